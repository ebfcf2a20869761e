#!/usr/bin/env python3
"""The rules that a compiler does not check. Each rule is a function from the tree to its violations; each has a
planted violation below that it must find and a clean neighbour that it must leave alone, since a lint that can not
fail is worthless. Reports in TAP (tests/tap.py).

usage: tests/lint/lint.py            from the root of the checkout
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import tap  # noqa: E402

TOP_LEVEL = {"server", "engine", "storage", "migrations", "api-spec", "tests", "docker", "Makefile", "README.md",
             "CHANGELOG.md", "LICENSE", ".ci", ".clang-format", ".dockerignore", ".gitignore", ".gitattributes"}
MAX_LINES = 800
PRODUCT = ("server/", "engine/", "storage/")

RULES = []


def rule(description):
    def register(function):
        RULES.append((description, function))
        return function
    return register


class Tree:
    """Files of a checkout: those git knows or would add. `files`: {path: bytes} instead, for planted violations."""

    def __init__(self, root=None, files=None):
        self.root = pathlib.Path(root) if root else None
        if files is None:
            out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, check=True,
                                 stdout=subprocess.PIPE).stdout.decode()
            self.paths = sorted(p for p in out.split("\0") if p and (self.root / p).is_file())
            self.data = {p: (self.root / p).read_bytes() for p in self.paths}
        else:
            self.paths, self.data = sorted(files), files

    def text(self, path):
        """None for a file that is not text."""
        data = self.data[path]
        if b"\0" in data:
            return None
        try:
            return data.decode()
        except UnicodeDecodeError:
            return None

    def lines(self, path):
        return (self.text(path) or "").splitlines()

    def sources(self, *prefixes):
        return [p for p in self.paths if p.endswith((".c", ".h")) and p.startswith(prefixes or ("",))]

    def exists(self, path):
        path = path.rstrip("/")
        return path in self.data or any(p.startswith(path + "/") for p in self.paths)


# ------------------------------------------------------------------ layers


def allowed(path, header):
    """May `path` include `header`? The table of design: server sees engine.h, storage and base; storage sees base."""
    if path.startswith("engine/base/"):
        return header.startswith("engine/base/")
    if path.startswith("engine/"):
        if header.startswith("engine/cpu/") and not path.startswith("engine/cpu/") and path != "engine/backend.c":
            return False  # only backend.c knows which backends there are
        if header.startswith("engine/cuda/") and not path.startswith("engine/cuda/") and not path.startswith("engine/backend_library."):
            return False  # the shared objects' border is in one place
        return header.startswith("engine/")
    if path.startswith("storage/"):
        return header.startswith(("storage/", "engine/base/"))
    if path.startswith("server/"):
        return header.startswith(("server/", "storage/", "engine/base/")) or header == "engine/engine.h"
    return True  # tests see everything


@rule("includes follow the layers: server -> engine.h, storage -> base; cpu/ and cuda/ only behind backend.c")
def layers(tree):
    for path in tree.sources(*PRODUCT):
        for number, line in enumerate(tree.lines(path), 1):
            found = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            if not found:
                continue
            header = found.group(1)
            if not re.match(r"(engine|storage|server|build)/", header):
                yield f'{path}:{number}: include "{header}" by its path from the root'
            elif not allowed(path, header):
                yield f"{path}:{number}: may not include {header}"


@rule("no JSON in storage's headers nor in engine/engine.h")
def json_at_the_edge(tree):
    for path in tree.sources("storage/", "engine/engine.h"):
        if path.endswith(".h"):
            for number, line in enumerate(tree.lines(path), 1):
                if re.search(r"\bjson_t\b|jansson\.h|json_text\.h", line):
                    yield f"{path}:{number}: JSON is parsed at the edge, into plain structs"


@rule("nothing but server/settings.c reads the environment")
def environment(tree):
    for path in tree.sources(*PRODUCT):
        if path != "server/settings.c":
            for number, line in enumerate(tree.lines(path), 1):
                if re.search(r"\b(secure_)?getenv\s*\(", line):
                    yield f"{path}:{number}: a setting belongs in the table of server/settings.c"


@rule("no exit() or abort() in library code: errors go to the caller")
def no_exit(tree):
    for path in tree.sources("engine/", "storage/"):
        # A forked child that can not become its program has nobody to return to.
        calls = "exit|abort|quick_exit" + ("" if re.search(r"\bfork\(\)", tree.text(path) or "") else "|_exit")
        for number, line in enumerate(tree.lines(path), 1):
            if re.search(rf"(?<![\w.>])({calls})\s*\(", strip_comment(line)):
                yield f"{path}:{number}: return an error instead of ending the process"


def strip_comment(line):
    line = re.sub(r'"(\\.|[^"\\])*"', '""', line)
    line = re.sub(r"/\*.*?(\*/|$)", "", line)
    return "" if re.match(r"\s*\*", line) else line.split("//")[0]


@rule("no copy or format into a buffer without its size")
def unbounded(tree):
    for path in tree.sources(*PRODUCT):
        for number, line in enumerate(tree.lines(path), 1):
            if re.search(r"(?<!\w)(strcpy|strcat|sprintf|vsprintf|gets|strtok|alloca)\s*\(", strip_comment(line)):
                yield f"{path}:{number}: use a function that knows the size"


# ------------------------------------------------------------------ shape


@rule("only the design's folders at the top")
def top_level(tree):
    for name in sorted({p.split("/")[0] for p in tree.paths} - TOP_LEVEL):
        yield f"{name}: not in the list of top-level names"


@rule(f"no file of ours over {MAX_LINES} lines")
def length(tree):
    for path in tree.paths:
        if path.endswith((".c", ".h", ".py", ".sh", ".sql", ".md")) or path == "Makefile":
            count = len(tree.lines(path))
            if count > MAX_LINES:
                yield f"{path}: {count} lines: split it by what it does"


@rule("no file named after nothing: util, misc, helper, manager, common")
def names(tree):
    for path in tree.paths:
        if re.search(r"(^|[/_])(utils?|misc|helpers?|managers?|common)([_.]|$)", path):
            yield f"{path}: name it after what it does"


@rule("each header begins with what it is, and has its guard")
def headers(tree):
    for path in tree.sources(*PRODUCT):
        if path.endswith(".h"):
            text = tree.text(path) or ""
            name = path.split("/")[-1]
            if not text.startswith(f"/* {name}: "):
                yield f"{path}:1: begin with /* {name}: one sentence what it is"
            # X_body.h is a template: included once for each of its forms.
            if not path.endswith("_body.h") and not re.search(r"#ifndef GRAFT_\w+_H\n#define GRAFT_\w+_H\n", text):
                yield f"{path}: no include guard GRAFT_..._H"


@rule("no typedef for a struct, no tab, no blank at a line's end")
def looks(tree):
    for path in tree.paths:
        if path.endswith((".c", ".h", ".py", ".sh", ".sql", ".md", ".yaml", ".def")):
            for number, line in enumerate(tree.lines(path), 1):
                if line != line.rstrip():
                    yield f"{path}:{number}: blank at the end"
                if "\t" in line:
                    yield f"{path}:{number}: tab"
                # simd_X.h call the same name a struct here and a processor's vector there.
                if path.endswith((".c", ".h")) and "/simd_" not in path and re.match(r"\s*typedef\s+struct\b", line):
                    yield f"{path}:{number}: say struct"


@rule("no marker of unfinished work")
def unfinished(tree):
    words = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"))
    for path in tree.paths:
        if path.startswith(("tests/lint/", "tests/fuzz/corpus/")) or path == "LICENSE":
            continue
        for number, line in enumerate(tree.lines(path), 1):
            if re.search(rf"\b({words})\b(?!X)", line):
                yield f"{path}:{number}: finish it or file it"


@rule("no path of somebody's machine")
def machine_paths(tree):
    pattern = re.compile(r"(?<![\w.~$}/-])/(work/|root/\w|home/\w+|tmp/wt|tmp/peers|Users/\w+)")
    for path in tree.paths:
        if path.startswith("tests/lint/"):
            continue
        for number, line in enumerate(tree.lines(path), 1):
            if pattern.search(line):
                yield f"{path}:{number}: {pattern.search(line).group(0)}"


@rule("no large or derived file in the tree")
def large(tree):
    for path in tree.paths:
        if len(tree.data[path]) > 1 << 20:
            yield f"{path}: {len(tree.data[path])} bytes; make it in the test or fetch it into .cache/"
        if path.endswith((".o", ".so", ".a", ".pyc", ".gguf.part")):
            yield f"{path}: derived"


# ------------------------------------------------------------------ documents


def anchors(text):
    """GitHub's anchors of a document's headings."""
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        found = re.match(r"#+\s+(.*)", line)
        if found:
            yield re.sub(r"[^\w\- ]", "", found.group(1).lower()).strip().replace(" ", "-")


@rule("links and files that the documents name exist")
def links(tree):
    for path in tree.paths:
        text = tree.text(path)
        if not path.endswith(".md") or text is None:
            continue
        folder = path.rsplit("/", 1)[0] if "/" in path else ""
        prose = re.sub(r"```.*?```", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
        for number, line in enumerate(prose.splitlines(), 1):
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                yield from dead_link(tree, path, folder, number, target)
            for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", line):
                first = name.split("/")[0]
                if first in TOP_LEVEL and not tree.exists(name):
                    yield f"{path}:{number}: {name} is not there"


def dead_link(tree, path, folder, number, target):
    if re.match(r"[a-z]+:", target):
        return
    name, _, anchor = target.partition("#")
    where = os.path.normpath(os.path.join(folder, name)) if name else path
    if not tree.exists(where):
        yield f"{path}:{number}: dead link {target}"
    elif anchor and where.endswith(".md") and anchor not in anchors(tree.text(where) or ""):
        yield f"{path}:{number}: no heading for #{anchor} in {where}"


@rule("files that comments and scripts name exist")
def named_files(tree):
    pattern = re.compile(r"(?<![\w./{}$-])((?:server|engine|storage|migrations|api-spec|tests)/[\w./-]*\w\.(?:c|h|py|sh|sql|md|yaml|def|txt|json))\b")
    for path in tree.paths:
        if path.startswith(("tests/lint/", "tests/fuzz/corpus/")) or not path.endswith((".c", ".h", ".sh", ".py", "Makefile")):
            continue
        for number, line in enumerate(tree.lines(path), 1):
            for name in pattern.findall(line):
                if not tree.exists(name) and not re.search(r"\b(X|NNNN)|_X\b|\*", name):
                    yield f"{path}:{number}: {name} is not there"


# ------------------------------------------------------------------ tools


@rule("clang-format has nothing to change")
def formatting(tree):
    if shutil.which("clang-format") is None:
        tap.skip("clang-format is not installed (make deps)")
    files = tree.sources()
    if not files:
        return
    out = subprocess.run(["clang-format", "--dry-run", "-Werror", *files], cwd=tree.root, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT).stdout.decode()
    first = {}
    for line in out.splitlines():
        found = re.match(r"(\S+?:\d+):\d+: (?:error|warning): code should be clang-formatted", line)
        if found:
            first.setdefault(found.group(1).split(":")[0], found.group(1))
    for where in first.values():
        yield f"{where}: run make format"
    if out and not first:
        yield out.splitlines()[0]


@rule("shellcheck has nothing to say")
def shell(tree):
    if shutil.which("shellcheck") is None:
        tap.skip("shellcheck is not installed (make deps)")
    scripts = [p for p in tree.paths if re.match(rb"#!.*\b(ba)?sh\b", tree.data[p][:40])]
    if scripts:
        out = subprocess.run(["shellcheck", "-x", "-f", "gcc", *scripts], cwd=tree.root, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT).stdout.decode()
        yield from out.splitlines()


@rule("Python files compile")
def python(tree):
    for path in tree.paths:
        if path.endswith(".py") or re.match(rb"#!.*python3", tree.data[path][:40]):
            try:
                compile(tree.data[path], path, "exec")
            except SyntaxError as problem:
                yield f"{path}:{problem.lineno}: {problem.msg}"


# ------------------------------------------------------------------ what each rule must find

GUARD = "#ifndef GRAFT_A_H\n#define GRAFT_A_H\n#endif\n"
PLANTED = {  # rule: (files with a violation, files without)
    layers: ({"server/a.c": '#include "engine/trainer.h"\n'}, {"server/a.c": '#include "engine/engine.h"\n'}),
    json_at_the_edge: ({"storage/a.h": "json_t *a;\n"}, {"storage/a.c": "json_t *a;\n"}),
    environment: ({"engine/a.c": 'a = getenv("A");\n'}, {"server/settings.c": 'a = getenv("A");\n'}),
    no_exit: ({"engine/a.c": "    exit(1);\n"}, {"engine/a.c": "    on_exit_hook(1); /* no exit(1) */\n"}),
    unbounded: ({"server/a.c": "    strcpy(a, b);\n"}, {"server/a.c": '    puts("strcpy(a, b)");\n'}),
    top_level: ({"src/a.c": ""}, {"engine/a.c": ""}),
    length: ({"engine/a.c": "\n" * (MAX_LINES + 1)}, {"engine/a.c": "\n" * MAX_LINES}),
    names: ({"engine/string_util.c": ""}, {"engine/utility_curve.c": ""}),
    headers: ({"engine/a.h": GUARD}, {"engine/a.h": "/* a.h: an a. */\n" + GUARD}),
    looks: ({"engine/a.c": "int a; \n"}, {"engine/a.c": "int a;\n"}),
    unfinished: ({"engine/a.c": "/* TO" "DO: think */\n"}, {"engine/a.c": '/* "file.XXXXXX" */\n'}),
    machine_paths: ({"README.md": "see /home/me/a\n"}, {"README.md": "see ~/a and https://a.b/home/me\n"}),
    large: ({"tests/a.bin": "a" * (1 << 20 | 1)}, {"tests/a.bin": "a"}),
    links: ({"README.md": "[a](docs/none.md)\n"}, {"README.md": "# A b\n[a](#a-b), [c](engine/)\n", "engine/a.c": ""}),
    named_files: ({"engine/a.c": "/* see engine/b.h */\n"}, {"engine/a.c": "/* see engine/a.c */\n"}),
    formatting: ({"engine/a.c": "int  a ;\n"}, {"engine/a.c": "int a;\n"}),
    shell: ({"tests/a.sh": "#!/bin/bash\nrm $1\n"}, {"tests/a.sh": '#!/bin/bash\nrm "$1"\n'}),
    python: ({"tests/a.py": "def\n"}, {"tests/a.py": "a = 1\n"}),
}
MORE_VIOLATIONS = [
    (layers, {"engine/base/a.c": '#include "engine/tensor.h"\n'}),
    (layers, {"engine/model.c": '#include "engine/cpu/cpu.h"\n'}),
    (layers, {"engine/model.c": '#include "engine/cuda/cuda_backend.h"\n'}),
    (layers, {"engine/a.c": '#include "server/a.h"\n'}),
    (layers, {"storage/a.c": '#include "engine/engine.h"\n'}),
    (layers, {"storage/a.c": '#include "server/settings.h"\n'}),
    (layers, {"storage/a.c": '#include "pg.h"\n'}),
    (json_at_the_edge, {"engine/engine.h": "#include <jansson.h>\n"}),
    (links, {"README.md": "[a](#nowhere)\n"}),
    (links, {"README.md": "see `engine/none.c`\n"}),
    (no_exit, {"engine/a.c": "    _exit(70);\n"}),
    (machine_paths, {"tests/a.py": 'open("/root/x")\n'}),
    (looks, {"engine/a.h": "typedef struct a a;\n"}),
    (looks, {"engine/a.c": "\tint a;\n"}),
]


def planted(files, folder, config):
    """A tree of these files alone, on disk too, for the rules that run a tool."""
    root = pathlib.Path(folder)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    if config.exists():
        shutil.copy(config, root / ".clang-format")
    tree = Tree(files={path: text.encode() for path, text in files.items()})
    tree.root = root
    return tree


def self_test(function, files, expect, config):
    with tempfile.TemporaryDirectory() as folder:
        found = list(function(planted(files, folder, config)))
    if expect and not found:
        raise tap.Failed(f"did not see the violation in {files}")
    if not expect and found:
        raise tap.Failed(f"reported {found} where nothing is wrong")


def main():
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    tree = Tree(root)
    config = root / ".clang-format"
    for description, function in RULES:
        with tap.case(description):
            found = list(function(tree))
            if found:
                raise tap.Failed("\n".join(found[:50]))
        with tap.case(f"rule {function.__name__} finds what is planted"):
            bad, good = PLANTED[function]
            self_test(function, bad, True, config)
            self_test(function, good, False, config)
            for other, files in MORE_VIOLATIONS:
                if other is function:
                    self_test(function, files, True, config)
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
