"""The images as docker builds them, and compose.yaml as docker brings it up, by the README's own commands."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/api"))
import harness  # noqa: E402

DOCKER = ROOT / "docker"


def daemon():
    return shutil.which("docker") and subprocess.run(["docker", "info"], stdout=subprocess.DEVNULL,
                                                     stderr=subprocess.DEVNULL, timeout=60).returncode == 0


class Cuda(unittest.TestCase):
    @unittest.skipUnless(daemon(), "no docker daemon, so no base image of NVIDIA's: Dockerfile.cuda was compared with "
                         "Dockerfile.cpu and with the Makefile, and not built")
    def test_the_image_builds_and_its_backend_finds_its_libraries(self):
        tag = f"graft-test:{os.getpid()}"
        subprocess.run(["docker", "build", "-f", DOCKER / "Dockerfile.cuda", "-t", tag, ROOT], check=True)
        try:
            out = subprocess.run(["docker", "run", "--rm", "--entrypoint", "ldd", tag,
                                  "/usr/local/lib/graft/libgraft_cuda.so"], check=True, stdout=subprocess.PIPE, text=True)
            missing = set(re.findall(r"(\S+) => not found", out.stdout))
            self.assertEqual(missing - {"libcuda.so.1"}, set(), "the driver's library comes with the GPU")
        finally:
            subprocess.run(["docker", "rmi", "-f", tag], check=False, stdout=subprocess.DEVNULL)


@unittest.skipUnless(daemon(), "no docker daemon: test_image.py runs the CPU image's steps in a scratch root")
class Compose(unittest.TestCase):
    def compose(self, *words):
        done = subprocess.run(["docker", "compose", "-p", f"graft-test-{os.getpid()}", "-f", DOCKER / "compose.yaml", *words],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout[-4000:])
        return done.stdout

    def test_compose_up_a_model_and_an_answer(self):
        subprocess.run([DOCKER / "secrets.sh"], check=True, stdout=subprocess.DEVNULL)
        folder = tempfile.mkdtemp(prefix="graft-image.")
        self.addCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        harness.make_model(pathlib.Path(folder) / "model")
        self.addCleanup(self.compose, "down", "--volumes")
        self.compose("up", "--detach", "--build", "--wait")
        self.compose("run", "--rm", "-v", f"{folder}/model:/model:ro", "api", "model", "import", "/model", "--name", "tiny")
        out = self.compose("exec", "-T", "api", "graft", "key", "create", "--org", "me", "--project", "first")
        app = harness.Server.__new__(harness.Server)
        app.port, app.model, app.log_path = 8080, "tiny", pathlib.Path(folder) / "log"
        app.key = re.search(r"^gk-\S+$", out, re.M).group(0)
        file = app.upload(harness.examples(harness.FACTS)).json["id"]
        job = app.wait_job(app.create_job(file, epochs=1).json["id"])
        self.assertEqual(job["status"], "succeeded", self.compose("logs"))
        self.assertEqual(app.chat(job["fine_tuned_model"], "Where does person 3 live?").status, 200)


if __name__ == "__main__":
    unittest.main()
