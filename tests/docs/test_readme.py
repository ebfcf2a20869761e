"""README.md tells the truth: its shell and Python blocks run, as they stand, against a real server with a tiny model
under the name they use; the targets and subcommands it names exist."""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/api"))
import harness  # noqa: E402

README = (ROOT / "README.md").read_text()
MODEL = "smollm2-135m"
# What a block may count on beyond its text: curl fails when the server answers with an error.
PRELUDE = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n'


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = harness.Server(model_name=MODEL)
        cls.addClassCleanup(cls.server.stop)
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        (pathlib.Path(cls.folder.name) / "build").symlink_to(pathlib.Path(harness.GRAFT).parent)
        cls.env = {**os.environ, "OPENAI_BASE_URL": cls.server.url + "/v1", "OPENAI_API_KEY": cls.server.key,
                   "GRAFT_DATA": str(cls.server.data), "MODEL_PATH": str(cls.server.model_path)}

    def run_it(self, argv, limit=300):
        done = subprocess.run(argv, cwd=self.folder.name, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=limit)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def test_1_shell_blocks_run_in_order(self):
        text = "".join(blocks("sh"))
        self.assertIn("curl", text)
        out = self.run_it(["bash", "-c", PRELUDE + text])
        self.assertIn('"chat.completion"', out.replace(" ", ""))
        self.assertRegex(out, r"(?m)^gk-\S+$")

    def test_2_the_python_block_runs(self):
        venv = subprocess.run([ROOT / "tests/sdk/venv.sh"], stdout=subprocess.PIPE, text=True)
        if venv.returncode != 0:
            self.skipTest(venv.stdout.strip().splitlines()[-1])
        (text,) = blocks("python")
        out = self.run_it([venv.stdout.strip().splitlines()[-1], "-c", text])
        self.assertIn("The job has successfully completed", out)

    def test_named_targets_exist(self):
        makefiles = "".join((ROOT / name).read_text() for name in ("Makefile", "engine/cuda/cuda.mk", "tests/gpu/gpu.mk"))
        known = set(re.findall(r"^([a-z-]+):", makefiles, re.M))
        named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(re.findall(r"`[^`]*`|^make .*$", README, re.M))))
        self.assertTrue(named)
        self.assertEqual(named - known, set())

    def test_named_subcommands_and_flags_exist(self):
        listed = subprocess.run([harness.GRAFT, "help"], stdout=subprocess.PIPE, text=True, check=True).stdout
        flags = subprocess.run([harness.GRAFT, "help", "serve"], stdout=subprocess.PIPE, text=True, check=True).stdout
        for name in re.findall(r"graft ((?:model|key) [a-z]+|serve|help|bench)", README):
            self.assertIn(name, listed)
        for flag in re.findall(r"`(--[a-z-]+)", README):
            self.assertIn(flag, flags)

    def test_is_short(self):
        self.assertLess(len(README.splitlines()), 150)


if __name__ == "__main__":
    unittest.main()
