"""Results in the Test Anything Protocol, the one language in which every suite reports to tests/run.

    with tap.case("name of the behaviour"):      # prints ok, or not ok with the traceback
        ...
        tap.skip("the reason")                   # inside: the case counts as skipped
    sys.exit(tap.finish())

As a program it runs unittest files and reports each test as a case:

    python3 tests/tap.py [-k PATTERN]... tests/api/test_files.py ...
"""
import contextlib
import importlib.util
import pathlib
import sys
import time
import traceback
import unittest

_state = {"count": 0, "failed": 0}


class Skip(Exception):
    pass


class Failed(Exception):
    """A failure whose text says it all: reported without a traceback."""


def skip(reason):
    raise Skip(reason)


def report(ok, name, detail="", skipped=None):
    """One case. `detail` goes out as comment lines below a failure."""
    _state["count"] += 1
    line = f"{'ok' if ok else 'not ok'} {_state['count']} - {name.replace('#', '')}"
    if skipped is not None:
        line += f" # SKIP {skipped}"
    if not ok:
        _state["failed"] += 1
        line += "".join(f"\n# {part}" for part in detail.rstrip().splitlines())
    print(line, flush=True)


@contextlib.contextmanager
def case(name):
    try:
        yield
    except Skip as reason:
        report(True, name, skipped=str(reason))
    except Failed as problem:
        report(False, name, str(problem))
    except Exception:
        report(False, name, traceback.format_exc())
    else:
        report(True, name)


def finish():
    """Prints the plan; returns the exit status."""
    print(f"1..{_state['count']}", flush=True)
    return 1 if _state["failed"] or not _state["count"] else 0


class Result(unittest.TestResult):
    """unittest's events as cases. A test with failing subtests fails once, with all their details."""

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()
        self.subtests = []
        self.reported = False

    def stopTest(self, test):
        if self.subtests and not self.reported:  # unittest calls neither addSuccess nor addFailure
            self.put(False, test, "\n".join(self.subtests))
        super().stopTest(test)

    def put(self, ok, test, detail="", skipped=None):
        seconds = time.monotonic() - getattr(self, "started", time.monotonic())
        self.reported = True
        report(ok, f"{test.id()} ({seconds:.1f} s)", detail, skipped)

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.subtests.append(f"{subtest}\n" + "".join(traceback.format_exception(*error)))

    def addSuccess(self, test):
        self.put(True, test)

    def addFailure(self, test, error):
        self.put(False, test, "".join(traceback.format_exception(*error)))

    addError = addFailure

    def addSkip(self, test, reason):
        self.put(True, test, skipped=reason)

    def addExpectedFailure(self, test, error):
        self.put(True, test)

    def addUnexpectedSuccess(self, test):
        self.put(False, test, "expected to fail and did not")


def load(path):
    path = pathlib.Path(path).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def main(argv):
    patterns, paths = [], []
    rest = iter(argv)
    for word in rest:
        if word == "-k":
            patterns.append(f"*{next(rest)}*")
        else:
            paths.append(word)
    if patterns:
        unittest.defaultTestLoader.testNamePatterns = patterns
    result = Result()
    for path in paths:
        try:
            tests = load(path)
        except unittest.SkipTest as reason:
            report(True, path, skipped=str(reason))
            continue
        except Exception:
            report(False, path, traceback.format_exc())
            continue
        tests.run(result)
    return finish()


if __name__ == "__main__":
    sys.modules["tap"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
