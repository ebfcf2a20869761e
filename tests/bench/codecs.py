#!/usr/bin/env python3
"""What each codec costs at each size, on one base and its tuned models: a table and a plot in engine/codec/README.md, all
figures in build/bench-codecs-NAME.json.

usage: make bench-codecs BASE=DIR TUNED=DIR[,DIR...] CALIBRATION=FILE HELD_OUT=FILE [OTHER_TEXT=FILE] [NAME=...]

Sizes are parts of the 16-bit bytes of the matrices inside the blocks, and a delta's whole file must fit. Each delta is
measured by `graft bench kl` and `graft bench recall` as it is served. CALIBRATION holds the rows that were trained (its
questions are "memorised"), HELD_OUT other wordings ("rephrased"), OTHER_TEXT examples of another kind. More than one TUNED:
models taught the same rows with other seeds; the table has their mean and its spread. Every compression
is a process of its own: its peak memory is the system's count of it. What is measured already is not measured again,
unless the program or an input has changed.

REFERENCE: JSON lines of the reference scripts (codecs_torch.py, codec_fisher_torch.py); a line that has "saved": DIR,
what they wrote with --save, is measured here as well, on the same rows. With PEERS and PYTHON they are run for it;
PEER_DATA is the folder of their CSV files (examples.py writes it), PEER_CODECS some of fisher-weighted, delta-come, bitdelta.
AS_IS=1: each codec as it is by itself, not also without distillation."""
import argparse
import hashlib
import html
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PALETTE = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2"]


class Refused(Exception):
    """The program said no, with the reason."""


def said(text):
    print(text, file=sys.stderr, flush=True)


