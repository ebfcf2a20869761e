"""HTTP itself: the malformed list, limits, deadlines, headers, keys. No model runs here.

GRAFT_URL and GRAFT_KEY test a server that is there already (the tests that need short deadlines are skipped then).
"""
import http.client
import json
import os
import re
import socket
import time
import unittest
import urllib.parse

import harness

HEADER_SECONDS, BODY_SECONDS = 1.5, 3
LATE_SECONDS = 12  # beyond its deadline, on a busy machine
SMUGGLED = b"GET /healthz?smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def setUpModule():
    global server, address, key
    server = None
    url, key = os.environ.get("GRAFT_URL"), os.environ.get("GRAFT_KEY")
    if not url:
        server = harness.Server(model_name=None, header_deadline=HEADER_SECONDS, body_deadline=BODY_SECONDS, log_level="info")
        url, key = server.url, server.key
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname, parts.port)


def tearDownModule():
    if server:
        server.stop()


def talk(data, seconds=5, until=None):
    """Sends bytes; returns (all that came, did the server close)."""
    with socket.create_connection(address, timeout=seconds) as wire:
        wire.sendall(data)
        answer, end = b"", time.monotonic() + seconds
        while time.monotonic() < end and not (until and until in answer):
            wire.settimeout(max(0.01, end - time.monotonic()))
            try:
                chunk = wire.recv(65536)
            except socket.timeout:
                return answer, False
            except ConnectionResetError:
                return answer, True
            if not chunk:
                return answer, True
            answer += chunk
        return answer, False


