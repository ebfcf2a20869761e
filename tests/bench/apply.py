#!/usr/bin/env python3
"""What a delta costs when it is served: a table of `graft bench apply` and `graft bench decode` in engine/codec/README.md.

usage: make bench-apply [MODEL=DIR]        MODEL: what is decoded, SmolLM2-135M for example

Each row of the first table is one process: the same row of numbers through an F32 matrix and through its delta, in turn. The
figures are medians; the last column is the best run of each, for machines that others use too."""
import argparse
import importlib.util
import pathlib
import sys

spec = importlib.util.spec_from_file_location("bench_codecs", pathlib.Path(__file__).with_name("codecs.py"))
codecs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(codecs)

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)]  # SmolLM2's four, and a large one


OWN_SIZE = {"bitdelta"}  # which serve something else when asked for less


def at_sizes(codec, ratios, measure):
    """What measure(options) says at the codec's own size, where it has one, and at each size that it can be."""
    found = [measure(["--codec", codec])] if codec in OWN_SIZE else []
    for ratio in ratios:
        try:
            found.append(measure(["--codec", codec, "--ratio", f"{ratio:g}"]))
        except codecs.Refused as why:
            codecs.said(f"{codec} at 1/{ratio:g} is not to be had: {why}")
    return found or [measure(["--codec", codec])]


def kernels_here(graft, names):
    """Those of the kernels that this processor has."""
    found = []
    for name in names:
        try:
            codecs.run([graft, "bench", "apply", "--rows", 64, "--cols", 64, "--kernels", name])
            found.append(name)
        except codecs.Refused as why:
            codecs.said(f"left out: {why}")
    if not found:
        raise SystemExit(f"apply.py: this processor has none of the kernels {', '.join(names)}")
    return found


def apply_rows(graft, options):
    rows = []
    names = kernels_here(graft, options.kernels)
    for shape in options.shapes:
        for codec in options.codecs:
            for kernels in names:
                codecs.said(f"{shape[0]} by {shape[1]}, {codec}, {kernels}")
                argv = [graft, "bench", "apply", "--rows", shape[0], "--cols", shape[1], "--threads", options.threads, "--kernels", kernels]
                rows += at_sizes(codec, options.ratios, lambda more, argv=argv: codecs.run(argv + more))
    return rows


def decode_rows(graft, options):
    rows = []
    for codec in options.codecs:
        codecs.said(f"decoding, {codec}")
        argv = [graft, "bench", "decode", "--model", options.model, "--tenants", 1]
        rows += at_sizes(codec, options.ratios, lambda more, argv=argv: codecs.run(argv + more))
    return rows


def apply_table(results):
    out = ["| matrix | codec | 1/ | kernels | µs | GB/s of its bytes | F32 GB/s | times F32 | best times F32 |", "|---|---|---|---|---|---|---|---|---|"]
    out += [f"| {r['rows']} × {r['cols']} | `{r['codec']}` | {r['stored_ratio']:.1f} | {r['kernels']} | {r['s'] * 1e6:.1f} | {r['gb_per_s']:.1f} | "
            f"{r['f32_gb_per_s']:.1f} | {r['times_f32']:.1f} | {r['f32_s_best'] / r['s_best']:.1f} |" for r in results]
    return "\n".join(out)


def decode_table(results):
    out = ["| codec | tenant MB | base ms a step | with its tenant ms | costs |", "|---|---|---|---|---|"]
    out += [f"| `{r['codec']}` | {r['tenant_bytes'] / 1e6:.1f} | {r['base_s_per_step'] * 1e3:.1f} | {r['s_per_step'] * 1e3:.1f} | "
            f"{r['tenant_cost'] * 100:.1f} % |" for r in results]
    return "\n".join(out)


def arguments(argv):
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--model")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--codecs", type=lambda t: t.split(","), default=["graft", "bitdelta"])
    ap.add_argument("--kernels", type=lambda t: t.split(","), default=["avx512", "avx2"])
    ap.add_argument("--ratios", type=lambda t: [float(r) for r in t.split(",")], default=[16.0, 32.0, 64.0])
    ap.add_argument("--shapes", type=lambda t: [tuple(int(n) for n in s.split("x")) for s in t.split(",")], default=SHAPES)
    ap.add_argument("--build", default="build")
    ap.add_argument("--readme", default="engine/codec/README.md")
    return ap.parse_args(argv)


def main():
    options = arguments(sys.argv[1:])
    graft = codecs.ROOT / options.build / "graft"
    rows = apply_rows(graft, options)
    text = (f"### One row through a delta\n\n{codecs.machine()}, {options.threads} at work; medians. What F32 GB/s says is the matrix of the "
            f"same shape, read in the same run.\n\n{apply_table(rows)}")
    if options.model:
        text += f"\n\nA step of one sequence, all threads, random differences:\n\n{decode_table(decode_rows(graft, options))}"
    print(text)
    codecs.put(codecs.ROOT / options.readme, "apply", text)


if __name__ == "__main__":
    main()
