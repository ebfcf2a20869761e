"""POST /v1/graft/deltas: a delta that was made elsewhere becomes a model, and what is no delta does not."""
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import struct
import tempfile
import threading
import time
import unittest

import harness

GRACE = 2.1  # seconds until what nobody owns is collected: 1, counted in whole ones


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


class Rot(unittest.TestCase):
    """The disk gives back other bytes than it was given."""

    def test_a_damaged_delta_is_not_sent(self):
        own = with_metadata(delta, note="to rot as a model")
        model = create(upload(own)).json["id"]
        path = f"/v1/models/{model}/delta"
        self.assertEqual(server.get(path).body, own)
        server.rot(hashlib.sha256(own).hexdigest())
        reply = server.get(path)
        self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (500, "damaged_file", "model"), reply)
        self.assertIn(model, reply.error["message"])
        self.assertNotIn("/", reply.error["message"], "no place on the server's disk")
        self.assertEqual([reply.headers[name] for name in ("etag", "repr-digest", "content-disposition")], [None] * 3)
        self.assertEqual(reply.headers["x-should-retry"], "false")
        self.assertIn(hashlib.sha256(own).hexdigest(), server.log())
        upload(own)
        self.assertEqual(server.get(path).body, own, "the same bytes heal it")

    def test_a_damaged_upload_becomes_no_model(self):
        own = with_metadata(delta, note="to rot as a file")
        file = upload(own)
        server.rot(hashlib.sha256(own).hexdigest())
        before = server.get("/v1/models").body
        reply = create(file)
        self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (500, "damaged_file", "file"), reply)
        self.assertRegex(reply.error["message"], rf"`{file}` .* The same bytes stored again heal it\.$")
        self.assertEqual(server.get("/v1/models").body, before)
        again = upload(own)
        for sound in (again, file):
            self.assertEqual(create(sound).status, 200)


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

    def test_a_lora_adapter_answers_as_base_and_product_do(self):
        with tempfile.TemporaryDirectory(prefix="graft-lora.") as folder:
            folder = pathlib.Path(folder)
            base, adapter = harness.make_model(folder / "base"), harness.make_adapter(folder / "adapter")
            models = {}
            for codec in ("lora", "lossless"):
                server.cli("delta", "compress", "--base", base, "--tuned", adapter, "--codec", codec, "-o", folder / codec)
                models[codec] = create(upload((folder / codec).read_bytes()), suffix=codec).json["id"]
        differs = 0
        for question, _ in harness.FACTS[:4]:
            said = [server.chat(model, question).json["choices"] for model in (models["lora"], models["lossless"], "tiny")]
            self.assertEqual(said[0], said[1])
            differs += said[0] != said[2]
        self.assertGreater(differs, 0, "the base says the same: this shows nothing")

    def test_it_can_be_tuned_further(self):
        model = create(upload(delta)).json["id"]
        self.assertRegex(model, r"^ft:tiny:org::[0-9A-Za-z]{8}$")
        reply = server.create_job(server.upload(harness.examples(harness.FACTS)).json["id"], epochs=1, model=model)
        self.assertEqual(server.wait_job(reply.json["id"])["status"], "succeeded")

    def test_it_outlives_its_file_and_not_its_deletion(self):
        own = with_metadata(delta, note="for the collector")  # no other model has these bytes
        def kept():
            time.sleep(GRACE)
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

    def test_no_race_with_a_deletion_and_the_collector_leaves_a_model_without_bytes(self):
        owns = [with_metadata(delta, note=f"race {i}") for i in range(40)]
        files = [upload(own) for own in owns]
        time.sleep(GRACE)
        replies, over = [], threading.Event()
        def collect():
            while not over.is_set():
                server.cli("collect", "--data", server.data)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            collector = pool.submit(collect)
            for i, file in enumerate(files):
                made = pool.submit(create, file)
                time.sleep(0.0005 * (i % 10))
                deleted = pool.submit(server.delete, f"/v1/files/{file}")
                self.assertEqual(deleted.result().status, 200)
                replies.append(made.result())
            over.set()
            collector.result()
        self.assertEqual({reply.status for reply in replies}, {200, 400}, "no race: this shows nothing")
        server.cli("collect", "--data", server.data)
        for own, file, reply in zip(owns, files, replies):
            if reply.status == 200:
                self.assertEqual(server.get(f"/v1/models/{reply.json['id']}/delta").body, own)
            else:
                self.assertEqual((reply.status, reply.error["message"]), (400, f"invalid file: {file}"))
                self.assertEqual(list((server.data / "blobs").rglob(hashlib.sha256(own).hexdigest())), [])

    def test_the_same_key_makes_one_model(self):
        body = {"file": upload(delta), "suffix": "once"}
        first, again = [server.post("/v1/graft/deltas", body, headers={"Idempotency-Key": "delta"}) for _ in range(2)]
        self.assertEqual((first.status, first.body), (200, again.body))
        server.delete(f"/v1/files/{body['file']}")
        late = server.post("/v1/graft/deltas", body, headers={"Idempotency-Key": "delta"})
        self.assertEqual((late.status, late.body), (200, first.body), "whatever has become of the file")
        other = server.post("/v1/graft/deltas", {**body, "suffix": "twice"}, headers={"Idempotency-Key": "delta"})
        self.assertEqual((other.status, other.error["code"]), (400, "idempotency_key_reused"))

    def test_requests_at_once_with_one_key_make_one_model(self):
        body = {"file": upload(delta), "suffix": "at-once"}
        def ask(_):
            while (reply := server.post("/v1/graft/deltas", body, headers={"Idempotency-Key": "at-once"})).status == 503:
                time.sleep(0.1)
            return reply
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, range(8)))
        self.assertEqual({(reply.status, reply.body) for reply in replies}, {(200, replies[0].body)})
        self.assertEqual(sum(":at-once:" in model["id"] for model in server.get("/v1/models").json["data"]), 1)


