"""Reads a Dockerfile and its .dockerignore: as much of both as docker/ uses, and an error for the rest.

    for instruction in dockerfile.read(path):    # .name "RUN", .text, .words, .line
    dockerfile.stages(instructions)              # [Stage(name, base, instructions)]
    dockerfile.Context(root).files()             # the paths that a build of this folder is sent
"""
import fnmatch
import json
import pathlib
import re
import shlex
import subprocess

KNOWN = ("FROM", "RUN", "COPY", "USER", "ENV", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")


class Problem(Exception):
    pass


class Instruction:
    def __init__(self, name, text, line):
        self.name, self.text, self.line = name, text, line

    @property
    def words(self):
        """The words of an instruction in either form: ["a", "b"] or a b."""
        if self.text.startswith("["):
            try:
                return json.loads(self.text)
            except ValueError as problem:
                raise Problem(f"line {self.line}: {problem}") from problem
        return shlex.split(self.text)

    @property
    def is_exec_form(self):
        return self.text.startswith("[")

    def flag(self, name):
        """The value of --NAME=VALUE before the words; None where it is not given."""
        found = re.match(rf"(?:--[\w-]+=\S+\s+)*?--{name}=(\S+)", self.text)
        return found.group(1) if found else None

    def __repr__(self):
        return f"line {self.line}: {self.name} {self.text}"


class Stage:
    def __init__(self, name, base):
        self.name, self.base, self.instructions = name, base, []

    def all(self, name):
        return [i for i in self.instructions if i.name == name]

    def last(self, name):
        return self.all(name)[-1] if self.all(name) else None


def read(path):
    """Instructions in order. A line that ends in a backslash goes on; comment lines within are left out."""
    found, pending, start = [], "", 0
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        if line.lstrip().startswith("#") or (not pending and not line.strip()):
            continue
        start = start if pending else number
        pending += line.strip() + " " if not line.rstrip().endswith("\\") else line.rstrip()[:-1].strip() + " "
        if line.rstrip().endswith("\\"):
            continue
        name, _, text = pending.strip().partition(" ")
        if name not in KNOWN:
            raise Problem(f"line {start}: {name} is not an instruction that we know")
        if not text.strip():
            raise Problem(f"line {start}: {name} says nothing")
        found.append(Instruction(name, text.strip(), start))
        pending = ""
    if pending:
        raise Problem(f"line {start}: ends in the midst of an instruction")
    return found


def stages(instructions):
    found = []
    for i in instructions:
        if i.name == "FROM":
            base, *rest = i.words
            if rest and (len(rest) != 2 or rest[0] != "AS"):
                raise Problem(f"{i}: expected FROM IMAGE [AS NAME]")
            found.append(Stage(rest[1] if rest else None, base))
        elif not found:
            raise Problem(f"{i}: before the first FROM")
        else:
            found[-1].instructions.append(i)
    return found


def packages(stage):
    """Names that the stage's RUN instructions give to apt-get install."""
    names = []
    for run in stage.all("RUN"):
        for command in re.split(r"&&|;|\|\|", run.text):
            words = shlex.split(command)
            if "apt-get" in words and "install" in words:
                names += [w for w in words[words.index("install") + 1:] if not w.startswith("-")]
    return names


class Context:
    """What `docker build ROOT` sends: files of the checkout, less those that .dockerignore leaves out. A folder of
    builds or caches counts as there when a build would see it, whether git ignores it or not."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.patterns = []
        for line in (self.root / ".dockerignore").read_text().splitlines():
            line = line.strip()
            if line and not line.startswith("#"):
                self.patterns.append((line.lstrip("!").strip("/"), not line.startswith("!")))

    def sends(self, path):
        """The last pattern that matches the path or a folder above it decides."""
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        kept = True
        for pattern, ignores in self.patterns:
            if any(fnmatch.fnmatchcase(a, pattern) and a.count("/") == pattern.count("/") for a in above):
                kept = not ignores
        return kept

    def files(self):
        out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=self.root, check=True,
                             stdout=subprocess.PIPE).stdout.decode()
        return sorted(p for p in out.split("\0") if p and (self.root / p).is_file() and self.sends(p))
