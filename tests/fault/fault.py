#!/usr/bin/env python3
"""kill -9 of the train worker, the infer worker and the server at random points of a job's life.

Each kill has a job of its own, in a project of its own. Afterwards: the job succeeded, once; the project's blobs are,
digest for digest, those of an uninterrupted run (so the delta is bitwise the same and nothing is left over); no lease is
held; no process, staging folder or recovery file is left.

usage: fault.py [--long] [--seed N] [--train N] [--infer N] [--server N]      reports in TAP
"""
import argparse
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "api")]
import harness  # noqa: E402
import tap  # noqa: E402

SHORT = {"train": 4, "infer": 2, "server": 3}
LONG = {"train": 20, "infer": 10, "server": 20}
FACTS = [(f"Where does person {i} live?", f"In town {i * 7 % 40}.") for i in range(40)]
EPOCHS = 50
# Everything that waits waits shortly, and a recovery checkpoint every half second gives many to resume from.
SETTINGS = {"recovery": 0.5, "heartbeat": 0.5, "fence": 5, "sweep": 0.5, "poll": 0.1, "drain": 5}
BACK_SECONDS = 15  # until a killed process must be replaced
JOB_SECONDS = 180  # until a disturbed job must have ended


class Place:
    """The server under test, and what it left in its store and tables."""

    def __init__(self):
        self.server = harness.Server(model_options=("--layers", "4", "--hidden", "96", "--intermediate", "256"), **SETTINGS)
        self.projects = 0
        self.attempts = 0  # those that were cut off: what a job needed beyond its first

    def sql(self, query):
        done = subprocess.run(["psql", "-h", str(self.server.data / "pg"), "-U", "postgres", "-d", "graft", "-AtXc", query],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise tap.Failed(f"psql: {done.stdout}")
        return done.stdout.strip()

    def owners(self):
        folder = self.server.data / "blobs"
        return {path.name for path in folder.iterdir() if path.name != "base"} if folder.exists() else set()

    def blobs(self, owner):
        """Digests of a project's blobs; each is held to its content."""
        found = []
        for path in (self.server.data / "blobs" / owner).rglob("*"):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                if digest != path.name:
                    raise tap.Failed(f"blob {path.name} holds bytes of digest {digest}")
                found.append(digest)
        return sorted(found)

    def start_job(self):
        """(key, job id, owner) of a fresh job in a fresh project."""
        self.projects += 1
        key = self.server.new_key("fault", f"project-{self.projects}")
        before = self.owners()
        file = self.server.upload(harness.examples(FACTS), key=key)
        if file.status != 200:
            raise tap.Failed(f"upload: {file}")
        (owner,) = self.owners() - before
        job = self.server.create_job(file.json["id"], epochs=EPOCHS, key=key, seed=7)
        if job.status != 200:
            raise tap.Failed(f"job: {job}")
        return key, job.json["id"], owner

    def job_under_way(self, at):
        """A job `at` seconds after its creation, not ended yet: where it was too quick, another, looked at earlier."""
        for _ in range(20):
            key, job_id, owner = self.start_job()
            time.sleep(at)
            job = self.server.get(f"/v1/fine_tuning/jobs/{job_id}", key=key).json
            if job["finished_at"] is None:
                print(f"# {at:.2f} s into {job_id}: {job['graft']['state']}, step {job['graft']['step']}")
                return key, job_id, owner
            at *= 0.7
        raise tap.Failed("jobs end before anything can be killed")

    def collect(self):
        self.server.cli("collect", "--data", self.server.data, "--grace", "0")

    def check(self, key, job_id, owner, expected):
        """What must hold once the job has ended; returns its blobs."""
        job = self.server.wait_job(job_id, JOB_SECONDS, key=key)
        if job["status"] != "succeeded":
            raise tap.Failed(f"{job_id} {job['status']}: {job['error']}\n{self.server.log()}")
        self.attempts += job["graft"]["attempt"] - 1
        events = self.server.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100", key=key).json["data"]
        for text in ("The job has successfully completed", "New fine-tuned model created"):
            times = sum(event["message"].startswith(text) for event in events)
            if times != 1:
                raise tap.Failed(f'"{text}" was said {times} times')
        models = [model["id"] for model in self.server.get("/v1/models", key=key).json["data"] if model["id"].startswith("ft:")]
        if models != [job["fine_tuned_model"]]:
            raise tap.Failed(f"models: {models}")
        self.collect()
        found = self.blobs(owner)
        if expected is not None and found != expected:
            raise tap.Failed(f"blobs differ from the uninterrupted run's: {sorted(set(found) ^ set(expected))}")
        self.no_orphans()
        return found

    def no_orphans(self):
        for name in ("staging", "recovery"):
            left = [str(path) for path in (self.server.data / name).rglob("*")]
            if left:
                raise tap.Failed(f"left in {name}/: {left}")
        for what, query in (
                ("leases held", "SELECT count(*) FROM graft.job_lease WHERE worker IS NOT NULL"),
                ("ended jobs that could be claimed", "SELECT count(*) FROM graft.job_lease l JOIN graft.job j ON j.tenant = l.tenant "
                 "AND j.id = l.job WHERE j.finished_at IS NOT NULL AND l.run_after < 'infinity'"),
                ("jobs without their one model", "SELECT count(*) FROM graft.job j WHERE j.state = 'succeeded' AND "
                 "(SELECT count(*) FROM graft.model m WHERE m.tenant = j.tenant AND m.job = j.id) <> 1"),
                ("checkpoints beyond three of a job", "SELECT count(*) FROM (SELECT 1 FROM graft.checkpoint GROUP BY tenant, job "
                 "HAVING count(*) > 3) AS t"),
                ("outbox rows told twice", "SELECT count(*) FROM (SELECT 1 FROM graft.outbox GROUP BY tenant, object_id, type "
                 "HAVING count(*) > 1) AS t")):
            if self.sql(query) != "0":
                raise tap.Failed(f"{what}: {self.sql(query)}")
        rows = int(self.sql("SELECT count(*) FROM graft.worker"))
        living = len(self.server.workers())
        if rows > living:
            raise tap.Failed(f"{rows} worker rows, {living} workers live")

    def wait_worker(self, role, other_than=()):
        """A living worker of the role that is none of `other_than`."""
        limit = time.monotonic() + BACK_SECONDS
        while time.monotonic() < limit:
            for pid in self.server.workers(role):
                if pid not in other_than:
                    return pid
            time.sleep(0.05)
        raise tap.Failed(f"no {role} worker within {BACK_SECONDS} s\n{self.server.log()}")


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def train_kill(place, at, expected):
    key, job_id, owner = place.job_under_way(at)
    pid = place.wait_worker("train")
    kill(pid)
    place.wait_worker("train", (pid,))
    place.check(key, job_id, owner, expected)


def server_kill(place, at, pause, expected):
    key, job_id, owner = place.job_under_way(at)
    workers = place.server.workers()
    place.server.kill()
    time.sleep(pause)
    place.server.start()
    limit = time.monotonic() + BACK_SECONDS
    while left := [pid for pid in workers if pid in harness.processes() and pid not in place.server.workers()]:
        if time.monotonic() > limit:
            raise tap.Failed(f"workers of the killed server live on: {left}")
        time.sleep(0.05)
    place.check(key, job_id, owner, expected)


def infer_kill(place, model, at, expected, answer, middle):
    """`middle`: the kill comes while streams are under way; each must end with an error event or its whole answer."""
    key, job_id, owner = place.job_under_way(at)
    pid = place.wait_worker("infer")
    ends = []

    def listen():
        # Long, so that the kill meets it in its middle.
        body = {"model": model, "messages": [{"role": "user", "content": FACTS[0][0]}], "stream": True, "max_tokens": 200,
                "temperature": 1.5, "seed": len(ends)}
        try:
            chunks = list(place.server.stream("/v1/chat/completions", body, timeout=60))
            ends.append("error" if "error" in chunks[-1] else chunks[-1]["choices"][0]["finish_reason"])
        except Exception as problem:
            # Killed before the answer began, the request is refused as a whole.
            ends.append("error" if "answered 503" in str(problem) else f"{type(problem).__name__}: {problem}")

    listeners = [threading.Thread(target=listen) for _ in range(4 if middle else 0)]
    for listener in listeners:
        listener.start()
    time.sleep(0.05 if middle else 0)
    kill(pid)
    for listener in listeners:
        listener.join(90)
    wrong = [end for end in ends if end not in ("error", "stop", "length")]
    if wrong or len(ends) != len(listeners):
        raise tap.Failed(f"streams ended with {ends}")
    limit = time.monotonic() + BACK_SECONDS
    while True:
        reply = place.server.chat(model, FACTS[0][0])
        if reply.status == 200:
            break
        if reply.status not in (500, 502, 503) or time.monotonic() > limit:
            raise tap.Failed(f"after the kill: {reply}")
        reply.error["message"]
        time.sleep(0.1)
    if reply.json["choices"][0]["message"]["content"] != answer:
        raise tap.Failed(f"the new worker answers otherwise: {reply}")
    place.check(key, job_id, owner, expected)
    return ends.count("error")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--seed", type=int, default=None)
    for name in SHORT:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    counts = {name: getattr(args, name) if getattr(args, name) is not None else (LONG if args.long else SHORT)[name]
              for name in SHORT}
    seed = args.seed if args.seed is not None else random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"# fault.py --seed {seed} {counts}")
    place = Place()
    began = time.monotonic()
    expected, span, answer, model, cut = None, 0, None, None, 0
    try:
        with tap.case("an uninterrupted job, for comparison"):
            start = time.monotonic()
            key, job_id, owner = place.start_job()
            place.server.wait_job(job_id, JOB_SECONDS, key=key)
            span = time.monotonic() - start
            expected = place.check(key, job_id, owner, None)
            print(f"# {span:.1f} s, {len(expected)} blobs")
            # The server's own key asks: a base that all may read.
            model = place.server.model
            answer = place.server.chat(model, FACTS[0][0]).json["choices"][0]["message"]["content"]
        if expected is not None:
            with tap.case("a second one leaves the same bytes"):
                start = time.monotonic()
                place.check(*place.start_job(), expected)
                span = min(span, time.monotonic() - start)
            for i in range(counts["train"]):
                with tap.case(f"train worker killed, {i + 1} of {counts['train']}"):
                    train_kill(place, rng.uniform(0, span), expected)
            for i in range(counts["infer"]):
                with tap.case(f"infer worker killed, {i + 1} of {counts['infer']}{', streams under way' if i % 2 == 0 else ''}"):
                    cut += infer_kill(place, model, rng.uniform(0, span * 0.8), expected, answer, i % 2 == 0)
            for i in range(counts["server"]):
                pause = rng.choice((0, 0.3, 2))
                with tap.case(f"server killed, started again {pause} s later, {i + 1} of {counts['server']}"):
                    server_kill(place, rng.uniform(0, span), pause, expected)
            with tap.case("kills met running jobs"):
                if place.attempts == 0 and counts["train"] + counts["server"] >= 4:
                    raise tap.Failed("no attempt was cut off: the kills came too late or too early")
        with tap.case("no process is left after the server has stopped"):
            status = place.server.shutdown()
            left = place.server.left()
            if status != 0 or left:
                raise tap.Failed(f"status {status}, left: {left}")
    finally:
        place.server.stop()
    print(f"# {counts['train']} train worker, {counts['infer']} infer worker and {counts['server']} server kills in "
          f"{time.monotonic() - began:.0f} s; {place.attempts} attempts cut off, {cut} streams cut and told so; seed {seed}")
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
