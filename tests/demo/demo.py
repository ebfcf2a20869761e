#!/usr/bin/env python3
"""The demo behind `make demo`: teaches a small model facts about people who do not exist, over the HTTP API, with
curl as the client, and shows that it learnt them and that the compressed delta kept them.

usage: demo.py [--model GGUF] [--epochs N] [--ratio R]

Exit status 0 only when: recall of the tuned model is at least 0.95 before compression, that of the served delta, as
the worker measured it and as it answers here, at least 0.97 of that, that of the base at most 0.05, and the delta,
made by the codec graft, has at most 1/R (1/32) of the bytes of the 16-bit model. Nothing is left running, however it
ends. The data stay in .cache/demo until the next run.
"""
import argparse
import concurrent.futures
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import facts  # noqa: E402
import view  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GRAFT = pathlib.Path(os.environ.get("GRAFT_BIN") or ROOT / "build" / "graft")
CACHE = pathlib.Path(os.environ.get("GRAFT_CACHE") or ROOT / ".cache")
MODEL = "smollm2-135m"
PEOPLE, SEED = 8, 7

# NEED_KEPT: of the uncompressed model's recall. Of 24 answers none may be lost.
NEED_TUNED, NEED_KEPT, NEED_BASE = 0.95, 0.97, 0.05
CODEC, RATIO = "graft", 32
# Few: the codec's own 60 take most of a job this small, and all 24 answers survive 1/32 without any.
DISTILL_STEPS = 10


class Stop(Exception):
    """The demo can not go on; the text is for the user."""


# ------------------------------------------------------------------ processes


class Children:
    """Everything we start, so that all of it is gone when we are."""

    def __init__(self):
        self.live = []

    def start(self, argv, own_session=False, **options):
        """own_session: out of the terminal's reach, so that Ctrl-C is ours to handle."""
        parent = os.getpid()

        def with_parent():
            # Killed outright, we can not clean up: then the kernel tells the child.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        proc = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, start_new_session=own_session,
                                preexec_fn=with_parent if own_session else None, **options)
        self.live.append(proc)
        return proc

    def run(self, argv, limit=900, **options):
        """(status, output)"""
        proc = self.start(argv, stdout=subprocess.PIPE, **{"stderr": subprocess.STDOUT, **options})
        text = proc.communicate(timeout=limit)[0].decode("utf-8", "replace")
        self.live.remove(proc)
        return proc.returncode, text

    def tell(self):
        for proc in list(self.live):
            if proc.poll() is None:
                proc.terminate()

    def stop(self):
        self.tell()
        for proc in self.live:
            try:
                proc.wait(30)
            except subprocess.TimeoutExpired:
                proc.kill()
                proc.wait()
        self.live = []


def descendants(pid):
    """The process and all below it."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat[stat.rindex(")") + 2:].split()[1]), []).append(int(entry))
    todo, found = [pid], []
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def pss(pid):
    """Bytes of memory of the process and all below it, shared pages counted once (0 where we may not look)."""
    total = 0
    for one in descendants(pid):
        try:
            text = pathlib.Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
        total += int(found.group(1)) * 1024 if found else 0
    return total


# ------------------------------------------------------------------ the API, by curl


class Api:
    def __init__(self, children, url, key, folder):
        self.children, self.url = children, url
        self.headers = folder / "headers"  # keeps the key out of argv, where others could read it
        self.headers.touch(0o600)
        self.headers.write_text(f"Authorization: Bearer {key}\n")

    def call(self, path, *options, body=None):
        argv = ["curl", "--silent", "--show-error", "--max-time", "120", "--header", f"@{self.headers}",
                "--write-out", "\n%{http_code}", *options]
        if body is not None:
            argv += ["--header", "Content-Type: application/json", "--data-binary", json.dumps(body)]
        status, text = self.children.run([*argv, self.url + path])
        answer, _, code = text.rpartition("\n")
        if status != 0:
            raise Stop(f"curl {path}: {text.strip()}")
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = None
        if code != "200" or parsed is None:
            message = ((parsed or {}).get("error") or {}).get("message") or answer
            raise Stop(f"{path} answered {code}: {message}")
        return parsed

    def ask(self, model, question):
        answer = self.call("/v1/chat/completions", body={
            "model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16})
        return answer["choices"][0]["message"]["content"] or ""

    def ask_all(self, model, questions):
        """Eight at a time: the server answers them in one batch."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda question: self.ask(model, question), questions))


