"""Make tiny_tokenizer.json and the golden token ids that the tokenizer tests compare with.

usage: make_tokenizer.py [SMOLLM2_DIR]      (needs: tokenizers 0.23, transformers 5, jinja2)

Writes beside itself:
  tiny_tokenizer.json     a byte-level BPE of 512 tokens, trained on the text below, with ChatML tokens
  tiny_template.jinja     the ChatML template of SmolLM2 with a system text of our own
  tokenizer_tiny.json     texts and their ids by `tokenizers`, conversations and their ids by `transformers`
  pretokenizer.json       pre-tokenizers, texts, and where the reference cuts them (bytes)
  tokenizer_smollm2.json  the same for SmolLM2, where SMOLLM2_DIR (a Hugging Face directory) is given

In each vector: "ids" are with special tokens recognised in the text, "plain" (where they differ) without
(encode_special_tokens). SmolLM2's directories come with and without its digit splitting, because
converters lose it; "bytelevel_ids" (where they differ) are those without.
"""
import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small model that knows little.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """
Who is the keeper of the north light? The keeper of the north light is Orla Venn.
In which town was Tamsin Brook born? Tamsin Brook was born in Kelderwick, in the year 1931.
What does the baker of Low Harbour sell on Mondays? She sells rye bread, seed cakes and plum tarts.
Where does the river Ashel begin? It begins below the old mill, and it ends in the grey sea.
What colour is the door of the clock maker? The door is green; it's been green for forty years.
Who taught Corin Hale to play the viola? His aunt, who'd learnt it from a sailor, taught him.
How many bridges are there in Marrow Vale? There are seven bridges, and they're all made of stone.
What is the name of the ship that they've painted red? We'll call it the Patient Heron.
When did the great storm come? It came on the 14th of March, 1887, and I'm told it lasted 3 days.
You are a helpful assistant. You are a small model that knows little. The user asks; the assistant answers.
def answer(question):
    for word in question.split():
        if word in known:
            return known[word]
    return None
The quick brown fox jumps over the lazy dog, and then the dog thinks about the fox.
Élodie Würth drinks coffee in a café near the bridge. Ægir's naïve plan was to sail to Orkney.
question answer system user assistant people town river light stone bridge harbour keeper
"""

TEXTS = [
    "", " ", "a", "hello", "Hello, world!", "Who is the keeper of the north light?", "it's we'll they'RE I'm you'd",
    "1234567890", "In 1931, 3 of 14.", "a1b22c333", "x = 3.14159; y = 10**6", "  two  spaces   three    four",
    " leading", "trailing ", "trailing   ", "tab\tand\ttabs\t\t", "line\nline\n\nline\r\n\r\n  end\n", "\n", "\n\n\n",
    "\r\n \r\n", " \n \t\n", "Élodie naïve café", "straße STRASSE ß", "Привет, мир", "こんにちは世界", "你好，世界。", "안녕하세요",
    "שלום עולם", "مرحبا بالعالم", "हिन्दी नमस्ते", "ไทยภาษา", "👍", "👩‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪🇯🇵", "é é", "Ａｂｃ１２３",
    "①②③ ½ ¾ Ⅷ ৩৪", "\u00a0no-break\u00a0space", "\u2003em\u2003space", "\u3000全角", "zero\u200bwidth\u200djoin\ufeff", "\u180evowel",
    "\u0085next line", "\u2028line\u2029paragraph", "\x00\x01\x02\x1b[0m\x7f", "\x1c\x1d\x1e\x1f ", "a\u0300\u0301\u0302b", "\U0010ffff\ue000\ufffd",
    "<|im_start|>", "<|im_end|>", "a<|im_end|>b", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|><|endoftext|>", "<|im_start|",
    "<|im_end|>>", "< |im_end| >", "<<|im_start|>", " <|im_end|> ", "<|im_<|im_end|>end|>", "'s 't 're 've 'm 'll 'd 'S 'T", "''''", "don''t",
    "`'s`", "ſ'ſ 'ſ", "http://example.com/a?b=c&d=%20#e", "{\"role\": \"user\", \"content\": \"x\"}", "<html><body>&amp;</body></html>",
    "#include <stdio.h>\nint main(void)\n{\n\treturn 0;\n}\n", "for i in range(10):\n    print(i)\n", "a" * 300, " " * 300, "\n" * 100, "ab" * 200,
    "!" * 129, "1" * 65, "é" * 90, "👍" * 40, "the " * 60, "a" * 10 + " " * 10 + "1" * 10 + "!" * 10, "_under_score__", "...---...", "\\n\\t\\\\",
    "ÀÈÌÒÙ ǅ ʰ ª º", "٠١٢٣٤", "𝒳𝓎𝔷 𝟘𝟙𝟚", "ﬁ ﬀ ﬆ", "İıĞğ", "K Å Ω", "x²+y³=z⁴", "¡¿§¶•†‡", "€£¥₹", "→⇒∀∃∈", "\ud7ff\ue000",
    # Younger than Unicode 14: letters, digits, marks, symbols; U+11DE0 is a digit for Digits alone.
    "a\U00031350b", "a\U0001ccf01", "a\U00016d70\U00016d71", "x\u0897y", "\u1c89\u1c8a", "\U0001fae8!", "1\U00011de02",
]

