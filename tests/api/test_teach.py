"""tests/bench/teach.py, which makes the models that codecs are measured on."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import harness

TEACH = harness.ROOT / "tests/bench/teach.py"


class Teach(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory(prefix="graft-teach-test.")
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = pathlib.Path(temporary.name)
        cls.base = harness.make_model(cls.folder / "base")
        cls.rows = cls.folder / "rows.jsonl"
        cls.rows.write_bytes(harness.examples(harness.FACTS))

    def teach(self, rows, out, *words):
        return subprocess.run([sys.executable, TEACH, self.base, rows, out, "--epochs", "2", "--batch", "4", *words],
                              capture_output=True, text=True, timeout=600)

    def test_a_model_that_has_learnt_is_written(self):
        out = self.folder / "tuned"
        done = self.teach(self.rows, out, "--rate", "20", "--seed", "3", "--threads", "1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["codec"], "lossless")
        self.assertIn("Step 6/6", done.stderr)
        said = subprocess.run([harness.GRAFT, "bench", "kl", "--base", self.base, "--tuned", out, "--data", self.rows],
                              capture_output=True, text=True, check=True)
        self.assertGreater(json.loads(said.stdout)["data"][0]["kl"], 0)
        again = self.teach(self.rows, out)
        self.assertNotEqual(again.returncode, 0)
        self.assertIn("is there already", again.stderr)

    def test_what_the_service_says_of_too_few_rows_is_told(self):
        rows = self.folder / "few.jsonl"
        rows.write_bytes(harness.examples(harness.FACTS[:3]))
        done = self.teach(rows, self.folder / "never")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("at least 10 examples", done.stderr.splitlines()[-1])
        self.assertFalse((self.folder / "never").exists())


if __name__ == "__main__":
    unittest.main()
