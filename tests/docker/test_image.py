"""The images at work: API, PostgreSQL and worker as compose.yaml puts them together, a model, a job, an answer.

IMAGE_BASE says how the CPU image comes about:
    here    its last stage's steps, one by one, over this machine's own root and build/ (a few seconds; the default)
    built   all its steps, in a scratch root from debootstrap; test_daemon.py does it where a docker daemon is
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests/api")]
import harness  # noqa: E402
import scratch  # noqa: E402

BASE = os.environ.get("IMAGE_BASE") or "here"
DOCKER = ROOT / "docker"


def say(text):
    print(f"# {text}", flush=True)


def compose_file():
    try:
        import yaml
    except ImportError as problem:
        raise unittest.SkipTest("python3-yaml is not installed (make deps)") from problem
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


class Database:
    """What the postgres image does with an empty volume: a cluster with a password, and docker/postgres-init.sh."""

    def __init__(self, folder, secrets):
        self.folder = folder / "pg"
        found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
        if not found:
            raise unittest.SkipTest("no PostgreSQL is installed here (make deps)")
        self.bin = found[-1]
        self.folder.mkdir()
        shutil.chown(self.folder, "postgres")
        password = secrets / "postgres_password"
        self.do("initdb", "--auth-host=scram-sha-256", "--auth-local=trust", "--username=postgres",
                f"--pwfile={password}", "-D", self.folder / "data")
        self.do("pg_ctl", "start", "--wait", "-D", self.folder / "data", "-l", self.folder / "log", "-o",
                f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off")
        self.init = subprocess.run([*self.postgres(), DOCKER / "postgres-init.sh"], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "POSTGRES_USER": "postgres", "PGHOST": str(self.folder)})

    @staticmethod
    def postgres():
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

    def do(self, program, *words):
        done = subprocess.run([*self.postgres(), self.bin / program, *map(str, words)], cwd="/", stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        if done.returncode != 0:
            raise AssertionError(f"{program} ended with {done.returncode}: {done.stdout}")

    def stop(self):
        self.do("pg_ctl", "stop", "--wait", "--mode=immediate", "-D", self.folder / "data")


class Containers(harness.Server):
    """The services of compose.yaml, without docker. HTTP and the rest as in harness.Server."""

    def __init__(self, folder, image, compose, secrets):
        self.folder, self.image, self.compose = folder, image, compose
        self.log_path, self.key, self.model = folder / "log", None, "tiny"
        self.port = int(compose["services"]["api"]["ports"][0].split(":")[-1])
        self.data = folder / "volume"
        self.data.mkdir()
        shutil.copystat(image.root / image.volume.lstrip("/"), self.data)  # as docker makes a new volume
        owner = (image.root / image.volume.lstrip("/")).stat()
        os.chown(self.data, owner.st_uid, owner.st_gid)
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(compose['services'])}\n")
        self.mounts = {"/data": self.data, "/run/secrets": secrets, "/etc/hosts": hosts}
        self.running, self.more = {}, {}

    def env_of(self, service):
        return {**self.compose["services"][service]["environment"], **self.more}

    def up(self, service):
        words = self.image.entrypoint + self.compose["services"][service].get("command", self.image.cmd)
        with open(self.log_path, "ab") as log:
            self.running[service] = self.image.start(words, log, env=self.env_of(service), mounts=self.mounts,
                                                     contained=True)

    def exec(self, service, *words, **mounts):
        return self.image.run(list(words), env=self.env_of(service), mounts={**self.mounts, **mounts}, contained=True)

    def healthy(self):
        return self.exec("api", *self.image.health)[0] == 0

    def pid(self, service):
        """Of the container's process 1."""
        above = self.running[service].pid
        return int(pathlib.Path(f"/proc/{above}/task/{above}/children").read_text().split()[0])

    def down(self, service):
        os.kill(self.pid(service), signal.SIGTERM)
        return self.running.pop(service).wait(60)

    def stop(self):
        for process in self.running.values():
            process.kill()  # unshare takes the container with it
            process.wait()


