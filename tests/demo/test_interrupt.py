"""However the demo is stopped, and whenever: it ends soon, with the status of the signal, and leaves nothing running.
With a tiny model, since what it learns is of no interest here."""
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "api"))
import harness  # noqa: E402

SECONDS = 60


class Interrupt(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="graft-demo-test.")
        self.addCleanup(self.folder.cleanup)
        os.chmod(self.folder.name, 0o755)
        self.model = harness.make_model(pathlib.Path(self.folder.name) / "model")

    def start(self):
        env = {**os.environ, "GRAFT_BIN": harness.GRAFT, "GRAFT_CACHE": self.folder.name}
        proc = subprocess.Popen([sys.executable, "-u", HERE / "demo.py", "--model", self.model, "--epochs", "50", "--ratio", "4"], env=env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)
        self.addCleanup(proc.stdout.close)
        return proc

    def left(self):
        return [line for _, line in harness.processes().values() if self.folder.name in line]

    def none_left(self, seconds):
        limit = time.monotonic() + seconds
        while self.left() and time.monotonic() < limit:
            time.sleep(0.1)
        self.assertEqual(self.left(), [])

    def until(self, proc, marker):
        seen = ""
        for line in proc.stdout:
            seen += line
            if marker in line:
                return
        self.fail(f"ended before {marker!r}:\n{seen}")

    def stopped_at(self, marker, delay, signum, whole_group):
        proc = self.start()
        self.until(proc, marker)
        time.sleep(delay)
        if whole_group:
            os.killpg(proc.pid, signum)  # as a terminal does
        else:
            proc.send_signal(signum)
        out = proc.communicate(timeout=SECONDS)[0]
        self.assertEqual(proc.returncode, 128 + signum, out)
        self.none_left(1)

    def test_ctrl_c_while_the_database_is_made(self):
        self.stopped_at("Serve", 0.3, signal.SIGINT, True)

    def test_ctrl_c_during_the_import(self):
        self.stopped_at("Import", 0.1, signal.SIGINT, True)

    def test_ctrl_c_during_training(self):
        self.stopped_at("step ", 0.2, signal.SIGINT, True)

    def test_terminate_during_training(self):
        self.stopped_at("step ", 0, signal.SIGTERM, False)

    def test_hang_up_right_after_upload(self):
        self.stopped_at("fine_tuning/jobs", 0, signal.SIGHUP, True)

    def test_a_kill_takes_the_server_along(self):
        proc = self.start()
        self.until(proc, "step ")
        proc.kill()
        proc.communicate()
        self.none_left(SECONDS)


if __name__ == "__main__":
    unittest.main()
