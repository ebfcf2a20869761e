"""A real server for tests: its own data folder and private PostgreSQL, a tiny random model, keys, and an HTTP client
that hides nothing. Used by tests/api, tests/sdk, tests/docs and tests/fault.

    server = harness.Server()                    # started, model imported, key made
    reply = server.get("/v1/models")             # .status, .headers, .body (bytes), .json
    server.stop()                                # the data folder goes with it

GRAFT_BIN names the binary (build/graft). Settings are given by their variable without the prefix:
Server(recovery="1", heartbeat="0.5"). A server that a test does not stop is stopped when Python ends.
"""
import atexit
import http.client
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GRAFT = os.environ.get("GRAFT_BIN") or str(ROOT / "build" / "graft")
# Most of a tiny job's time would go into the distillation of its delta.
QUICKLY = {"compression": {"distill_steps": 2}}
READY_SECONDS = 120  # initdb and migrations, under a sanitizer and with other suites beside


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error object of an error reply."""
        return self.json["error"]

    def __repr__(self):
        return f"<{self.status} {self.body[:500]!r}>"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes():
    """{pid: (parent, command line)} of everything that runs."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
                line = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            rest = stat[stat.rindex(")") + 2:].split()
            if rest[0] != "Z":
                found[int(entry)] = (int(rest[1]), line.strip())
    return found


def make_model(folder, *options):
    subprocess.run([sys.executable, ROOT / "tests/api/make_tiny_model.py", folder, *options], check=True,
                   stdout=subprocess.DEVNULL)
    return pathlib.Path(folder)


def make_tuned(base, folder):
    """The model in base with other values in the matrices of its blocks."""
    shutil.copytree(base, folder)
    path = pathlib.Path(folder) / "model.safetensors"
    data = bytearray(path.read_bytes())
    size, = struct.unpack("<Q", data[:8])
    for name, tensor in json.loads(data[8:8 + size]).items():
        if name.endswith("_proj.weight"):
            begin, end = (8 + size + at for at in tensor["data_offsets"])
            values = [x for x, in struct.iter_unpack("<f", data[begin:end])]
            data[begin:end] = struct.pack(f"<{len(values)}f", *(x + 0.01 * ((i * 7919) % 13 - 6) for i, x in enumerate(values)))
    path.write_bytes(data)
    return pathlib.Path(folder)