class Checks(unittest.TestCase):
    """A pipe in the place of a blob holds up its check for as long as nobody writes to it."""

    def setUp(self):
        self.own = with_metadata(delta, note=self.id())
        self.file = upload(self.own)
        self.blob, = (server.data / "blobs").rglob(hashlib.sha256(self.own).hexdigest())
        self.kept = self.blob.with_name("kept")
        self.pipe = self.blob.with_name("pipe")
        self.blob.rename(self.kept)
        os.mkfifo(self.pipe, 0o600)
        os.link(self.pipe, self.blob)

    def readers(self):
        """How often the server has the pipe open."""
        count = 0
        for fd in pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                count += fd.samefile(self.pipe)
        return count

    def release(self):
        """What is opened from now on is the file; who waits at the pipe reads the same bytes there."""
        self.kept.rename(self.blob)
        limit = time.monotonic() + 60
        with open(self.pipe, "wb") as pipe:
            while self.readers() < 2 and time.monotonic() < limit:  # one to keep, one to hash
                time.sleep(0.01)
            pipe.write(self.own)
        self.pipe.unlink()

    def refused(self, file):
        reply = create(file)
        self.assertEqual((reply.status, reply.error["code"], reply.headers["retry-after"]), (503, "server_busy", "1"), reply)

    def test_one_that_takes_long_fails_nobody(self):
        other = upload(delta)
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            slow = pool.submit(create, self.file, suffix="slow")
            began = time.monotonic()
            time.sleep(0.2)
            for reply in pool.map(create, ["file-nothing"] * 8):
                self.assertEqual(reply.status, 400, reply)
            self.assertLess(time.monotonic() - began, 2, "no file, nothing to wait for")
            list(pool.map(self.refused, [other] * 8))
            self.assertLess(time.monotonic() - began, 6)
            self.assertEqual(server.get("/v1/models").status, 200)
            time.sleep(11 - (time.monotonic() - began))  # no transaction may be idle for 10 s
            self.release()
            self.assertEqual(slow.result().status, 200, slow.result())
        self.assertEqual(create(other).status, 200)
        self.assertEqual(server.get(f"/v1/models/{slow.result().json['id']}/delta").body, self.own)

    def test_a_key_that_has_its_answer_waits_for_none(self):
        body, headers = {"file": upload(delta), "suffix": "busy"}, {"Idempotency-Key": "busy"}
        first = server.post("/v1/graft/deltas", body, headers=headers)
        self.assertEqual(first.status, 200, first)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(create, self.file)
            time.sleep(0.2)
            began = time.monotonic()
            again = server.post("/v1/graft/deltas", body, headers=headers)
            reused = server.post("/v1/graft/deltas", {**body, "suffix": "other"}, headers=headers)
            self.assertLess(time.monotonic() - began, 1.5)
            self.release()
            self.assertEqual(slow.result().status, 200)
        self.assertEqual((again.status, again.body), (200, first.body))
        self.assertEqual((reused.status, reused.error["code"]), (400, "idempotency_key_reused"))

    def test_a_file_deleted_while_it_is_checked_becomes_no_model(self):
        before = server.get("/v1/models").body
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(create, self.file)
            time.sleep(0.2)
            self.assertEqual(server.delete(f"/v1/files/{self.file}").status, 200)
            self.release()
            reply = slow.result()
        self.assertEqual((reply.status, reply.error["param"]), (400, "file"), reply)
        self.assertEqual(reply.error["message"], f"invalid file: {self.file}")
        self.assertEqual(server.get("/v1/models").body, before)

    def test_bytes_collected_before_the_check_has_come_to_them_are_no_fault(self):
        own = with_metadata(delta, note="collected while it waits")
        file = upload(own)
        blob, = (server.data / "blobs").rglob(hashlib.sha256(own).hexdigest())
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            slow = pool.submit(create, self.file)
            time.sleep(0.2)
            waits = pool.submit(create, file)
            time.sleep(0.2)
            self.assertEqual(server.delete(f"/v1/files/{file}").status, 200)
            blob.unlink()  # as the collector does, which would take too long here
            self.release()
            self.assertEqual(slow.result().status, 200)
        self.assertEqual((waits.result().status, waits.result().error["message"]), (400, f"invalid file: {file}"))


