#!/usr/bin/env python3
"""kill -9 of the train worker, the infer worker and the server at random points of a job's life.

Each kill has a job of its own, in a project of its own. Afterwards: the job succeeded, once; the project's blobs are,
digest for digest, those of an uninterrupted run (so the delta is bitwise the same and nothing is left over); no lease is
held; no process, staging folder or recovery file is left.

usage: fault.py [--long] [--seed N] [--train N] [--infer N] [--server N]      reports in TAP
"""
import argparse
import random
import sys
import threading
import time

from place import BACK_SECONDS, FACTS, JOB_SECONDS, Place, kill, harness, tap

SHORT = {"train": 4, "infer": 2, "server": 3}
LONG = {"train": 20, "infer": 10, "server": 20}
MODEL = ("--layers", "4", "--hidden", "96", "--intermediate", "256")
EPOCHS = 50


def train_kill(place, at, expected):
    key, job_id, owner = place.job_under_way(at)
    pid = place.wait_worker("train")
    kill(pid)
    place.wait_worker("train", (pid,))
    place.check(key, job_id, owner, expected)


def server_kill(place, at, pause, expected):
    key, job_id, owner = place.job_under_way(at)
    workers = place.server.workers()
    place.server.kill()
    time.sleep(pause)
    place.server.start()
    limit = time.monotonic() + BACK_SECONDS
    while left := [pid for pid in workers if pid in harness.processes() and pid not in place.server.workers()]:
        if time.monotonic() > limit:
            raise tap.Failed(f"workers of the killed server live on: {left}")
        time.sleep(0.05)
    place.check(key, job_id, owner, expected)


def infer_kill(place, model, at, expected, answer, middle):
    """`middle`: the kill comes while streams are under way; each must end with an error event or its whole answer."""
    key, job_id, owner = place.job_under_way(at)
    pid = place.wait_worker("infer")
    ends = []

    def listen():
        # Long, so that the kill meets it in its middle.
        body = {"model": model, "messages": [{"role": "user", "content": FACTS[0][0]}], "stream": True, "max_tokens": 200,
                "temperature": 1.5, "seed": len(ends)}
        try:
            chunks = list(place.server.stream("/v1/chat/completions", body, timeout=60))
            ends.append("error" if "error" in chunks[-1] else chunks[-1]["choices"][0]["finish_reason"])
        except Exception as problem:
            # Killed before the answer began, the request is refused as a whole.
            ends.append("error" if "answered 503" in str(problem) else f"{type(problem).__name__}: {problem}")

    listeners = [threading.Thread(target=listen) for _ in range(4 if middle else 0)]
    for listener in listeners:
        listener.start()
    time.sleep(0.05 if middle else 0)
    kill(pid)
    for listener in listeners:
        listener.join(90)
    wrong = [end for end in ends if end not in ("error", "stop", "length")]
    if wrong or len(ends) != len(listeners):
        raise tap.Failed(f"streams ended with {ends}")
    limit = time.monotonic() + BACK_SECONDS
    while True:
        reply = place.server.chat(model, FACTS[0][0])
        if reply.status == 200:
            break
        if reply.status not in (500, 502, 503) or time.monotonic() > limit:
            raise tap.Failed(f"after the kill: {reply}")
        reply.error["message"]
        time.sleep(0.1)
    if reply.json["choices"][0]["message"]["content"] != answer:
        raise tap.Failed(f"the new worker answers otherwise: {reply}")
    place.check(key, job_id, owner, expected)
    return ends.count("error")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--seed", type=int, default=None)
    for name in SHORT:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    counts = {name: getattr(args, name) if getattr(args, name) is not None else (LONG if args.long else SHORT)[name]
              for name in SHORT}
    seed = args.seed if args.seed is not None else random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"# fault.py --seed {seed} {counts}")
    place = Place(MODEL, FACTS, EPOCHS, None if args.long else harness.QUICKLY)
    began = time.monotonic()
    expected, span, answer, model, cut = None, 0, None, None, 0
    try:
        with tap.case("an uninterrupted job, for comparison"):
            start = time.monotonic()
            key, job_id, owner = place.start_job()
            place.server.wait_job(job_id, JOB_SECONDS, key=key)
            span = time.monotonic() - start
            expected = place.check(key, job_id, owner, None)
            print(f"# {span:.1f} s, {len(expected)} blobs")
            # The server's own key asks: a base that all may read.
            model = place.server.model
            answer = place.server.chat(model, FACTS[0][0]).json["choices"][0]["message"]["content"]
        if expected is not None:
            with tap.case("a second one leaves the same bytes"):
                start = time.monotonic()
                place.check(*place.start_job(), expected)
                span = min(span, time.monotonic() - start)
            for i in range(counts["train"]):
                with tap.case(f"train worker killed, {i + 1} of {counts['train']}"):
                    train_kill(place, rng.uniform(0, span), expected)
            for i in range(counts["infer"]):
                with tap.case(f"infer worker killed, {i + 1} of {counts['infer']}{', streams under way' if i % 2 == 0 else ''}"):
                    cut += infer_kill(place, model, rng.uniform(0, span * 0.8), expected, answer, i % 2 == 0)
            for i in range(counts["server"]):
                pause = rng.choice((0, 0.3, 2))
                with tap.case(f"server killed, started again {pause} s later, {i + 1} of {counts['server']}"):
                    server_kill(place, rng.uniform(0, span), pause, expected)
            with tap.case("kills met running jobs"):
                if place.attempts == 0 and counts["train"] + counts["server"] >= 4:
                    raise tap.Failed("no attempt was cut off: the kills came too late or too early")
        with tap.case("no process is left after the server has stopped"):
            status = place.server.shutdown()
            left = place.server.left()
            if status != 0 or left:
                raise tap.Failed(f"status {status}, left: {left}")
    finally:
        place.server.stop()
    print(f"# {counts['train']} train worker, {counts['infer']} infer worker and {counts['server']} server kills in "
          f"{time.monotonic() - began:.0f} s; {place.attempts} attempts cut off, {cut} streams cut and told so; seed {seed}")
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
