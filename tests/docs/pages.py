"""Pages whose blocks run as they stand, against a real server with a tiny model under the name that they use."""
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

MODEL = "smollm2-135m"
# What a block may count on beyond its text: curl fails when the server answers with an error.
PRELUDE = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n'


def text_of(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.S | re.M)


class Pages(unittest.TestCase):
    """A server, and a folder to run in."""

    @classmethod
    def setUpClass(cls):
        cls.server = harness.Server(model_name=MODEL)
        cls.addClassCleanup(cls.server.stop)
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = pathlib.Path(cls.temporary.name)
        (cls.folder / "build").symlink_to(pathlib.Path(harness.GRAFT).parent)
        cls.env = {**os.environ, "OPENAI_BASE_URL": cls.server.url + "/v1", "OPENAI_API_KEY": cls.server.key,
                   "GRAFT_DATA": str(cls.server.data), "MODEL_PATH": str(cls.server.model_path),
                   "ADAPTER": str(harness.make_adapter(cls.folder / "adapter"))}

    def run_it(self, argv, limit=300):
        done = subprocess.run(argv, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=limit)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def run_blocks(self, text):
        return self.run_it(["bash", "-c", PRELUDE + text])
