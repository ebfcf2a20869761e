"""/v1/models, and what POST /v1/fine_tuning/jobs refuses before there is a job; pages of jobs, events, checkpoints."""
import json
import unittest
import urllib.parse

import harness


def setUpModule():
    global server, file
    server = harness.Server(poll=60)  # no worker touches what is created here
    file = server.upload(harness.examples(harness.FACTS)).json["id"]


def tearDownModule():
    server.stop()


def path_of(name):
    return "/v1/models/" + urllib.parse.quote(name, safe="")


class Models(unittest.TestCase):
    def test_a_base_is_listed_and_found(self):
        page = server.get("/v1/models").json
        self.assertEqual(sorted(page), ["data", "object"])
        (model,) = page["data"]
        self.assertEqual({k: model[k] for k in ("id", "object", "owned_by")}, {"id": "tiny", "object": "model", "owned_by": "graft"})
        self.assertIsInstance(model["created"], int)
        self.assertEqual(server.get("/v1/models/tiny").json, model)

    def test_a_base_stays(self):
        self.assertEqual(server.delete("/v1/models/tiny").status, 403)
        self.assertEqual(server.get("/v1/models/tiny").status, 200)

    def test_names_with_slashes_and_colons_arrive_whole(self):
        server.cli("model", "import", server.model_path, "--name", "org/tiny.1", "--data", server.data)
        self.assertEqual(server.get(path_of("org/tiny.1")).json["id"], "org/tiny.1")
        self.assertEqual(server.get("/v1/models/org/tiny.1").json["error"]["code"], "unknown_url")
        reply = server.get("/v1/models/ft:tiny:org:suffix:12345678")
        self.assertEqual(reply.status, 404)
        self.assertEqual(reply.error["message"],
                         "The model `ft:tiny:org:suffix:12345678` does not exist or you do not have access to it.")
        self.assertEqual((reply.error["code"], reply.error["param"]), ("model_not_found", "model"))
        self.assertEqual(reply.json, server.delete("/v1/models/ft%3Atiny%3Aorg%3Asuffix%3A12345678").json)


