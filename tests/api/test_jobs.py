"""The main path: files -> job -> events -> checkpoints -> result file -> chat with the tuned model; and its other ends."""
import base64
import csv
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import time
import unittest
import urllib.parse

import harness

EPOCHS = 5
MORE_FACTS = [(f"Where does person {i} live?", f"In town {i * 7 % 40}.") for i in range(40)]


def setUpModule():
    global server
    # No room for deltas: each is loaded for its request and goes with the next one.
    server = harness.Server(recovery=0.3, heartbeat=0.5, fence=5, sweep=0.5, poll=0.1, delta_memory=0)


def tearDownModule():
    server.stop()


def events_of(job_id):
    """Oldest first."""
    found, after = [], ""
    while True:
        page = server.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=50{after}").json
        found += page["data"]
        if not page["has_more"]:
            return found[::-1]
        after = f"&after={page['data'][-1]['id']}"


def start(data, epochs=EPOCHS, **fields):
    file = server.upload(data)
    assert file.status == 200, file
    job = server.create_job(file.json["id"], epochs=epochs, seed=11, **fields)
    assert job.status == 200, job
    return job.json


def metadata(delta):
    """What a delta file says of itself."""
    size, = struct.unpack("<Q", delta[:8])
    return json.loads(delta[8:8 + size])["__metadata__"]


