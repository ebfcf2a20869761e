#!/usr/bin/env python3
"""Would the tests see that a barrier is missing? Runs the shim's test programs again and again, each time without one
of the barriers (__syncthreads, __syncwarp) that their kernels reach, and expects red from one of the programs.

usage: tests/cuda/barriers.py [--short] [--only PATTERN] [--counts FOLDER] PROGRAM...     build/tests/unit/test_cuda_*

--short tries two barriers of each source file, --only those whose place matches; with --counts (GRAFT_SHIM_COUNTS of
a green run of these programs) they need not be run to know what they reach. Reports in TAP, a case for each source
file; a barrier that nobody misses is a failure: either it is not needed, or a test is.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tap  # noqa: E402

JOBS = int(os.environ.get("TEST_JOBS") or len(os.sched_getaffinity(0)))
LIMIT = 900  # seconds of one run; a program that hangs without a barrier has noticed


def run(program, env):
    """(is it green, seconds). Ends the program at its first failure: the rest is not asked for."""
    began = time.monotonic()
    proc = subprocess.Popen([program], cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    red = False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watch = pool.submit(lambda: any(re.search(r"Failure!|FAILED|^not ok", line) for line in proc.stderr))
        try:
            red = watch.result(LIMIT)
        except concurrent.futures.TimeoutError:
            red = True
        if red:
            proc.kill()
    status = proc.wait()
    return not red and status == 0, time.monotonic() - began


def places(program):
    """The barriers a program reaches when it is left alone, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        green, seconds = run(program, {"GRAFT_SHIM_COUNTS": folder})
        if not green:
            raise tap.Failed(f"{program} is red with all its barriers")
        text = "".join(path.read_text() for path in pathlib.Path(folder).iterdir())
    return {line.split()[1] for line in text.splitlines() if line.startswith("barrier ")}, seconds


def told(folder):
    """The same of a green run that wrote its counts: {program: (places, seconds)}."""
    found = {}
    for path in pathlib.Path(folder).iterdir():
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
        name = next(words[1] for words in lines if words[0] == "program")
        seconds = next(float(words[1]) for words in lines if words[0] == "seconds")
        found[pathlib.Path(name).name] = ({words[1] for words in lines if words[0] == "barrier"}, seconds)
    return found


def missed(place, programs):
    """Who notices that the barrier is not there; None: nobody."""
    for program in programs:
        if not run(program, {"GRAFT_SHIM_SKIP": place})[0]:
            return pathlib.Path(program).name
    return None


def by_line(place):
    file, _, line = place.rpartition(":")
    return file, int(line)


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--counts")
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(argv)
    reached, seconds = {}, {}
    known = told(options.counts) if options.counts else {}
    look = lambda program: known.get(pathlib.Path(program).name) or places(program)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        with tap.case("the programs are green with all barriers"):
            for program, (found, took) in zip(options.program, pool.map(look, options.program)):
                seconds[program] = took
                for place in found:
                    if re.search(options.only, place):
                        reached.setdefault(place, []).append(program)
            if not reached:
                raise tap.Failed("no barrier is reached")
        files = {}
        for place in sorted(reached, key=by_line):
            files.setdefault(by_line(place)[0], []).append(place)
        if options.short:
            files = {file: sorted({found[0], found[-1]}, key=by_line) for file, found in files.items()}
        chosen = [place for found in files.values() for place in found]
        who = dict(zip(chosen, pool.map(
            lambda place: missed(place, sorted(reached[place], key=seconds.get)), chosen)))
    for file, found in files.items():
        with tap.case(f"{file}: {len(found)} barriers, each missed when it is left out"):
            unseen = [place for place in found if not who[place]]
            if unseen:
                raise tap.Failed("\n".join(f"{place}: nothing is wrong without it, in " + ", ".join(
                    pathlib.Path(program).name for program in reached[place]) for place in unseen))
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
