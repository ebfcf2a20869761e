"""The runner counts honestly: what crashes, stops short, hangs or runs nothing is a failure; skips keep their reason."""
import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import unittest

TESTS = pathlib.Path(__file__).resolve().parent.parent
LOADER = importlib.machinery.SourceFileLoader("suite_runner", str(TESTS / "run"))
SPEC = importlib.util.spec_from_loader("suite_runner", LOADER)
runner = importlib.util.module_from_spec(SPEC)
sys.dont_write_bytecode = True
LOADER.exec_module(runner)


def counted(text, status=0):
    count = runner.read_tap(text, status, "x")
    return count.passed, count.failed, len(count.skips)


class ReadTap(unittest.TestCase):
    def test_counts(self):
        self.assertEqual(counted("1..3\nok 1 - a\nnot ok 2 - b\n# why\nok 3 - c # SKIP no GPU\n", 1), (1, 1, 1))

    def test_a_crash_is_a_failure(self):
        self.assertEqual(counted("1..3\nok 1 - a\nok 2 - b\n", -11), (2, 1, 0))

    def test_a_short_plan_is_a_failure(self):
        self.assertEqual(counted("1..3\nok 1 - a\nok 2 - b\n"), (2, 1, 0))

    def test_no_plan_is_a_failure(self):
        self.assertEqual(counted(""), (0, 1, 0))
        self.assertEqual(counted("ok 1 - a\n"), (1, 1, 0))

    def test_a_bad_end_after_good_cases_is_a_failure(self):
        self.assertEqual(counted("1..1\nok 1 - a\n", 1), (1, 1, 0))

    def test_reasons_and_details_are_kept(self):
        # As cmocka 1.1.5 writes them.
        count = runner.read_tap("1..2\nno model at hand\nnot ok 1 # SKIP a\nnot ok 2 - b\n# a.c:3: wrong\n", 1, "x")
        self.assertEqual(count.skips, ["x: a: no model at hand"])
        self.assertEqual(count.failures, [("x: b", ["a.c:3: wrong"])])


class Suites(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.logs, runner.LOGS = runner.LOGS, pathlib.Path(self.folder.name)
        self.addCleanup(setattr, runner, "LOGS", self.logs)

    def outcome(self, function):
        run = runner.Run("x")
        self.addCleanup(run.log.close)
        function(run)
        return run.count

    def test_what_hangs_is_ended_and_fails(self):
        count = self.outcome(lambda run: run.tap(["sh", "-c", "echo 1..1; sleep 60 & wait"], "hang", limit=0.3))
        self.assertEqual((count.passed, count.failed), (0, 1))

    def test_a_step_fails_by_its_status(self):
        self.assertEqual(self.outcome(lambda run: run.step(["false"], "f")).failed, 1)
        self.assertEqual(self.outcome(lambda run: run.step(["true"], "t")).passed, 1)

    def test_an_unknown_suite_is_a_usage_error(self):
        done = subprocess.run([TESTS / "run", "no-such-suite"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("no-such-suite", done.stderr)


class Tap(unittest.TestCase):
    def run_file(self, text):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "test_it.py"
            path.write_text(text)
            done = subprocess.run([sys.executable, TESTS / "tap.py", path], capture_output=True, text=True)
        return counted(done.stdout, done.returncode), done.returncode

    def test_every_kind_of_outcome(self):
        outcome, status = self.run_file(
            "import unittest\nclass A(unittest.TestCase):\n"
            "    def test_a(self): pass\n    def test_b(self): self.fail()\n    def test_c(self): 1 / 0\n"
            "    def test_d(self): self.skipTest('x')\n"
            "    def test_e(self):\n        for i in 1, 2:\n            with self.subTest(i=i): self.assertEqual(i, 1)\n")
        self.assertEqual((outcome, status), ((1, 3, 1), 1))

    def test_no_test_and_a_broken_file_fail(self):
        self.assertEqual(self.run_file("")[1], 1)
        self.assertEqual(self.run_file("import nothing_of_that_name\n"), ((0, 1, 0), 1))


if __name__ == "__main__":
    unittest.main()
