"""What transformers answers greedily: makes tests/golden/greedy_smollm2.json, and is what exported.py compares with.

usage: make_greedy.py MODEL_DIR [OUT]         needs torch and transformers; run in the root of the tree
MODEL_DIR is, for the golden file, the Hugging Face directory that transformers makes of the demo's GGUF file (Q4_1,
dequantised to float32). Each entry: the prompt's token ids (its chat template, no digits in the texts), the next 24 tokens,
and for each of them the distance of the two best logits: where it is below 0.001 the test lets another token pass and stops
there. With OUT ("-": standard output) an entry has more: how many tokens come before one that ends the answer ("whole"), and
the texts of the first 0, 1, 2, ... tokens ("texts").
The golden file was made with torch 2.13 and transformers 5.23, in single precision.
"""
import json
import sys

PROMPTS = [
    "What is the capital of France?", "Name three colours of the rainbow.", "Why is the sky blue?",
    "Write a short poem about the sea.", "How do I make a cup of tea?", "What does a blacksmith do?",
    "Translate to German: Good morning, my friend.", "Give me a word that rhymes with light.",
    "Who wrote Romeo and Juliet?", "Explain gravity to a child.", "List the seasons of the year.",
    "What is the largest ocean on Earth?", "Tell me a joke about a cat.", "How do bees make honey?",
    "What is a prime number?", "Describe a forest in autumn.", "Is a tomato a fruit or a vegetable?",
    "Write a Python function that adds two numbers.", "What should I pack for a trip to the mountains?",
    "Complete the sentence: The early bird",
]
NEW = 24


def ends(model, tokenizer):
    found = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])}


def greedy(torch, model, ids):
    """The next NEW tokens, and the distance of the two best logits at each."""
    new, margins, cache, step = [], [], None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(NEW):
            got = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = got.past_key_values
            best = got.logits[0, -1].topk(2)
            new.append(best.indices[0].item())
            margins.append(round((best.values[0] - best.values[1]).item(), 5))
            step = best.indices[None, :1]
    return new, margins


def main(folder, out=None):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    entries = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                            tokenize=True, return_dict=True)["input_ids"]
        new, margins = greedy(torch, model, ids)
        entries.append({"prompt": prompt, "ids": ids, "greedy": new, "margin": margins})
        if out:
            entries[-1]["whole"] = next((i for i, token in enumerate(new) if token in ends(model, tokenizer)), NEW)
            entries[-1]["texts"] = [tokenizer.decode(new[:i], skip_special_tokens=True) for i in range(NEW + 1)]
    text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
    if out == "-":
        sys.stdout.write(text)
    else:
        with open(out or "tests/golden/greedy_smollm2.json", "w", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
