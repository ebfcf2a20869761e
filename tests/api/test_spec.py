"""api-spec/ and the code say the same: routes, error codes, job states. Needs no server."""
import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SPEC = ROOT / "api-spec"


def routes():
    """{(method, path): operation} of the table in server/api_routes.c."""
    text = (ROOT / "server/api_routes.c").read_text()
    macros = dict(re.findall(r'^#define (\w+) (.+)$', text, re.M))
    found = {}
    for entry in re.findall(r"\{(\.method = .*?)\},\n", text, re.S):
        def path_of(words):
            return "".join(path_of(macros[w]) if w in macros else w.strip('"') for w in re.findall(r'"[^"]*"|\w+', words))
        method = re.search(r'\.method = "(\w+)"', entry).group(1)
        path = path_of(re.search(r"\.pattern = ([^,]+),", entry).group(1))
        found[method, path] = re.search(r'\.operation = "(\w+)"', entry).group(1)
    return found


def described():
    """The same of openapi.yaml, which is written so that it can be read line by line."""
    found, path, method = {}, None, None
    for line in (SPEC / "openapi.yaml").read_text().splitlines():
        if match := re.fullmatch(r"  (/\S*):", line):
            path = match.group(1)
        elif re.match(r"\S", line):
            path = None
        elif path and (match := re.fullmatch(r"    (get|post|delete|put|patch):", line)):
            method = match.group(1).upper()
        elif path and (match := re.fullmatch(r"      operationId: (\w+)", line)):
            found[method, path] = match.group(1)
    return found


def emitted():
    """Error codes in the sources of server, storage and engine."""
    found = set()
    for folder in ("server", "storage", "engine"):
        for source in (ROOT / folder).rglob("*.c"):
            text = source.read_text()
            for arguments in re.findall(r"err_set_code\(\s*[^,]+,\s*ERR_\w+,(.*?),", text, re.S):
                found |= set(re.findall(r'"([a-z_]+)"', arguments))
            for function in re.findall(r"struct job_error\)\{(.*?)\}", text, re.S):
                found |= set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', function))
            found |= set(re.findall(r'snprintf\([^;\n]*code[^;\n]*, "([a-z]+(?:_[a-z]+)+)"\)', text))
            found |= set(re.findall(r'"((?:invalid|no)_(?:training|validation)_file)"', text))
    return found


class Spec(unittest.TestCase):
    def test_routes_and_document_are_the_same(self):
        self.assertGreaterEqual(len(routes()), 18)
        self.assertEqual(described(), routes())

    def test_every_reference_of_the_document_has_its_target(self):
        text = (SPEC / "openapi.yaml").read_text()
        for kind, name in set(re.findall(r"#/components/(\w+)/(\w+)", text)):
            section = re.search(rf"^  {kind}:\n((?:    .*\n|\n)*)", text, re.M).group(1)
            self.assertRegex(section, rf"(?m)^    {name}:", f"{kind}/{name}")

    def test_the_document_is_yaml_of_openapi_3_1(self):
        try:
            import yaml
        except ImportError:
            self.skipTest("python3-yaml is not installed")
        document = yaml.safe_load((SPEC / "openapi.yaml").read_text())
        self.assertTrue(document["openapi"].startswith("3.1"))
        for path, item in document["paths"].items():
            named = set(re.findall(r"\{(\w+)\}", path))
            given = {document["components"]["parameters"][p["$ref"].rsplit("/", 1)[1]]["name"] if "$ref" in p else p["name"]
                     for p in item.get("parameters", [])}
            self.assertEqual(named, given, path)

    def test_every_error_code_is_listed_and_emitted(self):
        text = (SPEC / "errors.md").read_text()
        listed = set(re.findall(r"^\| `(\w+)` \|", text, re.M)) | set(re.findall(r"\(`(\w+)`\)", text))
        self.assertEqual(emitted() - listed, set(), "not in errors.md")
        self.assertEqual(listed - emitted(), set(), "in errors.md, and nowhere in the sources")

    def test_job_states_are_those_of_the_table(self):
        text = (ROOT / "storage/job_state.def").read_text()
        states = {name: (database, wire, terminal == "true") for name, database, wire, terminal in
                  re.findall(r'^JOB_STATE\((\w+), "(\w+)", "(\w+)", (\w+)\)', text, re.M)}
        moves = {}
        for source, target in re.findall(r"^JOB_MOVE\((\w+), (\w+)\)", text, re.M):
            moves.setdefault(states[source][0], []).append(states[target][0])
        rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \| (.*) \|$", (SPEC / "job-states.md").read_text(), re.M)
        self.assertEqual([(state, wire, terminal == "yes") for state, wire, terminal, _ in rows], list(states.values()))
        for state, _, _, targets in rows:
            self.assertEqual(re.findall(r"`(\w+)`", targets), moves.get(state, []), state)


if __name__ == "__main__":
    unittest.main()