class Steps(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        base = "debootstrap" if BASE == "built" else "here"
        why = scratch.unable(base)
        if why:
            raise unittest.SkipTest(f"the image's steps were not run: {why}")
        cls.compose = compose_file()
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="graft-image."))
        cls.folder.chmod(0o755)
        scratch.own_mounts()
        cls.addClassCleanup(cls.remove)
        cls.image = scratch.build("docker/Dockerfile.cpu", cls.folder, base, say if BASE == "built" else lambda text: None)
        scratch.own_network()
        secrets = cls.secrets()
        cls.database = Database(cls.folder, secrets)
        cls.addClassCleanup(cls.database.stop)
        cls.app = Containers(cls.folder, cls.image, cls.compose, secrets)
        cls.addClassCleanup(cls.app.stop)

    @classmethod
    def remove(cls):
        # Mounts first: they are ours alone and would be emptied with the folder.
        inside = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
        for path in reversed([p for p in inside if p.startswith(str(cls.folder))]):
            subprocess.run(["umount", "--lazy", path], check=False)
        shutil.rmtree(cls.folder, ignore_errors=True)

    @classmethod
    def secrets(cls):
        """What docker/secrets.sh makes, where compose mounts it: for us at /run/secrets of a /run of our own."""
        script = shutil.copy(DOCKER / "secrets.sh", cls.folder)
        subprocess.run([script], check=True, stdout=subprocess.DEVNULL)
        scratch.mount("-t", "tmpfs", "none", "/run")
        shutil.copytree(cls.folder / "secrets", "/run/secrets")
        os.chmod("/run/secrets", 0o755)
        return pathlib.Path("/run/secrets")

    def wait_for(self, what, holds, seconds=90):
        limit = time.monotonic() + seconds
        while not holds():
            for service, process in self.app.running.items():
                if process.poll() is not None:
                    self.fail(f"{service} ended with {process.returncode}:\n{self.app.log()}")
            if time.monotonic() > limit:
                self.fail(f"{what}: not after {seconds} s\n{self.app.log()}")
            time.sleep(0.2)

    def test_1_the_database_has_a_login_that_is_no_superuser(self):
        self.assertEqual((self.database.init.returncode, self.database.init.stdout), (0, ""))
        url = pathlib.Path("/run/secrets/database_url").read_text().strip().replace("@postgres:", "@127.0.0.1:")
        out = subprocess.run(["psql", url, "-Atc", "SELECT rolsuper, rolcreaterole, rolbypassrls, current_database() "
                              "FROM pg_roles WHERE rolname = current_user"], check=True, stdout=subprocess.PIPE, text=True)
        self.assertEqual(out.stdout.strip(), "f|f|f|graft")

    def test_2_it_refuses_to_listen_to_everyone_without_being_told_so(self):
        status, out = self.image.run(self.image.entrypoint + self.image.cmd, mounts=self.app.mounts, contained=True,
                                     env={"GRAFT_DATABASE_FILE": "/run/secrets/database_url"}, limit=60)
        self.assertNotEqual(status, 0)
        self.assertIn("--insecure", out)

    if BASE == "built":  # this machine's own root has them
        def test_2_no_compiler_and_no_header_is_in_it(self):
            self.assertEqual(self.image.run(["sh", "-c", "command -v gcc cc make || ls /usr/include/jansson.h"])[0], 2)

    def test_3_the_api_answers_and_the_health_check_says_so(self):
        self.assertFalse(self.app.healthy(), "healthy before it is up")
        self.app.up("api")
        self.wait_for("the API is healthy", self.app.healthy)
        self.assertEqual(self.app.get("/healthz", key=None).json, {"status": "ok"})

    def test_4_it_is_nobody_and_can_write_nothing_but_its_volume(self):
        status = pathlib.Path(f"/proc/{self.app.pid('api')}/status").read_text()
        self.assertEqual(set(re.search(r"Uid:\s+(.*)", status).group(1).split()), {"10001"})
        self.assertEqual(re.search(r"CapBnd:\s+(\S+)", status).group(1).strip("0"), "")
        self.assertEqual(re.search(r"NSpid:\s+(.*)", status).group(1).split()[-1], "1")
        for path, ends in (("/usr/local/bin/x", 1), ("/var/tmp/x", 1), ("/tmp/x", 0), ("/data/x", 0)):
            status, out = self.app.exec("api", "touch", path)
            self.assertEqual(status, ends, f"{path}: {out}")
        (self.app.data / "x").unlink()
        for pid, (_, line) in harness.processes().items():
            self.assertNotIn("postgresql://", line if "graft" in line else "", f"a password in the arguments of {pid}")

    def test_5_a_model_a_key_and_a_job_that_the_worker_trains(self):
        model = harness.make_model(self.folder / "model")
        model.chmod(0o755)
        status, out = self.app.exec("api", "graft", "model", "import", "/model", "--name", "tiny", **{"/model": model})
        self.assertEqual(status, 0, out)
        status, out = self.app.exec("api", "graft", "key", "create", "--org", "me", "--project", "first")
        self.assertEqual(status, 0, out)
        self.app.key = re.search(r"^gk-\S+$", out, re.M).group(0)
        self.wait_for("the API is ready", lambda: self.app.get("/readyz", key=None).status == 200)
        file = self.app.upload(harness.examples(harness.FACTS)).json["id"]
        job = self.app.create_job(file, epochs=1)
        self.assertEqual(job.status, 200, job)
        time.sleep(2)
        self.assertNotIn(self.app.get(f"/v1/fine_tuning/jobs/{job.json['id']}").json["status"],
                         ("running", "succeeded"), "the API has no train worker of its own")
        self.app.up("worker")
        done = self.app.wait_job(job.json["id"])
        self.assertEqual(done["status"], "succeeded", json.dumps(done, indent=1) + self.app.log())
        answer = self.app.chat(done["fine_tuned_model"], "Where does person 3 live?")
        self.assertEqual(answer.status, 200, answer)

    def test_6_sigterm_to_process_1_ends_each_in_order(self):
        self.assertEqual([self.app.down("worker"), self.app.down("api")], [0, 0], self.app.log())

    def test_7_with_a_certificate_the_health_check_speaks_tls(self):
        pair = {f"GRAFT_TLS_{name.upper()}": self.app.data / f"{name}.pem" for name in ("cert", "key")}
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
                        "2", "-subj", "/CN=graft.example", "-out", pair["GRAFT_TLS_CERT"], "-keyout", pair["GRAFT_TLS_KEY"]],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for variable, file in pair.items():
            os.chown(file, *map(int, self.image.user.split(":")))
            self.app.more[variable] = f"/data/{file.name}"
        self.app.more["GRAFT_INSECURE"] = "false"
        self.app.up("api")
        self.wait_for("the API is healthy", self.app.healthy)
        self.assertEqual(self.app.down("api"), 0, self.app.log())


if __name__ == "__main__":
    unittest.main()