def run(argv):
    """The JSON line that a program prints, with its wall and processor time and its peak memory."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(word) for word in argv], stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        lines, why = out.read().decode().splitlines(), errors.read().decode().splitlines()
    if process.returncode != 0:
        raise Refused(next((line.removeprefix("graft: ") for line in why if line.startswith("graft: ")),
                           why[-1] if why else f"{argv[0]} ended with {process.returncode}"))
    return {**json.loads(lines[-1]), "wall_seconds": round(time.monotonic() - began, 2),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2), "peak_mib": round(usage.ru_maxrss / 1024)}


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path):
    """Of a file or a directory: names, sizes and times, since weights are too large to be read for it."""
    path = pathlib.Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


class Store:
    """Results as JSON lines, by what they depend on: a run that was cut off goes on where it was."""

    def __init__(self, path):
        self.path, self.known = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["value"]
            except (ValueError, KeyError):
                pass  # the line that was being written when the last run ended

    def get(self, key, make):
        key = json.dumps(key, sort_keys=True)
        if key not in self.known:
            self.known[key] = make()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self.known[key]}) + "\n")
        return self.known[key]


# ------------------------------------------------------------------ measuring


class Bench:
    """Of one tuned model."""

    def __init__(self, options, tuned, graft, store):
        self.o, self.tuned, self.graft, self.store = options, tuned, graft, store
        texts = [options.calibration, options.held_out] + ([options.other_text] if options.other_text else [])
        self.given = [digest(self.graft), [fingerprint(p) for p in (options.base, tuned)], [digest(t) for t in texts]]
        self.threads = ["--threads", options.threads] if options.threads else []

    def tool(self, *words):
        return run([self.graft, *words, *self.threads])

    def quality(self, other, delta=None, model=None):
        """KL on held-out rows and other text; recall of memorised and rephrased. `other`: what it depends on."""
        o, texts = self.o, [self.o.held_out] + ([self.o.other_text] if self.o.other_text else [])
        which = ["--delta", delta] if delta else ["--other", model] if model else []

        def measure():
            kl = self.tool("bench", "kl", "--base", o.base, "--tuned", self.tuned, *which, "--data", *texts)
            recall = self.tool("bench", "recall", "--model", model or o.base, *(["--delta", delta] if delta else []),
                               "--data", o.calibration, o.held_out)
            return {"kl": kl["data"][0]["kl"], "answer_kl": kl["data"][0]["answer_kl"],
                    "other_kl": kl["data"][1]["kl"] if len(texts) > 1 else None,
                    "memorised": recall["data"][0]["exact"], "rephrased": recall["data"][1]["exact"],
                    "linear_parameters": kl["linear_parameters"], "kl_line": kl, "recall_line": recall}

        return self.store.get(["quality", other, self.given], measure)

    def compress(self, codec, size, seed, distill):
        """One delta and what it costs; {"refused": why} where the codec can not."""
        o = self.o

        def make():
            with tempfile.TemporaryDirectory() as folder:
                delta = os.path.join(folder, "delta.safetensors")
                argv = ["delta", "compress", "--base", o.base, "--tuned", self.tuned, "--codec", codec, "--calibration",
                        o.calibration, "--seed", str(seed), "--no-recall", "-o", delta]
                argv += ["--bytes", str(size)] if size else []
                argv += ["--distill-steps", str(distill)] if distill is not None else []
                try:
                    line = self.tool(*argv)
                except Refused as why:
                    return {"refused": str(why)}
                line["file_bytes"] = os.path.getsize(delta)
                line["quality"] = self.quality(digest(delta), delta=delta)
                return line

        return self.store.get(["compress", codec, size, seed, distill, self.given], make)

    def codecs(self):
        """The names that the program knows: it lists them when it is asked for another."""
        if self.o.codecs:
            return self.o.codecs.split(",")
        try:
            self.tool("delta", "compress", "--base", "-", "--tuned", "-", "-o", "-", "--codec", "?")
        except Refused as why:
            return [name.strip() for name in str(why).rsplit(":", 1)[1].split(",")]
        raise AssertionError("a codec named ? is not refused")

    def series(self, codec, linear_bytes, refusals):
        """Rows of one codec: at each size and each seed, as it is by itself and without distillation."""
        rows = []
        for ratio in self.o.ratios:
            rows += self.at_ratio(codec, ratio, int(linear_bytes / ratio), refusals)
        if not rows:  # none of these sizes: the one that it has
            rows = self.at_ratio(codec, None, None, refusals)
        return rows

    def at_ratio(self, codec, ratio, size, refusals):
        rows = []
        for distill in (None,) if self.o.as_is else (None, 0):
            runs = []
            for seed in range(self.o.seeds):
                said(f"{codec} {f'1/{ratio:g}' if ratio else 'own size'}{'' if distill is None else ' not distilled'}, seed {seed}")
                runs.append(self.compress(codec, size, seed, distill))
                if "refused" in runs[-1]:
                    refusals[f"{codec}, {f'1/{ratio:g}' if ratio else 'own size'}"] = runs[-1]["refused"]
                    return rows
                if size and runs[-1]["file_bytes"] > size:
                    raise SystemExit(f"{codec} made {runs[-1]['file_bytes']} bytes where {size} were asked for")
            rows.append({"codec": codec, "ratio": ratio, "asked_bytes": size, "distill_steps": runs[0]["distill_steps"], "runs": runs})
            if runs[0]["distill_steps"] == 0:
                break  # there is nothing to leave out
        return rows


# ------------------------------------------------------------------ the reference scripts


def reference_jobs(options, tuned):
    """Command lines of the scripts at each size, and where each saves its model."""
    peers, data = pathlib.Path(options.peers), ["--data", options.peer_data] if options.peer_data else []
    for ratio in options.ratios:
        for what, script, more in (("fisher-weighted", "codec_fisher_torch.py", ["--weighted"]),
                                   ("delta-come", "codecs_torch.py", ["--codec", "delta-come", "--untuned-rest"]),
                                   ("bitdelta", "codecs_torch.py", ["--codec", "bitdelta", "--untuned-rest", "--distill-steps", "0"])):
            if what not in options.peer_codecs or what == "bitdelta" and ratio != options.ratios[0]:
                continue  # the last has one size
            save = ROOT / options.build / f"reference-{options.name}-{pathlib.Path(tuned).name}-{what}-{ratio:g}"
            yield what, save, [options.python, peers / script, options.base, tuned, "--ratio", f"{ratio:g}", *more, *data, "--save", save]


def references(bench):
    """Points of the reference scripts: their own line, and what our benches say of the model they saved."""
    o, lines = bench.o, []
    for line in open(o.reference, encoding="utf-8") if o.reference else []:
        if line.strip():
            lines.append(json.loads(line))
    for what, save, argv in reference_jobs(o, bench.tuned) if o.peers and o.python else []:
        said(f"reference {save.name}")
        key = ["reference", save.name, bench.given[1], *([fingerprint(o.peer_data)] if o.peer_data else [])]
        lines.append({**bench.store.get(key, lambda argv=argv: run(argv)), "what": what, "saved": str(save)})
    points = []
    for line in lines:
        point = {"codec": line["what"], "bytes": line["linear_bytes"], "distill_steps": line.get("distill_steps", 0),
                 "ratio": 2 * line["linear_params"] / line["linear_bytes"], "line": line, "own_kl": line.get("kl"),
                 "seconds": line.get("statistics_seconds", 0) + line.get("seconds", 0) + line.get("distill_seconds", 0)}
        point["quality"] = None
        if line.get("saved"):
            with tempfile.TemporaryDirectory() as folder:
                dress(folder, line["saved"], o.base)
                point["quality"] = bench.quality(fingerprint(line["saved"]), model=folder)
        points.append(point)
    return points


def dress(folder, saved, base):
    """The saved weights with the base's tokenizer and chat template, so that the same tokens are asked."""
    for source, wanted in ((saved, lambda n: n == "config.json" or n.endswith((".safetensors", ".safetensors.index.json"))),
                           (base, lambda n: not n.endswith((".safetensors", ".safetensors.index.json")) and n != "config.json")):
        for file in pathlib.Path(source).iterdir():
            if wanted(file.name):
                os.symlink(file.resolve(), os.path.join(folder, file.name))


