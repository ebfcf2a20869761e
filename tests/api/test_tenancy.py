"""Tenants never see one another: for every id of A, on every route and in every place of a request, B gets byte for byte
what B gets for an id that never was. The routes come from openapi.yaml, so a new one is in this test by itself."""
import re
import secrets
import string
import unittest
import urllib.parse

import harness
import test_spec

LETTERS = string.ascii_letters + string.digits
VOLATILE = ("date", "x-request-id", "openai-processing-ms")


def setUpModule():
    global server, a, b, own, ids, lists_before
    server = harness.Server(poll=0.1, heartbeat=0.5, recovery=0.2)
    harness.make_model(server.folder / "tuned", "--seed", "7")
    server.cli("model", "import", server.folder / "tuned", "--name", "tuned-elsewhere", "--data", server.data)
    a, b = server.new_key("acme", "one"), server.new_key("acme", "two")  # one organization: the project is the tenant
    other = server.new_key("other", "one")
    data = harness.examples(harness.FACTS)
    ids = make(a, data, "secret")
    own = make(b, data, "mine")
    lists_before = {path: [server.get(path, key=k).body for k in (b, other)]
                    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models")}


def tearDownModule():
    server.stop()


def make(key, data, suffix):
    """A file, a finished job, its event, checkpoint, result file and models; its delta as a file, and the model of that."""
    file = server.upload(data, key=key).json["id"]
    job = server.wait_job(server.create_job(file, epochs=1, suffix=suffix, seed=3, key=key, metadata={"who": suffix}).json["id"], key=key)
    assert job["status"] == "succeeded", job
    event = server.get(f"/v1/fine_tuning/jobs/{job['id']}/events", key=key).json["data"][0]["id"]
    checkpoint = server.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints", key=key).json["data"][0]
    compressed = server.get(f"/v1/models/{job['fine_tuned_model']}/delta", key=key).body
    delta = server.upload(compressed, name=f"{suffix}.delta", purpose="graft-delta", key=key).json["id"]
    imported = server.post("/v1/graft/deltas", {"file": delta, "suffix": suffix}, key=key).json["id"]
    return {"file": file, "result": job["result_files"][0], "job": job["id"], "event": event, "checkpoint": checkpoint["id"],
            "model": job["fine_tuned_model"], "checkpoint model": checkpoint["fine_tuned_model_checkpoint"],
            "delta": delta, "imported model": imported}


def never_was(name):
    """The same shape and length, with other random characters: the eight of a model's name, or all behind the prefix."""
    if name.startswith("ft:"):
        return re.sub(r"[0-9A-Za-z]{8}(?=$|:ckpt-step-)", lambda m: fresh(len(m.group())), name)
    prefix = re.match(r"[a-z]+[-_]", name).group()
    return prefix + fresh(len(name) - len(prefix))


def fresh(count):
    return "".join(secrets.choice(LETTERS) for _ in range(count))


def shape_of(reply, name):
    headers = sorted((k.lower(), v) for k, v in reply.headers.items() if k.lower() not in VOLATILE)
    body = reply.body
    for form in (name, urllib.parse.quote(name, safe="")):
        body = body.replace(form.encode(), b"<id>")
    return reply.status, headers, body


class Tenancy(unittest.TestCase):
    def same(self, name, ask):
        """`ask(name)` with A's id and with one that never was."""
        foreign, missing = never_was(name), never_was(name)
        theirs = shape_of(ask(name), name)
        nobodys = shape_of(ask(foreign), foreign)
        self.assertEqual(theirs, nobodys, name)
        self.assertEqual(nobodys, shape_of(ask(missing), missing))
        return theirs

    def test_ids_in_paths(self):
        asked = refused = 0
        for method, path in test_spec.routes():
            if "{" not in path:
                continue
            for what, name in ids.items():
                for verb in {method, "GET", "HEAD", "POST", "DELETE", "PUT"}:
                    with self.subTest(f"{verb} {path} {what}"):
                        status = self.same(name, lambda n: server.request(
                            verb, re.sub(r"\{\w+\}", urllib.parse.quote(n, safe=""), path), key=b))[0]
                        self.assertIn(status, (404, 405))
                        asked += 1
                        refused += status == 404
        self.assertGreater(asked, 250)
        self.assertGreater(refused, 70)

    def test_ids_in_queries(self):
        for what, name in ids.items():
            for path in ("/v1/files", "/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{own['job']}/events",
                         f"/v1/fine_tuning/jobs/{own['job']}/checkpoints"):
                with self.subTest(f"{path}?after={what}"):
                    self.assertEqual(self.same(name, lambda n: server.get(
                        f"{path}?after={urllib.parse.quote(n, safe='')}", key=b))[0], 400)
        self.assertEqual(server.get("/v1/fine_tuning/jobs?metadata[who]=secret", key=b).json["data"], [])

    def test_ids_in_bodies(self):
        job = {"model": "tiny", "training_file": own["file"]}
        for what, name in ids.items():
            for field in ("training_file", "validation_file", "model"):
                with self.subTest(f"jobs {field} {what}"):
                    self.assertIn(self.same(name, lambda n: server.post("/v1/fine_tuning/jobs", {**job, field: n}, key=b))[0], (400, 404))
            with self.subTest(f"chat {what}"):
                self.assertEqual(self.same(name, lambda n: server.chat(n, "Where?", key=b))[0], 404)
            with self.subTest(f"chat stream {what}"):
                self.assertEqual(self.same(name, lambda n: server.chat(n, "Where?", key=b, stream=True))[0], 404)

    def test_ids_in_bodies_of_deltas(self):
        pair = {"base": "tiny", "tuned": "tuned-elsewhere"}
        asked = [("file", {}), ("base", pair), ("tuned", pair), ("calibration_file", pair)]
        for what, name in ids.items():
            for field, body in asked:
                with self.subTest(f"deltas {field} {what}"):
                    status = self.same(name, lambda n: server.post("/v1/graft/deltas", {**body, field: n}, key=b))[0]
                    self.assertEqual(status, 404 if field in ("base", "tuned") else 400)

    def test_the_same_requests_succeed_with_ones_own(self):
        """Else the refusals above would show nothing."""
        self.assertEqual(server.post("/v1/graft/deltas", {"file": own["delta"]}, key=b).status, 200)
        pair = {"base": "tiny", "tuned": "tuned-elsewhere", "calibration_file": own["file"], "compression": {"codec": "bitdelta"}}
        job = server.post("/v1/graft/deltas", pair, key=b)
        self.assertEqual(job.status, 200, job)
        server.post(f"/v1/fine_tuning/jobs/{job.json['id']}/cancel", key=b)
        for what in ("model", "checkpoint model", "imported model"):
            with self.subTest(what):
                self.assertEqual(server.chat(own[what], "Where?", key=b).status, 200)
                self.assertEqual(server.get(f"/v1/models/{own[what]}/delta", key=b).status, 200)

    def test_keys_of_idempotency_are_each_tenants_own(self):
        body = {"model": "tiny", "training_file": ids["file"], "seed": 5}
        first = server.post("/v1/fine_tuning/jobs", body, headers={"Idempotency-Key": "k"}, key=a)
        self.assertEqual(first.status, 200)
        mine = server.post("/v1/fine_tuning/jobs", {**body, "training_file": own["file"]}, headers={"Idempotency-Key": "k"}, key=b)
        self.assertEqual(mine.status, 200)
        self.assertNotEqual(mine.json["id"], first.json["id"])
        theirs, mine = [server.post("/v1/graft/deltas", {"file": made["delta"], "suffix": "keyed"}, headers={"Idempotency-Key": "k2"}, key=key)
                        for made, key in ((ids, a), (own, b))]
        self.assertEqual((theirs.status, mine.status), (200, 200))
        self.assertNotEqual(mine.json["id"], theirs.json["id"])

    def test_lists_hold_nothing_of_others(self):
        for path, bodies in lists_before.items():
            for body in bodies:
                for what, name in ids.items():
                    self.assertNotIn(name.encode(), body, f"{path} {what}")
            self.assertNotIn(b"secret", b"".join(bodies))

    def test_what_was_asked_for_in_vain_is_still_there(self):
        """Last in the alphabet: after all the attempts of B."""
        for path in (f"/v1/files/{ids['file']}", f"/v1/files/{ids['result']}/content", f"/v1/fine_tuning/jobs/{ids['job']}",
                     f"/v1/files/{ids['delta']}/content"):
            self.assertEqual(server.get(path, key=a).status, 200, path)
        for what in ("model", "checkpoint model", "imported model"):
            self.assertEqual(server.get(f"/v1/models/{ids[what]}", key=a).status, 200, what)
            self.assertEqual(server.get(f"/v1/models/{ids[what]}/delta", key=a).status, 200, what)
            self.assertEqual(server.chat(ids[what], "Where?", key=a).status, 200, what)


if __name__ == "__main__":
    unittest.main()
