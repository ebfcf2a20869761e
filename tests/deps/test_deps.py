"""The package installer, with a pretended distribution: fake dpkg-query, apt-get, apt-cache, id and sudo on PATH
that write down how they were called."""
import os
import pathlib
import stat
import subprocess
import tempfile
import unittest

SCRIPT = pathlib.Path(__file__).resolve().parent / "install.sh"
TOOLS = ("bash", "grep", "sed", "head", "cat", "printf", "env", "rm", "rmdir", "mkdir", "tee")

FAKES = {
    "dpkg-query": 'for last; do :; done\ngrep -qx "$last" "$STATE/installed" && echo installed || exit 1\n',
    "apt-cache": 'echo "clang"; echo "  Depends: clang-19"\n',
    "apt-get": 'echo "apt-get $*" >> "$STATE/calls"\n[ ! -e "$STATE/fail" ]\n',
    "sudo": 'echo "sudo $*" >> "$STATE/calls"\nexec "$@"\n',
    "id": 'cat "$STATE/uid"\n',
}


class Deps(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.state = pathlib.Path(self.folder.name)
        self.bin = self.state / "bin"
        self.bin.mkdir()
        for name, body in FAKES.items():
            path = self.bin / name
            path.write_text("#!/bin/bash\n" + body)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        for name in TOOLS:
            for folder in ("/bin", "/usr/bin"):
                if os.path.exists(f"{folder}/{name}"):
                    (self.bin / name).symlink_to(f"{folder}/{name}")
                    break
        (self.state / "uid").write_text("0\n")
        self.have()

    def have(self, *packages):
        (self.state / "installed").write_text("".join(f"{name}\n" for name in packages))

    def run_it(self, *words):
        return subprocess.run(["bash", str(SCRIPT), *words], env={"PATH": str(self.bin), "STATE": str(self.state)},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def calls(self):
        path = self.state / "calls"
        return path.read_text() if path.exists() else ""

    def names(self, what):
        return self.run_it(what, "--list").stdout.split()

    def test_nothing_missing_means_nothing_done(self):
        self.have(*self.names("all"), "libclang-rt-19-dev")
        for what in ("build", "all"):
            done = self.run_it(what)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(self.calls(), "")

    def test_says_and_installs_just_what_is_missing(self):
        names = self.names("build")
        self.have(*(name for name in names if name not in ("gcc", "curl")), "postgresql")
        done = self.run_it("build")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Installing from the distribution: gcc curl\n", done.stderr)
        install = self.calls().splitlines()[-1]
        self.assertIn("--no-install-recommends gcc curl", install)
        self.assertTrue(install.startswith("apt-get"), install)

    def test_goes_through_sudo_when_not_root(self):
        (self.state / "uid").write_text("1000\n")
        self.have(*(name for name in self.names("build") if name != "gcc"))
        self.assertEqual(self.run_it("build").returncode, 0)
        self.assertIn("sudo env DEBIAN_FRONTEND=noninteractive apt-get", self.calls())

    def test_without_root_and_sudo_it_names_the_command(self):
        (self.state / "uid").write_text("1000\n")
        (self.bin / "sudo").unlink()
        self.have(*(name for name in self.names("build") if name != "gcc"))
        done = self.run_it("build")
        self.assertEqual(done.returncode, 1)
        self.assertIn("apt-get install --no-install-recommends gcc\n", done.stderr)
        self.assertEqual(self.calls(), "")

    def test_a_failed_installation_is_a_failure(self):
        (self.state / "fail").touch()
        self.have(*(name for name in self.names("build") if name != "gcc"))
        self.assertNotEqual(self.run_it("build").returncode, 0)

    def test_the_sanitizer_runtime_follows_clang(self):
        self.have(*self.names("all"))
        self.assertEqual(self.run_it("all").returncode, 0)
        self.assertIn("libclang-rt-19-dev", self.calls())

    def test_usage(self):
        for words in ((), ("some",)):
            self.assertEqual(self.run_it(*words).returncode, 2)

    def test_elsewhere_it_names_the_packages(self):
        (self.bin / "apt-get").unlink()
        done = self.run_it("build")
        self.assertEqual(done.returncode, 1)
        self.assertIn("libmicrohttpd-dev", done.stderr)


if __name__ == "__main__":
    unittest.main()