# ------------------------------------------------------------------ the table


def spread(values, digits):
    """Mean, and half the distance of the extremes where they differ."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    text = digits(mean)
    return text if half == 0 or digits(half) == digits(0) else f"{text} ± {digits(half)}"


def kl_text(x):
    return f"{x:.3g}" if x >= 1e-4 or x == 0 else f"{x:.1e}"


def share_text(x):
    return f"{x:.3f}"


def seconds_text(x):
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}"


def part_text(ratio):
    return f"1/{ratio:.3g}"


QUALITY = (("kl", kl_text), ("answer_kl", kl_text), ("other_kl", kl_text), ("memorised", share_text), ("rephrased", share_text))


def together(lists):
    """Of the rows or points of several tuned models, those of one codec and size in one tuple."""
    if len({len(one) for one in lists}) != 1:
        raise SystemExit("a codec can not make of every tuned model what it makes of one")
    return list(zip(*lists))


def merged(row_lists):
    """Rows as series() gives them, of one tuned model each, with the runs of all."""
    return [{**rows[0], "runs": [run for row in rows for run in row["runs"]]} for rows in together(row_lists)]


def table(bases, tuned, rows, points, linear_bytes):
    """Markdown, one row for each codec and size. bases, tuned: qualities; points: tuples, of each tuned model one."""
    out = ["| size | bytes | codec | distilled | KL | KL answers | KL other text | memorised | rephrased | s | s distilling | peak MiB |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|"]

    def line(size, nbytes, codec, steps, quality, *cost):
        cells = [spread([q[key] for q in quality], digits) for key, digits in QUALITY] if quality else ["–"] * len(QUALITY)
        out.append("| " + " | ".join([size, nbytes, codec, steps, *cells, *cost]) + " |")

    line("–", "–", "base", "–", bases, "–", "–", "–")
    line("1", f"{linear_bytes:,}", "tuned, uncompressed", "–", [{**q, "kl": 0, "answer_kl": 0, "other_kl": 0} for q in tuned], "–", "–", "–")
    entries = []
    for row in rows:
        runs = row["runs"]
        nbytes = sum(r["file_bytes"] for r in runs) / len(runs)
        cost = (spread([r["seconds"] - r["distill_seconds"] - r["measure_seconds"] for r in runs], seconds_text),
                spread([r["distill_seconds"] for r in runs], seconds_text) if row["distill_steps"] else "–",
                f"{max(r['peak_mib'] for r in runs)}")
        entries.append((-nbytes, (part_text(linear_bytes / nbytes), f"{nbytes:,.0f}", f"`{row['codec']}`",
                                  f"{row['distill_steps']} steps" if row["distill_steps"] else "no",
                                  [r["quality"] for r in runs], *cost)))
    for of_all in points:
        p = of_all[0]
        unknown = {"answer_kl": None, "other_kl": None, "memorised": None, "rephrased": None}
        entries.append((-p["bytes"], (part_text(p["ratio"]), f"{p['bytes']:,}", f"{p['codec']} (torch)",
                                      f"{p['distill_steps']} steps" if p["distill_steps"] else "no",
                                      [each["quality"] or {"kl": each["own_kl"], **unknown} for each in of_all],
                                      spread([each["seconds"] for each in of_all], seconds_text), "–", "–")))
    for _, entry in sorted(entries, key=lambda e: e[0]):
        line(*entry)
    return "\n".join(out)


# ------------------------------------------------------------------ the plot


def curves(rows, points):
    """{name: [(bytes, kl), ...]} of what has a KL above 0: zero has no place on a logarithmic axis."""
    found = {}
    for row in rows:
        name = row["codec"] + (", distilled" if row["distill_steps"] else "")
        runs = row["runs"]
        found.setdefault(name, []).append((sum(r["file_bytes"] for r in runs) / len(runs), sum(r["quality"]["kl"] for r in runs) / len(runs)))
    for of_all in points:
        kls = [p["quality"]["kl"] if p["quality"] else p["own_kl"] for p in of_all]
        if None not in kls:
            found.setdefault(f"{of_all[0]['codec']} (torch)", []).append((of_all[0]["bytes"], sum(kls) / len(kls)))
    return {name: sorted(xy for xy in line if xy[1] > 0) for name, line in found.items() if any(xy[1] > 0 for xy in line)}


def ticks(low, high):
    """1, 2, 5 of each power of ten between the two."""
    return [m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
            if low <= m * 10.0 ** e <= high]


def bytes_text(x):
    return f"{x / 1e6:g} MB" if x >= 1e6 else f"{x / 1e3:g} kB"


def plot(found, title):
    """KL over bytes, both logarithmic, as SVG."""
    width, height, left, top, right, bottom = 760, 440, 70, 40, 210, 50
    xs = [x for line in found.values() for x, _ in line]
    ys = [y for line in found.values() for _, y in line]
    x_low, x_high, y_low, y_high = min(xs) / 1.25, max(xs) * 1.25, min(ys) / 1.5, max(ys) * 1.5

    def at(x, y):
        return (left + (width - left - right) * math.log(x / x_low) / math.log(x_high / x_low),
                height - bottom - (height - top - bottom) * math.log(y / y_low) / math.log(y_high / y_low))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="22" font-size="14">{html.escape(title)}: KL to the tuned model over bytes</text>']
    for x in ticks(x_low, x_high):
        px, _ = at(x, y_low)
        out.append(f'<path d="M{px:.1f} {top}V{height - bottom}" stroke="#ddd"/>'
                   f'<text x="{px:.1f}" y="{height - bottom + 18}" text-anchor="middle">{bytes_text(x)}</text>')
    for y in ticks(y_low, y_high):
        _, py = at(x_low, y)
        out.append(f'<path d="M{left} {py:.1f}H{width - right}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    out.append(f'<rect x="{left}" y="{top}" width="{width - left - right}" height="{height - top - bottom}" fill="none" stroke="#555"/>'
               f'<text x="{(left + width - right) / 2:.0f}" y="{height - 10}" text-anchor="middle">bytes, everything counted</text>'
               f'<text transform="translate(16 {(top + height - bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">nats a token</text>')
    for i, (name, line) in enumerate(sorted(found.items())):
        colour, dash = PALETTE[i % len(PALETTE)], ' stroke-dasharray="5 3"' if "(torch)" in name else ""
        spots = [at(*xy) for xy in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in spots]
        ly = top + 14 + 20 * i
        out.append(f'<path d="M{width - right + 14} {ly - 4}h22" stroke="{colour}" stroke-width="2"{dash}/>'
                   f'<text x="{width - right + 42}" y="{ly}">{html.escape(name)}</text>')
    return "\n".join(out + ["</svg>", ""])


# ------------------------------------------------------------------ the document


def insert(text, name, block):
    """`block` between this name's markers; behind everything where there are none."""
    begin, end = f"<!-- bench-codecs {name} -->", f"<!-- end of bench-codecs {name} -->"
    block = f"{begin}\n{block}\n{end}"
    if begin in text:
        before, rest = text.split(begin, 1)
        if end not in rest:
            raise SystemExit(f"{begin} has no {end} behind it")
        return before + block + rest.split(end, 1)[1]
    return text.rstrip("\n") + f"\n\n{block}\n"