def ask(method, path, body=None, headers=None, own_key=True):
    connection = http.client.HTTPConnection(*address, timeout=20)
    headers = dict(headers or {})
    if own_key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return harness.Reply(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def request(line="GET /healthz HTTP/1.1", headers=(), body=b"", host=True, end=b"\r\n"):
    lines = [line.encode() if isinstance(line, str) else line] + ([b"Host: x"] if host else [])
    lines += [h.encode("latin-1") if isinstance(h, str) else h for h in headers]
    return end.join(lines) + end + end + body


POST = "POST /healthz HTTP/1.1"
CHUNKED_NOTHING = b"0\r\n\r\n"

# name: (bytes, statuses allowed); a second request follows each and must never be answered
MALFORMED = {
    "Content-Length with Transfer-Encoding": (request(POST, ["Content-Length: 5", "Transfer-Encoding: chunked"], CHUNKED_NOTHING), {400}),
    "Transfer-Encoding with Content-Length": (request(POST, ["Transfer-Encoding: chunked", "Content-Length: 5"], CHUNKED_NOTHING), {400}),
    "two Content-Length that differ": (request(POST, ["Content-Length: 0", "Content-Length: 44"]), {400}),
    "two Content-Length that agree": (request(POST, ["Content-Length: 0", "Content-Length: 0"]), {400}),
    "a list as Content-Length": (request(POST, ["Content-Length: 0, 44"]), {400}),
    "Content-Length with a sign": (request(POST, ["Content-Length: +0"]), {400}),
    "negative Content-Length": (request(POST, ["Content-Length: -1"]), {400}),
    "hexadecimal Content-Length": (request(POST, ["Content-Length: 0x0"]), {400}),
    "Content-Length beyond 64 bits": (request(POST, ["Content-Length: 99999999999999999999999"]), {400, 413}),
    "two Host": (request(headers=["Host: y"]), {400}),
    "no Host": (request(host=False), {400}),
    "Host with a path": (request(host=False, headers=["Host: x/y"]), {400}),
    "empty Host": (request(host=False, headers=["Host: "]), {400}),
    "Transfer-Encoding xchunked": (request(POST, ["Transfer-Encoding: xchunked"], CHUNKED_NOTHING), {400}),
    "Transfer-Encoding gzip, chunked": (request(POST, ["Transfer-Encoding: gzip, chunked"], CHUNKED_NOTHING), {400}),
    "Transfer-Encoding identity": (request(POST, ["Transfer-Encoding: identity"], CHUNKED_NOTHING), {400}),
    "identity, then chunked": (request(POST, ["Transfer-Encoding: identity", "Transfer-Encoding: chunked"], CHUNKED_NOTHING), {400}),
    "chunked twice": (request(POST, ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], CHUNKED_NOTHING), {400}),
    "chunked with a trailing tab": (request(POST, ["Transfer-Encoding: chunked\t"], CHUNKED_NOTHING), {400}),
    "chunked in HTTP/1.0": (request("POST /healthz HTTP/1.0", ["Transfer-Encoding: chunked"], CHUNKED_NOTHING), {400}),
    "a space before the colon": (request(POST, ["Transfer-Encoding : chunked"], CHUNKED_NOTHING), {400}),
    "a tab before the colon": (request(headers=["X\t: y"]), {400}),
    "a line without a colon": (request(headers=["nonsense"]), {400}),
    "an empty name": (request(headers=[": y"]), {400}),
    "an empty name that hides a request": (request(headers=[": y", "GET /healthz?smuggled HTTP/1.1", "Host: x"]), {400}),
    "a name that is no token": (request(headers=["X(y): z"]), {400}),
    "a folded line": (request(headers=["X: a", " b"]), {400}),
    "a folded line of blanks": (request(headers=["X: a", " \t"]), {400}),
    "a first line that is folded": (request(host=False, headers=[" Host: x", "Host: y"]), {400}),
    "a folded Transfer-Encoding": (request(POST, ["Transfer-Encoding:", " chunked"], CHUNKED_NOTHING), {400}),
    "a NUL in a value": (request(headers=["X: a\0b", "Y: z"]), {400}),
    "a NUL in a name": (request(headers=["X\0y: z"]), {400}),
    "a CR in a value": (request(headers=["X: a\rY: z"]), {400}),
    "a control byte in a value": (request(headers=["X: a\x01"]), {400}),
    "bare LF everywhere": (request(headers=["X: y"], end=b"\n"), {400}),
    "a bare LF behind the request line": (b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n", {400}),
    "a bare LF behind the last field": (b"GET /healthz HTTP/1.1\r\nHost: x\n\r\n", {400}),
    "a bare LF between fields": (b"GET /healthz HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", {400}),
    "%00 in the path": (request("GET /healthz%00x HTTP/1.1"), {400}),
    "%5c in the path": (request("GET /v1%5cfiles HTTP/1.1"), {400}),
    "dots in the path": (request("GET /v1/../healthz HTTP/1.1"), {400}),
    "encoded dots in the path": (request("GET /%2e%2e/healthz HTTP/1.1"), {400}),
    "encoded slashes and dots": (request("GET /v1/files/..%2f..%2fhealthz HTTP/1.1"), {400}),
    "dots inside a model id": (request("GET /v1/models/a%2f..%2fb HTTP/1.1"), {400}),
    "a control byte in the path": (request("GET /health%0az HTTP/1.1"), {400}),
    "a raw byte from 0x80": (request(b"GET /health\xc3\xa9 HTTP/1.1"), {400}),
    "an encoded byte from 0x80": (request("GET /health%c3%a9 HTTP/1.1"), {400}),
    "a broken escape": (request("GET /health%zz HTTP/1.1"), {400}),
    "%00 in the query": (request("GET /healthz?a=%00 HTTP/1.1"), {400}),
    "a query that is not UTF-8": (request("GET /healthz?a=%ff HTTP/1.1"), {400}),
    "an absolute target": (request("GET http://x/healthz HTTP/1.1"), {400}),
    "a target without a slash": (request("GET healthz HTTP/1.1"), {400}),
    "an asterisk": (request("OPTIONS * HTTP/1.1"), {400}),
    "HTTP/2.0": (request("GET /healthz HTTP/2.0"), {400, 505}),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", {400, None}),
    "no version": (b"GET /healthz \r\nHost: x\r\n\r\n", {400, None}),
    "two spaces in the target": (request("GET /heal thz HTTP/1.1"), {400, None}),
    "a TLS hello": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", {400, None}),
    "a target above 4 kB": (request(f"GET /{'a' * 4200} HTTP/1.1"), {414}),
    "more than 100 fields": (request(headers=[f"X{i}: y" for i in range(100)]), {400}),
    "headers beyond the buffer": (request(headers=["X: " + "y" * 40000]), {400, 431}),
    "Content-Encoding": (request(POST, ["Content-Encoding: gzip", "Content-Length: 1"], b"x"), {415}),
    "an unknown expectation": (request(POST, ["Expect: tea", "Content-Length: 1"], b"x"), {417}),
    "broken chunks": (request("POST /v1/fine_tuning/jobs/x/cancel HTTP/1.1", ["Transfer-Encoding: chunked"], b"zz\r\nabc\r\n"), {400, 401}),
    "a chunk size beyond 64 bits": (request("POST /v1/fine_tuning/jobs/x/cancel HTTP/1.1", ["Transfer-Encoding: chunked"],
                                            b"1" + b"0" * 17 + b"\r\n"), {400, 401, 413}),
}


class Malformed(unittest.TestCase):
    def test_each_is_refused_and_closed_and_smuggles_nothing(self):
        for name, (data, statuses) in MALFORMED.items():
            with self.subTest(name):
                answer, closed = talk(data + SMUGGLED)
                self.assertTrue(closed, f"left open after {answer[:200]!r}")
                found = [int(s) for s in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]
                self.assertIn(found[0] if found else None, statuses, answer[:300])
                # libmicrohttpd 0.9.75 may write the header of its own errors twice; never another answer
                self.assertEqual(len(set(found)), min(1, len(found)), answer)
                self.assertNotIn(200, found)

    def test_the_server_is_unharmed(self):
        self.assertEqual(ask("GET", "/healthz").status, 200)

    def test_good_neighbours_of_the_malformed_are_served(self):
        for name, data in {
            "chunked": request("POST /v1/fine_tuning/jobs HTTP/1.1", ["Transfer-Encoding: chunked", f"Authorization: Bearer {key}"],
                               b"2\r\n{}\r\n0\r\n\r\n"),
            "Content-Length": request("POST /v1/fine_tuning/jobs HTTP/1.1", ["Content-Length: 2", f"Authorization: Bearer {key}"], b"{}"),
        }.items():
            with self.subTest(name):
                answer, closed = talk(data, until=b"missing_required_parameter")
                self.assertIn(b"HTTP/1.1 400", answer)
                self.assertIn(b"missing_required_parameter", answer)
                self.assertFalse(closed)

    def test_two_requests_in_one_packet_get_two_answers(self):
        answer, _ = talk(request() + request("GET /nowhere HTTP/1.1"), until=b"unknown_url")
        self.assertEqual(re.findall(rb"HTTP/1\.1 (\d+) ", answer), [b"200", b"404"])


class Limits(unittest.TestCase):
    def test_a_body_that_is_declared_too_large_is_not_read(self):
        for path, length in (("/v1/fine_tuning/jobs", (1 << 20) + 1), ("/v1/chat/completions", (8 << 20) + 1),
                             ("/v1/files", 600 << 20)):
            with self.subTest(path):
                answer, closed = talk(request(f"POST {path} HTTP/1.1", [
                    f"Content-Length: {length}", f"Authorization: Bearer {key}", "Expect: 100-continue",
                    "Content-Type: " + ("multipart/form-data; boundary=x" if path == "/v1/files" else "application/json")]))
                self.assertTrue(answer.startswith(b"HTTP/1.1 413 "), answer)
                self.assertIn(b"request_too_large", answer)
                self.assertTrue(closed)

    def test_a_chunked_body_is_cut_off_at_the_limit(self):
        chunk = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
        answer, _ = talk(request("POST /v1/fine_tuning/jobs HTTP/1.1", [
            "Transfer-Encoding: chunked", f"Authorization: Bearer {key}"], chunk * 20 + b"0\r\n\r\n"), until=b"}}")
        self.assertTrue(answer.startswith(b"HTTP/1.1 413 "), answer)

    def test_who_sends_all_before_it_reads_finds_its_refusal(self):
        form, json_type, length = "multipart/form-data; boundary=x", "application/json", 4 << 20
        for path, status, kind, bearer in (("/v1/files", 401, form, "sk-of-another-service"), ("/v1/chat/completions", 401, json_type, ""),
                                           ("/files", 404, form, key), ("/v1/models", 405, json_type, key),
                                           ("/v1/fine_tuning/jobs", 413, json_type, key), ("/v1/chat/completions", 415, "text/plain", key)):
            with self.subTest(path=path, status=status), socket.create_connection(address, timeout=20) as wire:
                wire.sendall(request(f"POST {path} HTTP/1.1", [
                    f"Content-Length: {length}", f"Authorization: Bearer {bearer}", f"Content-Type: {kind}"]))
                time.sleep(0.3)  # enough for an answer that does not wait for the body
                for _ in range(length >> 16):
                    wire.sendall(b" " * 65536)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 %d " % status))

    def test_deep_json_is_refused(self):
        for text in (b"[" * 100000, b'{"metadata":' * 40 + b"1" + b"}" * 40, b'{"a":' * 100000):
            reply = ask("POST", "/v1/fine_tuning/jobs", text, {"Content-Type": "application/json"})
            self.assertEqual(reply.status, 400, reply)
            self.assertIn("could not parse", reply.error["message"])

    def test_broken_json_bodies(self):
        bodies = {"truncated": b'{"model":', "two values": b"{} {}", "an array": b"[]", "a string": b'"x"', "a number": b"1",
                  "null": b"null", "nothing": b"", "blanks": b"  \r\n", "duplicate keys": b'{"model":"a","model":"b"}',
                  "invalid UTF-8": b'{"model":"\xff"}', "overlong UTF-8": b'{"model":"\xc0\xaf"}',
                  "a lone surrogate": b'{"model":"\\ud800"}', "a NUL": b'{"model":"\\u0000"}', "a raw NUL": b'{"model":"\0"}',
                  "NaN": b'{"seed":NaN}', "a huge number": b'{"seed":1e400}', "beyond 64 bits": b'{"seed":99999999999999999999}',
                  "single quotes": b"{'model':'x'}", "a comment": b"{/*x*/}", "a byte order mark": b"\xef\xbb\xbf{}",
                  "UTF-16": '{"model":"x"}'.encode("utf-16")}
        for name, body in bodies.items():
            with self.subTest(name):
                reply = ask("POST", "/v1/fine_tuning/jobs", body, {"Content-Type": "application/json"})
                self.assertEqual(reply.status, 400, reply)
                self.assertEqual(reply.error["type"], "invalid_request_error")
                self.assertTrue(reply.error["message"])


class Deadlines(unittest.TestCase):
    def setUp(self):
        if server is None:
            self.skipTest("needs a server with short deadlines")

    def drip(self, head, piece, seconds):
        """Sends `piece` each 0.3 s; returns the seconds until the server hung up."""
        with socket.create_connection(address, timeout=5) as wire:
            began = time.monotonic()
            wire.sendall(head)
            wire.settimeout(0.3)
            while time.monotonic() - began < seconds:
                try:
                    wire.sendall(piece)
                    if wire.recv(65536) == b"":
                        return time.monotonic() - began
                except socket.timeout:
                    continue
                except OSError:
                    return time.monotonic() - began
        return None

    def test_headers_that_drip(self):
        took = self.drip(b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n", 2 * LATE_SECONDS)
        self.assertIsNotNone(took)
        self.assertLess(took, HEADER_SECONDS + LATE_SECONDS)

    def test_a_body_that_drips(self):
        took = self.drip(request("POST /v1/fine_tuning/jobs HTTP/1.1", ["Content-Length: 1000", f"Authorization: Bearer {key}"]),
                         b" ", 2 * LATE_SECONDS)
        self.assertIsNotNone(took)
        self.assertGreater(took, BODY_SECONDS - 1)
        self.assertLess(took, BODY_SECONDS + LATE_SECONDS)

    def test_an_upload_that_drips(self):
        took = self.drip(request("POST /v1/files HTTP/1.1", [
            "Content-Length: 100000", "Content-Type: multipart/form-data; boundary=x", f"Authorization: Bearer {key}"],
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'), b" ", 2 * LATE_SECONDS)
        self.assertIsNotNone(took)
        self.assertLess(took, BODY_SECONDS + LATE_SECONDS)
        self.nothing_is_left_in_staging()

    def nothing_is_left_in_staging(self):
        staging = server.data / "staging"
        limit = time.monotonic() + LATE_SECONDS
        while any(staging.iterdir()) and time.monotonic() < limit:
            time.sleep(0.1)
        self.assertEqual([p.name for p in staging.iterdir()], [])

    def test_an_upload_whose_client_goes_leaves_nothing(self):
        # a megabyte of which would wait two minutes more for the rest; the client ends with its last bytes
        head = request("POST /v1/files HTTP/1.1", [
            "Content-Length: 100000000", "Content-Type: multipart/form-data; boundary=x", f"Authorization: Bearer {key}"],
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n')
        for _ in range(10):
            with socket.create_connection(address, timeout=5) as wire:
                wire.sendall(head + b" " * 1000000)
        self.nothing_is_left_in_staging()

    def test_two_hundred_drippers_leave_room_for_others(self):
        wires = [socket.create_connection(address, timeout=5) for _ in range(200)]
        try:
            for wire in wires:
                wire.sendall(b"GET /healthz HTTP/1.1\r\nX:")
            began = time.monotonic()
            self.assertEqual(ask("GET", "/v1/files").status, 200)
            self.assertLess(time.monotonic() - began, LATE_SECONDS)
            time.sleep(HEADER_SECONDS + 1)
            gone = 0
            for wire in wires:
                wire.settimeout(LATE_SECONDS)
                try:
                    gone += wire.recv(100) == b""
                except OSError:
                    gone += 1
            self.assertEqual(gone, len(wires))
        finally:
            for wire in wires:
                wire.close()


class Answers(unittest.TestCase):
    def test_every_answer_has_the_headers(self):
        seen = set()
        for path, status in (("/healthz", 200), ("/v1/files", 200), ("/v1/files/file-x", 404), ("/_stainless_unknown_path", 404)):
            reply = ask("GET", path)
            self.assertEqual(reply.status, status)
            self.assertEqual(reply.headers["content-type"], "application/json")
            self.assertEqual(reply.headers["openai-version"], "2020-10-01")
            self.assertGreaterEqual(int(reply.headers["openai-processing-ms"]), 0)
            seen.add(reply.headers["x-request-id"])
            if path.startswith("/v1/files"):
                self.assertTrue(reply.headers["openai-organization"])
        self.assertEqual(len(seen), 4)

    def test_every_error_has_four_keys(self):
        for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/v1/files", 405), ("GET", "/v1/files/x", 404),
                                     ("POST", "/v1/files", 400), ("GET", "/v1/models/x", 404), ("POST", "/v1/fine_tuning/jobs", 400)):
            reply = ask(method, path)
            self.assertEqual(reply.status, status, reply)
            self.assertEqual(sorted(reply.error), ["code", "message", "param", "type"])
            self.assertEqual(reply.error["type"], "invalid_request_error")

    def test_methods(self):
        self.assertEqual(ask("PATCH", "/v1/files").headers["allow"], "POST, GET, HEAD, OPTIONS")
        self.assertEqual(ask("OPTIONS", "/v1/files", own_key=False).status, 204)
        self.assertEqual(ask("OPTIONS", "/nowhere").status, 404)
        self.assertEqual(ask("TRACE", "/healthz").status, 405)
        head = ask("HEAD", "/v1/files")
        self.assertEqual((head.status, head.body), (200, b""))

    def test_trailing_and_doubled_slashes_are_other_urls(self):
        for path in ("/v1/files/", "//v1/files", "/v1//files", "/V1/files", "/v1/files/a%2fb", "/", "/v1"):
            self.assertEqual(ask("GET", path).status, 404, path)

    def test_accept_is_taken_easily(self):
        for accept in ("application/binary", "*/*", "text/html", "nonsense"):
            self.assertEqual(ask("GET", "/v1/files", headers={"Accept": accept}).status, 200)

    def test_a_bodyless_post_needs_no_content_type(self):
        reply = ask("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel")
        self.assertEqual(reply.status, 404)
        self.assertEqual(reply.error, {"message": "Could not find fine tune: ftjob-x", "type": "invalid_request_error",
                                       "param": "fine_tune_id", "code": "fine_tune_not_found"})

    def test_wrong_content_types(self):
        reply = ask("POST", "/v1/fine_tuning/jobs", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"})
        self.assertEqual((reply.status, reply.error["code"]), (415, "unsupported_content_type"))
        reply = ask("POST", "/v1/files", b"{}", {"Content-Type": "application/json"})
        self.assertEqual(reply.status, 400)
        self.assertIn("multipart/form-data", reply.error["message"])


class Keys(unittest.TestCase):
    def test_bad_keys_read_the_same(self):
        well_formed = "gk-" + "A" * 49
        for header in (None, "", "Bearer", "Bearer ", "Basic eDp5", f"Bearer {key[:-1]}", f"Bearer {key}x", f"Bearer {key[:-1]}\x80",
                       f"Bearer {well_formed}", "Bearer sk-1234567890", f"bearer{key}", key):
            with self.subTest(header):
                reply = ask("GET", "/v1/files", headers={} if header is None else {"Authorization": header}, own_key=False)
                self.assertEqual(reply.status, 401, reply)
                self.assertEqual(reply.error["code"], "invalid_api_key")
                self.assertNotIn(key[3:-1], reply.error["message"])
                self.assertNotIn("1234567890", reply.error["message"])

    def test_the_scheme_is_case_insensitive(self):
        reply = ask("GET", "/v1/files", headers={"Authorization": f"bEARER {key}"}, own_key=False)
        self.assertEqual(reply.status, 200)

    def test_blanks_around_it_are_not_a_part_of_it(self):
        reply = ask("GET", "/v1/files", headers={"Authorization": f" \tBearer  {key} \t"}, own_key=False)
        self.assertEqual(reply.status, 200, reply)

    def test_every_v1_route_needs_one(self):
        for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/models"), ("POST", "/v1/fine_tuning/jobs"),
                             ("POST", "/v1/chat/completions"), ("DELETE", "/v1/models/x"), ("GET", "/v1/files/x/content")):
            self.assertEqual(ask(method, path, own_key=False).status, 401, path)

    def test_an_upload_with_a_wrong_key_is_refused_before_its_body(self):
        # well formed, so that only the database knows that it is wrong
        wrong = os.environ.get("GRAFT_WRONG_KEY") or revoked_key(self)
        answer, closed = talk(request("POST /v1/files HTTP/1.1", [
            "Content-Length: 100000000", "Content-Type: multipart/form-data; boundary=x", "Expect: 100-continue",
            f"Authorization: Bearer {wrong}"]))
        self.assertTrue(answer.startswith(b"HTTP/1.1 401 "), answer)
        self.assertTrue(closed)


def revoked_key(test):
    if server is None:
        test.skipTest("needs GRAFT_WRONG_KEY")
    wrong = server.new_key("org", "other")
    server.cli("key", "revoke", wrong, "--data", server.data)
    return wrong


class Health(unittest.TestCase):
    def test_it_is_alive_and_says_what_it_counts(self):
        self.assertEqual(ask("GET", "/healthz", own_key=False).json, {"status": "ok"})
        reply = ask("GET", "/metrics", own_key=False)
        self.assertEqual(reply.status, 200)
        self.assertTrue(reply.headers["content-type"].startswith("text/plain"))
        self.assertIn(b"graft_http_requests_total", reply.body)

    def test_readiness_names_what_is_missing(self):
        reply = ask("GET", "/readyz", own_key=False)
        self.assertIn(reply.status, (200, 503))
        if reply.status == 200:
            self.assertEqual(reply.json, {"status": "ready"})
        else:
            self.assertTrue(json.loads(reply.body)["error"]["message"])


class WrongKeyFlood(unittest.TestCase):
    """Last in the alphabet, since it uses up what this address may fail."""

    def test_a_flood_of_wrong_keys_is_braked_and_good_keys_pass(self):
        self.assertEqual(ask("GET", "/v1/files").status, 200)
        statuses = set()
        connection = http.client.HTTPConnection(*address, timeout=20)
        for i in range(250):
            connection.request("GET", "/v1/files", headers={"Authorization": f"Bearer nonsense-{i}"})
            answer = connection.getresponse()
            answer.read()
            statuses.add(answer.status)
            if answer.status == 429:
                self.assertEqual(answer.headers["retry-after"], "1")
                break
        connection.close()
        self.assertEqual(statuses, {401, 429})
        self.assertEqual(ask("GET", "/v1/files").status, 200)

    def test_no_key_is_logged(self):
        if server is None:
            self.skipTest("needs the server's log")
        text = server.log_path.read_text(errors="replace")
        self.assertIn("GET /v1/files 200", text)
        self.assertNotIn(key[3:], text)
        self.assertNotIn("sk-1234567890", text)
        self.assertNotIn("nonsense", text)


if __name__ == "__main__":
    unittest.main()
