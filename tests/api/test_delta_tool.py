"""graft delta compress: what it prints, what it refuses, and that Ctrl-C leaves nothing behind."""
import contextlib
import glob
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest
import xml.etree.ElementTree

import harness


class Tool(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="graft-delta-test.")
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = pathlib.Path(cls.temporary.name)
        cls.base, cls.tuned = cls.folder / "base", cls.folder / "tuned"
        harness.make_model(cls.base)
        harness.make_tuned(cls.base, cls.tuned)
        cls.rows = cls.folder / "rows.jsonl"
        cls.rows.write_bytes(harness.examples(harness.FACTS))

    def argv(self, *words):
        return [harness.GRAFT, "delta", "compress", "--base", self.base, "--tuned", self.tuned, "-o",
                self.folder / "out.delta", *words]

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())

    def test_one_line_says_what_came_of_it(self):
        done = subprocess.run(self.argv("--ratio", "4", "--calibration", self.rows, "--distill-steps", "2"),
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(report["bytes"], (self.folder / "out.delta").stat().st_size)
        self.assertGreaterEqual(report["ratio"], 4)
        self.assertEqual(report["distill_steps"], 2)
        self.assertEqual(done.stderr.split(), ["read", "statistics", "decompose", "compress", "distill", "compare", "measure",
                                               "recall"])
        self.assertEqual(report["recall"]["asked"], len(harness.FACTS))
        self.assertTrue(all(0 <= report["recall"][who] <= 1 for who in ("base", "tuned", "served")), report["recall"])
        without = subprocess.run(self.argv("--codec", "bitdelta", "--calibration", self.rows, "--distill-steps", "0", "--no-recall"),
                                 capture_output=True, text=True, check=True)
        self.assertIsNone(json.loads(without.stdout)["recall"])
        self.assertNotIn("recall", without.stderr)
        (self.folder / "out.delta").unlink()

    def test_a_delta_is_drawn_matrix_by_matrix(self):
        delta, plot = self.folder / "out.delta", self.folder / "out.svg"
        subprocess.run(self.argv("--codec", "bitdelta"), check=True, capture_output=True)
        said = subprocess.run([harness.GRAFT, "delta", "inspect", delta, "--plot", plot], check=True, capture_output=True, text=True)
        matrices = len(json.loads(said.stdout)["report"]["matrices"]["bytes"])
        bars = [e for e in xml.etree.ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "white"]
        self.assertGreater(matrices, 0)
        self.assertEqual(len(bars), 2 * matrices + 7, "a bar for bytes, one for the error, and the legend's")
        svg = plot.read_text()
        self.assertIn("no rows were given", svg)
        self.assertNotIn("<circle", svg)
        plot.unlink()
        # Without a report there is nothing to draw, and no picture.
        delta.write_bytes(delta.read_bytes().replace(b'graft.report', b'graft.rexort'))
        failed = subprocess.run([harness.GRAFT, "delta", "inspect", delta, "--plot", plot], capture_output=True, text=True)
        self.assertEqual(failed.returncode, 1)
        self.assertIn("nothing to plot", failed.stderr)
        self.assertFalse(plot.exists())
        delta.unlink()

    def test_bars_have_the_colours_of_their_matrices(self):
        delta, plot = self.folder / "out.delta", self.folder / "out.svg"
        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # as in a block, and in the legend
        self.addCleanup(delta.unlink)
        self.addCleanup(plot.unlink)
        # A bit for each weight of some matrices, fewer of the others: their parts lie in the file by their size.
        for words, dtypes in ((["--codec", "graft"], {"U8"}), (["--codec", "bitdelta", "--bytes", "16650"], {"I32", "F16", "U8"})):
            subprocess.run(self.argv(*words), check=True, capture_output=True)
            said = subprocess.run([harness.GRAFT, "delta", "inspect", delta, "--plot", plot], check=True, capture_output=True, text=True)
            self.assertEqual({tensor["dtype"] for tensor in json.loads(said.stdout)["tensors"]}, dtypes)
            bars = [e.get("fill") for e in xml.etree.ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}rect")][1:]
            self.assertEqual(len(bars), 5 * len(kinds), "two layers in two charts, and the legend")
            for chart in (bars[:14], bars[14:28]):
                self.assertEqual(chart, 2 * bars[28:], words)

    def test_the_kl_is_drawn_over_the_bytes(self):
        delta, plot = self.folder / "out.delta", self.folder / "out.svg"
        subprocess.run(self.argv("--max-kl", "0.01", "--distill-steps", "0", "--calibration", self.rows), check=True,
                       capture_output=True)
        said = subprocess.run([harness.GRAFT, "delta", "inspect", delta, "--plot", plot], check=True, capture_output=True, text=True)
        report = json.loads(said.stdout)["report"]
        predicted, tried = report["predicted"], report["tried"]
        self.assertGreater(len(predicted), 2)
        self.assertTrue(all(big[0] > small[0] and big[1] < small[1] for big, small in zip(predicted, predicted[1:])), predicted)
        self.assertGreater(len(tried), 3)
        self.assertIn([report["bytes"], report["measured_kl"]], tried)
        self.assertEqual(report["bytes"], min(size for size, kl in tried if kl <= 0.01))
        marks = list(xml.etree.ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}circle"))
        self.assertEqual(len(marks), len(predicted) + len(tried) + 1)
        (own,) = [mark for mark in marks if mark.get("fill") == "#d62728"]
        for mark, (size, kl) in zip(marks[len(predicted):], tried):  # larger is further right, a higher KL further up
            self.assertEqual(float(mark.get("cx")) > float(own.get("cx")), size > report["bytes"])
            self.assertEqual(float(mark.get("cy")) < float(own.get("cy")), kl > report["measured_kl"])
        # A report of before has neither curve: what it says of its own file is drawn.
        delta.write_bytes(delta.read_bytes().replace(b'predicted\\"', b'predixted\\"').replace(b'tried\\"', b'trixd\\"'))
        subprocess.run([harness.GRAFT, "delta", "inspect", delta, "--plot", plot], check=True, capture_output=True)
        self.assertEqual(plot.read_text().count("<circle"), 1)
        plot.unlink()
        delta.unlink()

    def test_a_kl_is_kept_to_where_nothing_changed(self):
        delta = self.folder / "out.delta"
        done = subprocess.run([harness.GRAFT, "delta", "compress", "--base", self.base, "--tuned", self.base, "-o", delta, "--max-kl",
                               "0.01", "--calibration", self.rows, "--no-recall"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLessEqual(json.loads(done.stdout)["measured_kl"], 0.01)
        delta.unlink()

    def test_interrupted_it_goes_on_from_where_it_was(self):
        delta, words = self.folder / "out.delta", ("--ratio", "4", "--calibration", self.rows, "--distill-steps", "40")
        whole = subprocess.run(self.argv(*words), capture_output=True, text=True)
        self.assertEqual(whole.returncode, 0, whole.stderr)
        want = delta.read_bytes()
        delta.unlink()
        before = self.files()
        for signum in (signal.SIGKILL, signal.SIGINT):
            with self.subTest(signum):
                tool = subprocess.Popen(self.argv(*words, "--resume"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                while not (self.folder / "out.delta.scales").exists():  # ten steps are made
                    self.assertIsNone(tool.poll())
                    time.sleep(0.001)
                tool.send_signal(signum)
                out, _ = tool.communicate()
                self.assertEqual((tool.returncode, out), (-signum, ""))
                self.assertEqual(self.files(), sorted([*before, "out.delta.scales", "out.delta.undistilled"]))
                done = subprocess.run(self.argv(*words, "--resume"), capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(done.stderr.split(), ["read", "distill", "compare", "measure", "recall"],
                                 "statistics are not taken again")
                self.assertEqual(delta.read_bytes(), want)
                delta.unlink()
                self.assertEqual(self.files(), before)

    def test_what_it_kept_is_for_the_same_compression_alone(self):
        words = ("--calibration", self.rows, "--distill-steps", "40", "--resume")
        for other in (("--ratio", "5"), ("--ratio", "4", "--precision", "bf16")):
            tool = subprocess.Popen(self.argv("--ratio", "4", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while not (self.folder / "out.delta.scales").exists():
                self.assertIsNone(tool.poll())
                time.sleep(0.001)
            tool.kill()
            tool.communicate()
            done = subprocess.run(self.argv(*other, *words), capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("statistics", done.stderr.split())
            (self.folder / "out.delta").unlink()

    def test_resume_is_refused_where_nothing_is_kept(self):
        before, rows = self.files(), ("--calibration", self.rows)
        for words, what in ((["--max-kl", "0.01", *rows], "a search for max_kl starts over"),
                            ([], "without calibration rows"),
                            (["--held-out", self.rows], "without calibration rows"),
                            (["--distill-steps", "0", *rows], "no steps of distillation"),
                            (["--codec", "delta-come", *rows], "this codec is not distilled"),
                            (["--codec", "lossless", *rows], "this codec is not distilled")):
            done = subprocess.run(self.argv("--resume", *words), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""), words)
            self.assertIn("resume has nothing to go on from: " + what, done.stderr)
            self.assertEqual(self.files(), before)

    def test_numbers_are_what_they_say(self):
        for words, what in ((["--bytes", "0"], '--bytes: "0" is not a number from 1'),
                            (["--ratio", "many"], '--ratio: "many" is not a number from 1'),
                            (["--distill-steps", "2.7"], '--distill-steps: "2.7" is not a whole number'),
                            (["--seed", "0.5"], '--seed: "0.5" is not a whole number')):
            done = subprocess.run(self.argv(*words), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)
            self.assertIn(what, done.stderr)

    def test_rows_that_can_not_be_read_are_named(self):
        before, bad = self.files(), self.folder / "bad.jsonl"
        self.addCleanup(bad.unlink)
        bad.write_text("no JSON\n")
        for words, what in ((["--calibration", bad, "--held-out", self.rows], f"--calibration {bad}: "),
                            (["--calibration", self.rows, "--held-out", bad], f"--held-out {bad}: "),
                            (["--calibration", self.folder / "none"], f"--calibration {self.folder / 'none'}: ")):
            done = subprocess.run(self.argv(*words), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertIn(what, done.stderr)
            self.assertEqual(self.files(), sorted([*before, bad.name]))

    def test_what_asks_it_to_stop_leaves_nothing_behind(self):
        before = self.files()
        for signum in (signal.SIGINT, signal.SIGTERM):
            tool = subprocess.Popen(self.argv("--ratio", "4", "--calibration", self.rows, "--distill-steps", "10000"),
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while (line := tool.stderr.readline()) and line != "distill\n":
                continue
            self.assertEqual(line, "distill\n")
            tool.send_signal(signum)
            began = time.monotonic()
            out, _ = tool.communicate(timeout=60)
            self.assertEqual((tool.returncode, out), (-signum, ""))
            self.assertLess(time.monotonic() - began, 20, "10000 steps take minutes")
            self.assertEqual(self.files(), before)

    def test_an_import_that_is_asked_to_stop_leaves_nothing_behind(self):
        large, temporary = self.make_large(), "/tmp/graft-base-"
        self.addCleanup(shutil.rmtree, large)
        tool = subprocess.Popen([harness.GRAFT, "delta", "compress", "--base", large, "--tuned", large, "-o", self.folder / "out.delta"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        opened = []
        while not opened and tool.poll() is None:
            opened = [path for path in self.open_files(tool.pid) if path.startswith(temporary)]
        tool.send_signal(signal.SIGINT)
        out, said = tool.communicate(timeout=60)
        self.assertEqual((tool.returncode, out), (-signal.SIGINT, ""), said)
        self.assertEqual(glob.glob(opened[0][:len(temporary) + 6] + "*"), [])

    def make_large(self):
        """A model of zeros whose import takes a while."""
        folder, at = shutil.copytree(self.base, self.folder / "large"), 0
        config, weights = folder / "config.json", folder / "model.safetensors"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 1 << 19}))
        data = weights.read_bytes()
        tensors = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])
        del tensors["__metadata__"]
        tensors["model.embed_tokens.weight"]["shape"][0] = 1 << 19
        for tensor in tensors.values():
            tensor["data_offsets"] = [at, at := at + 4 * math.prod(tensor["shape"])]
        header = json.dumps(tensors).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(weights, 8 + len(header) + at)
        return folder

    @staticmethod
    def open_files(pid):
        paths = []
        for fd in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                paths.append(os.readlink(fd))
        return paths

    def test_bitdelta_takes_the_size_it_is_given(self):
        delta, errors = self.folder / "out.delta", []
        self.addCleanup(delta.unlink)
        for ratio in (12, 16, 20):  # 13 is where a bit for each weight ends
            done = subprocess.run(self.argv("--codec", "bitdelta", "--ratio", str(ratio)), capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            report = json.loads(done.stdout)
            self.assertGreaterEqual(report["ratio"], ratio)
            errors.append(report["relative_error"])
        self.assertEqual(errors, sorted(set(errors)), "the less is kept, the more is lost")

    def test_an_adapter_is_kept_as_it_is_or_compressed(self):
        adapter, delta = harness.make_adapter(self.folder / "adapter"), self.folder / "out.delta"
        dora = harness.make_adapter(self.folder / "dora", use_dora=True)
        self.addCleanup(shutil.rmtree, adapter)
        self.addCleanup(shutil.rmtree, dora)
        self.addCleanup(delta.unlink)

        def compress(*words, tuned=adapter):
            return subprocess.run([harness.GRAFT, "delta", "compress", "--base", self.base, "--tuned", tuned, "-o", delta, *words],
                                  capture_output=True, text=True)

        done = compress("--codec", "lora", "--held-out", self.rows)
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual((report["codec"], report["relative_error"]), ("lora", 0))
        self.assertGreater(report["measured_tokens"], 0)
        self.assertLess(report["measured_kl"], 1e-8)
        tensors = json.loads(subprocess.run([harness.GRAFT, "delta", "inspect", delta], check=True, capture_output=True).stdout)["tensors"]
        self.assertEqual(len(tensors), 3 * 4)
        self.assertIn({"name": "model.layers.1.self_attn.v_proj.weight.up", "dtype": "F16", "shape": [32, 2], "bytes": 128}, tensors)
        for codec in ("graft", "bitdelta", "delta-come", "lossless"):
            done = compress("--codec", codec)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(json.loads(done.stdout)["codec"], codec)
        for words, tuned, what in (
                (["--codec", "lora"], self.tuned, "adapter_config.json"),
                (["--codec", "lora", "--ratio", "16"], adapter, "lora has the size that comes of what it keeps"),
                (["--codec", "lossless", "--bytes", "100"], adapter, "leave out ratio, bytes and max_kl"),
                (["--codec", "lossless", "--max-kl", "1", "--calibration", self.rows], adapter, "leave out ratio, bytes and max_kl"),
                (["--codec", "lora"], dora, "use_dora"),
                (["--codec", "graft"], dora, "use_dora")):
            done = compress(*words, tuned=tuned)
            self.assertEqual(done.returncode, 1)
            self.assertIn(what, done.stderr)


if __name__ == "__main__":
    unittest.main()
