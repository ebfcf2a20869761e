"""A device that goes away under a running server: its worker ends with a code of its own, its job goes on elsewhere at
once and is not blamed, chat moves to the next device, and the device is taken back when it is there again.

The device is the test shim, and it goes away as a card does whose driver was unloaded: its library is removed, so that it
can not be opened any more. Faults inside a running kernel: GRAFT_SHIM_FAULT (engine/cuda/shim/shim_control.h)."""
import os
import pathlib
import shutil
import signal
import tempfile
import time
import unittest

import harness

SHIM = "shim:0"


def setUpModule():
    global server, library, hidden, folder
    built = pathlib.Path(harness.GRAFT).parent
    if not (built / "libgraft_shim.so").exists():
        raise unittest.SkipTest("the shim is not built (make shim)")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="graft-test."))
    harness.GRAFT = shutil.copy(harness.GRAFT, folder)  # libraries are looked for beside the program
    library, hidden = folder / "libgraft_shim.so", folder / "hidden"
    shutil.copy(built / library.name, library)
    server = harness.Server(devices=f"{SHIM},cpu", workers=1, heartbeat=0.3, poll=0.1, sweep=0.5)


def tearDownModule():
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def devices():
    return server.get("/v1/graft/devices").json["data"]


def shim_worker():
    (found,) = [d for d in devices() if d["device"] == SHIM and d["role"] == "train"]
    return found


def until(true, seconds=60):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {devices()}\n{server.log(30)}")


class Loss(unittest.TestCase):
    def setUp(self):
        until(lambda: shim_worker()["state"] == "idle")
        library.rename(hidden)

    def tearDown(self):
        hidden.rename(library)

    def cpu_train_worker(self):
        (pid,) = [pid for pid in server.workers("train") if "--device cpu" in harness.processes()[pid][1]]
        return pid

    def test_a_job_goes_on_elsewhere_and_is_not_blamed(self):
        before = shim_worker()
        held = self.cpu_train_worker()
        os.kill(held, signal.SIGSTOP)  # so that the job is the shim's first
        try:
            job = server.create_job(server.upload(harness.examples(harness.FACTS)).json["id"], epochs=2).json["id"]
            lost = until(lambda: shim_worker()["lost"] > before["lost"] and shim_worker())
            self.assertIn("libgraft_shim.so", lost["last_failure"])
            self.assertIn(f"has lost {SHIM} (status 75)", server.log())
            self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job}").json["graft"]["attempt"], 1)
        finally:
            os.kill(held, signal.SIGCONT)
        done = server.wait_job(job)
        self.assertEqual((done["status"], done["graft"]["attempt"]), ("succeeded", 2), server.log())
        self.assertEqual(server.get("/readyz", key=None).status, 200)
        self.assertGreater(server.metric("graft_device_lost_total"), 0)
        # A worker that finds no device takes no job: none was claimed and dropped again.
        self.assertNotIn(f"{job}, attempt 3", server.log(200))

    def test_chat_moves_and_training_waits(self):
        self.assertEqual((devices()[0]["role"], devices()[0]["device"]), ("infer", SHIM))
        limit = time.monotonic() + 60
        while server.chat("tiny", "hello").status != 200:
            self.assertLess(time.monotonic(), limit, server.log())
            time.sleep(0.1)
        self.assertEqual(devices()[0]["device"], "cpu")
        self.assertGreaterEqual(devices()[0]["lost"], 3)
        self.assertEqual(shim_worker()["device"], SHIM)


class Faults(unittest.TestCase):
    """Of a kernel that chat launches, once: the file that is named is used up by the fault."""

    def train_with(self, memory):
        """A job of long examples on a device of so many bytes: (the job, its warnings)."""
        served = harness.Server(devices=SHIM, infer_device="cpu", workers=1, poll=0.1, shim_memory=memory)
        self.addCleanup(served.stop)
        words = "a word " * 20
        facts = [(f"Where does person {i} live, {words}?", f"In town {i * 7 % 12}.") for i in range(12)]
        job = served.wait_job(served.create_job(served.upload(harness.examples(facts)).json["id"], epochs=1).json["id"])
        self.assertEqual(served.metric("graft_device_lost_total"), 0)  # no reason to die
        events = served.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json["data"]
        return job, [e["message"] for e in events if e["level"] == "warn"]

    def test_a_device_with_little_memory_computes_in_halves(self):
        job, warnings = self.train_with(5000000)
        self.assertEqual((job["status"], job["graft"]["attempt"]), ("succeeded", 1), job["error"])
        self.assertRegex(warnings[-1], "computed in halves")
        self.assertRegex(warnings[0], "recall was not measured")
        self.assertRegex(warnings[1], "neither weighed by the training file's rows nor measured")
        self.assertIsNone(job["graft"]["report"]["measured_kl"])
        self.assertIsNone(job["graft"].get("recall"))

    def test_a_device_with_too_little_memory_says_how_much(self):
        job, _ = self.train_with(3000000)
        self.assertEqual(job["error"]["code"], "insufficient_memory", job["error"])
        self.assertRegex(job["error"]["message"], rf"needs about \d+ MiB of memory and device {SHIM} has \d+ MiB")

    def serve(self, fault, **settings):
        token = folder / "token"
        token.touch()
        made = harness.Server(devices=SHIM, workers=0, shim_fault=f"{fault}:60:{token}", **settings)
        self.addCleanup(made.stop)
        return made

    def expect(self, served, status, reason):
        reply = served.chat("tiny", "hello")
        self.assertEqual((reply.status, reply.error["code"]), (503, "worker_restarted"), reply)
        until(lambda: served.get("/v1/graft/devices").json["data"][0]["state"] == "idle")
        (infer,) = served.get("/v1/graft/devices").json["data"]
        self.assertEqual((infer["device"], infer["lost"], infer["restarts"]), (SHIM, 1, 1))
        self.assertRegex(infer["last_failure"], reason)
        self.assertRegex(served.log(), rf"infer worker \d+ has lost {SHIM} \(status {status}\)")
        again = [served.chat("tiny", "hello") for _ in range(2)]
        self.assertEqual([r.status for r in again], [200, 200], again)
        self.assertEqual(*[r.json["choices"] for r in again])

    def test_a_poisoned_device_ends_the_worker(self):
        self.expect(self.serve("poison"), 75, "injected fault")

    def test_a_launch_that_fails_ends_the_worker(self):
        self.expect(self.serve("launch"), 75, "injected fault")

    def test_a_device_that_hangs_is_noticed(self):
        began = time.monotonic()
        served = self.serve("hang", watchdog=2)
        self.expect(served, 76, r"^no progress for \d+ s in step \d+$")
        self.assertIn(f"device {SHIM} made no progress", served.log())
        self.assertLess(time.monotonic() - began, 60)


if __name__ == "__main__":
    unittest.main()
