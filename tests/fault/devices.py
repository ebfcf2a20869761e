#!/usr/bin/env python3
"""What can happen to a device, under the whole service: jobs train on the test shim while allocations fail, launches fail,
kernels break the device or never end, and processes are killed.

Each fault strikes once, at a random point of a job (GRAFT_SHIM_FAULT and its token, engine/cuda/shim/shim_control.h). The
server answers throughout, the worker is back within seconds, and the job succeeds once, with the delta of an undisturbed
run, digest for digest. With two devices two jobs train at once while chat goes on; a device that is lost for good leaves
its work to the other.

usage: devices.py [--long] [--seed N] [--allocations]     reports in TAP
"""
import argparse
import pathlib
import random
import sys
import tempfile
import threading
import time

from place import JOB_SECONDS, Place, harness, kill, tap

SHORT = {"kill": 1, "alloc": 2, "launch": 1, "poison": 1, "hang": 1}
LONG = {"kill": 5, "alloc": 10, "launch": 10, "poison": 10, "hang": 3}
# The shim takes tens of thousands of times as long as a GPU: little of everything.
MODEL = ("--layers", "1", "--hidden", "32", "--intermediate", "64")
FACTS = [(f"{i}?", f"{i * 7 % 10}.") for i in range(10)]
EPOCHS = 2
# The default weighs what is lost and distils, which takes as long as all else: where faults strike, only in the long form.
DISTILLED, PLAIN = {"compression": {"distill_steps": 1}}, {"compression": {"codec": "bitdelta", "distill_steps": 0}}
WATCHDOG = 15        # seconds of silence, where a device hangs
PATIENCE = 300       # where none does: on a busy machine the shim may be silent for as long as it likes
WORKER_SECONDS = 30  # until a worker is back, beside the watchdog's


class Watch:
    """Is the server up all the time? Its longest silence, and every answer that was not 200."""

    def __init__(self, server):
        self.server, self.wrong, self.slowest, self.ended = server, [], 0.0, False
        self.thread = threading.Thread(target=self.look)

    def look(self):
        while not self.ended:
            began = time.monotonic()
            try:
                status = self.server.get("/readyz", key=None, timeout=20).status
            except OSError as problem:
                status = problem
            self.slowest = max(self.slowest, time.monotonic() - began)
            if status != 200:
                self.wrong.append(status)
            time.sleep(0.1)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.ended = True
        self.thread.join()
        if kind is None and self.wrong:
            raise tap.Failed(f"the server did not answer: {self.wrong[:5]}, {len(self.wrong)} times\n{self.server.log()}")


def devices(place, role=None):
    found = place.server.get("/v1/graft/devices").json["data"]
    return [d for d in found if role is None or d["role"] == role]


def until(true, seconds, what):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise tap.Failed(f"{what}: not within {seconds} s")


def restart(place, **env):
    """The server again, with these variables (None: without)."""
    if place.server.process.poll() is None:
        status = place.server.shutdown()
        if status != 0:
            raise tap.Failed(f"the server ended with {status}\n{place.server.log()}")
    for name, value in env.items():
        if value is None:
            place.server.env.pop(f"GRAFT_{name.upper()}", None)
        else:
            place.server.env[f"GRAFT_{name.upper()}"] = str(value)
    place.server.start()


def counted(folder):
    """What the process that launched most has counted: {"alloc": N, "launch": N}."""
    found = []
    for path in folder.iterdir():
        lines = [line.split() for line in path.read_text().splitlines() if not line.startswith(("kernel", "barrier"))]
        found.append({words[0]: int(words[1]) for words in lines if words[0] in ("alloc", "launch")})
    if not found:
        raise tap.Failed("no process has met the shim")
    return max(found, key=lambda counts: counts.get("launch", 0))


def struck(place, folder, fault, nth, expected):
    """A job during which the fault strikes once, at the nth of what it counts."""
    token = folder / f"{fault}-{nth}"
    token.touch()
    restart(place, shim_fault=f"{fault}:{nth}:{token}", watchdog=WATCHDOG if fault == "hang" else PATIENCE)
    key, job_id, owner = place.start_job()
    with Watch(place.server):
        met = until(lambda: not token.exists() and time.monotonic(), JOB_SECONDS, f"{fault}:{nth} has not struck")
        if fault != "alloc":
            until(lambda: devices(place, "train")[0]["restarts"] == 1, WATCHDOG + WORKER_SECONDS, "no other worker is there")
            took = time.monotonic() - met
            print(f"# {fault}:{nth}: the worker was back after {took:.1f} s")
            (train,) = devices(place, "train")
            if train["lost"] != 1 or not train["last_failure"]:
                raise tap.Failed(f"{fault}:{nth} is not told: {train}")
        place.check(key, job_id, owner, expected)
    if fault == "alloc" and devices(place, "train")[0]["restarts"] != 0:
        raise tap.Failed(f"a failed allocation ended the worker\n{place.server.log()}")


def killed(place, at, expected):
    with Watch(place.server):
        key, job_id, owner = place.job_under_way(at)
        pid = place.wait_worker("train")
        kill(pid)
        place.wait_worker("train", (pid,))
        place.check(key, job_id, owner, expected)


def chatting(place, model, seconds_each, told, stop):
    while not stop.is_set():
        reply = place.server.chat(model, FACTS[0][0])
        told.append(reply.json["choices"][0]["message"]["content"] if reply.status == 200 else repr(reply))
        time.sleep(seconds_each)


def check_both(place, jobs, expected):
    """Once both have ended: what runs holds a lease and a folder."""
    for key, job_id, _ in jobs:
        place.server.wait_job(job_id, JOB_SECONDS, key=key)
    for job in jobs:
        place.check(*job, expected)


