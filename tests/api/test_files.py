"""/v1/files: multipart in the shapes that clients send, what is kept of it, pages, expiry, errors."""
import hashlib
import http.client
import json
import os
import re
import time
import unittest

import harness

LINES = harness.examples(harness.FACTS)
MARK = "xYzZY"


def setUpModule():
    global server
    server = harness.Server(model_name=None)


def tearDownModule():
    server.stop()


def part(name, data, file_name=None, headers=()):
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if file_name is not None:
        disposition += f'; filename="{file_name}"'
    return f"--{MARK}\r\n".encode() + "\r\n".join([disposition, *headers]).encode() + b"\r\n\r\n" + data + b"\r\n"


def send(*parts, end=f"--{MARK}--\r\n".encode(), **options):
    headers = {"Content-Type": f"multipart/form-data; boundary={MARK}", **options.pop("headers", {})}
    return server.post("/v1/files", b"".join(parts) + end, headers=headers, **options)


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", LINES, "train.jsonl", ["Content-Type: application/octet-stream"])


class Upload(unittest.TestCase):
    def test_the_object(self):
        reply = send(PURPOSE, FILE)
        self.assertEqual(reply.status, 200, reply)
        file = reply.json
        self.assertRegex(file["id"], r"^file-[0-9A-Za-z]{24}$")
        self.assertAlmostEqual(file["created_at"], time.time(), delta=60)
        self.assertEqual({k: file[k] for k in ("object", "bytes", "filename", "purpose", "status")},
                         {"object": "file", "bytes": len(LINES), "filename": "train.jsonl", "purpose": "fine-tune",
                          "status": "processed"})
        self.assertNotIn("expires_at", file)
        self.assertEqual(server.get(f"/v1/files/{file['id']}").json, file)

    def test_the_file_may_come_first(self):
        self.assertEqual(send(FILE, PURPOSE).status, 200)

    def test_unquoted_names_and_extended_file_names(self):
        body = (f"--{MARK}\r\nContent-Disposition: form-data; name=purpose\r\n\r\nfine-tune\r\n"
                f"--{MARK}\r\nContent-Disposition: form-data; name=file; filename*=UTF-8''na%C3%AFve.jsonl\r\n\r\n").encode()
        reply = send(body + LINES + b"\r\n")
        self.assertEqual(reply.status, 200, reply)
        self.assertEqual(reply.json["filename"], "naïve.jsonl")
        content = server.get(f"/v1/files/{reply.json['id']}/content")
        self.assertIn("filename*=UTF-8''na%C3%AFve.jsonl", content.headers["content-disposition"])

    def test_file_names_are_only_data(self):
        for name in ("../../../../etc/passwd", "/etc/passwd", "a\\b", "..", "C:\\x", "a b;c=d", "%2e%2e%2f", "x" * 512):
            with self.subTest(name):
                reply = send(PURPOSE, part("file", LINES, name.replace("\\", "\\\\")))
                self.assertEqual(reply.status, 200, reply)
                self.assertEqual(reply.json["filename"], name)
                content = server.get(f"/v1/files/{reply.json['id']}/content")
                self.assertEqual(content.body, LINES)
                self.assertNotIn("\n", content.headers["content-disposition"])
        self.assertEqual(send(PURPOSE, part("file", LINES, "x" * 513)).status, 400)

    def test_content_comes_back_byte_for_byte(self):
        blob = b"\r\n--" + MARK[:-1].encode() + b"\r\n\0\xff" + os.urandom(200000) + b"\r\n--"
        reply = send(part("purpose", b"user_data"), part("file", blob, "blob"))
        self.assertEqual(reply.status, 200, reply)
        content = server.get(f"/v1/files/{reply.json['id']}/content")
        self.assertEqual(content.body, blob)
        self.assertEqual(content.headers["content-type"], "application/octet-stream")
        self.assertEqual(int(content.headers["content-length"]), len(blob))
        self.assertIn('filename="blob"', content.headers["content-disposition"])

    def test_a_chunked_upload_of_many_megabytes(self):
        line = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode() + b"\n"
        count, digest = 30000, hashlib.sha256()

        def pieces():
            yield PURPOSE + part("file", b"", "big.jsonl")[:-2]
            for _ in range(count // 100):
                digest.update(line * 100)
                yield line * 100
            yield f"\r\n--{MARK}--\r\n".encode()

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/files", pieces(), {
            "Authorization": f"Bearer {server.key}", "Content-Type": f"multipart/form-data; boundary={MARK}"}, encode_chunked=True)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        self.assertEqual(answer.status, 200, body)
        self.assertEqual(body["bytes"], count * len(line))
        content = server.get(f"/v1/files/{body['id']}/content")
        self.assertEqual(hashlib.sha256(content.body).hexdigest(), digest.hexdigest())

    def test_broken_uploads_leave_nothing(self):
        before = len(server.get("/v1/files").json["data"])
        cases = {
            "no closing boundary": send(PURPOSE, FILE, end=b""),
            "cut inside the file": send(PURPOSE, FILE[:-500], end=b""),
            "no file": send(PURPOSE),
            "a file without a name": send(PURPOSE, part("file", LINES)),
            "no purpose": send(FILE),
            "an unknown purpose": send(part("purpose", b"magic"), FILE),
            "purpose twice": send(PURPOSE, PURPOSE, FILE),
            "two files": send(PURPOSE, FILE, FILE),
            "the file in another field": send(PURPOSE, part("data", LINES, "x.jsonl")),
            "an unknown field": send(PURPOSE, FILE, part("owner", b"me")),
            "an empty file": send(PURPOSE, part("file", b"", "x.jsonl")),
            "a field with a NUL": send(part("purpose", b"fine-tune\0"), FILE),
            "a field above 64 kB": send(PURPOSE, part("owner", b"x" * 70000), FILE),
            "a part header above 8 kB": send(PURPOSE, part("file", LINES, "x", ["X: " + "y" * 9000])),
            "17 parts": send(*[part(f"f{i}", b"") for i in range(17)]),
            "no disposition": send(f"--{MARK}\r\nContent-Type: text/plain\r\n\r\nx\r\n".encode()),
            "an empty body": send(end=b""),
            "not JSONL": send(PURPOSE, part("file", b"hello world\n", "x.jsonl")),
            "an array": send(PURPOSE, part("file", b"[{}]\n", "x.json")),
            "JSON over several lines": send(PURPOSE, part("file", b'{\n"messages": []\n}\n', "x.json")),
            "a zip archive": send(PURPOSE, part("file", b"PK\x03\x04\0\0", "x.zip")),
            "only the anchor": send(PURPOSE, FILE, part("expires_after[anchor]", b"created_at")),
            "an expiry that no form has": send(PURPOSE, FILE, part("expires_after.seconds", b"3600")),
            "an expiry without brackets": send(PURPOSE, FILE, part("expires_after", b"3600")),
            "expiry too soon": send(PURPOSE, FILE, part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"1")),
            "expiry in words": send(PURPOSE, FILE, part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"soon")),
        }
        for name, reply in cases.items():
            with self.subTest(name):
                self.assertEqual(reply.status, 400, reply)
                self.assertTrue(reply.error["message"])
        self.assertEqual(len(server.get("/v1/files").json["data"]), before)
        self.assertEqual([p.name for p in (server.data / "staging").iterdir()], [])
        self.assertIn("Expected file to have JSONL format, where every line is a valid JSON dictionary",
                      cases["not JSONL"].error["message"])
        self.assertEqual(cases["an unknown field"].error["message"], "Unknown parameter: 'owner'.")

    def test_a_client_that_hangs_up_leaves_nothing(self):
        for cut in (20, 200, 800):
            body = PURPOSE + FILE
            head = (f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n"
                    f"Content-Type: multipart/form-data; boundary={MARK}\r\n\r\n").encode()
            import socket
            with socket.create_connection(("127.0.0.1", server.port)) as wire:
                wire.sendall(head + body[:cut])
                time.sleep(0.1)
        limit = time.monotonic() + 5
        while any((server.data / "staging").iterdir()) and time.monotonic() < limit:
            time.sleep(0.1)
        self.assertEqual([p.name for p in (server.data / "staging").iterdir()], [])

    def test_a_one_line_file_is_taken(self):
        self.assertEqual(send(PURPOSE, part("file", b'{"anything": 1}', "x.jsonl")).status, 200)

    def test_expect_100_continue(self):
        import socket
        body = PURPOSE + FILE + f"--{MARK}--\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
            wire.sendall((f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n"
                          f"Content-Type: multipart/form-data; boundary={MARK}\r\nExpect: 100-continue\r\n\r\n").encode())
            self.assertTrue(wire.recv(1000).startswith(b"HTTP/1.1 100 "))
            wire.sendall(body)
            self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_expiry(self):
        expiry = (part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"3600"))
        file = send(PURPOSE, FILE, *expiry).json
        self.assertEqual(file["expires_at"], file["created_at"] + 3600)
        batch = send(part("purpose", b"batch"), FILE).json
        self.assertEqual(batch["expires_at"], batch["created_at"] + 30 * 86400)