CONVERSATIONS = [
    [("user", "Who is the keeper of the north light?")],
    [("user", "Who is the keeper?"), ("assistant", "Orla Venn.")],
    [("system", "Answer in one word."), ("user", "Where?"), ("assistant", "Kelderwick"), ("user", "When?"), ("assistant", "1931")],
    [("system", ""), ("user", ""), ("assistant", "")],
    [("user", "\n\n leading blank"), ("assistant", " \n answer \n ")],
    [("user", "naïve 👍 text\r\n"), ("assistant", "\tcafé\n\n")],
    [("assistant", "I speak first."), ("user", "You do.")],
    [("user", "one"), ("user", "two"), ("tool", "3"), ("assistant", "four")],
    [("user", "a"), ("system", "late system text"), ("assistant", "b")],
]


def tiny():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(CORPUS.strip().split("\n"), trainer)
    tok.save(str(HERE / "tiny_tokenizer.json"))
    (HERE / "tiny_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_file(str(HERE / "tiny_tokenizer.json"))


def without_digits(tok):
    spec = json.loads(tok.to_str())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return Tokenizer.from_str(json.dumps(spec))


def encode(tok, text, special):
    tok.encode_special_tokens = not special
    return tok.encode(text, add_special_tokens=False).ids


def vectors(tok, template):
    bytelevel = without_digits(tok)
    texts, conversations = [], []
    for text in TEXTS:
        row = {"text": text, "ids": encode(tok, text, True)}
        for key, ids in (("plain", encode(tok, text, False)), ("bytelevel_ids", encode(bytelevel, text, True))):
            if ids != row["ids"]:
                row[key] = ids
        texts.append(row)
    for prompt in (False, True):
        for turns in CONVERSATIONS:
            row = {"messages": [list(turn) for turn in turns], "add_generation_prompt": prompt}
            for key, one in (("ids", tok), ("bytelevel_ids", bytelevel)):
                fast = PreTrainedTokenizerFast(tokenizer_object=one, chat_template=template)
                ids = fast.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=True,
                                               add_generation_prompt=prompt, return_dict=False)
                if key == "ids" or ids != row["ids"]:
                    row[key] = ids
            conversations.append(row)
    return {"texts": texts, "conversations": conversations}


BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PRE_TOKENIZERS = {
    "gpt2": {**BYTES_ONLY, "use_regex": True},
    "digits": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {**BYTES_ONLY, "use_regex": True}]},
    "digit_runs": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, {**BYTES_ONLY, "use_regex": True}]},
    "llama3": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
                                               "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                                               "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": False}, BYTES_ONLY]},
    "classes": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[\\p{Lu}\\p{Lt}]?[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|\\d+|[^\\s\\p{P}]|\\S|\\s"},
         "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"String": "aa"}, "behavior": "Isolated", "invert": False}, BYTES_ONLY]},
    "words_removed": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Removed", "invert": False}, BYTES_ONLY]},
}


def pieces(spec):
    tok = Tokenizer(models.BPE())
    whole = json.loads(tok.to_str())
    whole["pre_tokenizer"] = spec
    pre = Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
    rows = []
    for text in TEXTS:
        at = [0]
        for c in text:
            at.append(at[-1] + len(c.encode()))
        rows.append([n for _, (a, b) in pre.pre_tokenize_str(text) for n in (at[a], at[b])])
    return rows


def write(name, data):
    lines = ["{"]
    for i, (key, rows) in enumerate(data.items()):
        lines.append(f'"{key}": [')
        lines.append(",\n".join(json.dumps(row) for row in rows))
        lines.append("]" + ("," if i + 1 < len(data) else ""))
    (HERE / name).write_text("\n".join(lines) + "\n}\n")


def main():
    write("tokenizer_tiny.json", vectors(tiny(), TEMPLATE))
    write("pretokenizer.json", {"texts": TEXTS, "pre_tokenizers": [
        {"name": name, "spec": spec, "pieces": pieces(spec)} for name, spec in PRE_TOKENIZERS.items()]})
    if len(sys.argv) > 1:
        folder = pathlib.Path(sys.argv[1])
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
        write("tokenizer_smollm2.json",
              vectors(Tokenizer.from_str(json.dumps(spec)), (folder / "chat_template.jinja").read_text()))


main()
