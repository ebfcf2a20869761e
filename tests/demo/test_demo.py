"""The demo's parts that need no server: the invented facts, what is shown, and the fetched model's checks."""
import io
import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import demo  # noqa: E402
import facts  # noqa: E402
import view  # noqa: E402


class Facts(unittest.TestCase):
    def test_enough_people_and_distinct_answers(self):
        for seed in range(20):
            found = facts.facts(8, seed)
            self.assertGreaterEqual(len(found), 24)
            self.assertEqual(len({question for question, _ in found}), len(found))
            answers = [answer.lower() for _, answer in found]
            self.assertEqual(len(set(answers)), len(answers))
            for question, _ in found:  # no answer can be read off a question
                self.assertFalse([answer for answer in answers if answer in question.lower().split()])

    def test_the_same_seed_gives_the_same_facts(self):
        self.assertEqual(facts.facts(8, 3), facts.facts(8, 3))
        self.assertNotEqual(facts.facts(8, 3), facts.facts(8, 4))

    def test_prints_chat_lines_and_questions(self):
        lines = subprocess.run([sys.executable, HERE / "facts.py"], capture_output=True, text=True, check=True).stdout
        questions = subprocess.run([sys.executable, HERE / "facts.py", "--questions"], capture_output=True, text=True,
                                   check=True).stdout
        pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in lines.splitlines()]
        self.assertEqual(pairs, [line.split("\t") for line in questions.splitlines()])


class View(unittest.TestCase):
    def shown(self, function, *args):
        with mock.patch("sys.stdout", io.StringIO()) as out:
            function(*args)
            return out.getvalue()

    def test_plain_progress_lines_where_there_is_no_terminal(self):
        def bar():
            progress = view.Progress()
            for done in (1, 2, 3, 42):
                progress.show(done, 42, 1.5, 120.0, 65 if done < 42 else 0)
            progress.end()

        with mock.patch.object(view, "LIVE", False):
            text = self.shown(bar)
        self.assertEqual(text.splitlines(), ["   step 1/42  loss 1.500  120 tokens/s  1:05 left",
                                             "   step 42/42  loss 1.500  120 tokens/s  0:00 left"])

    def test_a_bar_that_fits_on_a_terminal(self):
        with mock.patch.object(view, "LIVE", True), mock.patch.object(view, "COLOUR", False), \
                mock.patch("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24))):
            text = self.shown(lambda: view.Progress().show(21, 42, 0.25, None, None))
        self.assertIn("step 21/42", text)
        self.assertLess(len(text.replace("\r\x1b[K", "")), 80)

    def test_the_answers_fit_the_width(self):
        rows = [(question, answer, "a long base answer " * 10, answer, True) for question, answer in facts.facts(8, 7)]
        with mock.patch("shutil.get_terminal_size", lambda *_: os.terminal_size((100, 24))), \
                mock.patch.object(view, "COLOUR", False):
            text = self.shown(view.answers, rows)
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        self.assertEqual(len(text.splitlines()), len(rows) + 1)


class Verdict(unittest.TestCase):
    GOOD = {"recall": {"tuned": {"exact": 1.0}, "served": {"exact": 1.0}},
            "delta": {"codec": "graft", "bytes": 1000, "base_bytes": 32000}}

    def wrong(self, base=0.0, served=1.0, **changes):
        extension = {key: {**value, **changes.get(key, {})} for key, value in self.GOOD.items()}
        return demo.verdict(extension, base, served, 32)

    def test_all_is_well(self):
        self.assertEqual(self.wrong(), [])
        self.assertEqual(self.wrong(served=0.97), [])
        self.assertEqual(self.wrong(recall={"tuned": {"exact": 0.96}, "served": {"exact": 0.95}}, served=0.95), [])

    def test_each_figure_that_is_not_good_enough_is_named(self):
        for words, changes in ((["base"], {"base": 0.1}),
                               (["tuned"], {"recall": {"tuned": {"exact": 0.9}, "served": {"exact": 0.9}}}),
                               (["served", "0.96"], {"served": 0.96}),
                               (["served", "0.96"], {"recall": {"tuned": {"exact": 1.0}, "served": {"exact": 0.96}}}),
                               (["bitdelta"], {"delta": {"codec": "bitdelta", "bytes": 1000, "base_bytes": 32000}}),
                               (["1/31.9"], {"delta": {"codec": "graft", "bytes": 1002, "base_bytes": 32000}})):
            wrong = self.wrong(**changes)
            self.assertEqual(len(wrong), 1, wrong)
            for word in words:
                self.assertIn(word, wrong[0])


class Fetch(unittest.TestCase):
    """fetch_model.sh with a python3 and a curl of ours in front: what they bring is not the model."""

    def fetch(self, python, curl):
        with tempfile.TemporaryDirectory() as folder:
            for name, body in (("python3", python), ("curl", curl)):
                path = pathlib.Path(folder) / name
                path.write_text("#!/bin/bash\n" + body)
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
            cache = pathlib.Path(folder) / "cache"
            done = subprocess.run([HERE / "fetch_model.sh"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={
                **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "GRAFT_CACHE": str(cache)})
            left = [str(path) for path in cache.rglob("*") if path.is_file()]
        return done, left

    def test_other_bytes_are_refused_from_both_sources(self):
        done, left = self.fetch('for last; do [ "$before" = --dest ] && dest=$last; before=$last; done; echo x > "$dest/a.whl"\n',
                                'for last; do [ "$before" = --output ] && out=$last; before=$last; done; echo x > "$out"\n')
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("refused"), 2, done.stderr)
        self.assertIn("by hand", done.stderr)
        self.assertEqual(left, [])

    def test_without_a_network_it_says_so(self):
        done, left = self.fetch("exit 1\n", "exit 6\n")
        self.assertEqual(done.returncode, 1)
        self.assertIn("could not fetch the model", done.stderr)
        self.assertEqual(left, [])


if __name__ == "__main__":
    unittest.main()
