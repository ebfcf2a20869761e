#!/usr/bin/env python3
"""Teaches a base model rows of chat examples by a job of Graft's, and writes the tuned model as a Hugging Face directory.

usage: python3 tests/bench/teach.py BASE ROWS.jsonl OUT [--epochs 12] [--batch 10] [--rate N] [--seed 0] [--threads N]

What the tables of engine/codec/README.md measure codecs on. The job's delta is lossless, so OUT is the tuned model to the
last of its 16 bits. Server, database and key are its own and gone at the end. Prints the job's report as a JSON line."""
import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "api"))
import harness  # noqa: E402


def must(reply):
    """An accepted request's JSON."""
    if reply.status != 200:
        raise SystemExit(f"teach.py: {reply.error['message']}")
    return reply.json


def finished(server, job):
    """The job when it has succeeded; meanwhile its events go to standard error."""
    told = set()
    while True:
        job = must(server.get(f"/v1/fine_tuning/jobs/{job['id']}"))
        for event in reversed(must(server.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100"))["data"]):
            if event["id"] not in told:
                told.add(event["id"])
                print(event["message"], file=sys.stderr, flush=True)
        if job["status"] == "succeeded":
            return job
        if job["status"] in ("failed", "cancelled"):
            raise SystemExit(f"teach.py: the job has {job['status']}: {(job['error'] or {}).get('message')}")
        time.sleep(1)


def teach(server, o):
    """The report of the job that taught OUT."""
    server.cli("model", "import", o.base, "--name", "base", "--data", server.data)
    numbers = {"n_epochs": o.epochs, "batch_size": o.batch, **({"learning_rate_multiplier": o.rate} if o.rate else {})}
    job = must(server.post("/v1/fine_tuning/jobs", {
        "model": "base", "training_file": must(server.upload(o.rows.read_bytes(), o.rows.name))["id"], "seed": o.seed,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "graft": {"compression": {"codec": "lossless"}}}))
    job = finished(server, job)
    delta = server.folder / "delta.safetensors"
    delta.write_bytes(server.get(f"/v1/models/{job['fine_tuned_model']}/delta").body)
    server.cli("delta", "apply", "--base", o.base, "--delta", delta, "-o", o.out)
    return job["graft"]["report"]


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    ap.add_argument("base", type=pathlib.Path)
    ap.add_argument("rows", type=pathlib.Path)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--epochs", type=int, default=12)
    ap.add_argument("--batch", type=int, default=10)
    ap.add_argument("--rate", type=float, help="learning_rate_multiplier; without it the service chooses")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--threads", type=int)
    o = ap.parse_args(argv)
    if o.out.exists():
        ap.error(f'OUT: "{o.out}" is there already')
    server = harness.Server(model_name=None, **({"threads": o.threads} if o.threads else {}))
    try:
        print(json.dumps(teach(server, o)))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
