#!/usr/bin/env python3
"""What ptxas said of each kernel, from the logs that the build keeps: registers, shared memory, stack, spills.

usage: engine/cuda/report.py LOG...       exit status 1 where a kernel spills, or where no kernel is found
"""
import re
import shutil
import subprocess
import sys


def read(path):
    """Each entry function of a log: its mangled name, the chip, and its numbers."""
    kernel = None
    for line in open(path, encoding="utf-8", errors="replace"):
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = {"name": found.group(1), "chip": found.group(2), "registers": 0, "shared": 0}
        elif kernel and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
                                            line)):
            kernel["stack"], kernel["stores"], kernel["loads"] = map(int, found.groups())
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            kernel["registers"] = int(found.group(1))
            if shared := re.search(r"(\d+) bytes smem", line):
                kernel["shared"] = int(shared.group(1))
            yield kernel
            kernel = None


def plain(names):
    """What the mangled names say, without parameters and namespaces; themselves where c++filt is missing."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return {name: name for name in names}
    out = subprocess.run([tool], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: short(text) for name, text in zip(names, out.splitlines())}


def short(text):
    """"void (anonymous namespace)::norm_kernel<float>(cuda_batch, float*)" -> "norm_kernel<float>"."""
    depth = 0
    text = re.sub(r"\(anonymous namespace\)::|^void ", "", text)
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:i]
            break
    return text.replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def main(logs):
    kernels = [kernel for log in logs for kernel in read(log)]
    names = plain(sorted({kernel["name"] for kernel in kernels}))
    kernels.sort(key=lambda k: (names[k["name"]], k["chip"]))
    width = max([len(name) for name in names.values()] + [6])
    print(f"{'kernel':<{width}}  chip    registers  shared  stack  spilled")
    for k in kernels:
        print(f"{names[k['name']]:<{width}}  {k['chip']:<7} {k['registers']:>9} {k['shared']:>7} {k['stack']:>6} "
              f"{k['stores'] + k['loads']:>8}")
    spills = [k for k in kernels if k["stores"] or k["loads"]]
    print(f"{len(names)} kernels, {len(kernels)} compiled; {len(spills)} spill")
    return 1 if spills or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
