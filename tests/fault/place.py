"""A server under test whose jobs are disturbed, and what must hold of each job afterwards: it succeeded, once; its
project's blobs are those of an undisturbed run, digest for digest; nothing is held, and nothing is left over."""
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "api")]
import harness  # noqa: E402
import tap  # noqa: E402

FACTS = [(f"Where does person {i} live?", f"In town {i * 7 % 40}.") for i in range(40)]
# Everything that waits waits shortly, and a recovery checkpoint every half second gives many to resume from.
SETTINGS = {"recovery": 0.5, "heartbeat": 0.5, "fence": 5, "sweep": 0.5, "poll": 0.1, "drain": 5}
BACK_SECONDS = 60  # until a killed process must be replaced
JOB_SECONDS = 300  # until a disturbed job must have ended


class Place:
    """The server under test, and what it left in its store and tables."""

    def __init__(self, model_options, facts, epochs, graft=harness.QUICKLY, **settings):
        """graft: the jobs'; settings: the server's, beside SETTINGS."""
        self.server = harness.Server(model_options=model_options, **{**SETTINGS, **settings})
        self.facts, self.epochs, self.graft = facts, epochs, graft
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

    def start_job(self, **fields):
        """(key, job id, owner) of a fresh job in a fresh project."""
        self.projects += 1
        key = self.server.new_key("fault", f"project-{self.projects}")
        before = self.owners()
        file = self.server.upload(harness.examples(self.facts), key=key)
        if file.status != 200:
            raise tap.Failed(f"upload: {file}")
        (owner,) = self.owners() - before
        job = self.server.create_job(file.json["id"], epochs=self.epochs, key=key, seed=7, **{"graft": self.graft, **fields})
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
