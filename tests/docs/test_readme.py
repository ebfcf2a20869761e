"""README.md tells the truth: its shell and Python blocks run, as they stand; the targets and subcommands it names exist."""
import re
import subprocess
import unittest

import pages
from pages import ROOT, harness

PAGE = "README.md"
README = pages.text_of(PAGE)


class Readme(pages.Pages):
    def test_1_shell_blocks_run_in_order(self):
        text = "".join(pages.blocks(PAGE, "sh"))
        self.assertIn("curl", text)
        out = self.run_blocks(text)
        self.assertIn('"chat.completion"', out.replace(" ", ""))
        self.assertRegex(out, r"(?m)^gk-\S+$")

    def test_2_the_python_block_runs(self):
        venv = subprocess.run([ROOT / "tests/sdk/venv.sh"], stdout=subprocess.PIPE, text=True)
        if venv.returncode != 0:
            self.skipTest(venv.stdout.strip().splitlines()[-1])
        (text,) = pages.blocks(PAGE, "python")
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
        for name in re.findall(r"graft ((?:model|key|delta) [a-z]+|serve|help|bench)", README):
            self.assertIn(name, listed)
        for flag in re.findall(r"`(--[a-z-]+)", README):
            self.assertIn(flag, flags)

    def test_is_short(self):
        self.assertLess(len(README.splitlines()), 150)


if __name__ == "__main__":
    unittest.main()