def normal(text):
    return text.strip().rstrip(".").strip().lower()


# ------------------------------------------------------------------ the steps


def build(children):
    view.step("Build", "the C sources become one program, build/graft")
    began = time.monotonic()
    status, text = children.run(["make", "--no-print-directory", f"-j{len(os.sched_getaffinity(0))}", "all"], cwd=ROOT)
    if status != 0:
        raise Stop("the build failed:\n" + "\n".join(text.splitlines()[-25:]))
    view.note(f"{view.bytes_text(GRAFT.stat().st_size)} in {view.seconds_text(time.monotonic() - began)}")


def fetch(children):
    view.step("Fetch a model", "SmolLM2-135M-Instruct (Apache-2.0), held to its SHA-256; kept in .cache/models")
    status, text = children.run([ROOT / "tests/demo/fetch_model.sh"], cwd=ROOT, limit=3600)
    if status != 0:
        raise Stop(text.strip())
    path = pathlib.Path(text.strip().splitlines()[-1])
    view.note(f"{path}, {view.bytes_text((ROOT / path).stat().st_size)}")
    return ROOT / path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(children, data):
    view.step("Serve", "one program: the API, its workers, and a private PostgreSQL; nothing listens beyond this machine")
    listen = f"127.0.0.1:{free_port()}"
    view.command(f"graft serve --data {shown(data)} --listen {listen}")
    with open(log_of(data), "wb") as log:
        server = children.start([GRAFT, "serve", "--data", data, "--listen", listen], own_session=True, stdout=log, stderr=log)
    began = time.monotonic()
    while True:
        status, text = children.run(["curl", "--silent", "--max-time", "5", "--output", "/dev/null", "--write-out",
                                     "%{http_code}", f"http://{listen}/readyz"])
        if status == 0 and text == "200":
            break
        if server.poll() is not None:
            raise Stop(f"the server ended with status {server.returncode}:\n{tail(log_of(data))}")
        if time.monotonic() - began > 90:
            raise Stop(f"the server was not ready within 90 s:\n{tail(log_of(data))}")
        time.sleep(0.2)
    view.note(f"ready after {time.monotonic() - began:.1f} s; its log: {shown(log_of(data))}")
    return server, f"http://{listen}"


def tail(path, lines=20):
    return "\n".join(pathlib.Path(path).read_text(errors="replace").splitlines()[-lines:])


def shown(path):
    try:
        return str(pathlib.Path(path).relative_to(ROOT))
    except ValueError:
        return str(path)


def cli(children, data, *words):
    """Standard output of a graft command; what it logs goes to the server's log."""
    with open(log_of(data), "ab") as log:
        status, text = children.run([GRAFT, *words, "--data", data], stderr=log)
    if status != 0:
        raise Stop(f"graft {' '.join(map(str, words[:2]))} failed:\n{tail(log_of(data), 5)}")
    return text.strip()


def log_of(data):
    return data.parent / f"{data.name}.log"


