"""`graft doctor`: its lines on a machine without a GPU, what it calls a failure, and that it makes nothing."""
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import harness

LEVELS = ("ok", "warn", "fail")
CPU = r".+, \d+ cores?, (avx512|avx2|plain) kernels.*"


def doctor(*words, binary=harness.GRAFT, env=None):
    return subprocess.run([binary, "doctor", *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=120, env=env)


def findings(done):
    """{check: (level, message)} of the text form."""
    lines = done.stdout.splitlines()
    found = {}
    for line in lines[:-1]:
        level, check, message = re.fullmatch(r"(ok|warn|fail) +(\S+) +(.+)", line).groups()
        found[check] = (level, message)
    counts = re.fullmatch(r"(\d+) ok, (\d+) to look at, (\d+) must be mended", lines[-1]).groups()
    levels = [level for level, _ in found.values()]
    if [levels.count(level) for level in LEVELS] != list(map(int, counts)):
        raise AssertionError(done.stdout)
    return found


class Doctor(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="graft-test."))
        self.folder.chmod(0o755)
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def expect(self, found, check, level, pattern):
        self.assertEqual(found[check][0], level, found[check])
        self.assertRegex(found[check][1], rf"^(?:{pattern})$")

    def test_a_new_machine(self):
        data = self.folder / "data"
        # The binary alone: no library of a backend beside it.
        binary = shutil.copy(harness.GRAFT, self.folder / "graft")
        done = doctor("--data", data, binary=binary)
        found = findings(done)
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual(done.stderr, "")
        self.assertEqual(list(found), ["graft", "cpu", "cuda", "data", "disk", "postgresql", "database", "models"])
        self.expect(found, "graft", "ok", r"version \d+\.\d+\.\d+")
        self.assertRegex(found["cpu"][1], CPU)
        self.expect(found, "cuda", "warn", r"not used: libgraft_cuda\.so is .+: build it \(make CUDA=1\)")
        self.expect(found, "data", "ok", f"{re.escape(str(data))} will be made")
        self.assertRegex(found["disk"][1], r"^[\d.]+ GiB free")
        self.expect(found, "postgresql", "ok", r"version \d+")
        self.expect(found, "database", "ok", "a private one will be made at the first start")
        self.expect(found, "models", "warn", "no base model yet: graft model import PATH --name NAME")
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["graft"], "nothing was made")

    def test_what_must_be_mended_is_1(self):
        binary = shutil.copy(harness.GRAFT, self.folder / "graft")
        (self.folder / "file").write_text("x")
        (self.folder / "pg").mkdir()
        (self.folder / "pg" / "PG_VERSION").write_text("9\n")
        for words, check, message in (
                (("--data", self.folder / "file"), "data", "is no folder: give another --data"),
                (("--data", self.folder / "file" / "below"), "data", "can not be made"),
                (("--data", self.folder), "postgresql", "made by PostgreSQL 9, which is not installed here"),
                (("--data", self.folder / "x", "--devices", "cuda:1"), "cuda:1", "not used: libgraft_cuda.so"),
                (("--data", self.folder / "x", "--devices", "cpu", "--infer-device", "shim:2"), "shim:2", "not used: libgraft_shim.so"),
                (("--data", self.folder / "x", "--database", "postgresql://u:canary-secret@127.0.0.1:1/d"), "database", "check --database")):
            with self.subTest(words=words):
                done = doctor(*words, binary=binary)
                self.assertEqual(done.returncode, 1, done)
                self.assertIn(message, findings(done)[check][1])
                self.assertEqual(findings(done)[check][0], "fail")
                self.assertNotIn("canary", done.stdout + done.stderr)

    def test_json_for_machines_says_the_same(self):
        data = self.folder / "data"
        text, machine = doctor("--data", data), doctor("--data", data, "--json")
        root = json.loads(machine.stdout)
        self.assertEqual(sorted(root), ["checks", "healthy", "version"])
        self.assertIs(root["healthy"], True)
        self.assertEqual([c["check"] for c in root["checks"]], list(findings(text)))
        self.assertEqual([c["level"] for c in root["checks"]], [level for level, _ in findings(text).values()])
        bad = doctor("--data", data, "--devices", "cuda:63", "--json")
        self.assertEqual(bad.returncode, 1)
        self.assertIs(json.loads(bad.stdout)["healthy"], False)

    def test_beside_a_running_server(self):
        server = harness.Server()
        self.addCleanup(server.stop)
        found = findings(server.command("doctor", "--data", server.data))
        self.expect(found, "database", "ok", "the private one answers")
        self.expect(found, "models", "ok", "1: tiny")
        self.expect(found, "data", "ok", re.escape(str(server.data)))
        self.assertEqual(server.get("/readyz", key=None).status, 200)
        server.shutdown()
        found = findings(server.command("doctor", "--data", server.data))
        self.expect(found, "models", "ok", "1: tiny")
        self.assertEqual(server.left(), [])

    def test_wrong_usage_is_2(self):
        self.assertEqual(doctor("--devices", "gpu0").returncode, 2)
        self.assertEqual(doctor("stray").returncode, 2)


if __name__ == "__main__":
    unittest.main()
