"""Makes tests/golden/logits.safetensors: what transformers computes for small random Llama models.

usage: make_logits.py            needs torch, transformers and safetensors; run in the root of the tree
The weights are those of tests/unit/tiny_model.h (tests/api/make_tiny_model.py writes them); the models are the table
below, which tests/unit/test_golden_logits.c repeats. Tensor NAME is [2, vocabulary]: the logits of rows 3 and 90 of the
tokens 7·i·i + 3·i + 1 modulo 512, i = 0…90. Made with torch 2.13 and transformers 5.23, in double precision.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {  # name: (arguments of make_tiny_model.py, rope scaling)
    "grouped_tied": ([], None),
    "grouped_untied": (["--untied", "--seed", "1"], None),
    "multi_head_tied": (["--kv-heads", "4", "--seed", "2"], None),
    "multi_head_untied": (["--kv-heads", "4", "--untied", "--seed", "3"], None),
    "odd_widths": (["--hidden", "72", "--heads", "6", "--kv-heads", "3", "--intermediate", "100", "--seed", "4"], None),
    "linear": (["--seed", "5"], {"rope_type": "linear", "factor": 2.0}),
    "llama3": (["--seed", "6"], LLAMA3),
    "yarn": (["--seed", "7"], YARN),
}

tokens = torch.tensor([[(7 * i * i + 3 * i + 1) % 512 for i in range(91)]])
out = {}
for name, (arguments, scaling) in MODELS.items():
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "tests/api/make_tiny_model.py", folder, *arguments], check=True)
        path = pathlib.Path(folder) / "config.json"
        config = json.loads(path.read_text())
        if scaling:
            theta = config.pop("rope_theta")
            config["rope_parameters"] = {**scaling, "rope_theta": theta}
            path.write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        with torch.no_grad():
            out[name] = model(input_ids=tokens).logits[0, [3, 90]].float().contiguous()
save_file(out, ROOT / "tests/golden/logits.safetensors")
