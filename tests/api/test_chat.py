"""POST /v1/chat/completions: shape, streams, determinism, refusals, and what happens to those who go."""
import concurrent.futures
import http.client
import json
import os
import pathlib
import shutil
import signal
import time
import unittest

import harness

QUESTION = [{"role": "user", "content": "Where does person 1 live?"}]


def setUpModule():
    global server
    server = harness.Server()


def tearDownModule():
    server.stop()


def post(key=harness.Server.OWN, **fields):
    return server.post("/v1/chat/completions", {"model": server.model, "messages": QUESTION, "max_tokens": 8, **fields}, key=key)


def text_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


class Answer(unittest.TestCase):
    def test_it_has_every_required_key(self):
        reply = post(temperature=0)
        self.assertEqual(reply.status, 200, reply)
        body = reply.json
        self.assertRegex(body["id"], r"^chatcmpl-[0-9A-Za-z]{24}$")
        self.assertEqual(body["object"], "chat.completion")
        self.assertEqual(body["model"], server.model)
        self.assertAlmostEqual(body["created"], time.time(), delta=60)
        (choice,) = body["choices"]
        self.assertEqual(choice["index"], 0)
        self.assertIn(choice["finish_reason"], ("stop", "length"))
        self.assertIsNone(choice["logprobs"])
        self.assertEqual(choice["message"]["role"], "assistant")
        self.assertIsInstance(choice["message"]["content"], str)
        self.assertIsNone(choice["message"]["refusal"])
        usage = body["usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertGreater(usage["prompt_tokens"], 0)
        self.assertLessEqual(usage["completion_tokens"], 8)
        self.assertTrue(reply.headers["x-request-id"])

    def test_a_stream_says_the_same(self):
        whole = post(temperature=0).json
        chunks = list(server.stream("/v1/chat/completions", {
            "model": server.model, "messages": QUESTION, "max_tokens": 8, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}))
        self.assertEqual({chunk["object"] for chunk in chunks}, {"chat.completion.chunk"})
        self.assertEqual(len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}), 1)
        self.assertEqual(chunks[0]["choices"][0]["delta"], {"role": "assistant", "content": "", "refusal": None})
        self.assertIsNone(chunks[0]["choices"][0]["finish_reason"])
        self.assertEqual(text_of(chunks), whole["choices"][0]["message"]["content"])
        self.assertEqual(chunks[-2]["choices"][0]["delta"], {})
        self.assertEqual(chunks[-2]["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"])
        self.assertEqual(chunks[-1]["choices"], [])
        self.assertEqual(chunks[-1]["usage"], whole["usage"])
        self.assertTrue(all(chunk["usage"] is None for chunk in chunks[:-1]))

    def test_without_include_usage_no_chunk_has_usage(self):
        chunks = list(server.stream("/v1/chat/completions", {
            "model": server.model, "messages": QUESTION, "max_tokens": 4, "stream": True}))
        self.assertTrue(all("usage" not in chunk for chunk in chunks))
        self.assertIsNotNone(chunks[-1]["choices"][0]["finish_reason"])

    def test_the_seed_decides(self):
        texts = {seed: post(seed=seed, temperature=1.5, max_tokens=24).json["choices"][0]["message"]["content"] for seed in (1, 2)}
        again = post(seed=1, temperature=1.5, max_tokens=24).json["choices"][0]["message"]["content"]
        self.assertEqual(texts[1], again)
        self.assertNotEqual(texts[1], texts[2])

    def test_max_tokens_is_a_length(self):
        body = post(temperature=0, max_tokens=3).json
        if body["choices"][0]["finish_reason"] == "length":
            self.assertEqual(body["usage"]["completion_tokens"], 3)
        newer = post(temperature=0, max_tokens=100, max_completion_tokens=3).json
        self.assertLessEqual(newer["usage"]["completion_tokens"], 3)

    def test_a_stop_string_ends_and_is_not_part(self):
        whole = post(temperature=0, max_tokens=24).json["choices"][0]["message"]["content"]
        if len(whole) < 4:
            self.skipTest("this random model says too little")
        stop = whole[2:4]
        body = post(temperature=0, max_tokens=24, stop=[stop]).json
        self.assertEqual(body["choices"][0]["finish_reason"], "stop")
        self.assertEqual(body["choices"][0]["message"]["content"], whole[:whole.index(stop)])

    def test_the_same_weights_under_another_template_are_asked_by_it(self):
        before = post(temperature=0).json
        other = shutil.copytree(server.model_path, os.path.join(server.folder, "other-template"))
        template = pathlib.Path(other, "chat_template.jinja")
        template.write_text(template.read_text().replace("that knows little", "that knows little, and says so at some length"))
        server.cli("model", "import", other, "--name", "other-template", "--data", server.data)
        after = post(temperature=0, model="other-template").json
        self.assertGreater(after["usage"]["prompt_tokens"], before["usage"]["prompt_tokens"])
        self.assertNotEqual(after["system_fingerprint"], before["system_fingerprint"])
        self.assertEqual(post(temperature=0).json["usage"], before["usage"])

    def test_company_changes_nothing(self):
        alone = [post(seed=seed, temperature=1).json["choices"][0]["message"]["content"] for seed in range(12)]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda seed: post(seed=seed, temperature=1).json["choices"][0]["message"]["content"], range(12)))
        self.assertEqual(alone, together)

    def test_parts_and_roles(self):
        plain = post(temperature=0, messages=[{"role": "system", "content": "Be brief."}, *QUESTION]).json
        parts = post(temperature=0, messages=[{"role": "developer", "content": [{"type": "text", "text": "Be "},
                                                                                {"type": "text", "text": "brief."}]}, *QUESTION]).json
        self.assertEqual(plain["choices"], parts["choices"])
        self.assertEqual(plain["usage"], parts["usage"])