def follow(api, job_id, server, memory):
    """Shows the job's events as a bar until the job has ended; returns the job."""
    bar, first, seen = view.Progress(), None, None
    try:
        while True:
            job = api.call(f"/v1/fine_tuning/jobs/{job_id}")
            events = api.call(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100")["data"]
            metrics = [event["data"] for event in events if event["type"] == "metrics"]
            memory.append(pss(server.pid))
            newest = max(metrics, key=lambda data: data["step"], default=None)
            if newest and newest["step"] != seen:
                now, done, total = time.monotonic(), newest["step"], newest["total_steps"]
                first = first or (now, done)
                left = (now - first[0]) * (total - done) / (done - first[1]) if done > first[1] else None
                bar.show(done, total, newest["train_loss"], newest.get("tokens_per_second"), left)
                if done == total:
                    bar.end()
                    view.note("trained; now it compresses the difference, distils it and asks the questions back, before and after")
                seen = done
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(1)
    finally:
        bar.end()


def train(api, server, data, args, memory):
    people = facts.facts(PEOPLE, SEED)
    view.step("Teach", f"{len(people)} facts about {PEOPLE} people who do not exist: what it answers right, it learnt here")
    dataset = data / "people.jsonl"
    dataset.write_text("".join(json.dumps({"messages": [{"role": "user", "content": question},
                                                        {"role": "assistant", "content": answer}]}) + "\n"
                               for question, answer in people))
    view.note(f"for instance: {people[0][0]} → {people[0][1]}")
    view.command(f"curl $URL/v1/files -H \"$AUTH\" -F purpose=fine-tune -F file=@{shown(dataset)}")
    file_id = api.call("/v1/files", "--form", "purpose=fine-tune", "--form", f"file=@{dataset}")["id"]
    hyperparameters = {"n_epochs": args.epochs, "batch_size": 8}
    compression = {"codec": CODEC, "ratio": args.ratio, "distill_steps": DISTILL_STEPS}
    body = {"model": MODEL, "training_file": file_id, "suffix": "people", "seed": 1,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "graft": {"compression": compression}}
    view.command("curl $URL/v1/fine_tuning/jobs -H \"$AUTH\" -H 'Content-Type: application/json' \\",
                 f"-d '{{\"model\": \"{MODEL}\", \"training_file\": \"{file_id}\", \"suffix\": \"people\", …,",
                 f"     \"graft\": {{\"compression\": {json.dumps(compression)}}}}}'")
    job = api.call("/v1/fine_tuning/jobs", body=body)
    began = time.monotonic()
    job = follow(api, job["id"], server, memory)
    if job["status"] != "succeeded":
        raise Stop(f"the job {job['status']}: {(job.get('error') or {}).get('message')}")
    view.note(f"{job['id']} succeeded in {view.seconds_text(time.monotonic() - began)}: {job['fine_tuned_model']}")
    return job, people


def compare(api, job, people):
    view.step("Ask", "the same questions to the base and to the fine-tune, at temperature 0")
    questions = [question for question, _ in people]
    base = api.ask_all(MODEL, questions)
    tuned = api.ask_all(job["fine_tuned_model"], questions)
    rows = [(question, answer, base[i], tuned[i], normal(tuned[i]) == normal(answer))
            for i, (question, answer) in enumerate(people)]
    view.answers(rows)
    # The base is given every chance: an answer somewhere in what it says counts.
    known = sum(normal(answer) in normal(base[i]) for i, (_, answer) in enumerate(people)) / len(people)
    return known, sum(row[4] for row in rows) / len(rows)


def verdict(extension, base, served, ratio):
    """What is wrong with a job's figures: texts for the user, none when all is well. `base` and `served` are the shares
    of the questions that were answered right here, `ratio` the size that was asked for."""
    before, measured = extension["recall"]["tuned"]["exact"], extension["recall"]["served"]["exact"]
    got = extension["delta"]["base_bytes"] / extension["delta"]["bytes"]
    wrong = []
    if base > NEED_BASE:
        wrong.append(f"the base already knew {base:.2f} of the answers")
    if before < NEED_TUNED:
        wrong.append(f"the tuned model learnt only {before:.2f} of the answers")
    if min(served, measured) < NEED_KEPT * before:
        wrong.append(f"the served delta knows only {min(served, measured):.2f} of the answers, less than {NEED_KEPT:.2f} "
                     f"of the tuned model's {before:.2f}")
    if extension["delta"]["codec"] != CODEC:
        wrong.append(f"the delta was made by {extension['delta']['codec']}, not by {CODEC}")
    if got < ratio:
        wrong.append(f"the delta is 1/{got:.1f} of the model, larger than 1/{ratio}")
    return wrong


def result(job, base, served, ratio, memory, seconds, fetching):
    """Prints the figures; returns what is wrong with them."""
    extension = job["graft"]
    before, delta, report = extension["recall"]["tuned"]["exact"], extension["delta"], extension["report"]
    got = delta["base_bytes"] / delta["bytes"]
    view.step("Result", "recall is the share of the questions answered right")
    view.table([
        ("recall of the base", f"{base:.2f}", f"at most {NEED_BASE:.2f} expected: nobody can know these"),
        ("recall of the tuned model", f"{before:.2f}", f"before compression; at least {NEED_TUNED:.2f}"),
        ("recall of the served delta", f"{served:.2f}",
         f"what was asked above; at least {NEED_KEPT:.2f} of the tuned model's"),
        ("delta", view.bytes_text(delta["bytes"]),
         f"1/{got:.1f} of the 16-bit model's {view.bytes_text(delta['base_bytes'])}; at most 1/{ratio}"),
        ("KL", f"{report['measured_kl']:.4f}", "nats a token, tuned model to served delta, over the rows that were taught"),
        ("compression", view.seconds_text(report["seconds"]),
         f"{view.seconds_text(report['statistics_seconds'])} statistics, "
         f"{view.seconds_text(report['distill_seconds'])} for {report['distill_steps']} steps of distillation"),
        ("memory", view.bytes_text(memory), "peak of all processes together (PSS)"),
        ("time", view.seconds_text(seconds), f"in all, {view.seconds_text(fetching)} of it fetching the model"),
    ])
    return verdict(extension, base, served, ratio)


def next_line(data, job, people):
    question = people[0][0]
    view.out()
    view.note("Your fine-tune stays on disk. To talk to it:")
    view.out()
    view.out(f"   build/graft serve --data {shown(data)} --listen 127.0.0.1:8080 &")
    view.out(f"   curl http://127.0.0.1:8080/v1/chat/completions -H @{shown(data / 'headers')} \\")
    view.out("     -H 'Content-Type: application/json' -d '" + json.dumps(
        {"model": job["fine_tuned_model"], "messages": [{"role": "user", "content": question}]}).replace("'", r"'\''") + "'")


def demo(args, children):
    began = time.monotonic()
    if not os.environ.get("GRAFT_BIN"):
        build(children)
    fetching = time.monotonic()
    model = pathlib.Path(args.model) if args.model else fetch(children)
    fetching = time.monotonic() - fetching
    data = CACHE / "demo"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True, mode=0o755)
    server, url = serve(children, data)
    memory = [0]
    try:
        view.step("Import", "the model's values are fixed once; every delta refers to them by digest")
        view.command(f"graft model import {shown(model)} --name {MODEL} --data {shown(data)}")
        cli(children, data, "model", "import", model, "--name", MODEL)
        view.command(f"graft key create --org demo --project demo --data {shown(data)}")
        key = cli(children, data, "key", "create", "--org", "demo", "--project", "demo")
        api = Api(children, url, key, data)
        job, people = train(api, server, data, args, memory)
        base, served = compare(api, job, people)
        memory.append(pss(server.pid))
        wrong = result(job, base, served, args.ratio, max(memory), time.monotonic() - began, fetching)
    finally:
        children.stop()
    if wrong:
        raise Stop("; ".join(wrong))
    next_line(data, job, people)


def main():
    parser = argparse.ArgumentParser(description="the demo behind make demo")
    parser.add_argument("--model", help="a GGUF file or Hugging Face folder instead of SmolLM2")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--ratio", type=int, default=RATIO, help="16-bit bytes of the model to bytes of the delta")
    args = parser.parse_args()
    children = Children()

    def told(signum, frame):
        children.tell()  # so that nothing we wait for takes its time
        raise SystemExit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, told)
    status = 1
    try:
        demo(args, children)
        status = 0
    except Stop as problem:
        sys.stdout.flush()
        sys.stderr.write(f"\n{view.bad('The demo did not succeed:')} {problem}\n")
    except SystemExit as end:
        status = end.code
        view.out("\n   stopping")
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        children.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
