"""Write a small random Llama model as a Hugging Face directory; needs nothing but Python.

usage: make_tiny_model.py DIR [--layers 2] [--hidden 64] [--intermediate 128] [--heads 4] [--kv-heads 2]
                          [--vocabulary 512] [--context 256] [--rope-theta 10000] [--seed 0] [--untied]
The weights are those of tests/unit/tiny_model.h, where the formula is.
"""
import argparse
import json
import math
import pathlib
import shutil
import struct

MASK = (1 << 64) - 1
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


def values(name, count, columns, seed):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 & MASK
    z0 = h ^ (seed * 0xD1342543DE82EF95 & MASK)
    scale = 1.0 if name == "model.embed_tokens.weight" else 2 / math.sqrt(columns)
    for i in range(count):
        z = (z0 + (i + 1) * 0x9E3779B97F4A7C15) & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        u = ((z ^ z >> 31) >> 40) * 2.0**-23 - 1
        yield 1 + u / 10 if "norm" in name else u * scale


def shapes(a):
    head_dim = a.hidden // a.heads
    q, kv = a.heads * head_dim, a.kv_heads * head_dim
    yield "model.embed_tokens.weight", [a.vocabulary, a.hidden]
    for i in range(a.layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", [a.hidden]
        yield p + "self_attn.q_proj.weight", [q, a.hidden]
        yield p + "self_attn.k_proj.weight", [kv, a.hidden]
        yield p + "self_attn.v_proj.weight", [kv, a.hidden]
        yield p + "self_attn.o_proj.weight", [a.hidden, q]
        yield p + "post_attention_layernorm.weight", [a.hidden]
        yield p + "mlp.gate_proj.weight", [a.intermediate, a.hidden]
        yield p + "mlp.up_proj.weight", [a.intermediate, a.hidden]
        yield p + "mlp.down_proj.weight", [a.hidden, a.intermediate]
    yield "model.norm.weight", [a.hidden]
    if a.untied:
        yield "lm_head.weight", [a.vocabulary, a.hidden]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("dir", type=pathlib.Path)
    for name, value in (("layers", 2), ("hidden", 64), ("intermediate", 128), ("heads", 4), ("kv-heads", 2),
                        ("vocabulary", 512), ("context", 256), ("rope-theta", 10000), ("seed", 0)):
        ap.add_argument("--" + name, type=int, default=value)
    ap.add_argument("--untied", action="store_true")
    a = ap.parse_args()
    a.dir.mkdir(parents=True, exist_ok=True)
    (a.dir / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "hidden_act": "silu", "hidden_size": a.hidden, "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
        "max_position_embeddings": a.context, "rms_norm_eps": 1e-05, "rope_theta": float(a.rope_theta),
        "tie_word_embeddings": not a.untied, "vocab_size": a.vocabulary, "bos_token_id": 1, "eos_token_id": 2}, indent=2))
    header, data = {"__metadata__": {"format": "pt"}}, []
    at = 0
    for name, shape in shapes(a):
        count = math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * count]}
        data.append(struct.pack(f"<{count}f", *values(name, count, shape[-1], a.seed)))
        at += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (a.dir / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    shutil.copy(GOLDEN / "tiny_tokenizer.json", a.dir / "tokenizer.json")
    shutil.copy(GOLDEN / "tiny_template.jinja", a.dir / "chat_template.jinja")
    (a.dir / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))


main()