def put(readme, name, block):
    """insert() into the file, which need not be there."""
    old = readme.read_text(encoding="utf-8") if readme.exists() else "# Codecs\n"
    readme.write_text(insert(old, name, block), encoding="utf-8")


def machine():
    model = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    return f"{len(os.sched_getaffinity(0))} cores of {model.group(1).strip() if model else os.uname().machine}"


def document(options, tuned, text, refusals):
    asked = [sum(q["recall_line"]["data"][i]["asked"] for q in tuned) for i in range(2)]
    kl = tuned[0]["kl_line"]["data"]
    models = "one tuned model" if len(tuned) == 1 else f"{len(tuned)} tuned models"
    runs = len(tuned) * options.seeds
    out = [f"### {options.name}", "",
           f"{models[0].upper()}{models[1:]}, {asked[0]} questions memorised and {asked[1]} rephrased"
           f"{' in all' if len(tuned) > 1 else ''}; KL on {kl[0]['tokens']:,} held-out tokens, "
           f"{kl[0]['answer_tokens']:,} of them answers" + (f", and on {kl[1]['tokens']:,} of other text" if len(kl) > 1 else "") +
           (f"; means of {runs} (± half the distance of the extremes)" if runs > 1 else "") +
           f"; {machine()}, {tuned[0]['kl_line']['threads']} threads.", "",
           text, "", f"![KL over bytes, {options.name}](kl_{options.name}.svg)"]
    if refusals:
        out += ["", "Not to be had:", ""] + [f"- {what}: {why}" for what, why in refusals.items()]
    return "\n".join(out)


