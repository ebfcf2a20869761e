"""TLS by --tls-cert and --tls-key: 1.2 and 1.3, nothing older, also beyond loopback; what is wrong with them is said."""
import http.client
import shutil
import socket
import ssl
import subprocess
import time
import unittest
import warnings

import harness


def certificate(folder, name):
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
                   check=True, stderr=subprocess.DEVNULL)
    return cert, key


def setUpModule():
    global server, cert, key, process
    if not shutil.which("openssl"):
        raise unittest.SkipTest("openssl, which makes the test's certificate, is not installed")
    server = harness.Server(model_name=None, header_deadline=2)
    server.shutdown()
    cert, key = certificate(server.folder, "good")
    with open(server.log_path, "ab") as log:
        process = server.process = subprocess.Popen(
            [harness.GRAFT, "serve", "--data", str(server.data), "--listen", f"0.0.0.0:{server.port}", "--tls-cert", str(cert),
             "--tls-key", str(key)], env=server.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    limit = time.monotonic() + harness.READY_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        try:
            if ask("/readyz").status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(server.log())


def tearDownModule():
    server.stop()


def context(version=None):
    made = ssl.create_default_context(cafile=cert)
    if version:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.minimum_version = made.maximum_version = version
            made.set_ciphers("ALL:@SECLEVEL=0")
    return made


def ask(path, version=None):
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context(version))
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {server.key}"})
        answer = connection.getresponse()
        return harness.Reply(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


class Tls(unittest.TestCase):
    def test_1_2_and_1_3_answer(self):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            self.assertEqual(ask("/v1/files", version).json["object"], "list")

    def test_older_versions_are_refused(self):
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self.assertRaises((ssl.SSLError, ConnectionError)):
                    ask("/healthz", version)

    def test_plain_http_gets_nothing(self):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
            wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                answer = wire.recv(1000)
            except ConnectionResetError:
                answer = b""
            self.assertNotIn(b"200", answer)

    def test_a_silent_handshake_is_cut(self):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
            began = time.monotonic()
            self.assertEqual(wire.recv(1), b"")
            self.assertLess(time.monotonic() - began, 15)

    def test_wrong_files_are_named(self):
        _, other = certificate(server.folder, "other")
        for flags, words in ((["--tls-cert", cert], "belong together"), (["--tls-cert", cert, "--tls-key", other], "PEM files"),
                             (["--tls-cert", "/none", "--tls-key", key], "/none")):
            done = server.command("serve", "--data", server.folder / "x", "--listen", "127.0.0.1:0", *flags)
            self.assertIn(done.returncode, (1, 2), done)
            self.assertIn(words, done.stderr)


if __name__ == "__main__":
    unittest.main()