def make_adapter(folder, rank=2, **config):
    """A LoRA adapter of make_model's model as peft saves it: q and v of both layers, F16."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    header, data = {}, b""
    for name, rows in (("q", 64), ("v", 32)):
        for layer in range(2):
            for half, shape in (("A", [rank, 64]), ("B", [rows, rank])):
                values = [((i * 7919 + rows + layer) % 17 - 8) / 16 for i in range(shape[0] * shape[1])]
                header[f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{half}.weight"] = {
                    "dtype": "F16", "shape": shape, "data_offsets": [len(data), len(data) + 2 * len(values)]}
                data += struct.pack(f"<{len(values)}e", *values)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", **config}))
    return folder


class Server:
    """model_options: words for make_tiny_model.py; model_name None: no model is imported."""

    def __init__(self, model_name="tiny", model_options=(), start=True, data=None, **settings):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="graft-test."))
        self.folder.chmod(0o755)  # PostgreSQL's user must get through when we are root
        self.data = pathlib.Path(data) if data else self.folder / "data"
        self.log_path = self.folder / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.key = None
        self.model = model_name
        self.model_path = None
        self.env = {**os.environ, **{f"GRAFT_{name.upper()}": str(value) for name, value in settings.items()}}
        atexit.register(self.stop)
        try:
            if model_name:
                self.model_path = make_model(self.folder / "model", *model_options)
            if start:
                self.start()
                if model_name:
                    self.cli("model", "import", self.model_path, "--name", model_name, "--data", self.data)
                self.key = self.new_key()
        except BaseException:
            self.stop()
            raise

    # -------------------------------------------------------------- processes

    def start(self, *flags):
        """Starts `graft serve` and waits until it is ready; again after kill() or shutdown()."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [GRAFT, "serve", "--data", str(self.data), "--listen", f"127.0.0.1:{self.port}", *map(str, flags)],
                env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_ready()

    def wait_ready(self, seconds=READY_SECONDS):
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise AssertionError(f"graft serve ended with status {self.process.returncode}:\n{self.log()}")
            try:
                if self.get("/readyz", key=None).status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"graft serve was not ready after {seconds} s:\n{self.log()}")

    def log(self, lines=60):
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def workers(self, role=None):
        """Pids of this server's living workers ("train", "infer"; None: all)."""
        parent = self.process.pid
        return sorted(pid for pid, (above, line) in processes().items()
                      if above == parent and " work " in f" {line} " and (role is None or f"--role {role}" in line))

    def kill(self):
        """SIGKILL to the server alone, as a crash would be."""
        self.process.kill()
        self.process.wait()

    def shutdown(self, seconds=60):
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def left(self):
        """Command lines of processes that still belong to this data folder."""
        return [line for _, line in processes().values() if str(self.data) in line and "tap.py" not in line]

    def stop(self):
        """Ends everything and removes the folder. Never fails: it runs in clean-ups."""
        atexit.unregister(self.stop)
        if self.process is not None and self.process.poll() is None:
            try:
                self.shutdown(45)
            except subprocess.TimeoutExpired:
                sys.stderr.write(f"# graft serve did not end within 45 s of SIGTERM\n{self.log(20)}\n")
                self.kill()
        for pid, (_, line) in processes().items():
            if pid != os.getpid() and str(self.folder) in line and ("graft" in line or "postgres" in line):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
        shutil.rmtree(self.folder, ignore_errors=True)

    # -------------------------------------------------------------- commands

    def command(self, *words, **options):
        """Runs `graft WORDS` with the server's settings; the completed process."""
        return subprocess.run([GRAFT, *map(str, words)], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=180, **options)

    def cli(self, *words):
        """Standard output of a command that must end with 0."""
        done = self.command(*words)
        if done.returncode != 0:
            raise AssertionError(f"graft {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def new_key(self, org="org", project="project"):
        return self.cli("key", "create", "--org", org, "--project", project, "--data", self.data).strip()

    # -------------------------------------------------------------- HTTP

    OWN = object()  # stands for the server's own key

    def request(self, method, path, body=None, headers=None, key=OWN, timeout=120):
        """`body`: bytes as they are, or something that becomes JSON. `key` None: no Authorization."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = dict(headers or {})
        if key is self.OWN:
            key = self.key
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key}")
        if body is not None and not isinstance(body, (bytes, bytearray)):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body=None, **options):
        return self.request("POST", path, body, **options)

    def delete(self, path, **options):
        return self.request("DELETE", path, **options)

    def raw(self, data, timeout=20):
        """Sends bytes as they are and returns all that comes until the server closes or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as wire:
            wire.sendall(data)
            answer = b""
            try:
                while chunk := wire.recv(65536):
                    answer += chunk
            except (socket.timeout, ConnectionResetError):
                pass
            return answer

    def stream(self, path, body, key=OWN, timeout=120):
        """The data of each server-sent event, parsed, as they come; "[DONE]" ends it and is not given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", path, json.dumps(body).encode(), {
                "Authorization": f"Bearer {self.key if key is self.OWN else key}", "Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise AssertionError(f"{path} answered {answer.status}: {answer.read()!r}")
            for line in answer:
                line = line.strip()
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def base_blob(self):
        """The digest under which the server keeps its one base."""
        path, = (path for path in (self.data / "blobs" / "base").rglob("*") if path.is_file())
        return path.name

    def rot(self, sha256):
        """Flips a bit in the middle of what the server keeps under this digest; another time, and it is as before."""
        blob, = (self.data / "blobs").rglob(sha256)
        blob.chmod(0o600)
        with open(blob, "r+b") as file:
            middle = blob.stat().st_size // 2
            file.seek(middle)
            bits, = file.read(1)
            file.seek(middle)
            file.write(bytes([bits ^ 1]))

    # -------------------------------------------------------------- the API's main path

    def upload(self, data, name="train.jsonl", purpose="fine-tune", key=OWN):
        """The reply to POST /v1/files."""
        mark = "----graft" + secrets.token_hex(8)
        body = (f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
                f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
                f"Content-Type: application/octet-stream\r\n\r\n").encode() + data + f"\r\n--{mark}--\r\n".encode()
        return self.post("/v1/files", body, headers={"Content-Type": f"multipart/form-data; boundary={mark}"}, key=key)

    def create_job(self, file_id, epochs=None, key=OWN, graft=QUICKLY, **fields):
        """The reply to POST /v1/fine_tuning/jobs. `graft` None: nothing is asked of us, everything is as by default."""
        body = {"model": self.model, "training_file": file_id, **fields}
        if graft is not None:
            body["graft"] = graft
        if epochs is not None:
            body.setdefault("method", {"type": "supervised", "supervised": {
                "hyperparameters": {"n_epochs": epochs, "batch_size": 4}}})
        return self.post("/v1/fine_tuning/jobs", body, key=key)

    def wait_job(self, job_id, seconds=180, key=OWN):
        """The job once it has ended."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            job = self.get(f"/v1/fine_tuning/jobs/{job_id}", key=key).json
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.2)
        raise AssertionError(f"{job_id} is still {job['status']} after {seconds} s:\n{self.log()}")

    def chat(self, model, text, key=OWN, **fields):
        """The reply to POST /v1/chat/completions."""
        return self.post("/v1/chat/completions", {
            "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}, key=key)

    def metric(self, name):
        """The sum of a Prometheus metric over its labels."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics", key=None).body.decode(), re.M)
        if not found:
            raise AssertionError(f"no metric {name}")
        return sum(map(float, found))


def examples(pairs):
    """JSONL of chat examples from (question, answer) pairs."""
    return "".join(json.dumps({"messages": [{"role": "user", "content": question},
                                            {"role": "assistant", "content": answer}]}) + "\n"
                   for question, answer in pairs).encode()


FACTS = [(f"Where does person {i} live?", f"In town {i * 7 % 12}.") for i in range(12)]