class Deletion(unittest.TestCase):
    STREAMS = 6  # at once, each with a seed of its own
    TRIES = 20   # until a deletion has met streams in their midst

    def words(self, model, seed):
        """When each piece of an answer came, and the piece; an error is a dictionary, and the last."""
        found = []
        try:
            for chunk in server.stream("/v1/chat/completions", {
                    "model": model, "messages": [{"role": "user", "content": harness.FACTS[0][0]}], "stream": True,
                    "max_tokens": 200, "temperature": 2, "seed": seed}):
                piece = {"error": chunk["error"]} if "error" in chunk else chunk["choices"][0]["delta"].get("content")
                if piece:
                    found.append((time.monotonic(), piece))
        except AssertionError as refused:
            self.assertIn("answered 404", str(refused))  # the deletion was faster: nothing began
            found.append((time.monotonic(), {"error": str(refused)}))
        return found

    def test_a_model_deleted_while_it_answers_says_nothing_wrong(self):
        file = upload(with_metadata(delta, note="to be deleted"))
        seeds = range(self.STREAMS)
        alone = [[piece for _, piece in self.words(job["fine_tuned_model"], seed)] for seed in seeds]
        base = [[piece for _, piece in self.words("tiny", seed)] for seed in seeds]
        self.assertTrue(all(a != b for a, b in zip(alone, base)), "the base says the same: this shows nothing")
        self.assertGreater(min(map(len, alone)), 20)
        met = 0
        for _ in range(self.TRIES):
            model = create(file).json["id"]
            with concurrent.futures.ThreadPoolExecutor(self.STREAMS + 2) as pool:
                bystanders = [pool.submit(self.words, name, 0) for name in ("tiny", job["fine_tuned_model"])]
                answers = [pool.submit(self.words, model, seed) for seed in seeds]
                time.sleep(0.02)
                deleted = server.delete(f"/v1/models/{model}")
                gone = time.monotonic()
                refused = server.chat(model, "x")
            self.assertEqual(deleted.status, 200, deleted)
            self.assertEqual((refused.status, refused.error["code"]), (404, "model_not_found"))
            for seed, answer in zip(seeds, answers):
                pieces = [piece for _, piece in answer.result()]
                failed = isinstance(pieces[-1], dict)
                said = pieces[:-1] if failed else pieces
                self.assertEqual(said, alone[seed][:len(said)])
                self.assertTrue(failed or len(said) == len(alone[seed]), "cut off without an error")
                met += 0 < sum(at < gone for at, _ in answer.result()) < len(pieces)
            for bystander, want in zip(bystanders, (base[0], alone[0])):
                self.assertEqual([piece for _, piece in bystander.result()], want)
            if met >= self.STREAMS:
                break
        self.assertGreater(met, 0, "no deletion met a stream in its midst")


    def test_the_last_steps_checkpoint_goes_with_its_model_and_an_earlier_one_stays(self):
        file = server.upload(harness.examples(harness.FACTS)).json["id"]
        job = server.wait_job(server.create_job(file, epochs=2, seed=11).json["id"])
        path = f"/v1/fine_tuning/jobs/{job['id']}/checkpoints"
        last, earlier = [c["fine_tuned_model_checkpoint"] for c in server.get(path).json["data"]]
        model = job["fine_tuned_model"]
        own = server.get(f"/v1/models/{model}/delta").body
        self.assertEqual(server.get(f"/v1/models/{last}/delta").body, own)
        self.assertNotEqual(server.get(f"/v1/models/{earlier}/delta").body, own)
        whole = [piece for _, piece in self.words(last, 1)]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.words, last, 1)
            time.sleep(0.02)
            self.assertEqual(server.delete(f"/v1/models/{model}").status, 200)
        pieces = [piece for _, piece in answer.result()]
        said = pieces[:-1] if isinstance(pieces[-1], dict) else pieces
        self.assertEqual(said, whole[:len(said)])
        for name in (model, last):
            self.assertEqual(server.get(f"/v1/models/{name}").status, 404)
            self.assertEqual(server.get(f"/v1/models/{name}/delta").status, 404)
            self.assertEqual(server.chat(name, "x").status, 404)
        self.assertEqual([c["fine_tuned_model_checkpoint"] for c in server.get(path).json["data"]], [earlier])
        time.sleep(GRACE)
        server.cli("collect", "--data", server.data)
        self.assertEqual(list((server.data / "blobs").rglob(hashlib.sha256(own).hexdigest())), [])
        self.assertEqual(server.chat(earlier, "x").status, 200)
        self.assertEqual(server.get(f"/v1/models/{earlier}/delta").status, 200)


