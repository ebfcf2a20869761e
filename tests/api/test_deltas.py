"""POST /v1/graft/deltas: a delta that was made elsewhere becomes a model, and what is no delta does not."""
import hashlib
import json
import struct
import time
import unittest

import harness


def setUpModule():
    global server, job, delta
    server = harness.Server(poll=0.1, grace=1, sweep=0.5)
    file = server.upload(harness.examples(harness.FACTS)).json["id"]
    job = server.wait_job(server.create_job(file, epochs=5, seed=3).json["id"])
    assert job["status"] == "succeeded", job
    delta = server.get(f"/v1/models/{job['fine_tuned_model']}/delta").body


def tearDownModule():
    server.stop()


def upload(data, **options):
    reply = server.upload(data, name="delta.safetensors", purpose="graft-delta", **options)
    assert reply.status == 200, reply
    return reply.json["id"]


def create(file, key=harness.Server.OWN, **fields):
    return server.post("/v1/graft/deltas", {"file": file, **fields}, key=key)


def with_metadata(data, **changes):
    """The same file with other metadata; None takes a key away."""
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    for name, value in changes.items():
        header["__metadata__"]["graft." + name] = value
        if value is None:
            del header["__metadata__"]["graft." + name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begin at a multiple of 64
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


class Import(unittest.TestCase):
    def test_another_project_answers_with_it_as_its_maker_does(self):
        key = server.new_key("elsewhere", "elsewhere")
        reply = create(upload(delta, key=key), key=key, suffix="Moved")
        self.assertEqual(reply.status, 200, reply)
        model = reply.json
        self.assertEqual(sorted(model), ["created", "id", "object", "owned_by"])
        self.assertRegex(model["id"], r"^ft:tiny:elsewhere:moved:[0-9A-Za-z]{8}$")
        self.assertEqual(server.get(f"/v1/models/{model['id']}", key=key).json, model)
        self.assertIn(model, server.get("/v1/models", key=key).json["data"])
        differs = 0
        for question, _ in harness.FACTS[:4]:
            made, moved = server.chat(job["fine_tuned_model"], question), server.chat(model["id"], question, key=key)
            self.assertEqual(moved.status, 200, moved)
            self.assertEqual(moved.json["choices"], made.json["choices"])
            differs += made.json["choices"] != server.chat("tiny", question).json["choices"]
        self.assertGreater(differs, 0, "the base says the same: this shows nothing")
        self.assertEqual(server.get(f"/v1/models/{model['id']}/delta", key=key).body, delta)
        self.assertEqual(server.chat(model["id"], "x").status, 404, "it is the other project's own")
        self.assertEqual(server.get(f"/v1/models/{model['id']}").status, 404)

    def test_it_can_be_tuned_further(self):
        model = create(upload(delta)).json["id"]
        self.assertRegex(model, r"^ft:tiny:org::[0-9A-Za-z]{8}$")
        reply = server.create_job(server.upload(harness.examples(harness.FACTS)).json["id"], epochs=1, model=model)
        self.assertEqual(server.wait_job(reply.json["id"])["status"], "succeeded")

    def test_it_outlives_its_file_and_not_its_deletion(self):
        own = with_metadata(delta, note="for the collector")  # no other model has these bytes
        def kept():
            time.sleep(1.5)  # the collector's grace
            server.cli("collect", "--data", server.data)
            return len(list((server.data / "blobs").rglob(hashlib.sha256(own).hexdigest())))
        file = upload(own)
        model = create(file).json["id"]
        self.assertEqual(server.delete(f"/v1/files/{file}").status, 200)
        self.assertEqual(kept(), 1)
        self.assertEqual(server.chat(model, "x").status, 200)
        self.assertEqual(server.delete(f"/v1/models/{model}").status, 200)
        self.assertEqual(server.chat(model, "x").status, 404)
        self.assertEqual(kept(), 0)
        self.assertEqual(create(file).error["param"], "file")

    def test_the_same_key_makes_one_model(self):
        body = {"file": upload(delta), "suffix": "once"}
        first, again = [server.post("/v1/graft/deltas", body, headers={"Idempotency-Key": "delta"}) for _ in range(2)]
        self.assertEqual((first.status, first.body), (200, again.body))
        other = server.post("/v1/graft/deltas", {**body, "suffix": "twice"}, headers={"Idempotency-Key": "delta"})
        self.assertEqual((other.status, other.error["code"]), (400, "idempotency_key_reused"))


class Refusal(unittest.TestCase):
    def refused(self, file, code="invalid_delta", param="file", **fields):
        before = server.get("/v1/models").body
        reply = create(file, **fields)
        self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (400, code, param), reply)
        self.assertEqual(reply.error["type"], "invalid_request_error")
        self.assertEqual(server.get("/v1/models").body, before)
        return reply.error["message"]

    def test_requests(self):
        file = upload(delta)
        self.assertIn("file", self.refused(None, "missing_required_parameter"))
        self.refused(7, "invalid_type")
        self.refused("file-nothing", None)
        self.refused("../../etc/passwd", None)
        self.refused(file, "invalid_value", "suffix", suffix="a:b")
        self.refused(file, "unknown_parameter", "name", name="x")
        self.assertIn("graft-delta", self.refused(server.upload(delta, purpose="user_data").json["id"], None))
        theirs = upload(delta, key=server.new_key("theirs", "theirs"))
        self.assertEqual(self.refused(theirs, None), f"invalid file: {theirs}")
        self.assertEqual(server.post("/v1/graft/deltas", {"file": file}, key=None).status, 401)

    def test_files_that_are_no_deltas(self):
        size = struct.unpack("<Q", delta[:8])[0]
        cases = {
            "short": b"abc",
            "text": b"this is not a delta, but a text",
            "a header without an end": struct.pack("<Q", 1 << 60) + delta[8:],
            "a header cut off": delta[:8 + size // 2],
            "no JSON": delta[:8] + b"{" * size + delta[8 + size:],
            "an array": struct.pack("<Q", 2) + b"[]",
            "metadata that are none": struct.pack("<Q", 19) + b'{"__metadata__": 1}',
            "another format": with_metadata(delta, format="lora"),
            "another version": with_metadata(delta, version="99"),
            "a part of a version": with_metadata(delta, version=""),
            "no base": with_metadata(delta, base=None),
            "a base that is no digest": with_metadata(delta, base="A" * 64),
            "no codec": with_metadata(delta, codec=None),
            "a codec that is a number": with_metadata(delta, codec=7),
        }
        for name, data in cases.items():
            with self.subTest(name):
                self.refused(upload(data))

    def test_deltas_that_are_damaged(self):
        size, = struct.unpack("<Q", delta[:8])
        header = json.loads(delta[8:8 + size])
        scale = next(name for name in sorted(header) if name.endswith(".scale"))
        at = 8 + size + header[scale]["data_offsets"][0]
        renamed = json.dumps({scale + "x" if name == scale else name: value for name, value in header.items()}).encode()
        renamed += b" " * (-len(renamed) % 64 + 56)
        cases = {
            "a scale that is no number": delta[:at] + b"\x00\x7e" + delta[at + 2:],
            "a part under another name": struct.pack("<Q", len(renamed)) + renamed + delta[8 + size:],
            "cut off": delta[:-2],
            "longer than it says": delta + b"\0\0",
        }
        for name, data in cases.items():
            with self.subTest(name):
                self.assertNotIn("/", self.refused(upload(data)), "no place on the server's disk")

    def test_another_base_is_named(self):
        digest = hashlib.sha256(b"another base").hexdigest()
        self.assertIn(digest, self.refused(upload(with_metadata(delta, base=digest))))


if __name__ == "__main__":
    unittest.main()