class Lists(unittest.TestCase):
    def test_pages_meet_without_gap_or_overlap(self):
        key = server.new_key("pages", "pages")
        ids = [server.upload(LINES, name=f"{i}.jsonl", key=key).json["id"] for i in range(5)]
        for order, want in (("desc", ids[::-1]), ("asc", ids)):
            found, after = [], ""
            while True:
                page = server.get(f"/v1/files?limit=2&order={order}{after}", key=key).json
                self.assertEqual(page["object"], "list")
                found += [file["id"] for file in page["data"]]
                self.assertEqual((page["first_id"], page["last_id"]), (page["data"][0]["id"], page["data"][-1]["id"]))
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            self.assertEqual(found, want)
        self.assertEqual([f["id"] for f in server.get("/v1/files", key=key).json["data"]], ids[::-1])

    def test_an_empty_list(self):
        page = server.get("/v1/files", key=server.new_key("empty", "empty")).json
        self.assertEqual(page, {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False})

    def test_each_purpose_of_the_specification_comes_back_as_it_was_sent(self):
        spec = (harness.ROOT / "api-spec/openapi.yaml").read_text()
        request = re.search(r"CreateFileRequest:.*?purpose: \{type: string, enum: \[(.*?)\]\}", spec, re.S).group(1).split(", ")
        reply = re.search(r"CreateFileRequest:.*?\n    File:.*?purpose:.*?enum: \[(.*?)\]", spec, re.S).group(1).split(", ")
        self.assertEqual(sorted(reply), sorted([*request, "fine-tune-results"]))
        for purpose in request:
            made = server.upload(LINES, purpose=purpose)
            self.assertEqual((made.status, made.json["purpose"]), (200, purpose))
            self.assertEqual(server.get(f"/v1/files/{made.json['id']}").json["purpose"], purpose)
        refused = server.upload(LINES, purpose="fine-tune-results")
        self.assertEqual((refused.status, refused.error["param"]), (400, "purpose"))
        for purpose in request:
            self.assertIn(purpose, refused.error["message"], "the refusal names what there is")

    def test_by_purpose(self):
        key = server.new_key("purpose", "purpose")
        server.upload(LINES, key=key)
        other = server.upload(LINES, purpose="user_data", key=key).json["id"]
        self.assertEqual([f["id"] for f in server.get("/v1/files?purpose=user_data", key=key).json["data"]], [other])
        self.assertEqual(server.get("/v1/files?purpose=vision", key=key).json["data"], [])

    def test_wrong_parameters(self):
        for query, param in (("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"), ("order=up", "order"),
                             ("after=file-x", "after"), ("offset=3", "offset")):
            reply = server.get(f"/v1/files?{query}")
            self.assertEqual((reply.status, reply.error["param"]), (400, param), reply)


