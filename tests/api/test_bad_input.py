"""Broken datasets, models and bodies: each gets an error that names the line or part and the remedy, and the service
goes on as if nothing had been."""
import json
import pathlib
import shutil
import struct
import unittest

import harness

GOOD = harness.examples(harness.FACTS).decode().splitlines()
HUGE = 1 << 30  # bytes of a line, or of a tensor, that nobody has


def setUpModule():
    global server
    server = harness.Server(heartbeat=0.5, poll=0.1)


def tearDownModule():
    server.stop()


def with_line(text, number=5):
    """A good file but for one line."""
    lines = [line.encode() for line in GOOD]
    lines[number - 1] = text if isinstance(text, bytes) else text.encode()
    return b"\n".join(lines) + b"\n"


def message(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]})


# name: (file, words that the upload's or the job's error must have)
DATASETS = {
    "empty": (b"", ["empty"]),
    "blank lines alone": (b"\n\n\n", ["JSONL"]),
    "byte order mark": (b"\xef\xbb\xbf" + "\n".join(GOOD).encode(), ["byte order mark", "UTF-8"]),
    "UTF-16": ("\n".join(GOOD).encode("utf-16"), ["JSONL"]),
    "one JSON array": (json.dumps([json.loads(line) for line in GOOD]).encode(), ["JSONL"]),
    "CSV": (b"question,answer\na,b\n" * 12, ["JSONL"]),
    "truncated line": (with_line(GOOD[4][:40]), ["Line 5", "JSON", "expected"]),
    "truncated at the end of the file": ("\n".join(GOOD).encode()[:-30], ["Line 12", "JSON"]),
    "invalid UTF-8": (with_line(GOOD[4].encode().replace(b"town", b"to\xffwn")), ["Line 5", "0xff"]),
    "NUL": (with_line(message(content="a\0b")), ["Line 5", "\\u0000"]),
    "duplicate key": (with_line('{"messages": [], ' + message()[1:]), ["Example 5", "duplicate"]),
    "depth bomb": (with_line('{"messages": ' + "[" * 5000 + "]" * 5000 + "}"), ["Line 5", "depth"]),
    "messages is text": (with_line('{"messages": "hello"}'), ["Example 5", "messages"]),
    "no messages": (with_line('{"message": []}'), ["Example 5", "messages"]),
    "content is a number": (with_line(message(content=7)), ["Example 5", "content"]),
    "unknown role": (with_line(message(role="robot")), ["Example 5", "robot"]),
    "weight 2": (with_line(message(weight=2)), ["Example 5", "weight"]),
    "weight on a user message": (with_line('{"messages": [{"role": "user", "content": "a", "weight": 1}, '
                                           '{"role": "assistant", "content": "b"}]}'), ["Example 5", "weight"]),
    "a key nobody knows": (with_line('{"prio": 1, ' + message()[1:]), ["Example 5", "prio"]),
    "preferences": (with_line('{"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}', 1),
                    ["preference", "dpo", "supervised"]),
    "every label masked": ((message(weight=0) + "\n").encode() * 12, ["nothing to learn", "weight"]),
    "nine examples": ("\n".join(GOOD[:9]).encode(), ["9 example(s)", "at least 10"]),
}


class Datasets(unittest.TestCase):
    def error_of(self, data):
        file = server.upload(data)
        if file.status != 200:
            self.assertEqual(file.status, 400, file)
            return file.error["message"]
        job = server.create_job(file.json["id"], epochs=1)
        self.assertEqual(job.status, 200, job)
        job = server.wait_job(job.json["id"], 60)
        self.assertEqual(job["status"], "failed", job)
        self.assertEqual(job["error"]["param"], "training_file")
        return job["error"]["message"]

    def test_each_is_refused_in_words(self):
        for name, (data, words) in DATASETS.items():
            with self.subTest(name):
                text = self.error_of(data)
                for word in words:
                    self.assertIn(word.lower(), text.lower())

    def test_a_line_without_end(self):
        """2 MiB without a newline: refused by line, in little memory (the unit test feeds 1 GB)."""
        data = with_line('{"messages": [{"role": "user", "content": "' + "x" * (2 << 20) + '"}]}')
        self.assertIn("Example 5", self.error_of(data))

    def test_line_ends_of_another_system_are_fine(self):
        file = server.upload("\r\n".join(GOOD).encode() + b"\r\n")
        job = server.wait_job(server.create_job(file.json["id"], epochs=1).json["id"])
        self.assertEqual(job["status"], "succeeded", job)


def rewrite_header(change):
    """A change to the model that edits the parsed header of its safetensors file."""
    def apply(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])
    return apply


def rewrite_config(**fields):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(fields)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return apply


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def declare_more(header):
    header["model.norm.weight"]["shape"] = [HUGE]
    begin = header["model.norm.weight"]["data_offsets"][0]
    header["model.norm.weight"]["data_offsets"][1] = begin + 4 * HUGE


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]


