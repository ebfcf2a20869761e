"""Faults that may cost a client time, never a job: a full disk, a worker that falls asleep, a database that restarts; and
the first use of a key, which once cost an upload.

A full disk is a small tmpfs in a mount namespace of this process. As root that needs nothing; anyone else needs user
namespaces, and where the kernel refuses them those tests are skipped."""
import ctypes
import errno
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import harness

FACTS = [(f"Where does person {i} live?", f"In town {i * 7 % 40}.") for i in range(40)]
EPOCHS = 30
SHAPE = ("--layers", "4", "--hidden", "96", "--intermediate", "256")
QUICK = {"heartbeat": 0.5, "fence": 5, "sweep": 0.5, "poll": 0.1, "recovery": 0.2}
MIB = 1 << 20


def wait_until(true, what, seconds=180):  # as long as a job may take under a sanitizer beside others
    limit = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > limit:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.03)
    return value


# -------------------------------------------------------------------- what the tests look at

def sql(server, query):
    done = subprocess.run(["psql", "-h", str(server.data / "pg"), "-U", "postgres", "-d", "graft", "-AtXc", query],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise AssertionError(f"psql: {done.stdout}")
    return done.stdout.strip()


def upload(server, data=None, **options):
    reply = server.upload(data or harness.examples(FACTS), **options)
    if reply.status != 200:
        raise AssertionError(f"upload: {reply}")
    return reply.json["id"]


def start(server, file, epochs=EPOCHS, **options):
    """The id of a job that always ends with the same delta."""
    reply = server.create_job(file, epochs=epochs, seed=7, **options)
    if reply.status != 200:
        raise AssertionError(f"job: {reply}")
    return reply.json["id"]


def messages(server, job, level=None):
    """Oldest first; metrics left out."""
    found, after = [], ""
    while True:
        page = server.get(f"/v1/fine_tuning/jobs/{job}/events?limit=100{after}").json
        found += [event["message"] for event in page["data"]
                  if event["type"] == "message" and level in (None, event["level"])]
        if not page["has_more"]:
            return found[::-1]
        after = f"&after={page['data'][-1]['id']}"


def says(server, job, words):
    """Waits until the job has an event with these words."""
    return wait_until(lambda: any(words in message for message in messages(server, job)),
                      f'an event with "{words}"; there are {messages(server, job)}\n{server.log()}')


def is_training(server, job):
    """Waits until the job has a recovery checkpoint behind it."""
    wait_until(lambda: sql(server, f"SELECT recovery_step > 0 FROM graft.job_lease WHERE job = '{job}'") == "t",
               "a first recovery checkpoint")


def has_made_steps(server, job):
    wait_until(lambda: sql(server, f"SELECT count(*) > 20 FROM graft.job_event WHERE job = '{job}'") == "t", "some steps")


def artifact(server, job):
    return sql(server, f"SELECT artifact_sha256 FROM graft.model WHERE job = '{job}'")


def undisturbed(server, file, known=[]):
    """The artifact that start() ends with on any server, when nothing happens."""
    if not known:
        job = start(server, file)
        if server.wait_job(job)["status"] != "succeeded":
            raise AssertionError(server.log())
        known.append(artifact(server, job))
    return known[0]


def left_behind(server):
    found = []
    for folder in ("staging", "recovery"):
        for _, folders, files in os.walk(server.data / folder):  # unlike rglob it bears with what vanishes
            found += folders + files
    return found


class Fault(unittest.TestCase):
    def succeeds_once(self, server, job, seconds=180):
        ended = server.wait_job(job, seconds)
        self.assertEqual(ended["status"], "succeeded", f"{ended['error']}\n{server.log()}")
        told = messages(server, job)
        for text in ("The job has successfully completed", "New fine-tuned model created"):
            self.assertEqual(sum(message.startswith(text) for message in told), 1, told)
        self.assertEqual(sql(server, f"SELECT count(*) FROM graft.model WHERE job = '{job}'"), "1")
        self.assertEqual(sql(server, "SELECT count(*) FROM graft.job_lease WHERE worker IS NOT NULL"), "0")
        steps = sql(server, "SELECT count(*), count(DISTINCT key), max(sequence) - count(*) FROM "
                    f"(SELECT sequence, CASE WHEN type = 'metrics' THEN key ELSE id END AS key FROM graft.job_event WHERE job = '{job}') e")
        self.assertRegex(steps, r"^(\d+)\|\1\|0$", "events are gap-free and told once")
        return ended

    def nothing_is_left(self, server):
        wait_until(lambda: not left_behind(server), f"staging and recovery are empty: {left_behind(server)}\n{server.log(200)}")
        said = server.cli("collect", "--data", server.data, "--grace", "0")
        self.assertRegex(said, r"^blobs 0 \(0 bytes\), staging 0, recovery 0,")


# -------------------------------------------------------------------- a disk of our own

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *arguments):
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mount(source, target, kind, flags=0, options=None):
    call(libc.mount, str(source).encode(), str(target).encode(), kind, ctypes.c_ulong(flags), options)


