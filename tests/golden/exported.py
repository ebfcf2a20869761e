#!/usr/bin/env python3
"""A directory that `graft delta apply` writes answers under transformers as base and delta do when Graft serves them:
20 prompts, 24 tokens each, greedy. Reports in TAP.

usage: exported.py [--base DIR --delta FILE]      without: a tiny random model, tuned and compressed by each codec
TRANSFORMERS_PYTHON names an interpreter that has torch and transformers (python3); where it has not, this skips.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/api"), str(ROOT / "tests/golden")]
import harness      # noqa: E402
import make_greedy  # noqa: E402
import tap          # noqa: E402

PYTHON = os.environ.get("TRANSFORMERS_PYTHON") or "python3"
CODECS = ("graft", "bitdelta", "delta-come", "lossless", "lora")
CLOSE = 1e-3  # two best logits nearer than this may change places, as in tests/unit/test_smollm2.c


def need_transformers():
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode != 0:
        tap.skip(f"{PYTHON} has no torch and transformers; TRANSFORMERS_PYTHON can name an interpreter that has")


def reference(folder):
    done = subprocess.run([PYTHON, ROOT / "tests/golden/make_greedy.py", folder, "-"], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise tap.Failed(done.stderr[-2000:])
    return json.loads(done.stdout)


def compare(entry, choice, tokens):
    """(tokens that agree, of how many, None or how far the two best logits are apart where they part)."""
    said, whole = choice["message"]["content"], entry["whole"]
    if said == entry["texts"][whole] and tokens == whole:
        return whole, whole, None
    same = max(i for i in range(whole + 1) if said.startswith(entry["texts"][i]))
    return same, whole, entry["margin"][min(same, make_greedy.NEW - 1)]


def check(server, base, delta, folder):
    subprocess.run([harness.GRAFT, "delta", "apply", "--base", base, "--delta", delta, "-o", folder], check=True,
                           stdout=subprocess.DEVNULL)
    file = server.upload(delta.read_bytes(), name="delta.safetensors", purpose="graft-delta").json["id"]
    made = server.post("/v1/graft/deltas", {"file": file})
    assert made.status == 200, made
    agree = total = changed = 0
    gaps = []
    for entry in reference(folder):
        reply = server.chat(made.json["id"], entry["prompt"], max_tokens=make_greedy.NEW)
        assert reply.status == 200, reply
        same, whole, gap = compare(entry, reply.json["choices"][0], reply.json["usage"]["completion_tokens"])
        agree, total = agree + same, total + whole
        if gap is not None:
            gaps.append((gap, entry["prompt"], same))
        plain = server.chat(server.model, entry["prompt"], max_tokens=make_greedy.NEW)
        changed += plain.json["choices"][0]["message"] != reply.json["choices"][0]["message"]
    print(f"# {agree} of {total} tokens agree; {changed} of 20 answers are not the base's")
    for gap, prompt, same in gaps:
        print(f"# \"{prompt}\" parts after {same} tokens, where the two best logits are {gap:g} apart")
    assert changed > 0, "the base says the same: this shows nothing"
    assert all(gap < CLOSE for gap, _, _ in gaps), "they part where the logits are clear"


def tiny(folder):
    """A base, a model tuned from it, and an adapter of it."""
    base = harness.make_model(folder / "base")
    return base, harness.make_tuned(base, folder / "tuned"), harness.make_adapter(folder / "adapter")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--base", type=pathlib.Path)
    ap.add_argument("--delta", type=pathlib.Path)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory(prefix="graft-exported-test.") as name:
        folder = pathlib.Path(name)
        server = None
        for codec in CODECS if a.delta is None else (a.delta.name,):
            with tap.case(f"exported and served say the same: {codec}"):
                need_transformers()
                if a.delta is None and server is None:
                    a.base, tuned, adapter = tiny(folder)
                if server is None:
                    server = harness.Server(model_name=None)
                    server.model = "base"
                    server.cli("model", "import", a.base, "--name", "base", "--data", server.data)
                delta = a.delta or folder / f"{codec}.delta"
                if a.delta is None:
                    subprocess.run([harness.GRAFT, "delta", "compress", "--base", a.base, "--tuned",
                                    adapter if codec == "lora" else tuned, "--codec", codec, "-o", delta], check=True,
                                   capture_output=True)
                check(server, a.base, delta, folder / f"{codec}-full")
        if server:
            server.stop()
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