# name: (what is done to a good model folder, words that the error must have)
MODELS = {
    "truncated weights": (cut("model.safetensors", 5000), ["model.safetensors"]),
    "empty weights": (write("model.safetensors", b""), ["model.safetensors"]),
    "declared tensor larger than the file": (rewrite_header(declare_more), ["model.safetensors", "model.norm.weight"]),
    "overlapping tensors": (rewrite_header(overlap), ["model.safetensors"]),
    "a header of 2^60 bytes": (write("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
                               ["model.safetensors", "header"]),
    "a missing tensor": (rewrite_header(lambda h: h.__setitem__("other", h.pop("model.norm.weight"))),
                         ["model.norm.weight"]),
    "a dtype nobody knows": (rewrite_header(lambda h: h["model.norm.weight"].update(dtype="F8_E4M3")), ["F8_E4M3"]),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "another architecture": (rewrite_config(model_type="mamba", architectures=["MambaForCausalLM"]), ["mamba", "llama"]),
    "sizes that do not fit": (rewrite_config(hidden_size=96), ["model.embed_tokens.weight", "shape", "config.json"]),
    "layers beyond reason": (rewrite_config(num_hidden_layers=2000000000), ["config.json", "number of layers", "1024"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (cut("tokenizer.json", 700), ["tokenizer", "JSON", "line"]),
    "GGUF that is none": (lambda folder: shutil.rmtree(folder), []),
}


class Models(unittest.TestCase):
    def refused(self, path, words):
        done = server.command("model", "import", path, "--name", "broken", "--data", server.data)
        self.assertEqual(done.returncode, 1, done)
        self.assertEqual(done.stdout, "")
        for word in words:
            self.assertIn(word, done.stderr)

    def test_each_is_refused_in_words(self):
        for name, (damage, words) in MODELS.items():
            with self.subTest(name):
                folder = server.folder / "broken"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(server.model_path, folder)
                damage(folder)
                if not folder.exists():
                    folder = server.folder / "broken.gguf"
                    folder.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1 << 62))
                    words = ["broken.gguf"]
                self.refused(folder, words)
        self.assertNotIn("broken", server.cli("model", "list", "--data", server.data))


JOB = {"model": "tiny", "training_file": "file-x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
# name: (path, body, words that the error must have)
BODIES = {
    "no body": ("/v1/fine_tuning/jobs", b"", []),
    "truncated JSON": ("/v1/fine_tuning/jobs", b'{"model": "tiny"', ["JSON"]),
    "an array": ("/v1/fine_tuning/jobs", b"[]", ["object"]),
    "invalid UTF-8": ("/v1/chat/completions", b'{"model": "t\xff"}', ["0xff", "column 12"]),
    "duplicate key": ("/v1/chat/completions", b'{"model": "a", "model": "b"}', ["duplicate"]),
    "byte order mark": ("/v1/chat/completions", b"\xef\xbb\xbf{}", ["byte order mark"]),
    "depth bomb": ("/v1/chat/completions", b'{"messages": ' + b"[" * 100000 + b"]" * 100000 + b"}", ["nested deeper"]),
    "model is a number": ("/v1/fine_tuning/jobs", {**JOB, "model": 7}, ["model"]),
    "no training_file": ("/v1/fine_tuning/jobs", {"model": "tiny"}, ["training_file"]),
    "a file that is not there": ("/v1/fine_tuning/jobs", JOB, ["file-x"]),
    "51 epochs": ("/v1/fine_tuning/jobs", {**JOB, "hyperparameters": {"n_epochs": 51}}, ["n_epochs", "50"]),
    "a suffix of 65": ("/v1/fine_tuning/jobs", {**JOB, "suffix": "s" * 65}, ["suffix", "64"]),
    "a field nobody knows": ("/v1/fine_tuning/jobs", {**JOB, "priority": 1}, ["priority"]),
    "17 pairs of metadata": ("/v1/fine_tuning/jobs", {**JOB, "metadata": {str(i): "" for i in range(17)}},
                             ["metadata", "16"]),
    "no messages": ("/v1/chat/completions", {"model": "tiny"}, ["messages"]),
    "empty messages": ("/v1/chat/completions", {**CHAT, "messages": []}, ["messages"]),
    "temperature 3": ("/v1/chat/completions", {**CHAT, "temperature": 3}, ["temperature", "2"]),
    "five stops": ("/v1/chat/completions", {**CHAT, "stop": ["a"] * 5}, ["stop", "4"]),
    "a prompt beyond the context": ("/v1/chat/completions", {**CHAT, "messages": [
        {"role": "user", "content": "word " * 5000}]}, ["context"]),
    "a model nobody has": ("/v1/chat/completions", {**CHAT, "model": "nobody"}, ["nobody", "does not exist"]),
}


class Bodies(unittest.TestCase):
    def test_each_is_refused_in_words(self):
        for name, (path, body, words) in BODIES.items():
            with self.subTest(name):
                reply = server.post(path, body, headers={"Content-Type": "application/json"})
                self.assertIn(reply.status, (400, 404), reply)
                self.assertEqual(set(reply.error), {"message", "type", "param", "code"})
                self.assertGreater(len(reply.error["message"]), 10)
                for word in words:
                    self.assertIn(word, f'{reply.error["message"]} {reply.error["param"]}')


class Afterwards(unittest.TestCase):
    def test_the_service_is_unharmed(self):
        workers = server.workers()
        self.assertEqual(len(workers), 2)
        Datasets("error_of").error_of(DATASETS["truncated line"][0])
        server.post("/v1/chat/completions", b"{", headers={"Content-Type": "application/json"})
        self.assertEqual(server.chat("tiny", "hello").status, 200)
        job = server.wait_job(server.create_job(server.upload(harness.examples(harness.FACTS)).json["id"],
                                                epochs=1).json["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertEqual(server.workers(), workers, "a worker was replaced")


if __name__ == "__main__":
    unittest.main()