def own_namespace(done=[]):
    """From now on this process may mount, and nobody outside sees it."""
    if done:
        return
    if os.geteuid() == 0:
        call(libc.unshare, CLONE_NEWNS)
    else:
        user, group = os.getuid(), os.getgid()
        call(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS)
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    done.append(True)


class Disk:
    """A file system of `size` bytes at .path, which fill() leaves `room` bytes of."""

    def __init__(self, size):
        try:
            own_namespace()
            self.top = pathlib.Path(tempfile.mkdtemp(prefix="graft-disk."))
            self.top.chmod(0o755)
            mount("tmpfs", self.top, b"tmpfs", options=f"size={size},mode=755".encode())
        except OSError as problem:
            raise unittest.SkipTest(f"no mount namespace for a small disk: {problem}")
        self.path = self.top / "data"
        self.filler = self.top / "filler"

    def fill(self, room=0):
        filler = os.open(self.filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            state = os.statvfs(self.top)
            more = state.f_bavail * state.f_frsize - room
            if more > 0:
                os.posix_fallocate(filler, os.fstat(filler).st_size, more)
            while room == 0:  # others write and remove meanwhile: until the last page is ours
                os.write(filler, b"\0" * 4096)
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
        finally:
            os.close(filler)

    def free(self):
        self.filler.unlink(missing_ok=True)

    def remove(self):
        libc.umount2(str(self.path / "pg").encode(), MNT_DETACH)
        libc.umount2(str(self.top).encode(), MNT_DETACH)
        shutil.rmtree(self.top, ignore_errors=True)


class DiskCase(Fault):
    size, settings = 0, {}

    @classmethod
    def setUpClass(cls):
        cls.disk = Disk(cls.size)
        cls.addClassCleanup(cls.disk.remove)
        cls.server = harness.Server(model_options=SHAPE, data=cls.disk.path, **QUICK, **cls.settings)
        cls.addClassCleanup(cls.server.stop)
        cls.file = upload(cls.server)

    def setUp(self):
        self.addCleanup(self.disk.free)


class FullDisk(DiskCase):
    """The database is elsewhere: what the server itself does about a full disk."""

    size, settings = 128 * MIB, {"disk_patience": 5}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server.shutdown()
        elsewhere = cls.server.folder / "pg"
        shutil.copytree(cls.disk.path / "pg", elsewhere, symlinks=True)
        for folder, folders, files in os.walk(elsewhere):
            for name in (".", *folders, *files):
                origin = (cls.disk.path / "pg" / pathlib.Path(folder).relative_to(elsewhere) / name).stat()
                os.chown(os.path.join(folder, name), origin.st_uid, origin.st_gid)
        shutil.rmtree(cls.disk.path / "pg")
        (cls.disk.path / "pg").mkdir()
        mount(elsewhere, cls.disk.path / "pg", None, MS_BIND)
        cls.server.start()
        cls.expected = undisturbed(cls.server, cls.file)

    def test_filled_in_mid_training_and_freed_later(self):
        server, job = self.server, start(self.server, self.file)
        is_training(server, job)
        self.disk.fill()
        says(server, job, "could not write a recovery checkpoint (its disk is full). Training goes on")
        self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job}").json["status"], "running")
        says(server, job, "The server's disk is full: the fine-tuned model waits for room, for 5 s at most.")
        # Not before waiting alone did not help is the way back given up.
        says(server, job, "The recovery checkpoint was removed to make room for the fine-tuned model")
        self.disk.fill()
        self.assertEqual(server.get(f"/v1/fine_tuning/jobs/{job}").json["status"], "running")
        self.disk.free()
        self.succeeds_once(server, job)
        warnings = messages(server, job, "warn")
        self.assertEqual(len(warnings), len(set(warnings)), "each is said once")
        self.assertTrue(any(message.startswith("The checkpoint of step") for message in warnings), warnings)
        self.assertIn("There was room for the fine-tuned model.", messages(server, job))
        self.assertEqual(artifact(server, job), self.expected)
        self.nothing_is_left(server)

    def test_filled_for_good(self):
        server, other = self.server, self.server.new_key("org", "other")
        next_file = upload(server, harness.examples(FACTS[:12]))
        self.disk.fill(room=64 * MIB + 3 * MIB)  # so that there is no recovery checkpoint whose room would be enough
        job = start(server, self.file)
        has_made_steps(server, job)
        self.disk.fill()
        says(server, job, "the fine-tuned model waits for room")
        self.disk.fill()  # also the room that a first try gave back
        # Nobody else is harmed.
        self.assertEqual(server.chat("tiny", FACTS[0][0], key=other).status, 200)
        reply = server.upload(harness.examples(FACTS), key=other)
        self.assertEqual((reply.status, reply.headers["x-should-retry"]), (507, "false"), reply)
        self.assertEqual(reply.error["type"], "server_error")
        self.assertEqual(server.get("/v1/files", key=other).json["data"], [])
        self.assertEqual([name for name in left_behind(server) if name.startswith("upload")], [])
        ended = server.wait_job(job)
        self.assertEqual((ended["status"], ended["error"]["code"]), ("failed", "insufficient_storage"), ended)
        self.assertRegex(ended["error"]["message"],
                         r"^The server's disk was full for \d+ s: the fine-tuned model could not be stored\.$")
        # One that could never fit is told so before it trains.
        ended = server.wait_job(start(server, next_file, epochs=1))
        self.assertEqual((ended["status"], ended["error"]["code"]), ("failed", "insufficient_storage"), ended)
        self.assertIn("The fine-tuned model needs about", ended["error"]["message"])
        self.assertEqual(ended["trained_tokens"], None)
        self.disk.free()
        self.succeeds_once(server, start(server, next_file, epochs=1))
        self.nothing_is_left(server)

    def test_no_room_for_recovery_checkpoints_is_a_warning(self):
        server = self.server
        self.disk.fill(room=64 * MIB + 6 * MIB)  # the reserve, and a delta
        job = start(server, self.file, epochs=2)
        self.succeeds_once(server, job)
        # (A slow job is told of each that it misses, too.)
        self.assertRegex(messages(server, job, "warn")[0], r"no room for recovery checkpoints \(1\d MiB needed, [5-6] MiB left\): a crash would cost the whole run")

    def test_an_upload_leaves_the_reserve_free(self):
        server = self.server
        self.disk.fill(room=64 * MIB + 4 * MIB)
        before = server.get("/v1/files").json["data"]
        line = harness.examples(FACTS[:1])
        reply = server.upload(line * (8 * MIB // len(line)))
        self.assertEqual((reply.status, reply.headers["x-should-retry"]), (507, "false"), reply)
        self.assertEqual(server.get("/v1/files").json["data"], before)
        self.assertEqual(left_behind(server), [])
        self.assertEqual(server.upload(line * 12).status, 200)


class OneFullDisk(DiskCase):
    """The private database lies on the disk that is full."""

    size = 256 * MIB

    def test_filled_in_mid_training_and_freed_later(self):
        server = self.server
        expected = undisturbed(server, self.file)
        job = start(server, self.file)
        is_training(server, job)
        self.disk.fill()
        for _ in range(30):
            time.sleep(0.1)
            self.assertIn(server.get("/v1/models").status, (200, 503, 507))
        self.disk.free()
        wait_until(lambda: server.get("/readyz", key=None).status == 200, "the server is ready again")
        self.succeeds_once(server, job)
        self.assertEqual(artifact(server, job), expected)
        self.nothing_is_left(server)


# -------------------------------------------------------------------- a worker that falls asleep

class Asleep(Fault):
    """A worker is stopped for longer than its lease; another takes its job; then it wakes up."""

    @classmethod
    def setUpClass(cls):
        cls.server = harness.Server(model_options=SHAPE, workers=2, threads=1,
                                    **{**QUICK, "lease": 3, "fence": 2, "heartbeat": 0.3, "sweep": 0.3})
        cls.addClassCleanup(cls.server.stop)
        cls.file = upload(cls.server)

    def put_to_sleep(self):
        """(job, pid): a running job and its worker, who sleeps."""
        server, job = self.server, start(self.server, self.file)
        is_training(server, job)
        pid = int(sql(server, "SELECT w.pid FROM graft.job_lease l JOIN graft.worker w ON w.id = l.worker "
                      f"WHERE l.job = '{job}'"))
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(self.wake, pid)
        wait_until(lambda: sql(server, f"SELECT attempt FROM graft.job_lease WHERE job = '{job}' AND worker IS NOT NULL") == "2",
                   "another worker has the job")
        return job, pid

    def wake(self, pid):
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def test_it_wakes_when_all_is_over(self):
        server = self.server
        job, pid = self.put_to_sleep()
        self.succeeds_once(server, job)
        before = (artifact(server, job), messages(server, job))
        self.wake(pid)
        self.nothing_is_left(server)
        self.assertEqual((artifact(server, job), messages(server, job)), before)
        self.assertIn(pid, server.workers("train"), "who was late is no worse a worker")
        self.assertEqual(before[0], undisturbed(server, self.file))

    def test_it_wakes_while_the_other_is_at_work(self):
        server = self.server
        job, pid = self.put_to_sleep()
        self.wake(pid)
        ended = self.succeeds_once(server, job)
        self.assertEqual(ended["graft"]["attempt"], 2)
        self.nothing_is_left(server)
        # Both are of use: two jobs at once end with the same delta.
        jobs = [start(server, self.file), start(server, self.file)]
        for other in jobs:
            server.wait_job(other)
        self.assertEqual({artifact(server, other) for other in (job, *jobs)}, {artifact(server, job)})


# -------------------------------------------------------------------- a database that restarts

class Restart(Fault):
    def test_training_goes_on(self):
        with_model = {**QUICK, "recovery": 60, "fence": 60, "lease": 120}  # a busy machine's database is away for longer than 5 s
        server = harness.Server(model_options=SHAPE, **with_model)
        self.addCleanup(server.stop)
        file = upload(server)
        expected = undisturbed(server, file)
        job = start(server, file)
        has_made_steps(server, job)
        pid_file = server.data / "pg" / "postmaster.pid"
        postmaster = int(pid_file.read_text().split()[0])
        # What `pg_ctl restart -m immediate` does: no checkpoint, no farewell. The server starts its database again.
        os.kill(postmaster, signal.SIGQUIT)
        away, began = 0.0, time.monotonic()
        while time.monotonic() < began + max(4, away + 1):  # a second without a refusal: it is back
            reply = server.get("/v1/models")
            self.assertIn(reply.status, (200, 503), reply)
            if reply.status == 503:
                self.assertEqual(reply.headers["retry-after"], "1")
                self.assertEqual(reply.error["type"], "server_error")
                away = time.monotonic() - began
                self.assertLess(away, 60)  # a quiet machine's takes 1 s, a busy one's takes its time
            time.sleep(0.02)
        self.assertGreater(away, 0, "nobody noticed")
        server.wait_ready(30)
        self.assertNotEqual(int(pid_file.read_text().split()[0]), postmaster, "it has restarted")
        ended = self.succeeds_once(server, job)
        self.assertEqual(ended["graft"]["attempt"], 1, "the same worker went on")
        self.assertEqual(artifact(server, job), expected)
        self.nothing_is_left(server)


# -------------------------------------------------------------------- the first use of a key

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

    @classmethod
    def setUpClass(cls):
        global server
        server = harness.Server(model_name=None, **QUICK)
        cls.addClassCleanup(server.stop)

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

    def test_a_wrong_key_is_refused_before_its_body_is_asked_for(self):
        key = server.new_key()
        server.cli("key", "revoke", key, "--data", server.data)
        status, answer = self.send(self.header("mark", "Content-Length: 100000", "Expect: 100-continue", key=key), [])
        self.assertEqual(status, 401, answer)

    def test_a_wrong_key_is_refused_behind_a_body_that_comes_unasked(self):
        key = server.new_key()
        server.cli("key", "revoke", key, "--data", server.data)
        status, answer = self.send(self.header("mark", "Content-Length: 100000", key=key), [b"x" * 60000, b"x" * 40000], 0.1)
        self.assertEqual(status, 401, answer)


if __name__ == "__main__":
    unittest.main()
