"""The program from outside: commands and exit codes; one server for a data folder; workers come back and never stay behind."""
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
import unittest

import harness


def run(*words, env=None):
    return subprocess.run([harness.GRAFT, *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=120, env=env)


def setUpModule():
    global server
    server = harness.Server(model_name=None, heartbeat=0.5, fence=5, sweep=0.5, poll=0.1)


def tearDownModule():
    server.stop()


def wait_until(true, seconds=10):
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def postmaster_of(graft):
    return int((graft.data / "pg" / "postmaster.pid").read_text().split()[0])


class Commands(unittest.TestCase):
    def test_each_has_help(self):
        listed = run("help")
        self.assertEqual(listed.returncode, 0)
        names = re.findall(r"^  ([a-z]+(?: [a-z]+)?)  +\S", listed.stdout, re.M)
        self.assertIn("serve", names)
        self.assertIn("key create", names)
        for name in names:
            with self.subTest(name=name):
                first = run("help", *name.split())
                second = run(*name.split(), "--help")
                self.assertEqual((first.returncode, second.returncode), (0, 0))
                self.assertEqual(first.stdout, second.stdout)
                self.assertTrue(first.stdout.startswith(f"usage: graft {name}"))

    def test_wrong_usage_is_2_and_says_so_on_standard_error(self):
        for words in ((), ("nonsense",), ("serve", "--nonsense"), ("serve", "--workers", "x"), ("serve", "--devices", "gpu0"),
                      ("serve", "--devices", "cuda,cuda:0"), ("serve", "--infer-device", "auto"), ("work", "--role", "train", "--device", "cpu,cuda"), ("key",), ("key", "create"),
                      ("model", "import", "PATH"), ("model", "import", "PATH", "--name", "a b"), ("work",),
                      ("work", "--role", "cook"), ("work", "--role", "infer"), ("bench", "train"), ("help", "nonsense"),
                      ("key", "revoke"), ("serve", "stray")):
            with self.subTest(words=words):
                done = run(*words)
                self.assertEqual(done.returncode, 2, done)
                self.assertEqual(done.stdout, "")
                self.assertNotEqual(done.stderr, "")

    def test_defaults_may_be_said(self):
        model = harness.make_model(server.folder / "model")
        line = re.search(r"usage: graft (bench decode .*)", run("help", "bench", "decode").stdout).group(1)
        words = line.replace("[", "").replace("]", "").replace("DIR", str(model)).split()
        done = run(*words, "--prompt", "4", "--tokens", "2")
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual(json.loads(done.stdout)["tenants"], 0)

    def test_a_failure_is_1(self):
        done = run("model", "import", "/nowhere", "--name", "x", "--data", server.data)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertIn("/nowhere", done.stderr)

    def test_version(self):
        self.assertRegex(run("version").stdout, r"^graft \d+\.\d+\.\d+\n$")

    def test_a_key_is_printed_alone_and_can_be_revoked(self):
        done = server.command("key", "create", "--org", "o", "--project", "p", "--data", server.data)
        self.assertRegex(done.stdout, r"^gk-[0-9A-Za-z]+\n$")
        key = done.stdout.strip()
        self.assertEqual(server.get("/v1/models", key=key).status, 200)
        key_id = re.search(r"key_[0-9A-Za-z]+", done.stderr).group()
        listed = {row[0]: row[1:] for row in self.listed_keys()}
        self.assertEqual(listed[key_id][:2], ["o/p", key[-4:]])
        self.assertRegex(listed[key_id][2], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertRegex(listed[key_id][3], r"^20\d\d-")
        self.assertEqual(server.command("key", "revoke", key_id, "--data", server.data).returncode, 0)
        self.assertNotIn(key_id, [row[0] for row in self.listed_keys()])
        self.assertTrue(wait_until(lambda: server.get("/v1/models", key=key).status == 401, 70))
        # One that was never used says so.
        server.cli("key", "create", "--org", "o", "--project", "unused", "--data", server.data)
        self.assertEqual([row[4] for row in self.listed_keys() if row[1] == "o/unused"], ["never"])

    def listed_keys(self):
        return [line.split("\t") for line in server.cli("key", "list", "--data", server.data).splitlines()]

    def test_a_database_url_stays_out_of_what_is_said(self):
        env = {**os.environ, "GRAFT_DATABASE_URL": "postgresql://u:canary-secret@127.0.0.1:1/d"}
        done = run("migrate", "--data", server.folder / "other", env=env)
        self.assertEqual(done.returncode, 1)
        self.assertNotIn("canary-secret", done.stdout + done.stderr)

    def test_commands_work_without_a_server(self):
        data = server.folder / "alone"
        done = run("key", "create", "--org", "o", "--project", "p", "--data", data)
        self.assertRegex(done.stdout, r"^gk-[0-9A-Za-z]+\n$", done)
        self.assertEqual(run("migrate", "--data", data).returncode, 0)
        self.assertEqual(run("collect", "--data", data, "--grace", "0").returncode, 0)
        self.assertFalse([line for _, line in harness.processes().values() if str(data) in line])


class Serve(unittest.TestCase):
    def test_the_second_server_on_a_folder_is_refused(self):
        done = run("serve", "--data", server.data, "--listen", "127.0.0.1:0")
        self.assertEqual(done.returncode, 1)
        self.assertIn("another `graft serve` runs on", done.stderr)
        self.assertEqual(server.get("/readyz", key=None).status, 200)

    def test_beyond_loopback_without_tls_is_refused(self):
        done = run("serve", "--data", server.folder / "beyond", "--listen", "0.0.0.0:0")
        self.assertEqual(done.returncode, 1)
        self.assertIn("--insecure", done.stderr)

    def test_an_address_in_use_is_a_failure(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = run("serve", "--data", server.folder / "taken", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        self.assertEqual(done.returncode, 1, done)

    def test_what_is_quickly_seen_comes_before_a_database_is_made(self):
        data = server.folder / "early"
        (server.folder / "no.pem").write_text("no certificate")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            for words, message in ((("--listen", "nonsense"), "give HOST:PORT"),
                                   (("--listen", f"127.0.0.1:{taken.getsockname()[1]}"), "can not listen"),
                                   (("--listen", "127.0.0.1:0", "--tls-cert", server.folder / "no.pem", "--tls-key",
                                     server.folder / "no.pem"), "certificate and key"),
                                   (("--listen", "127.0.0.1:0", "--tls-cert", "/nowhere", "--tls-key", "/nowhere"), "/nowhere")):
                with self.subTest(words=words):
                    done = run("serve", "--data", data, *words)
                    self.assertEqual(done.returncode, 1)
                    self.assertIn(message, done.stderr)
                    self.assertFalse((data / "pg").exists())

    def test_the_private_database_has_room_for_every_handler(self):
        many = harness.Server(model_name=None, handlers=256, workers=0)
        self.addCleanup(many.stop)
        self.assertNotIn("max_connections", many.log())
        line = harness.processes()[postmaster_of(many)][1]
        self.assertGreaterEqual(int(re.search(r"max_connections=(\d+)", line).group(1)), 256 + 20)

    def test_a_device_that_is_not_there_is_named(self):
        done = run("serve", "--data", server.folder / "nowhere", "--listen", "127.0.0.1:0", "--devices", "cpu,cuda:63")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"--devices: (there is no )?cuda:63 .*")
        self.assertFalse((server.folder / "nowhere").exists(), "seen before anything was made")

    def test_workers_are_given_their_device(self):
        for pid in server.workers():
            self.assertIn("--device cpu", harness.processes()[pid][1])

    def test_dead_workers_come_back(self):
        for role in ("train", "infer"):
            with self.subTest(role=role):
                (pid,) = server.workers(role)
                os.kill(pid, signal.SIGKILL)
                # Two seconds, or longer when the supervisor has seen the worker die often of late.
                self.assertTrue(wait_until(lambda: server.workers(role) not in ([], [pid]), 60))
                self.assertTrue(wait_until(lambda: server.get("/readyz", key=None).status == 200, 60))

    def test_a_worker_that_dies_at_once_does_not_spin(self):
        before = server.metric("graft_worker_restarts_total")
        limit = time.monotonic() + 3
        while time.monotonic() < limit:
            for pid in server.workers("infer"):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.assertLess(server.metric("graft_worker_restarts_total") - before, 10)
        self.assertTrue(wait_until(lambda: server.get("/readyz", key=None).status == 200, 60))

    def test_workers_are_the_oom_killers_first_choice(self):
        for pid in server.workers():
            self.assertEqual(pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text().strip(), "500")

    def test_workers_do_not_show_the_database_in_argv(self):
        for pid in server.workers():
            self.assertNotIn("host=", pathlib.Path(f"/proc/{pid}/cmdline").read_text())

    def test_a_killed_server_leaves_no_worker_and_the_next_adopts_the_database(self):
        workers = server.workers()
        postmaster = postmaster_of(server)
        server.kill()
        self.assertTrue(wait_until(lambda: not set(workers) & set(harness.processes()), 30))
        server.start()
        self.assertEqual(server.get("/v1/models").status, 200)
        self.assertEqual(postmaster_of(server), postmaster)

    def test_a_killed_database_comes_back(self):
        postmaster = postmaster_of(server)
        os.kill(postmaster, signal.SIGKILL)

        def is_back():
            try:
                return postmaster_of(server) != postmaster and server.get("/readyz", key=None).status == 200
            except FileNotFoundError:
                return False
        self.assertTrue(wait_until(is_back, 60), server.log())
        # Connections that died with it are opened again, one for each handler thread.
        self.assertTrue(wait_until(lambda: server.get("/v1/models").status == 200, 60))

    def test_sigterm_ends_everything_in_order(self):
        children = server.workers()
        self.assertEqual(server.shutdown(), 0)
        self.assertFalse(set(children) & set(harness.processes()))
        self.assertEqual(server.left(), [])
        server.start()

    def test_a_second_interrupt_is_immediate(self):
        workers = server.workers()
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(10)
        self.assertTrue(wait_until(lambda: not set(workers) & set(harness.processes()), 30))
        server.start()


if __name__ == "__main__":
    unittest.main()
