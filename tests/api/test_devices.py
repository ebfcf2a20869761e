"""/v1/graft/devices and what /metrics says of devices: who works on what, told without another project's jobs."""
import os
import re
import signal
import subprocess
import time
import unittest

import harness

KEYS = ["description", "device", "job", "last_failure", "lost", "memory", "object", "restarts", "role", "seen_at", "state",
        "utilization"]


def setUpModule():
    global server, stranger
    server = harness.Server(workers=2, devices="cpu", heartbeat=0.2, poll=0.1, sweep=0.5)
    stranger = server.new_key("other", "other")


def tearDownModule():
    server.stop()


def devices(key=harness.Server.OWN):
    page = server.get("/v1/graft/devices", key=key).json
    if sorted(page) != ["data", "object"] or page["object"] != "list":
        raise AssertionError(page)
    return page["data"]


def until(true, seconds=20):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {devices()}")


class Devices(unittest.TestCase):
    def test_each_worker_with_its_device(self):
        found = until(lambda: [d for d in [devices()] if all(x["state"] in ("idle", "busy") for x in d)])[0]
        self.assertEqual([d["role"] for d in found], ["infer", "train", "train"])
        for d in found:
            self.assertEqual(sorted(d), KEYS)
            self.assertEqual((d["object"], d["device"], d["lost"], d["last_failure"]), ("graft.device", "cpu", 0, None))
            self.assertIn("core", d["description"])
            self.assertTrue(0 <= d["utilization"] <= 1)
            self.assertLess(abs(d["seen_at"] - time.time()), 30)
        for d in found[1:]:
            memory = d["memory"]
            self.assertEqual(memory["total_bytes"], memory["free_bytes"] + memory["used_bytes"])
            self.assertGreater(memory["free_bytes"], 0)

    def test_a_key_is_needed(self):
        self.assertEqual(server.get("/v1/graft/devices", key=None).status, 401)
        self.assertEqual(server.post("/v1/graft/devices").status, 405)

    def test_a_job_is_its_projects_own(self):
        file = server.upload(harness.examples(harness.FACTS)).json["id"]
        job = server.create_job(file, epochs=50).json["id"]

        def both():
            mine, theirs = devices(), devices(stranger)
            busy = [d for d in mine if d["job"] == job]
            return busy and [d["state"] for d in theirs].count("busy") and (busy, theirs)
        busy, theirs = until(both)
        self.assertEqual((busy[0]["state"], busy[0]["role"]), ("busy", "train"))
        self.assertEqual([d["job"] for d in theirs], [None, None, None])
        self.assertNotIn(job, server.get("/metrics", key=None).body.decode())
        self.assertEqual(server.wait_job(job)["status"], "succeeded")
        until(lambda: all(d["job"] is None for d in devices()))
        self.assertGreater(max(d["utilization"] for d in devices()), 0)

    def test_a_worker_that_died_was_restarted(self):
        before = {d["role"]: d["restarts"] for d in devices()[:1]}["infer"]
        os.kill(server.workers("infer")[0], signal.SIGKILL)
        until(lambda: devices()[0]["restarts"] == before + 1 and devices()[0]["state"] == "idle")
        self.assertEqual(devices()[0]["lost"], 0)  # no fault of its device

    def test_rows_of_dead_workers_go(self):
        dead = server.workers("train")
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(server.workers("train")) == 2 and not set(dead) & set(server.workers("train")))
        until(lambda: [d["state"] for d in devices()] == ["idle", "idle", "idle"])

    def test_a_worker_started_by_hand_is_there_too(self):
        with open(server.log_path, "ab") as log:
            hand = subprocess.Popen([harness.GRAFT, "work", "--role", "train", "--data", str(server.data)], env=server.env,
                                    stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            (found,) = until(lambda: devices()[3:])
            self.assertEqual((found["device"], found["role"], found["state"]), ("cpu", "train", "idle"))
            self.assertEqual((found["restarts"], found["lost"]), (None, None))  # somebody else's to count
            self.assertNotIn('worker="3"', server.get("/metrics", key=None).body.decode())
        finally:
            hand.terminate()
            self.assertEqual(hand.wait(20), 0)
        until(lambda: len(devices()) == 3)

    def test_metrics_of_each_device(self):
        until(lambda: all(d["state"] == "idle" for d in devices()))
        text = server.get("/metrics", key=None).body.decode()
        for role, worker in (("infer", 0), ("train", 1), ("train", 2)):
            labels = rf'\{{device="cpu",role="{role}",worker="{worker}"'
            self.assertRegex(text, rf'(?m)^graft_device_state{labels},state="idle"\}} 1$')
            self.assertRegex(text, rf"(?m)^graft_device_utilization{labels}\}} [01]\.\d+$")
            self.assertRegex(text, rf"(?m)^graft_device_lost_total{labels}\}} 0$")
        self.assertRegex(text, r'(?m)^graft_device_memory_bytes\{device="cpu",role="train",worker="1",kind="free"\} \d+$')
        series = re.findall(r"^(graft_device\S+) ", text, re.M)
        self.assertEqual(len(series), len(set(series)))


if __name__ == "__main__":
    unittest.main()