class Requests(unittest.TestCase):
    def refused(self, expected, code, param, **fields):
        body = {"model": "tiny", "training_file": file, **fields}
        reply = server.post("/v1/fine_tuning/jobs", {k: v for k, v in body.items() if v is not ...})
        self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (expected, code, param), reply)
        return reply.error["message"]

    def test_what_is_refused_and_how(self):
        before = server.get("/v1/fine_tuning/jobs?limit=1000").json["data"]
        self.assertEqual(self.refused(400, "missing_required_parameter", "model", model=...), "Missing required parameter: 'model'.")
        self.refused(400, "missing_required_parameter", "training_file", training_file=...)
        self.assertEqual(self.refused(400, "unknown_parameter", "tenant_id", tenant_id="x"), "Unknown parameter: 'tenant_id'.")
        self.refused(400, "unknown_parameter", "status", status="succeeded")
        self.refused(404, "model_not_found", "model", model="gpt-4o-mini")
        self.refused(400, None, "training_file", training_file="file-nothing")
        self.refused(400, None, "validation_file", validation_file="file-nothing")
        other = server.upload(b"anything", purpose="user_data").json["id"]
        self.assertIn("fine-tune", self.refused(400, None, "training_file", training_file=other))
        self.refused(400, "string_above_max_length", "suffix", suffix="x" * 65)
        self.refused(400, "invalid_value", "suffix", suffix="a:b")
        self.refused(400, "integer_below_min_value", "seed", seed=-1)
        self.refused(400, "invalid_type", "seed", seed="1")
        self.refused(400, "unsupported_value", "method.type", method={"type": "dpo"})
        self.refused(400, "unsupported_parameter", "integrations", integrations=[{"type": "wandb", "wandb": {"project": "x"}}])
        self.refused(400, "object_above_max_properties", "metadata", metadata={str(i): "x" for i in range(17)})
        self.refused(400, "string_above_max_length", "metadata.k", metadata={"k": "x" * 513})
        self.refused(400, "integer_above_max_value", "method.supervised.hyperparameters.n_epochs",
                     method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 51}}})
        self.refused(400, "unknown_parameter", "graft.x", graft={"x": 1})
        self.refused_compressions()
        self.assertEqual(server.get("/v1/fine_tuning/jobs?limit=1000").json["data"], before)

    def refused_compressions(self):
        def refused(code, field, **compression):
            return self.refused(400, code, f"graft.compression.{field}", graft={"compression": compression})
        names = refused("invalid_value", "codec", codec="zip")
        self.assertRegex(names, r"^Invalid value: 'zip'\. Supported values are: graft, bitdelta", "the refusal names what there is")
        refused("string_below_min_length", "codec", codec="")
        refused("invalid_type", "codec", codec=1)
        refused("decimal_below_min_value", "ratio", ratio=0.5)
        refused("decimal_above_max_value", "ratio", ratio=1025)
        refused("invalid_type", "ratio", ratio="32")
        self.assertIn("> 0", refused("decimal_below_min_value", "max_kl", max_kl=0))
        refused("decimal_below_min_value", "max_kl", max_kl=-1)
        self.assertIn("graft.compression.ratio", refused("invalid_value", "max_kl", max_kl=0.1, ratio=16))
        refused("integer_below_min_value", "distill_steps", distill_steps=-1)
        refused("invalid_type", "distill_steps", distill_steps=1.5)
        self.assertEqual(refused("unknown_parameter", "level", level=9), "Unknown parameter: 'graft.compression.level'.")
        self.refused(400, "invalid_type", "graft.compression", graft={"compression": "bitdelta"})

    def test_how_a_job_is_compressed_is_kept_as_it_was_asked(self):
        nothing = {"codec": None, "ratio": None, "max_kl": None, "distill_steps": None}
        asked = [({}, {}), ({"compression": None}, {}), ({"compression": {}}, {}), ({"compression": nothing}, {})]
        asked += [({"compression": c}, c) for c in (
            {"codec": "bitdelta"}, {"ratio": 4.5}, {"max_kl": 0.02}, {"distill_steps": 0},
            {"codec": "graft", "ratio": 4, "distill_steps": 60})]
        for graft, want in asked:
            job = server.create_job(file, graft=graft).json
            self.assertEqual(job["graft"]["compression"], {**nothing, **want}, graft)
            self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job['id']}").json, job)
            self.assertIsNone(job["graft"]["report"])

    def test_a_new_job(self):
        method = {"type": "supervised", "dpo": {"hyperparameters": {"beta": "auto"}},
                  "supervised": {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 2}}}
        reply = server.create_job(file, suffix="new", seed=42, metadata={"a": "b"}, method=method, validation_file=file,
                                  graft={"train_embeddings": True, "schedule": "cosine"})
        self.assertEqual(reply.status, 200, reply)
        job = reply.json
        self.assertEqual(job["hyperparameters"], {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2})
        self.assertEqual(job["method"], {"type": "supervised", "supervised": {"hyperparameters": job["hyperparameters"]}})
        want = {"object": "fine_tuning.job", "error": None, "fine_tuned_model": None, "finished_at": None, "model": "tiny",
                "result_files": [], "status": "validating_files", "trained_tokens": None, "training_file": file,
                "validation_file": file, "integrations": [], "seed": 42, "estimated_finish": None, "metadata": {"a": "b"},
                "user_provided_suffix": "new"}
        self.assertEqual({k: job[k] for k in want}, want)
        self.assertTrue(job["graft"]["train_embeddings"])
        self.assertEqual(job["graft"]["schedule"], "cosine")
        events = server.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json
        self.assertEqual([e["message"] for e in events["data"]][-1], f"Created fine-tuning job: {job['id']}")
        cancelled = server.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json
        self.assertEqual(cancelled["status"], "cancelled")
        self.assertEqual(server.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json["status"], "cancelled")
        self.assertIsNone(cancelled["error"])

    def test_a_seed_is_chosen_and_told(self):
        self.assertIn(server.create_job(file).json["seed"], range(1 << 31))

    def test_the_same_key_makes_one_job(self):
        body = {"model": "tiny", "training_file": file, "seed": 1}
        first = server.post("/v1/fine_tuning/jobs", body, headers={"Idempotency-Key": "job"})
        again = server.post("/v1/fine_tuning/jobs", dict(reversed(body.items())), headers={"Idempotency-Key": "job"})
        self.assertEqual((first.status, first.body), (again.status, again.body))
        other = server.post("/v1/fine_tuning/jobs", {**body, "seed": 2}, headers={"Idempotency-Key": "job"})
        self.assertEqual((other.status, other.error["code"]), (400, "idempotency_key_reused"))