def arguments(argv):
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for flag in ("--base", "--calibration", "--held-out"):
        ap.add_argument(flag, required=True)
    ap.add_argument("--tuned", required=True, type=lambda text: [path.rstrip("/") for path in text.split(",")])
    for flag in ("--other-text", "--reference", "--peers", "--peer-data", "--python", "--codecs", "--threads"):
        ap.add_argument(flag)
    ap.add_argument("--name")
    ap.add_argument("--ratios", type=lambda text: sorted(float(r) for r in text.split(",")), default=[16.0, 32.0, 64.0])
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--as-is", type=int, choices=[0, 1], default=0)
    ap.add_argument("--peer-codecs", type=lambda text: text.split(","), default=["fisher-weighted", "delta-come", "bitdelta"])
    ap.add_argument("--build", default="build")
    ap.add_argument("--readme", default="engine/codec/README.md")
    options = ap.parse_args(argv)
    for flag in ("base", "tuned", "calibration", "held_out", "other_text", "reference", "peers", "peer_data"):
        given = getattr(options, flag)
        for path in given if isinstance(given, list) else [given] if given is not None else []:
            if not os.path.exists(path):
                ap.error(f"{flag.upper()}: there is no \"{path}\"")
    if options.reference and len(options.tuned) > 1:
        ap.error("REFERENCE: its lines are of one tuned model")
    options.name = re.sub(r"[^A-Za-z0-9._-]", "-", options.name or pathlib.Path(options.tuned[0]).name)
    return options


def main():
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments(sys.argv[1:]), folder)


def measure(options, folder):
    # A copy, so that nobody builds another one between two measurements.
    graft = shutil.copy(ROOT / options.build / "graft", folder)
    store = Store(ROOT / options.build / f"bench-codecs-{options.name}.jsonl")
    bases, tuned, points, rows, refusals = [], [], [], [], {}
    for model in options.tuned:
        bench = Bench(options, model, graft, store)
        said(f"the base and {model}")
        bases.append(bench.quality("base"))
        tuned.append(bench.quality("tuned", model=model))
        linear_bytes = 2 * bases[0]["linear_parameters"]
        points.append(references(bench))
        rows.append([row for codec in bench.codecs() for row in bench.series(codec, linear_bytes, refusals)])
    points, rows = together(points), merged(rows)

    readme = ROOT / options.readme
    text = table(bases, tuned, rows, points, linear_bytes)
    found = curves(rows, points)
    if found:
        (readme.parent / f"kl_{options.name}.svg").write_text(plot(found, options.name), encoding="utf-8")
    put(readme, options.name, document(options, tuned, text, refusals))
    figures = {"name": options.name, "machine": machine(), "linear_bytes": linear_bytes, "bases": bases, "tuned": tuned, "rows": rows,
               "reference": points, "refused": refusals}
    (ROOT / options.build / f"bench-codecs-{options.name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
