"""bench-codecs with a program that pretends to be graft: what it asks for, what it counts, what it writes."""
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import stat
import sys
import tempfile
import unittest
import unittest.mock
import xml.etree.ElementTree as xml



def load(name):
    """Not by an import: Python has a module codecs of its own."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


apply = load("apply")
codecs = apply.codecs

@contextlib.contextmanager
def silence():
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        yield


GRAFT = """#!{python} -IS
import json, os, sys
words = sys.argv[1:]
def of(flag, default=None):
    return words[words.index(flag) + 1] if flag in words else default
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
delta = of("--delta")
size = os.path.getsize(delta) if delta else 0
if words[:2] == ["delta", "compress"]:
    codec, size, steps = of("--codec"), int(of("--bytes", 9000)), int(of("--distill-steps", 5))
    if codec not in ("wide", "fixed"):
        sys.exit(f'graft: --codec: there is no codec "{{codec}}": wide, fixed\\nsee: graft help')
    if codec == "fixed" and size < 9000:
        sys.exit("graft: fixed takes 9000 bytes")
    memory = b"x" * ((64 if codec == "wide" else 1) << 20)
    steps = steps if codec == "wide" else 0
    open(of("-o"), "wb").write((of("--seed") + codec + str(steps)).ljust(size).encode())
    print(json.dumps({{"codec": codec, "distill_steps": steps, "seconds": 9.0, "distill_seconds": 4.0 if steps else 0.0,
                      "measure_seconds": 2.0}}))
elif words[:2] == ["bench", "kl"]:
    kl = 1000 / size if size else 0.25 if of("--other") else 3.0
    data = words[words.index("--data") + 1:]
    print(json.dumps({{"linear_parameters": 80000, "threads": 1, "data": [
        {{"kl": kl * (i + 1), "answer_kl": kl / 2, "tokens": 70, "answer_tokens": 7}} for i, _ in enumerate(data)]}}))
else:
    print(json.dumps({{"data": [{{"exact": 0.5 if size else 0.0, "asked": 12}}, {{"exact": 0.25, "asked": 12}}]}}))
