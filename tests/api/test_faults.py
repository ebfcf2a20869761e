"""What must not cost a client anything: first use of a key."""
import re
import secrets
import socket
import time
import unittest

import harness


def tearDownModule():
    server.stop()


def setUpModule():
    global server
    server = harness.Server(heartbeat=0.5, fence=5, sweep=0.5, poll=0.1, recovery=0.2)


def multipart(data):
    """(boundary, body) of an upload."""
    mark = "----graft" + secrets.token_hex(8)
    return mark, (f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
                  f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="train.jsonl"\r\n\r\n'
                  ).encode() + data + f"\r\n--{mark}--\r\n".encode()


class FirstUseOfAKey(unittest.TestCase):
    """The server looks an unknown key up between an upload's headers and its body; the body must arrive whole, however it
    comes. (Once it was taken for complete before its first byte: "the multipart body ends in part 0".)"""

    DATA = harness.examples(harness.FACTS)

    def send(self, header, pieces, pause=0.0, expect=False):
        """(status, body) of the final answer; each piece is a packet of its own."""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.sendall(header)
            answer = b""
            if expect:
                while b"\r\n\r\n" not in answer:
                    answer += self.receive(wire)
                self.assertTrue(answer.startswith(b"HTTP/1.1 100 "), answer)
                answer = answer.partition(b"\r\n\r\n")[2]
            for piece in pieces:
                time.sleep(pause)
                wire.sendall(piece)
            while not re.search(rb"\r\n\r\n.*\}$", answer, re.S):
                answer += self.receive(wire)
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]

    def receive(self, wire):
        chunk = wire.recv(65536)
        self.assertNotEqual(chunk, b"", "the server closed the connection without an answer")
        return chunk

    def header(self, mark, *lines, key=None):
        return "\r\n".join((
            "POST /v1/files HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key or server.new_key()}",
            f"Content-Type: multipart/form-data; boundary={mark}", *lines, "", "")).encode()

    def upload(self, *extra, cut=(), pause=0.0, together=False, expect=False):
        mark, body = multipart(self.DATA)
        pieces = [body[a:b] for a, b in zip((0, *cut), (*cut, len(body)))]
        header = self.header(mark, f"Content-Length: {len(body)}", *extra)
        if together:
            header, pieces = header + body, []
        status, answer = self.send(header, pieces, pause, expect)
        self.assertEqual(status, 200, answer)

    def test_headers_and_body_in_one_packet(self):
        self.upload(together=True)

    def test_the_body_at_once_behind_the_headers(self):
        self.upload()

    def test_the_body_long_after_the_headers(self):
        self.upload(pause=0.3)

    def test_a_body_in_pieces(self):
        self.upload(cut=(1, 2, 30, 31, 400), pause=0.05)
        self.upload(cut=range(1, 60))

    def test_expect_100_continue(self):
        self.upload("Expect: 100-continue", expect=True)
        self.upload("Expect: 100-continue", expect=True, cut=(1, 30), pause=0.1)
        # A client may lose its patience and send without having been asked to.
        mark, body = multipart(self.DATA)
        status, answer = self.send(self.header(mark, f"Content-Length: {len(body)}", "Expect: 100-continue") + body, [])
        self.assertIn(status, (100, 200), answer)
        self.assertRegex(answer, rb'"object": ?"file"')

    def test_chunks(self):
        mark, body = multipart(self.DATA)
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1], body[1:40], body[40:])] + [b"0\r\n\r\n"]
        for pause in (0, 0.1):
            status, answer = self.send(self.header(mark, "Transfer-Encoding: chunked"), chunks, pause)
            self.assertEqual(status, 200, answer)

    def test_a_body_that_is_empty_is_told_so(self):
        for lines, pieces in ((("Content-Length: 0",), []), (("Transfer-Encoding: chunked",), [b"0\r\n\r\n"])):
            status, answer = self.send(self.header("mark", *lines), pieces, 0.1)
            self.assertEqual(status, 400, answer)
            self.assertIn(b"ends in part 0", answer)

    def test_a_wrong_key_is_refused_before_its_body(self):
        key = server.new_key()
        server.cli("key", "revoke", key, "--data", server.data)
        status, answer = self.send(self.header("mark", "Content-Length: 100000", key=key), [])
        self.assertEqual(status, 401, answer)


if __name__ == "__main__":
    unittest.main()
