#!/usr/bin/env python3
"""Every kernel has a test: each `__global__` function of engine/cuda/*.cu was launched by some test program of the
shim, as the programs' own counts say (GRAFT_SHIM_COUNTS, engine/cuda/shim/shim_control.h). Reports in TAP.

usage: tests/cuda/kernels.py FOLDER       with the counts of the programs that ran
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tap  # noqa: E402

CONVENTION = "say `static __global__ void NAME_kernel(...)`"


def kernels(text):
    """Names of the __global__ functions of a source; a "?" in front where the name or form is not ours."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    for found in re.finditer(r"(\bstatic\s+)?__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(",
                             text):
        static, name = found.groups()
        yield name if static and name.endswith("_kernel") else "?" + name
    for found in re.finditer(r"<<<", text):
        yield "?<<<"


def read_counts(folder):
    """{kernel: launches}, over all programs."""
    counts = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        for line in path.read_text().splitlines():
            word = line.split()
            if word[0] == "kernel":
                counts[word[1]] = counts.get(word[1], 0) + int(word[2])
    return counts


def main(folder):
    counts = read_counts(folder)
    with tap.case("the search finds kernels, and what is not as it should be"):
        found = list(kernels("/* static __global__ void no_kernel( */ template <typename T>\nstatic __global__ void\n"
                             "__launch_bounds__(f(2)) a_kernel(int)\n__global__ void b_kernel()\nf<<<1, 2>>>(3);"))
        if found != ["a_kernel", "?b_kernel", "?<<<"]:
            raise tap.Failed(f"{found}")
    total = 0
    for path in sorted((ROOT / "engine/cuda").glob("*.cu")):
        names = list(kernels(path.read_text()))
        if not names:
            continue
        with tap.case(f"{path.name}: a test launches each kernel"):
            wrong = [f"{name[1:]}: {CONVENTION}" for name in names if name.startswith("?")]
            wrong += [f"{name}: no test launches it" for name in names if name[0] != "?" and not counts.get(name)]
            if wrong:
                raise tap.Failed("\n".join(wrong))
        total += len(names)
    with tap.case("there are kernels at all"):
        if total == 0:
            raise tap.Failed("no __global__ function in engine/cuda/*.cu")
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
