#!/usr/bin/env python3
"""Torch's training at the shapes of bench_gpu.c: a Llama in bf16, compiled, attention by torch's own fused kernel, fused
AdamW; what is trained is the same (matrices and norms of the blocks). One JSON line with bench_gpu's keys.

usage: tests/bench/bench_torch.py 0.5b|1b|8b|tiny       tiny runs without a GPU and without compiling
"""
import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

SHAPES = {  # layers, hidden, intermediate, heads, kv heads, head width, vocabulary, bias, tied, document, documents
    "tiny": (2, 64, 96, 4, 2, 16, 128, False, True, 24, 2),
    "0.5b": (24, 896, 4864, 14, 2, 64, 151936, True, True, 4096, 4),
    "1b": (16, 2048, 8192, 32, 8, 64, 128256, False, True, 4096, 2),
    "8b": (32, 4096, 14336, 32, 8, 128, 128256, False, False, 4096, 1),
}
WARM_UP, STEPS = 3, 8
BYTES_PER_WEIGHT = 8  # bf16: weight, gradient, two moments


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    def __init__(self, hidden, intermediate, heads, kv_heads, width, bias):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.attn_norm, self.mlp_norm = Norm(hidden), Norm(hidden)
        self.q = nn.Linear(hidden, heads * width, bias=bias)
        self.k = nn.Linear(hidden, kv_heads * width, bias=bias)
        self.v = nn.Linear(hidden, kv_heads * width, bias=bias)
        self.o = nn.Linear(heads * width, hidden, bias=False)
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        n = self.attn_norm(x)
        q = self.q(n).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(n).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v(n).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True,
                                           enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        n = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    def __init__(self, layers, hidden, intermediate, heads, kv_heads, width, vocabulary, bias, tied, length):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layer = nn.ModuleList(Layer(hidden, intermediate, heads, kv_heads, width, bias) for _ in range(layers))
        self.norm = Norm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(False)
        self.head.weight.requires_grad_(False)
        angle = torch.outer(torch.arange(length), 500000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, token, target):
        x = self.embed(token)
        for layer in self.layer:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def fitting_layers(shape, room):
    """As many of the shape's layers as its weights leave room for, with a quarter for activations."""
    layers, hidden, intermediate, heads, kv_heads, width, vocabulary, _, tied = shape[:9]
    block = 2 * heads * width * hidden + 2 * kv_heads * width * hidden + 3 * intermediate * hidden
    outer = 2 * vocabulary * hidden * (1 if tied else 2)
    return block, max(1, min(layers, int((room * 0.75 - outer) / (block * BYTES_PER_WEIGHT))))


def main(name):
    shape = SHAPES[name]
    layers, hidden, intermediate, heads, kv_heads, width, vocabulary, bias, tied, document, documents = shape
    cuda = name != "tiny"
    device = "cuda" if cuda else "cpu"
    room = torch.cuda.mem_get_info()[0] if cuda else 1 << 34
    block, fit = fitting_layers(shape, room)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Llama(fit, hidden, intermediate, heads, kv_heads, width, vocabulary, bias, tied, document)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    run = torch.compile(model) if cuda else model
    token = torch.randint(vocabulary, (documents, document + 1), device=device)
    began, loss = 0.0, None
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
        loss = run(token[:, :-1], token[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    rows = document * documents
    flops = rows / seconds * (6 * block * fit + 4 * vocabulary * hidden + 6 * fit * heads * width * document)
    print(json.dumps({
        "what": "torch train", "shape": name, "precision": "bf16", "torch": torch.__version__, "compiled": cuda,
        "layers": fit, "of_layers": layers, "tokens_per_step": rows, "s_per_step": round(seconds, 4),
        "tokens_per_s": round(rows / seconds, 1), "tflops": round(flops / 1e12, 2), "loss": round(loss.item(), 4)}))


if __name__ == "__main__":
    main(sys.argv[1])