class Lost(unittest.TestCase):
    def test_bytes_that_are_not_there_are_our_fault_and_tell_nothing(self):
        file = send(part("purpose", b"user_data"), part("file", b"to be lost", "x")).json["id"]
        digest = hashlib.sha256(b"to be lost").hexdigest()
        for blob in server.data.glob(f"blobs/*/*/*/{digest}"):
            blob.unlink()
        reply = server.get(f"/v1/files/{file}/content")
        self.assertEqual(reply.status, 500)
        self.assertNotIn(digest.encode(), reply.body)

    def test_bytes_that_have_rotted_are_not_sent(self):
        for data in (b"to rot", b"a large one" * 2_000_000):
            file = send(part("purpose", b"user_data"), part("file", data, "x")).json["id"]
            server.rot(hashlib.sha256(data).hexdigest())
            reply = server.get(f"/v1/files/{file}/content")
            self.assertEqual((reply.status, reply.error["code"], reply.error["param"]), (500, "damaged_file", None), reply)
            self.assertIn(f"`{file}`", reply.error["message"])
            send(part("purpose", b"user_data"), part("file", data, "x"))
            self.assertEqual(server.get(f"/v1/files/{file}/content").body, data, "the same bytes heal it")


class Delete(unittest.TestCase):
    def test_deleted_is_gone(self):
        file = server.upload(LINES).json["id"]
        self.assertEqual(server.delete(f"/v1/files/{file}").json, {"id": file, "object": "file", "deleted": True})
        for reply in (server.get(f"/v1/files/{file}"), server.get(f"/v1/files/{file}/content"), server.delete(f"/v1/files/{file}")):
            self.assertEqual(reply.status, 404)
            self.assertEqual(reply.error, {"message": f"No such File object: {file}", "type": "invalid_request_error", "param": "id",
                                           "code": None})
        self.assertNotIn(file, [f["id"] for f in server.get("/v1/files").json["data"]])


class Idempotency(unittest.TestCase):
    def test_the_same_upload_happens_once(self):
        first = send(PURPOSE, FILE, headers={"Idempotency-Key": "upload-1"})
        again = send(PURPOSE, FILE, headers={"Idempotency-Key": "upload-1"})
        self.assertEqual((first.status, again.status), (200, 200))
        self.assertEqual(first.body, again.body)
        other = send(PURPOSE, part("file", LINES + LINES, "train.jsonl"), headers={"Idempotency-Key": "upload-1"})
        self.assertEqual((other.status, other.error["code"]), (400, "idempotency_key_reused"))
        self.assertNotEqual(send(PURPOSE, FILE).json["id"], first.json["id"])
        for key in ("x" * 256, "\xff\xfe", "a\tb"):
            refused = send(PURPOSE, FILE, headers={"Idempotency-Key": key})
            self.assertEqual((refused.status, refused.error["code"]), (400, "invalid_idempotency_key"))


if __name__ == "__main__":
    unittest.main()