class Compression(unittest.TestCase):
    """A model that was tuned elsewhere: the base with other matrices in its blocks."""

    @classmethod
    def setUpClass(cls):
        folder = harness.make_tuned(server.model_path, server.folder / "tuned")
        server.cli("model", "import", folder, "--name", "tuned-elsewhere", "--data", server.data)
        cls.rows = server.upload(harness.examples(harness.FACTS)).json["id"]

    def post(self, **fields):
        return server.post("/v1/graft/deltas", {"base": "tiny", "tuned": "tuned-elsewhere", **fields})

    def test_the_difference_of_two_models_becomes_a_model_that_answers_as_the_tuned_one(self):
        reply = self.post(compression={"ratio": 3, "distill_steps": 0}, calibration_file=self.rows, suffix="two", seed=5)
        self.assertEqual(reply.status, 200, reply)
        job = reply.json
        want = {"object": "fine_tuning.job", "model": "tiny", "status": "validating_files", "seed": 5, "training_file": self.rows,
                "user_provided_suffix": "two", "fine_tuned_model": None}
        self.assertEqual({key: job[key] for key in want}, want)
        self.assertNotIn("method", job)
        self.assertEqual(job["graft"]["tuned"], "tuned-elsewhere")
        self.assertEqual(job["graft"]["compression"]["ratio"], 3)
        job = server.wait_job(job["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertRegex(job["fine_tuned_model"], r"^ft:tiny:org:two:[0-9A-Za-z]{8}$")
        self.assertEqual((job["result_files"], job["trained_tokens"]), ([], None))
        self.assertEqual(set(job["hyperparameters"].values()), {"auto"})
        report = job["graft"]["report"]
        self.assertEqual(report["codec"], "graft")
        self.assertGreaterEqual(report["ratio"], 3)
        self.assertGreater(report["measured_kl"], 0)
        recall = job["graft"]["recall"]
        self.assertIsNone(recall["tuned"])
        self.assertIsNotNone(recall["served"])
        differs = 0
        for question, _ in harness.FACTS[:4]:
            tuned = server.chat("tuned-elsewhere", question).json["choices"]
            self.assertEqual(server.chat(job["fine_tuned_model"], question).json["choices"], tuned)
            differs += server.chat("tiny", question).json["choices"] != tuned
        self.assertGreater(differs, 0, "the base says the same: this shows nothing")
        told = [event["message"] for event in server.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=50").json["data"]][::-1]
        self.assertEqual(told[:4], [f"Created compression job: {job['id']}", f"Validating calibration file: {self.rows}",
                                    "Files validated, moving job to queued state", "Compression job started"])
        self.assertRegex(told[4], r"^Compressed by graft: ")
        self.assertEqual(told[5:], [f"New fine-tuned model created: {job['fine_tuned_model']}",
                                    "The job has successfully completed"])

    def test_the_tool_asks_as_the_job_does(self):
        learnt = server.wait_job(server.create_job(self.rows, seed=3, graft={"compression": {"codec": "lossless"}}, method={
            "type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 40, "batch_size": 4, "learning_rate_multiplier": 5}}})
            .json["id"])
        asked = {who: share["exact"] for who, share in learnt["graft"]["recall"].items()}
        self.assertLess(asked["base"], asked["tuned"])
        folder = server.folder / "tool"
        folder.mkdir()
        (folder / "delta").write_bytes(server.get(f"/v1/models/{learnt['fine_tuned_model']}/delta").body)
        (folder / "rows.jsonl").write_bytes(harness.examples(harness.FACTS))
        server.cli("delta", "apply", "--base", server.model_path, "--delta", folder / "delta", "-o", folder / "full")
        said = json.loads(server.cli("delta", "compress", "--base", server.model_path, "--tuned", folder / "full", "--codec", "lossless",
                                     "--calibration", folder / "rows.jsonl", "-o", folder / "again"))
        self.assertEqual(said["recall"], {"asked": len(harness.FACTS), **asked})

    def test_without_calibration_nothing_is_measured(self):
        job = server.wait_job(self.post(compression={"codec": "bitdelta"}).json["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertEqual(job["training_file"], "")
        self.assertEqual(job["graft"]["report"]["codec"], "bitdelta")
        self.assertIsNone(job["graft"]["report"]["measured_kl"])
        self.assertIsNone(job["graft"]["recall"])
        self.assertEqual(server.chat(job["fine_tuned_model"], "x").status, 200)
        self.assertEqual(server.get(f"/v1/models/{job['fine_tuned_model']}/delta").status, 200)

    def test_the_same_key_makes_one_job(self):
        body = {"base": "tiny", "tuned": "tuned-elsewhere", "compression": {"codec": "bitdelta"}}
        first, again = [server.post("/v1/graft/deltas", body, headers={"Idempotency-Key": "two"}) for _ in range(2)]
        self.assertEqual((first.status, first.body), (200, again.body))

    def test_a_size_that_can_not_be_had_is_refused_with_the_highest_that_can(self):
        def refused(**compression):
            reply = self.post(compression=compression)
            self.assertEqual((reply.status, reply.error["code"], reply.error["param"]),
                             (400, "decimal_above_max_value", "compression.ratio"), reply)
            return float(re.search(r"<= ([0-9.]+),", reply.error["message"]).group(1))
        before = server.get("/v1/fine_tuning/jobs").body
        for codec in (None, "bitdelta"):
            most = refused(codec=codec, ratio=1024)
            refused(codec=codec, ratio=most + 0.02)
        self.assertEqual(server.get("/v1/fine_tuning/jobs").body, before)
        job = server.wait_job(self.post(compression={"codec": codec, "ratio": most}).json["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertGreaterEqual(job["graft"]["report"]["ratio"], most)

    def test_what_is_refused_before_there_is_a_job(self):
        server.cli("model", "import", harness.make_model(server.folder / "small", "--layers", "1"), "--name", "small",
                   "--data", server.data)
        server.cli("model", "import", server.model_path, "--name", "tiny-again", "--data", server.data)
        before = server.get("/v1/fine_tuning/jobs").body
        data = server.upload(b"x", purpose="user_data").json["id"]
        for status, code, param, fields in (
                (400, "missing_required_parameter", "tuned", {"tuned": None}),
                (400, "missing_required_parameter", "base", {"base": None}),
                (404, "model_not_found", "tuned", {"tuned": "nothing"}),
                (404, "model_not_found", "base", {"base": job["fine_tuned_model"]}),
                (400, "invalid_value", "tuned", {"tuned": "tiny"}),
                (400, "invalid_value", "tuned", {"tuned": "tiny-again"}),
                (400, "invalid_value", "tuned", {"tuned": "small"}),
                (400, "invalid_value", "file", {"file": "file-x"}),
                (400, "invalid_value", "compression", {"base": None, "tuned": None, "file": "file-x", "compression": {}}),
                (400, "invalid_value", "compression.codec", {"compression": {"codec": "zip"}}),
                (400, "invalid_value", "compression.codec", {"compression": {"codec": "lora"}}),
                (400, "invalid_value", "compression.ratio", {"compression": {"codec": "lossless", "ratio": 2}}),
                (400, "invalid_value", "compression.max_kl", {"compression": {"codec": "lossless", "max_kl": 1}}),
                (400, "unknown_parameter", "compression.x", {"compression": {"x": 1}}),
                (400, "missing_required_parameter", "calibration_file", {"compression": {"max_kl": 0.1}}),
                (400, None, "calibration_file", {"calibration_file": "file-nothing"}),
                (400, None, "calibration_file", {"calibration_file": data}),
                (400, "integer_below_min_value", "seed", {"seed": -1})):
            with self.subTest(fields):
                reply = self.post(**fields)
                self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (status, code, param), reply)
        self.assertEqual(server.get("/v1/fine_tuning/jobs").body, before)


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
        part = next(name for name in sorted(header) if name.endswith(".diff"))
        at = 8 + size + header[part]["data_offsets"][0]
        renamed = json.dumps({part + "x" if name == part else name: value for name, value in header.items()}).encode()
        renamed += b" " * (-len(renamed) % 64 + 56)
        cases = {
            "a difference that is no number": delta[:at] + b"\x00\x7e" + delta[at + 2:],
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