class Success(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.created = start(harness.examples(harness.FACTS), suffix="towns", graft=None)
        cls.job = server.wait_job(cls.created["id"])
        cls.events = events_of(cls.job["id"])
        cls.messages = [event["message"] for event in cls.events if event["type"] == "message"]
        cls.metrics = [event["data"] for event in cls.events if event["type"] == "metrics"]

    def test_the_job_says_how_it_went(self):
        job = self.job
        self.assertEqual(job["status"], "succeeded", job)
        self.assertEqual(self.created["hyperparameters"].get("n_epochs"), EPOCHS)
        self.assertEqual(job["hyperparameters"]["n_epochs"], EPOCHS)
        self.assertIsInstance(job["hyperparameters"]["learning_rate_multiplier"], (int, float))
        self.assertRegex(job["fine_tuned_model"], r"^ft:tiny:org:towns:[0-9A-Za-z]{8}$")
        self.assertGreater(job["trained_tokens"], 0)
        self.assertGreaterEqual(job["finished_at"], job["created_at"])
        self.assertIsNone(job["estimated_finish"])
        self.assertIsNone(job["error"])
        self.assertEqual(len(job["result_files"]), 1)

    def test_the_job_says_what_compression_took_and_cost(self):
        report, delta = self.job["graft"]["report"], self.job["graft"]["delta"]
        for key in ("codec", "bytes"):
            self.assertEqual(report[key], delta[key])
        self.assertAlmostEqual(report["ratio"], delta["ratio"], places=5)
        self.assertEqual((report["codec"], report["distill_steps"]), ("graft", 60), "the default")
        self.assertGreater(report["relative_error"], 0)
        self.assertGreater(report["measured_kl"], 0)
        self.assertGreater(report["held_out_loss"], 0)
        self.assertGreaterEqual(report["seconds"], report["distill_seconds"])
        self.assertLess(report["linear_bytes"], report["bytes"])
        (event,) = [event for event in self.events if event["message"].startswith("Compressed by ")]
        self.assertRegex(event["message"], rf"^Compressed by {report['codec']}: [0-9.]+ [kM]B, 1/[0-9.]+ of the 16-bit model, KL [0-9.e-]+$")
        self.assertEqual(event["data"], report)

    def test_the_story_is_told_in_order(self):
        job = self.job
        expected = [f"Created fine-tuning job: {job['id']}", f"Validating training file: {job['training_file']}",
                    "Files validated, moving job to queued state", "Fine-tuning job started"]
        self.assertEqual(self.messages[:4], expected)
        self.assertEqual(self.messages[-2:], [f"New fine-tuned model created: {job['fine_tuned_model']}",
                                              "The job has successfully completed"])
        steps = EPOCHS * 3  # 12 examples, 4 a step
        self.assertEqual([m["step"] for m in self.metrics], list(range(1, steps + 1)))
        self.assertTrue(all(m["total_steps"] == steps for m in self.metrics))
        self.assertTrue(all("valid_loss" not in m for m in self.metrics))
        first = next(event for event in self.events if event["type"] == "metrics")
        self.assertEqual(first["message"], f"Step 1/{steps}: training loss={first['data']['train_loss']:.2f}")

    def test_it_learns(self):
        self.assertLess(self.metrics[-1]["train_loss"], self.metrics[0]["train_loss"])

    def test_the_last_three_epochs_are_models(self):
        page = server.get(f"/v1/fine_tuning/jobs/{self.job['id']}/checkpoints").json
        self.assertEqual([point["step_number"] for point in page["data"]], [15, 12, 9])
        for point in page["data"]:
            name = f"{self.job['fine_tuned_model']}:ckpt-step-{point['step_number']}"
            self.assertEqual(point["fine_tuned_model_checkpoint"], name)
            self.assertAlmostEqual(point["metrics"]["train_loss"], self.metrics[point["step_number"] - 1]["train_loss"], places=5)
            self.assertEqual(server.chat(name, harness.FACTS[0][0]).status, 200)
            self.assertIn(f"Checkpoint created at step {point['step_number']} with Snapshot ID: {name}", self.messages)

    def test_the_result_file_has_every_step(self):
        reply = server.get(f"/v1/files/{self.job['result_files'][0]}/content")
        self.assertEqual(reply.status, 200)
        rows = list(csv.DictReader(io.StringIO(reply.body.decode())))
        self.assertEqual(list(rows[0]), ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
        self.assertEqual([int(row["step"]) for row in rows], [m["step"] for m in self.metrics])
        self.assertAlmostEqual(float(rows[-1]["train_loss"]), self.metrics[-1]["train_loss"], places=4)
        self.assertEqual(rows[0]["valid_loss"], "")
        meta = server.get(f"/v1/files/{self.job['result_files'][0]}").json
        self.assertEqual(meta["purpose"], "fine-tune-results")

    def test_the_tuned_model_answers_and_is_listed(self):
        self.assertIn(self.job["fine_tuned_model"], [model["id"] for model in server.get("/v1/models").json["data"]])
        tuned = server.chat(self.job["fine_tuned_model"], harness.FACTS[0][0])
        self.assertEqual(tuned.status, 200, tuned)
        self.assertEqual(tuned.json["model"], self.job["fine_tuned_model"])

    def test_a_delta_that_was_evicted_answers_the_same(self):
        names = [self.job["fine_tuned_model"], f"{self.job['fine_tuned_model']}:ckpt-step-9"]
        texts = [[server.chat(name, harness.FACTS[1][0]).json["choices"] for name in names] for _ in range(3)]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[0], texts[2])

    def test_a_delta_is_downloaded_by_its_project(self):
        name = self.job["fine_tuned_model"]
        reply = server.get(f"/v1/models/{urllib.parse.quote(name, safe='')}/delta")
        self.assertEqual(reply.status, 200, reply)
        self.assertEqual(reply.headers["content-type"], "application/octet-stream")
        self.assertEqual(len(reply.body), self.job["graft"]["delta"]["bytes"])
        digest = hashlib.sha256(reply.body)
        self.assertEqual(reply.headers["etag"], f'"{digest.hexdigest()}"')
        self.assertEqual(reply.headers["repr-digest"], f"sha-256=:{base64.b64encode(digest.digest()).decode()}:")
        self.assertEqual(reply.headers["content-disposition"], f'attachment; filename="{name.replace(":", "-")}.safetensors"')
        said = metadata(reply.body)
        self.assertEqual((said["graft.format"], said["graft.codec"]), ("delta", self.job["graft"]["delta"]["codec"]))
        self.assertEqual(server.request("HEAD", f"/v1/models/{name}/delta").headers["etag"], reply.headers["etag"])
        earlier = server.get(f"/v1/models/{name}:ckpt-step-9/delta")
        self.assertEqual(earlier.status, 200)
        self.assertNotEqual(earlier.body, reply.body)
        stranger = server.get(f"/v1/models/{name}/delta", key=server.new_key("strangers", "strangers"))
        nobody = server.get("/v1/models/ft:tiny:org::12345678/delta")
        for missing, path in ((stranger, name), (nobody, "ft:tiny:org::12345678")):
            self.assertEqual((missing.status, missing.error["code"], missing.error["param"]), (404, "model_not_found", "model"))
            self.assertEqual(missing.error["message"], f"The model `{path}` does not exist or you do not have access to it.")
        base = server.get("/v1/models/tiny/delta")
        self.assertEqual((base.status, base.error["code"]), (404, "model_not_found"))
        self.assertEqual(server.get(f"/v1/models/{name}/delta", key=None).status, 401)

    def test_it_can_be_tuned_further(self):
        job = start(harness.examples(harness.FACTS), epochs=1, model=self.job["fine_tuned_model"])
        job = server.wait_job(job["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertEqual(job["model"], self.job["fine_tuned_model"])
        first = next(e["data"] for e in events_of(job["id"]) if e["type"] == "metrics")
        self.assertLess(first["train_loss"], self.metrics[0]["train_loss"])
        self.assertEqual(server.chat(job["fine_tuned_model"], harness.FACTS[0][0]).status, 200)

    def test_deleted_is_deleted(self):
        job = server.wait_job(start(harness.examples(harness.FACTS), epochs=1)["id"])
        name = job["fine_tuned_model"]
        self.assertEqual(server.chat(name, "x").status, 200)
        self.assertEqual(server.delete(f"/v1/models/{name}").json, {"id": name, "object": "model", "deleted": True})
        self.assertEqual(server.chat(name, "x").status, 404)


class Validation(unittest.TestCase):
    def test_metrics_of_a_validation_file(self):
        validation = server.upload(harness.examples(harness.FACTS[:4]), name="valid.jsonl").json["id"]
        job = start(harness.examples(harness.FACTS), epochs=2, validation_file=validation)
        job = server.wait_job(job["id"])
        self.assertEqual(job["status"], "succeeded", job)
        events = events_of(job["id"])
        self.assertIn(f"Validating training file: {job['training_file']} and validation file: {validation}",
                      [event["message"] for event in events])
        last = [event for event in events if event["type"] == "metrics"][-1]
        self.assertIn("full_valid_loss", last["data"])
        self.assertIn(", full validation loss=", last["message"])


class Compression(unittest.TestCase):
    def compressed(self, compression, **fields):
        job = start(harness.examples(harness.FACTS), epochs=2, graft={"compression": compression}, **fields)
        return server.wait_job(job["id"])

    def test_codec_and_size_are_as_they_were_asked(self):
        validation = server.upload(harness.examples(harness.FACTS[:4]), name="valid.jsonl").json["id"]
        for compression, codec in (({"codec": "bitdelta", "distill_steps": 0}, "bitdelta"),
                                   ({"codec": "graft", "ratio": 8, "distill_steps": 2}, "graft"),
                                   ({"ratio": 4, "distill_steps": 0}, "graft")):
            with self.subTest(compression):
                job = self.compressed(compression, validation_file=validation)
                self.assertEqual(job["status"], "succeeded", job)
                report, delta = job["graft"]["report"], job["graft"]["delta"]
                self.assertEqual((report["codec"], delta["codec"]), (codec, codec))
                self.assertEqual(report["distill_steps"], compression["distill_steps"])
                if "ratio" in compression:
                    self.assertGreaterEqual(delta["ratio"], compression["ratio"])
                    self.assertLess(delta["ratio"], 1.1 * compression["ratio"])
                self.assertGreater(report["measured_kl"], 0)
                body = server.get(f"/v1/models/{job['fine_tuned_model']}/delta").body
                said = metadata(body)
                self.assertEqual(said["graft.codec"], codec)
                self.assertEqual(json.loads(said["graft.report"])["distill_steps"], compression["distill_steps"])
                point = server.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json["data"][-1]
                self.assertEqual(point["step_number"], 3)
                early = server.get(f"/v1/models/{point['fine_tuned_model_checkpoint']}/delta").body
                self.assertLess(abs(len(early) / len(body) - 1), 0.1, "an epoch's checkpoint has the same budget")
                self.assertEqual(json.loads(metadata(early)["graft.report"])["distill_steps"], 0)
                self.assertEqual(server.chat(job["fine_tuned_model"], harness.FACTS[0][0]).status, 200)

    def test_a_kl_is_kept_to_by_a_smaller_file_where_more_is_allowed(self):
        reports = [self.compressed({"max_kl": kl, "distill_steps": 0})["graft"]["report"] for kl in (0.05, 0.001)]
        self.assertLessEqual(reports[0]["measured_kl"], 0.05)
        self.assertLessEqual(reports[1]["measured_kl"], 0.001)
        self.assertLess(reports[0]["bytes"], reports[1]["bytes"])
        job = self.compressed({"max_kl": 1e-9})
        self.assertEqual((job["status"], job["error"]["code"]), ("failed", "compression_failed"), job)

    def test_checkpoints_do_not_fail_a_job_whose_kl_only_distillation_keeps_to(self):
        # With bitdelta the largest file that is tried for a KL is the one that it makes unasked.
        plain, distilled = [self.compressed({"codec": "bitdelta", "distill_steps": steps})["graft"]["report"]["measured_kl"]
                            for steps in (0, 60)]
        self.assertLess(distilled, 0.8 * plain)
        job = self.compressed({"codec": "bitdelta", "max_kl": max((plain * distilled) ** 0.5, plain / 2.5), "distill_steps": 60})
        self.assertEqual(job["status"], "succeeded", job)
        self.assertEqual(job["graft"]["report"]["distill_steps"], 60)
        steps = [point["step_number"] for point in server.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json["data"]]
        self.assertEqual(steps, [6, 3])

    def test_it_is_measured_on_the_validation_file(self):
        validation = server.upload(harness.examples(harness.FACTS[:1]), name="valid.jsonl").json["id"]
        fields = {"compression": {"codec": "bitdelta", "distill_steps": 0}}
        tokens = [self.compressed(fields["compression"], **more)["graft"]["report"]["measured_tokens"]
                  for more in ({}, {"validation_file": validation})]
        self.assertGreater(tokens[0], tokens[1])
        self.assertGreater(tokens[1], 0)

    def refused(self, ratio, **graft):
        """The highest ratio that can be had, as a refusal says it."""
        codec = graft.pop("codec", None)
        file = server.upload(harness.examples(harness.FACTS)).json["id"]
        reply = server.create_job(file, epochs=1, graft={"compression": {"codec": codec, "ratio": ratio}, **graft})
        self.assertEqual(reply.status, 400, reply)
        self.assertEqual((reply.error["code"], reply.error["param"]), ("decimal_above_max_value", "graft.compression.ratio"))
        self.assertNotIn(str(server.data), reply.error["message"])
        return float(reply.error["message"].split("<= ")[1].split(", but")[0])

    def test_no_size_is_taken_for_a_codec_that_has_its_own(self):
        file = server.upload(harness.examples(harness.FACTS)).json["id"]
        for asked in ({"ratio": 1}, {"max_kl": 1}):
            reply = server.create_job(file, epochs=1, graft={"compression": {"codec": "lossless", **asked}})
            self.assertEqual((reply.status, reply.error["code"], reply.error["param"]),
                             (400, "invalid_value", f"graft.compression.{next(iter(asked))}"), reply)
            self.assertIn("lossless has the size that comes of what it keeps. Leave out", reply.error["message"])

    def test_a_size_that_can_not_be_had_is_refused_before_anything_is_trained(self):
        limit = self.refused(1024)
        job = self.compressed({"ratio": limit, "distill_steps": 0})
        self.assertEqual(job["status"], "succeeded", job)
        self.assertGreaterEqual(job["graft"]["delta"]["ratio"], limit)
        self.assertGreater(self.refused(limit + 0.02), limit - 0.01)
        self.assertLess(self.refused(1024, codec="bitdelta"), limit)
        self.assertLess(self.refused(1024, train_embeddings=True), limit)

    def test_trained_embeddings_have_room_without_being_asked_for(self):
        job = server.wait_job(start(harness.examples(harness.FACTS), epochs=1, graft={"train_embeddings": True})["id"])
        self.assertEqual(job["status"], "succeeded", job)
        self.assertGreater(job["graft"]["delta"]["bytes"], self.plain()["bytes"])

    def plain(self):
        return server.wait_job(start(harness.examples(harness.FACTS), epochs=1)["id"])["graft"]["delta"]


class Failure(unittest.TestCase):
    def fails(self, data, code, words):
        self.ends(start(data), code, "training_file", words)

    def ends(self, job, code, param, words):
        job = server.wait_job(job["id"])
        self.assertEqual(job["status"], "failed", job)
        self.assertEqual((job["error"]["code"], job["error"]["param"]), (code, param), job)
        self.assertIn(words, job["error"]["message"])
        self.assertIsNone(job["fine_tuned_model"])
        self.assertEqual(job["result_files"], [])
        self.assertEqual(events_of(job["id"])[-1]["level"], "error")

    def test_too_few_examples(self):
        self.fails(harness.examples(harness.FACTS[:7]), "invalid_n_examples",
                   "Training file has 7 example(s), but must have at least 10 examples")

    def test_every_label_masked(self):
        line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
        self.fails((json.dumps(line) + "\n").encode() * 12, "invalid_training_file", "")

    def test_a_message_without_a_role(self):
        lines = harness.examples(harness.FACTS).decode().splitlines()
        lines[4] = '{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}'
        self.fails("\n".join(lines).encode(), "invalid_training_file", "Example 5")

    def test_nothing_is_trained_on_bytes_that_have_rotted(self):
        data = harness.examples(harness.FACTS[::-1])
        file = server.upload(data).json["id"]
        server.rot(hashlib.sha256(data).hexdigest())
        self.ends(server.create_job(file).json, "damaged_file", "training_file", f"`{file}`")

    def test_a_job_waits_for_a_base_that_has_rotted_to_be_healed(self):
        base = server.base_blob()
        file = server.upload(harness.examples(harness.FACTS)).json["id"]
        server.rot(base)
        try:
            job = server.create_job(file).json["id"]
            limit = time.monotonic() + 60
            while not [e for e in events_of(job) if e["level"] == "warn" and f"`{server.model}`" in e["message"]]:
                self.assertLess(time.monotonic(), limit, server.log())
                time.sleep(0.05)
        finally:
            server.rot(base)
        self.assertEqual(server.wait_job(job)["status"], "succeeded")

    def test_a_job_does_not_wait_for_ever(self):
        other = harness.Server(disk_patience=1, poll=0.1)
        try:
            other.rot(other.base_blob())
            job = other.wait_job(other.create_job(other.upload(harness.examples(harness.FACTS)).json["id"]).json["id"])
            self.assertEqual((job["status"], job["error"]["code"], job["error"]["param"]), ("failed", "damaged_file", "model"))
            self.assertIn(f"`{other.model}`", job["error"]["message"])
            reply = other.chat(other.model, "x")
            self.assertIn(reply.status, (200, 500), "an answer may be out before the file is read to its end")
            limit = time.monotonic() + 20
            while (reply := other.chat(other.model, "x")).status == 200:
                self.assertLess(time.monotonic(), limit, "a base with other weights answers")
            self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (500, "damaged_file", "model"), reply)
        finally:
            other.stop()


class Warnings(unittest.TestCase):
    def test_rows_that_train_nothing_or_were_cut_are_said_aloud(self):
        pairs = harness.FACTS[:10] + [("Say it.", "word " * 400)]
        lines = harness.examples(pairs) + b'{"messages": [{"role": "user", "content": "nobody answers"}]}\n'
        job = server.wait_job(start(lines, epochs=1)["id"])
        self.assertEqual(job["status"], "succeeded", job)
        warnings = [event["message"] for event in events_of(job["id"]) if event["level"] == "warn"]
        self.assertEqual(len(warnings), 2, warnings)
        self.assertTrue(warnings[0].startswith("1 of 12 examples are longer than the model's context"), warnings)
        self.assertTrue(warnings[1].startswith("1 of 12 examples train nothing"), warnings)


class Cancel(unittest.TestCase):
    def test_a_running_job_stops_within_a_step(self):
        job = start(harness.examples(MORE_FACTS), epochs=50)
        limit = time.monotonic() + 60
        while server.get(f"/v1/fine_tuning/jobs/{job['id']}").json["status"] != "running":
            self.assertLess(time.monotonic(), limit, server.log())
            time.sleep(0.05)
        while (running := server.get(f"/v1/fine_tuning/jobs/{job['id']}").json)["estimated_finish"] is None:
            self.assertLess(time.monotonic(), limit, "a running job never said when it will end")
            time.sleep(0.05)
        self.assertEqual(running["status"], "running")
        self.assertEqual(running["hyperparameters"]["n_epochs"], 50)
        reply = server.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
        self.assertEqual((reply.status, reply.json["status"]), (200, "cancelled"), reply)
        events = len(events_of(job["id"]))
        # The worker is free for the next one, and nothing is told of a job that has ended.
        done = server.wait_job(start(harness.examples(harness.FACTS), epochs=1)["id"], 60)
        self.assertEqual(done["status"], "succeeded")
        self.assertEqual(len(events_of(job["id"])), events)
        self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job['id']}").json["status"], "cancelled")


    def compressing(self):
        """A job that would be distilled for minutes, while it is."""
        compression = {"ratio": 8, "distill_steps": 10000}
        job = start(harness.examples(harness.FACTS), epochs=1, graft={"compression": compression})["id"]
        self.reaches_compressing(job)
        return job

    def reaches_compressing(self, job):
        limit = time.monotonic() + 60
        while server.get(f"/v1/fine_tuning/jobs/{job}").json["graft"]["state"] != "compressing":
            self.assertLess(time.monotonic(), limit, server.log())
            time.sleep(0.05)
        time.sleep(1.5)  # well inside

    def ends_at_once(self, job):
        """The one worker has another job started soon after this one was cancelled."""
        reply = server.post(f"/v1/fine_tuning/jobs/{job}/cancel")
        self.assertEqual((reply.status, reply.json["status"]), (200, "cancelled"), reply)
        began = time.monotonic()
        compression = {"codec": "bitdelta", "distill_steps": 0}
        done = server.wait_job(start(harness.examples(harness.FACTS), epochs=1, graft={"compression": compression})["id"], 60)
        self.assertEqual(done["status"], "succeeded")
        self.assertLess(time.monotonic() - began, 20, "10000 steps of distillation take minutes")
        now = server.get(f"/v1/fine_tuning/jobs/{job}").json
        self.assertEqual((now["status"], now["fine_tuned_model"], now["graft"]["report"]), ("cancelled", None, None))

    def test_a_job_that_is_compressed_stops_within_a_step_too(self):
        self.ends_at_once(self.compressing())

    def test_a_server_that_is_stopped_does_not_wait_for_a_compression(self):
        job = self.compressing()
        began = time.monotonic()
        self.assertEqual(server.shutdown(), 0)
        self.assertLess(time.monotonic() - began, 15, "that is half of --drain, and far less than the compression")
        server.start()
        self.reaches_compressing(job)  # the next attempt
        self.ends_at_once(job)


class Poison(unittest.TestCase):
    def test_a_job_that_kills_its_worker_fails_and_harms_nobody(self):
        other = harness.Server(max_attempts=2, heartbeat=0.5, fence=5, sweep=0.5, poll=0.1)
        try:
            file = other.upload(harness.examples(MORE_FACTS)).json["id"]
            job = other.create_job(file, epochs=50).json
            limit = time.monotonic() + 60
            while (now := other.get(f"/v1/fine_tuning/jobs/{job['id']}").json)["status"] not in ("failed", "succeeded"):
                self.assertLess(time.monotonic(), limit, other.log())
                if now["graft"]["attempt"] > 0 and now["status"] == "running":
                    for pid in other.workers("train"):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            self.assertEqual((now["status"], now["error"]["code"]), ("failed", "worker_crashed"), now)
            after = other.create_job(file, epochs=1).json
            self.assertEqual(other.wait_job(after["id"])["status"], "succeeded")
        finally:
            other.stop()


class Alone(unittest.TestCase):
    def test_a_worker_started_by_hand_trains_and_stops(self):
        other = harness.Server(workers=0, heartbeat=0.5, fence=5, sweep=0.5, poll=0.1)
        worker = None
        try:
            job = other.create_job(other.upload(harness.examples(harness.FACTS)).json["id"], epochs=1).json
            worker = subprocess.Popen([harness.GRAFT, "work", "--role", "train", "--data", str(other.data)], env=other.env,
                                      stderr=subprocess.DEVNULL)
            self.assertEqual(other.wait_job(job["id"])["status"], "succeeded")
            worker.terminate()
            self.assertEqual(worker.wait(20), 0)
        finally:
            if worker and worker.poll() is None:
                worker.kill()
            other.stop()


class Resume(unittest.TestCase):
    def artifacts(self, job):
        content = server.get(f"/v1/files/{job['result_files'][0]}/content").body
        digests = sorted(path.name for path in (server.data / "blobs").rglob("*") if path.is_file())
        return content, digests

    def test_a_killed_worker_leaves_no_trace_in_the_result(self):
        whole = server.wait_job(start(harness.examples(MORE_FACTS), epochs=40)["id"])
        self.assertEqual(whole["status"], "succeeded", whole)
        expected, before = self.artifacts(whole)
        job = start(harness.examples(MORE_FACTS), epochs=40)
        limit = time.monotonic() + 60
        while not [e for e in server.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=5").json["data"] if e["type"] == "metrics"]:
            self.assertLess(time.monotonic(), limit, server.log())
            time.sleep(0.02)
        for pid in server.workers("train"):
            os.kill(pid, signal.SIGKILL)
        job = server.wait_job(job["id"])
        self.assertEqual(job["status"], "succeeded", job)
        content, after = self.artifacts(job)
        self.assertEqual(content, expected)
        self.assertEqual(after, before)  # bitwise the same delta is the same blob
        steps = [e["data"]["step"] for e in events_of(job["id"]) if e["type"] == "metrics"]
        self.assertEqual(steps, list(range(1, 401)))
        told = [e["message"] for e in events_of(job["id"]) if e["type"] == "message"]
        self.assertEqual(len(told), len(set(told)))

    def test_a_worker_killed_while_it_compresses_costs_no_step(self):
        other = harness.Server(recovery=0, heartbeat=0.5, fence=5, sweep=0.5, poll=0.1)
        try:
            file, validation = [other.upload(harness.examples(facts)).json["id"] for facts in (harness.FACTS, harness.FACTS[:4])]
            compression = {"codec": "bitdelta", "distill_steps": 200}
            jobs, points = [], []
            for killed in (False, True):
                job = other.create_job(file, epochs=2, seed=11, validation_file=validation, graft={"compression": compression}).json["id"]
                limit = time.monotonic() + 60
                while killed and other.get(f"/v1/fine_tuning/jobs/{job}").json["graft"]["state"] != "compressing":
                    self.assertLess(time.monotonic(), limit, other.log())
                    time.sleep(0.02)
                for pid in other.workers("train") if killed else ():
                    os.kill(pid, signal.SIGKILL)
                jobs.append(other.wait_job(job))
                self.assertEqual(jobs[-1]["status"], "succeeded", jobs[-1])
                points.append(other.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json["data"])
            self.assertEqual([job["graft"]["attempt"] for job in jobs], [1, 2])
            self.assertEqual([line.split()[-1] for line in other.log(10000).splitlines() if " goes on from step " in line], ["6"])
            told = [[(point["step_number"], point["metrics"].keys()) for point in of] for of in points]
            self.assertEqual(told[0], told[1])
            for undisturbed, resumed in zip(*points):
                self.assertIn("full_valid_loss", resumed["metrics"])
                for name, value in undisturbed["metrics"].items():
                    self.assertAlmostEqual(resumed["metrics"][name], value, places=5)
            deltas = [other.get(f"/v1/models/{job['fine_tuned_model']}/delta").body for job in jobs]
            self.assertEqual(deltas[0], deltas[1])
        finally:
            other.stop()

    def test_a_restarted_server_goes_on(self):
        job = start(harness.examples(MORE_FACTS), epochs=40)
        time.sleep(1)
        workers = server.workers()
        self.assertEqual(server.shutdown(), 0)
        self.assertFalse([pid for pid in workers if pid in harness.processes()])
        server.start()
        self.assertEqual(server.wait_job(job["id"])["status"], "succeeded")


if __name__ == "__main__":
    unittest.main()