def two_at_once(place, expected):
    """Two jobs, each on a device of its own, and chat beside them."""
    told, stop = [], threading.Event()
    chat = threading.Thread(target=chatting, args=(place, place.server.model, 0.05, told, stop))
    jobs = [place.start_job() for _ in range(2)]
    chat.start()
    try:
        with Watch(place.server):
            until(lambda: sorted(d["device"] for d in devices(place, "train") if d["state"] == "busy") == ["shim:0", "shim:1"],
                  JOB_SECONDS, "both devices at work")
            check_both(place, jobs, expected)
    finally:
        stop.set()
        chat.join()
    if len(set(told)) != 1 or len(told) < 2:
        raise tap.Failed(f"chat beside the training: {len(told)} answers, {sorted(set(told))[:3]}")


def one_lost_for_good(place, nth, expected):
    """shim:0 fails at its nth launch in every process that opens it; both jobs end on shim:1."""
    restart(place, shim_fault=f"launch:{nth}@0")
    jobs = [place.start_job() for _ in range(2)]
    with Watch(place.server):
        check_both(place, jobs, expected)
    lost = {d["device"]: d["lost"] for d in devices(place, "train")}
    if lost["shim:0"] < 1 or lost["shim:1"] != 0:
        raise tap.Failed(f"devices lost: {lost}")


def answers(place, job, key):
    reply = place.server.chat(job["fine_tuned_model"], FACTS[0][0], key=key)
    if reply.status != 200:
        raise tap.Failed(f"chat: {reply}")


def distilled(place):
    key, job_id, owner = place.start_job(graft=DISTILLED)
    place.check(key, job_id, owner, None)
    job = place.server.get(f"/v1/fine_tuning/jobs/{job_id}", key=key).json
    report = job["graft"]["report"]
    if report["distill_steps"] != 1 or report["calibration_tokens"] == 0:
        raise tap.Failed(f"report: {report}")
    answers(place, job, key)


def in_bf16(place, expected):
    restart(place, shim_fault=None, precision="bf16")
    jobs = [place.start_job() for _ in range(2)]
    done = [place.server.wait_job(job_id, JOB_SECONDS, key=key) for key, job_id, _ in jobs]
    found = place.check(*jobs[0], None)
    place.check(*jobs[1], found)
    if found == expected:
        raise tap.Failed("bf16 changed nothing")
    answers(place, done[0], jobs[0][0])


def run(args, rng, folder):
    counts_of = LONG if args.long else SHORT
    graft = DISTILLED if args.long else PLAIN
    one = Place(MODEL, FACTS, EPOCHS, graft, devices="shim:0", infer_device="cpu", workers=1, watchdog=PATIENCE,
                shim_counts=folder / "counts")
    expected = span = None
    try:
        with tap.case("an undisturbed job on the shim, its delta served"):
            (folder / "counts").mkdir()
            start = time.monotonic()
            key, job_id, owner = one.start_job()
            job = one.server.wait_job(job_id, JOB_SECONDS, key=key)
            span = time.monotonic() - start
            expected = one.check(key, job_id, owner, None)
            answers(one, job, key)
            print(f"# {span:.1f} s")
        if expected is None:
            return
        restart(one, shim_counts=None)
        if not args.long:
            with tap.case("a job whose delta is weighed and distilled on the shim, and served"):
                distilled(one)
        seen = counted(folder / "counts")
        print(f"# a job's worker allocates {seen['alloc']} and launches {seen['launch']} times")
        for i in range(counts_of["kill"]):
            with tap.case(f"train worker killed, {i + 1} of {counts_of['kill']}"):
                killed(one, rng.uniform(0, span), expected)
        for fault in ("launch", "poison", "hang"):
            for i in range(counts_of[fault]):
                nth = rng.randrange(seen["launch"]) + 1
                with tap.case(f"{fault} number {nth} of {seen['launch']}"):
                    struck(one, folder, fault, nth, expected)
        every = range(1, seen["alloc"] + 1)
        for nth in every if args.allocations else sorted(rng.sample(every, min(counts_of["alloc"], len(every)))):
            with tap.case(f"no memory for allocation {nth} of {seen['alloc']}"):
                struck(one, folder, "alloc", nth, expected)
        with tap.case("no process is left after the server has stopped"):
            status, left = one.server.shutdown(), one.server.left()
            if status != 0 or left:
                raise tap.Failed(f"status {status}, left: {left}")
    finally:
        one.server.stop()
    two = Place(MODEL, FACTS, EPOCHS, graft, devices="shim:0,shim:1", infer_device="cpu", workers=2, watchdog=PATIENCE)
    try:
        with tap.case("two devices train two jobs at once, and chat goes on"):
            two_at_once(two, expected)
        with tap.case("a device lost for good leaves its work to the other"):
            one_lost_for_good(two, rng.randrange(seen["launch"] // 2) + 20, expected)
        with tap.case("in bf16 two devices give one delta, another than in f32, and it is served"):
            in_bf16(two, expected)
    finally:
        two.server.stop()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--allocations", action="store_true", help="every allocation of a job, one after the other")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.randrange(1 << 32)
    began = time.monotonic()
    print(f"# devices.py --seed {seed}")
    if not (pathlib.Path(harness.GRAFT).parent / "libgraft_shim.so").exists():
        sys.exit("the shim is not built (make shim)")
    with tempfile.TemporaryDirectory(prefix="graft-test.") as folder:
        run(args, random.Random(seed), pathlib.Path(folder))
    print(f"# {time.monotonic() - began:.0f} s; seed {seed}")
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
