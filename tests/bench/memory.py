#!/usr/bin/env python3
"""graft delta compress on models that are larger than the memory it may have.

A random BF16 model and a tuned one are written, each larger than the limit, and compressed under RLIMIT_DATA (memory of
its own, what is only reserved as well; pages of mapped files are the kernel's to drop and are not counted). The file must be,
byte for byte, that of a run without a limit. All that was resident at once, mapped files included, is held to the limit, too.

usage: memory.py [--layers N] [--hidden N] [--intermediate N] [--limit MB] [--codecs NAME,...] [--threads N]    reports in TAP
"""
import argparse
import json
import math
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tap  # noqa: E402

GRAFT = os.environ.get("GRAFT_BIN") or str(ROOT / "build/graft")
GOLDEN = ROOT / "tests/golden"
MB = 1 << 20
HEAD = 64
VOCABULARY = 512
BLAS_MB = 128  # what OpenBLAS reserves for its blocks once it is called, whatever the shapes: codecs with singular vectors
SINGULAR = ("graft", "delta-come")
HIGH = bytes(b"\x3c\xbc"[i & 1] for i in range(256))           # sign and exponent: values around 0.01
LOW = bytes(0 if i < 128 else 1 << (i & 3) for i in range(256))  # half of the values change in a low bit


def shapes(a):
    yield "model.embed_tokens.weight", [VOCABULARY, a.hidden]
    for i in range(a.layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", [a.hidden]
        for name in "qkvo":
            yield p + f"self_attn.{name}_proj.weight", [a.hidden, a.hidden]
        yield p + "post_attention_layernorm.weight", [a.hidden]
        for name in ("gate", "up"):
            yield p + f"mlp.{name}_proj.weight", [a.intermediate, a.hidden]
        yield p + "mlp.down_proj.weight", [a.hidden, a.intermediate]
    yield "model.norm.weight", [a.hidden]


def start(folder, a):
    """Everything but the weights; the header of these."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "hidden_act": "silu", "hidden_size": a.hidden, "intermediate_size": a.intermediate, "num_hidden_layers": a.layers,
        "num_attention_heads": a.hidden // HEAD, "num_key_value_heads": a.hidden // HEAD, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True, "vocab_size": VOCABULARY,
        "bos_token_id": 1, "eos_token_id": 2}))
    shutil.copy(GOLDEN / "tiny_tokenizer.json", folder / "tokenizer.json")
    shutil.copy(GOLDEN / "tiny_template.jinja", folder / "chat_template.jinja")
    header, at = {}, 0
    for name, shape in shapes(a):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = open(folder / "model.safetensors", "wb")
    file.write(struct.pack("<Q", len(text)) + text)
    return file, at


def write_models(folder, a):
    """base and tuned below folder; bytes of the weights of each."""
    draw = random.Random(1)
    base, size = start(folder / "base", a)
    tuned, _ = start(folder / "tuned", a)
    with base, tuned:
        for name, shape in shapes(a):
            count = math.prod(shape)
            low, high = draw.randbytes(count), draw.randbytes(count).translate(HIGH)
            if "norm" in name:
                low, high = b"\x80" * count, b"\x3f" * count
            value = bytearray(2 * count)
            value[0::2], value[1::2] = low, high
            base.write(value)
            if "_proj" in name:
                change = draw.randbytes(count).translate(LOW)
                value[0::2] = (int.from_bytes(low, "little") ^ int.from_bytes(change, "little")).to_bytes(count, "little")
            tuned.write(value)
    return size


def compress(folder, out, codec, threads, limit):
    """(exit status, stderr, peak resident bytes); limit None: none."""
    argv = [GRAFT, "delta", "compress", "--base", folder / "base", "--tuned", folder / "tuned", "--codec", codec,
            "--threads", str(threads), "-o", out]
    # Each thread of OpenBLAS would reserve memory of its own; the engine's pool calls it one matrix a thread.
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        tool = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=said,
                                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))))
        _, status, used = os.wait4(tool.pid, 0)
        tool.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return tool.returncode, said.read().decode(errors="replace"), used.ru_maxrss * 1024


def check(folder, codec, a, size):
    limit = a.limit * MB
    reserved = limit + (BLAS_MB * MB * a.threads if codec in SINGULAR else 0)
    status, said, peak = compress(folder, folder / "limited.delta", codec, a.threads, reserved)
    if status != 0:
        raise tap.Failed(f"ended with {status} under a limit of {reserved // MB} MB:\n{said}")
    print(f"# {codec}: two models of {size / MB:.0f} MB, a limit of {reserved // MB} MB, {peak / MB:.0f} MB resident at most, "
          f"a delta of {(folder / 'limited.delta').stat().st_size / MB:.1f} MB")
    assert size > limit, "the model is no larger than the limit"
    assert peak < limit, f"{peak / MB:.0f} MB were resident at once"
    if a.compare:
        status, said, _ = compress(folder, folder / "free.delta", codec, a.threads, None)
        assert status == 0, said
        assert (folder / "limited.delta").read_bytes() == (folder / "free.delta").read_bytes(), "the limit changes the delta"


def main():
    ap = argparse.ArgumentParser()
    for name, value in (("layers", 20), ("hidden", 128), ("intermediate", 4096), ("limit", 52), ("threads", 1)):
        ap.add_argument("--" + name, type=int, default=value)
    ap.add_argument("--codecs", default="graft,bitdelta,delta-come")
    ap.add_argument("--no-compare", dest="compare", action="store_false", help="with a run without a limit")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory(prefix="graft-memory-test.") as name:
        folder = pathlib.Path(name)
        size = write_models(folder, a)
        for codec in a.codecs.split(","):
            with tap.case(f"a model larger than the memory is compressed by {codec}"):
                check(folder, codec, a, size)
        with tap.case("memory that is not enough is an error that says so, and no file"):
            status, said, _ = compress(folder, folder / "none.delta", "bitdelta", a.threads, 8 * MB)
            assert status == 1 and "memory" in said, f"{status}: {said}"
            assert not (folder / "none.delta").exists()
    return tap.finish()


if __name__ == "__main__":
    sys.exit(main())