class Examples(unittest.TestCase):
    def test_those_of_the_specification_are_taken(self):
        folder = harness.ROOT / "api-spec/examples"
        data = (folder / "train.jsonl").read_bytes()
        self.assertGreaterEqual(len(data.splitlines()), 10)
        upload = server.upload(data)
        self.assertEqual(upload.status, 200, upload)
        job = json.loads((folder / "create-job.json").read_text())
        job["training_file"] = upload.json["id"]
        reply = server.post("/v1/fine_tuning/jobs", job)
        self.assertEqual(reply.status, 200, reply)
        chunks = list(server.stream("/v1/chat/completions", json.loads((folder / "chat.json").read_text())))
        self.assertIsNotNone(chunks[-1]["usage"])


class Pages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.key = server.new_key("pages", "pages")
        upload = server.upload(harness.examples(harness.FACTS), key=cls.key).json["id"]
        cls.jobs = [server.create_job(upload, key=cls.key, metadata={"n": str(i % 2), "all": "x"} if i else None).json["id"]
                    for i in range(5)][::-1]

    def page(self, query):
        return server.get(f"/v1/fine_tuning/jobs{query}", key=self.key)

    def test_jobs_come_newest_first_in_pages(self):
        found, after = [], ""
        while True:
            page = self.page(f"?limit=2{after}").json
            found += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={found[-1]}"
        self.assertEqual(found, self.jobs)
        self.assertEqual(self.page("").json["has_more"], False)

    def test_jobs_by_metadata(self):
        def ids(query):
            return [job["id"] for job in self.page(query).json["data"]]
        self.assertEqual(ids("?metadata%5Bn%5D=1"), [self.jobs[1], self.jobs[3]])
        self.assertEqual(ids("?metadata[n]=1&metadata[all]=x"), [self.jobs[1], self.jobs[3]])
        self.assertEqual(ids("?metadata[n]=2"), [])
        self.assertEqual(ids("?metadata=null"), [self.jobs[4]])
        self.assertEqual(self.page("?metadata=x").status, 400)

    def test_wrong_parameters(self):
        for query, param in (("limit=0", "limit"), ("limit=1001", "limit"), ("after=ftjob-x", "after"), ("order=asc", "order"),
                             ("status=running", "status")):
            reply = self.page(f"?{query}")
            self.assertEqual((reply.status, reply.error["param"]), (400, param), reply)

    def test_events_and_checkpoints_of_a_new_job(self):
        job = self.jobs[0]
        first = server.get(f"/v1/fine_tuning/jobs/{job}/events?limit=1", key=self.key).json
        self.assertEqual((len(first["data"]), first["has_more"]), (1, True))
        rest = server.get(f"/v1/fine_tuning/jobs/{job}/events?after={first['data'][0]['id']}", key=self.key).json
        self.assertFalse(rest["has_more"])
        event = rest["data"][-1]
        self.assertEqual({k: event[k] for k in ("object", "level", "type", "data")},
                         {"object": "fine_tuning.job.event", "level": "info", "type": "message", "data": {}})
        self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job}/checkpoints", key=self.key).json,
                         {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False})
        for what in ("events", "checkpoints"):
            self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job}/{what}?after=nothing", key=self.key).status, 400)
            missing = server.get(f"/v1/fine_tuning/jobs/ftjob-x/{what}", key=self.key)
            self.assertEqual((missing.status, missing.error["code"]), (404, "fine_tune_not_found"))


if __name__ == "__main__":
    unittest.main()