class Refusal(unittest.TestCase):
    def refused(self, reply, status, code, param):
        self.assertEqual(reply.status, status, reply)
        self.assertEqual(set(reply.error), {"message", "type", "param", "code"})
        self.assertEqual((reply.error["code"], reply.error["param"]), (code, param), reply)

    def test_a_model_that_is_not_there(self):
        reply = post(model="nobody")
        self.refused(reply, 404, "model_not_found", "model")
        self.assertIn("The model `nobody` does not exist or you do not have access to it.", reply.error["message"])

    def test_fields_by_name(self):
        for fields, code, param in (
                ({"n": 2}, "unsupported_parameter", "n"),
                ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
                ({"logprobs": True}, "unsupported_parameter", "logprobs"),
                ({"nonsense": 1}, "unknown_parameter", "nonsense"),
                ({"messages": []}, "empty_array", "messages"),
                ({"temperature": 3}, "decimal_above_max_value", "temperature")):
            with self.subTest(fields=fields):
                self.refused(post(**fields), 400, code, param)

    def test_a_prompt_longer_than_the_context(self):
        self.refused(post(messages=[{"role": "user", "content": "town " * 2000}]), 400, "context_length_exceeded", "messages")

    def test_a_stream_that_can_not_begin_is_a_status(self):
        self.refused(post(messages=[{"role": "user", "content": "town " * 2000}], stream=True), 400, "context_length_exceeded",
                     "messages")

    def test_the_service_is_unharmed(self):
        self.assertEqual(post(temperature=0).status, 200)


class Faults(unittest.TestCase):
    def open_stream(self, tokens=200):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({
            "model": server.model, "messages": QUESTION, "max_tokens": tokens, "temperature": 1.5, "seed": 5, "stream": True}),
            {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"})
        return connection, connection.getresponse()

    def wait_idle(self):
        limit = time.monotonic() + 30
        while server.metric("graft_infer_open_requests") > 0:
            self.assertLess(time.monotonic(), limit, "requests of clients that have gone are still open")
            time.sleep(0.1)

    def test_a_client_that_goes_is_forgotten(self):
        for _ in range(8):
            connection, answer = self.open_stream()
            answer.readline()
            connection.close()
        self.wait_idle()
        self.assertEqual(post(temperature=0).status, 200)

    def test_a_killed_worker_ends_streams_with_an_error_and_comes_back(self):
        expected = post(temperature=0).json["choices"]
        connection, answer = self.open_stream()
        answer.readline()
        (pid,) = server.workers("infer")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        lines = [line for line in answer.read().decode().split("\n") if line.startswith("data: ")]
        self.assertLess(time.monotonic() - began, 30)
        if lines[-1] != "data: [DONE]":  # else it had finished before the kill
            self.assertIn("error", json.loads(lines[-1][6:]))
        connection.close()
        limit = time.monotonic() + 60
        while (reply := post(temperature=0)).status != 200:
            self.assertEqual(reply.status, 503, reply)
            self.assertTrue(reply.headers["Retry-After"])
            self.assertLess(time.monotonic(), limit)
            time.sleep(0.1)
        self.assertEqual(reply.json["choices"], expected)


class TwoBases(unittest.TestCase):
    def test_with_room_for_one_they_take_turns(self):
        small = harness.Server(base_memory=0)
        try:
            other = harness.make_model(small.folder / "other", "--seed", "3")
            small.cli("model", "import", other, "--name", "other", "--data", small.data)
            texts = [[small.chat(name, "Where does person 1 live?").json["choices"] for name in (small.model, "other")]
                     for _ in range(3)]
            self.assertEqual(texts[0], texts[1])
            self.assertEqual(texts[0], texts[2])
            self.assertNotEqual(texts[0][0], texts[0][1])
        finally:
            small.stop()


class FullQueue(unittest.TestCase):
    def test_more_than_the_queue_holds_is_429(self):
        small = harness.Server(infer_queue=2)
        try:
            def ask(seed):
                return small.post("/v1/chat/completions", {"model": small.model, "messages": QUESTION, "max_tokens": 200, "seed": seed})
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                replies = list(pool.map(ask, range(32)))
            refused = [reply for reply in replies if reply.status == 429]
            self.assertEqual({reply.status for reply in replies}, {200, 429}, replies)
            self.assertTrue(all(reply.headers["Retry-After"] for reply in refused))
        finally:
            small.stop()


if __name__ == "__main__":
    unittest.main()