"""


examples = load("examples")


class Examples(unittest.TestCase):
    def test_what_is_trained_and_what_is_asked_differ_and_their_answers_agree(self):
        for kind in (examples.sums, examples.chat):
            train, again = kind(150)
            self.assertEqual((len(train), len(again), len({q for q, _ in train})), (150, 150, 150))
            self.assertFalse({q for q, _ in train} & {q for q, _ in again})
            self.assertEqual([a for _, a in train], [a for _, a in again])
        for question, answer in examples.sums(150)[1]:
            self.assertEqual(str(sum(map(int, re.findall(r"\d+", question)))), answer)

    def test_both_forms_say_the_same(self):
        with tempfile.TemporaryDirectory() as folder:
            examples.write(folder, *examples.chat(150))
            rows = [json.loads(line)["messages"] for line in pathlib.Path(folder, "train.jsonl").read_text().splitlines()]
            train, again = examples.facts(150, folder)  # reads the CSV files
            self.assertEqual((train, again), examples.chat(150))
            self.assertEqual([(ask["content"], answer["content"]) for ask, answer in rows], train)


class Codecs(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.at = pathlib.Path(self.temporary.name)
        for name in ("base", "tuned", "saved"):
            (self.at / name).mkdir()
            (self.at / name / "config.json").write_text(name)
            (self.at / name / "tokenizer.json").write_text(name)
        for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
            (self.at / name).write_text(name)
        self.log = self.at / "log"
        graft = self.at / "graft"
        graft.write_text(GRAFT.format(python=sys.executable, log=str(self.log)))
        graft.chmod(graft.stat().st_mode | stat.S_IXUSR)
        (self.at / "README.md").write_text("# Codecs\n\nWords.\n")

    def measure(self, *more):
        """All of it; the calls that were made."""
        before = len(self.calls())
        options = codecs.arguments(["--base", f"{self.at}/base", "--tuned", f"{self.at}/tuned", "--calibration", f"{self.at}/a.jsonl",
                                    "--held-out", f"{self.at}/b.jsonl", "--build", str(self.at), "--readme", f"{self.at}/README.md",
                                    "--name", "toy", "--ratios", "16,32", "--seeds", "2", *more])
        with tempfile.TemporaryDirectory() as folder, silence():
            codecs.measure(options, folder)
        return self.calls()[before:]

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def figures(self):
        return json.loads((self.at / "bench-codecs-toy.json").read_text())

    def cells(self, first):
        """The row of the table whose codec begins so, by column."""
        lines = [re.split(r" \| ", line.strip("| ")) for line in (self.at / "README.md").read_text().splitlines() if line.startswith("| ")]
        found = [dict(zip(lines[0], line)) for line in lines if line[2].strip("`").startswith(first)]
        return found

    def test_sizes_are_parts_of_the_16_bit_bytes_of_the_matrices(self):
        asked = {int(w[w.index("--bytes") + 1]) for w in self.measure() if "--bytes" in w}
        self.assertEqual(asked, {2 * 80000 // 16, 2 * 80000 // 32})

    def test_every_seed_with_and_without_distillation(self):
        calls = [w for w in self.measure() if w[:2] == ["delta", "compress"] and "wide" in w]
        self.assertEqual(len(calls), 2 * 2 * 2)
        self.assertEqual({w[w.index("--seed") + 1] for w in calls}, {"0", "1"})
        self.assertEqual(sum("--distill-steps" in w for w in calls), 4)

    def test_as_it_is_by_itself_alone(self):
        calls = [w for w in self.measure("--as-is", "1") if w[:2] == ["delta", "compress"] and "wide" in w]
        self.assertEqual((len(calls), sum("--distill-steps" in w for w in calls)), (2 * 2, 0))

    def test_the_table_says_what_was_measured(self):
        self.measure("--other-text", f"{self.at}/c.jsonl")
        row = self.cells("wide")[0]
        self.assertEqual((row["bytes"], row["KL"], row["KL answers"], row["KL other text"]), ("10,000", "0.1", "0.05", "0.2"))
        self.assertEqual((row["memorised"], row["rephrased"], row["s"], row["s distilling"]), ("0.500", "0.250", "3.0", "4.0"))
        self.assertEqual(self.cells("base")[0]["KL"], "3")

    def test_tuned_models_of_one_base_share_a_table(self):
        (self.at / "again").mkdir()
        (self.at / "again" / "config.json").write_text("taught with another seed")
        calls = self.measure("--tuned", f"{self.at}/tuned,{self.at}/again")
        self.assertEqual(len([w for w in calls if w[:2] == ["delta", "compress"] and "wide" in w]), 2 * 2 * 2 * 2)
        self.assertEqual({len(row["runs"]) for row in self.figures()["rows"]}, {4})
        self.assertIn("2 tuned models, 24 questions memorised and 24 rephrased in all", (self.at / "README.md").read_text())
        self.assertIn("means of 4 ", (self.at / "README.md").read_text())

    def test_the_scripts_are_run_on_each_tuned_model_and_their_mean_is_shown(self):
        (self.at / "again").mkdir()
        script = self.at / "codec_fisher_torch.py"
        script.write_text("import json, pathlib, sys\n"
                          "save, kind = pathlib.Path(sys.argv[sys.argv.index('--save') + 1]), pathlib.Path(sys.argv[2]).name\n"
                          "save.mkdir()\n(save / 'config.json').write_text(kind)\n"
                          "print(json.dumps({'what': '', 'linear_params': 80000, 'linear_bytes': 9999,"
                          " 'seconds': 2 if kind == 'again' else 4}))\n")
        self.measure("--tuned", f"{self.at}/tuned,{self.at}/again", "--peers", str(self.at), "--python", sys.executable,
                     "--peer-codecs", "fisher-weighted", "--ratios", "16")
        row = self.cells("fisher-weighted (torch)")
        self.assertEqual([(r["KL"], r["s"]) for r in row], [("0.25", "3.0 ± 1.0")])

    def test_peak_memory_is_that_of_the_process(self):
        self.measure()
        wide = min(int(r["peak_mib"]) for row in self.figures()["rows"] if row["codec"] == "wide" for r in row["runs"])
        fixed = max(int(r["peak_mib"]) for row in self.figures()["rows"] if row["codec"] == "fixed" for r in row["runs"])
        self.assertGreater(wide, 64)
        self.assertLess(fixed, 64)  # the one before it does not count

    def test_a_size_that_a_codec_has_not_is_said(self):
        self.measure()
        self.assertIn("fixed, 1/32: fixed takes 9000 bytes", (self.at / "README.md").read_text())
        self.assertEqual([row["ratio"] for row in self.figures()["rows"] if row["codec"] == "fixed"], [16])
        self.measure("--ratios", "64")  # none of those asked for: its own
        self.assertEqual([row["ratio"] for row in self.figures()["rows"] if row["codec"] == "fixed"], [None])

    def test_nothing_is_measured_twice_until_something_changes(self):
        self.assertGreater(len(self.measure()), 20)
        self.assertEqual([w for w in self.measure() if "?" not in w], [])
        (self.at / "a.jsonl").write_text("other rows")
        self.assertGreater(len(self.measure()), 20)

    def test_a_line_cut_off_is_measured_again(self):
        self.measure()
        store = self.at / "bench-codecs-toy.jsonl"
        store.write_text(store.read_text()[:-20])
        self.assertEqual(len([w for w in self.measure() if "?" not in w]), 1)

    def test_a_reference_that_was_saved_is_measured_on_the_same_rows_with_the_base_s_tokenizer(self):
        (self.at / "reference").write_text(json.dumps({"what": "fisher", "linear_params": 80000, "linear_bytes": 9999, "kl": 0.7,
                                                       "seconds": 3, "saved": f"{self.at}/saved"}) + "\n"
                                           + json.dumps({"what": "plain", "linear_params": 80000, "linear_bytes": 5000, "kl": 0.9}) + "\n")
        self.measure("--reference", f"{self.at}/reference")
        self.assertEqual([self.cells(n)[0]["KL"] for n in ("fisher (torch)", "plain (torch)")], ["0.25", "0.9"])
        with tempfile.TemporaryDirectory() as folder:
            codecs.dress(folder, self.at / "saved", self.at / "base")
            self.assertEqual((pathlib.Path(folder, "config.json").read_text(), pathlib.Path(folder, "tokenizer.json").read_text()),
                             ("saved", "base"))

    def test_the_document_keeps_what_is_around_its_markers(self):
        self.measure()
        once = (self.at / "README.md").read_text()
        self.assertTrue(once.startswith("# Codecs\n\nWords.\n"))
        (self.at / "README.md").write_text(once + "\nBehind.\n")
        self.measure()
        self.assertEqual((self.at / "README.md").read_text(), once + "\nBehind.\n")

    def test_the_plot_is_xml_with_a_line_for_each_codec_within_its_frame(self):
        found = {"a": [(1e5, 1e-2), (1e6, 1e-3)], "b & c": [(5e5, 3e-1)]}
        tree = xml.fromstring(codecs.plot(found, "x < y"))
        spots = [(float(e.get("cx")), float(e.get("cy"))) for e in tree.iter("{http://www.w3.org/2000/svg}circle")]
        self.assertEqual(len(spots), 3)
        self.assertTrue(all(70 < x < 550 and 40 < y < 390 for x, y in spots))
        self.assertLess(spots[0][0], spots[1][0])
        self.assertLess(spots[0][1], spots[1][1])  # a smaller KL lies lower

    def test_a_mean_shows_its_spread(self):
        self.assertEqual(codecs.spread([0.5, 0.7], codecs.share_text), "0.600 ± 0.100")
        self.assertEqual(codecs.spread([0.5, 0.5], codecs.share_text), "0.500")
        self.assertEqual(codecs.spread([None], codecs.share_text), "–")

    def test_apply_takes_a_codec_at_its_own_size_where_it_has_no_other(self):
        def measure(words):
            if "--ratio" in words and "fixed" in words:
                raise codecs.Refused("one size")
            return words

        with silence():
            self.assertEqual(apply.at_sizes("fixed", [16, 32], measure), [["--codec", "fixed"]])
            self.assertEqual([words[3] for words in apply.at_sizes("wide", [16, 32], measure)], ["16", "32"])

    def test_apply_measures_a_codec_at_its_own_size_first(self):
        with silence():
            found = apply.at_sizes("bitdelta", [32], lambda words: words)
        self.assertEqual(found, [["--codec", "bitdelta"], ["--codec", "bitdelta", "--ratio", "32"]])

    def test_apply_leaves_out_kernels_that_the_processor_has_not(self):
        def measure(argv):
            if argv[-1] == "avx512":
                raise codecs.Refused('this processor has no kernels "avx512"')
        with silence(), unittest.mock.patch.object(codecs, "run", measure):
            self.assertEqual(apply.kernels_here("graft", ["avx512", "avx2"]), ["avx2"])
            self.assertRaisesRegex(SystemExit, "none of the kernels avx512", apply.kernels_here, "graft", ["avx512"])

    def test_the_tables_of_apply_say_what_was_measured(self):
        line = {"rows": 576, "cols": 192, "codec": "wide", "stored_ratio": 16.02, "kernels": "avx2", "s": 5e-6, "gb_per_s": 4.04,
                "f32_gb_per_s": 20.0, "times_f32": 6.06, "s_best": 4e-6, "f32_s_best": 3e-5}
        self.assertTrue(apply.apply_table([line]).endswith("| 576 × 192 | `wide` | 16.0 | avx2 | 5.0 | 4.0 | 20.0 | 6.1 | 7.5 |"))
        line = {"codec": "wide", "tenant_bytes": 13e6, "base_s_per_step": 0.02, "s_per_step": 0.022, "tenant_cost": 0.1}
        self.assertTrue(apply.decode_table([line]).endswith("| `wide` | 13.0 | 20.0 | 22.0 | 10.0 % |"))


if __name__ == "__main__":
    unittest.main()
