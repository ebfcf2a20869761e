"""Live answers against OpenAI's own schemas. GRAFT_CONTRACT_DIR holds openai-subset.normalized.json; the Python package
jsonschema reads it. Without them this skips."""
import json
import os
import pathlib
import re
import unittest

import harness
import test_spec

try:
    import jsonschema
except ImportError:
    jsonschema = None


def setUpModule():
    global server, schemas, file, job
    folder = os.environ.get("GRAFT_CONTRACT_DIR")
    if not folder:
        raise unittest.SkipTest("GRAFT_CONTRACT_DIR is not set")
    if jsonschema is None:
        raise unittest.SkipTest("the Python package jsonschema is not installed")
    schemas = json.loads((pathlib.Path(folder) / "openai-subset.normalized.json").read_text())
    server = harness.Server(poll=0.1)
    file = server.upload(harness.examples(harness.FACTS)).json
    job = server.create_job(file["id"], epochs=2, validation_file=file["id"], suffix="x", metadata={"a": "b"}).json


def tearDownModule():
    server.stop()


class Contract(unittest.TestCase):
    def fits(self, name, value):
        schema = {"$ref": f"#/components/schemas/{name}", "components": schemas["components"]}
        problems = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in jsonschema.Draft202012Validator(schema).iter_errors(value)]
        self.assertEqual(problems, [], name)

    def test_every_operation_is_built_or_named_as_not_built(self):
        built = {(method, path.removeprefix("/v1")): name for (method, path), name in test_spec.routes().items()}
        theirs = {(method.upper(), path): operation["operationId"] for path, methods in schemas["paths"].items()
                  for method, operation in methods.items() if method in ("get", "post", "delete", "put", "patch")}
        text = (harness.ROOT / "api-spec/openapi.yaml").read_text()
        named = re.search(r"Not built of OpenAI's[^:]*: (.*?)\.\n", text, re.S).group(1)
        self.assertEqual(sorted(re.findall(r"\w+", named)), sorted(name for route, name in theirs.items() if route not in built))
        for (method, path), name in theirs.items():
            if (method, path) in built:
                self.assertEqual(built[method, path], name)
            else:
                reply = server.request(method, "/v1" + re.sub(r"\{\w+\}", "x", path))
                self.assertIn((reply.status, reply.error["code"]), ((404, "unknown_url"), (405, "method_not_allowed")), path)

    def test_files(self):
        self.fits("OpenAIFile", file)
        self.fits("ListFilesResponse", server.get("/v1/files").json)
        self.fits("ListFilesResponse", server.get("/v1/files", key=server.new_key("empty", "empty")).json)
        other = server.upload(harness.examples(harness.FACTS), purpose="batch").json
        self.fits("OpenAIFile", other)
        self.fits("DeleteFileResponse", server.delete(f"/v1/files/{other['id']}").json)

    def test_jobs(self):
        self.fits("FineTuningJob", job)
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        done = server.wait_job(job["id"])
        self.assertEqual(done["status"], "succeeded", done)
        self.fits("FineTuningJob", done)
        self.fits("OpenAIFile", server.get(f"/v1/files/{done['result_files'][0]}").json)
        self.fits("ListPaginatedFineTuningJobsResponse", server.get("/v1/fine_tuning/jobs").json)
        self.fits("ListFineTuningJobEventsResponse", server.get(f"{path}/events?limit=100").json)
        self.fits("ListFineTuningJobCheckpointsResponse", server.get(f"{path}/checkpoints").json)
        self.fits("Model", server.get(f"/v1/models/{done['fine_tuned_model']}").json)
        self.fits("DeleteModelResponse", server.delete(f"/v1/models/{done['fine_tuned_model']}").json)
        failed = server.wait_job(server.create_job(server.upload(b'{"messages": []}\n').json["id"]).json["id"])
        self.assertEqual(failed["status"], "failed")
        self.fits("FineTuningJob", failed)
        cancelled = server.create_job(file["id"], epochs=50).json["id"]
        self.fits("FineTuningJob", server.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel").json)

    def test_models_and_chat(self):
        self.fits("ListModelsResponse", server.get("/v1/models").json)
        self.fits("CreateChatCompletionResponse", server.chat("tiny", "Where?").json)
        for chunk in server.stream("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5,
                                                             "stream": True, "stream_options": {"include_usage": True}}):
            self.fits("CreateChatCompletionStreamResponse", chunk)

    def test_errors(self):
        for reply in (server.get("/nowhere"), server.get("/v1/files", key=None), server.post("/v1/fine_tuning/jobs", {}),
                      server.get("/v1/models/none")):
            self.fits("ErrorResponse", reply.json)


if __name__ == "__main__":
    unittest.main()
