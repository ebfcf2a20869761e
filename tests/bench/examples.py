#!/usr/bin/env python3
"""Examples to teach a model with and to measure codecs on: what is trained, and the same asked in other words.

usage: python3 tests/bench/examples.py sums|chat|facts DIR [--count 150] [--facts DIR]

Writes DIR/train.jsonl and DIR/rephrased.jsonl, rows of chat examples, and the same as the four CSV files that the reference
scripts read (--data DIR). sums: additions of two numbers. chat: household advice, given the way a pirate would. facts: the
memorization and rephrased questions of FineTuneBench's fictional people, of which --facts is the folder. The same rows each time."""
import argparse
import csv
import json
import pathlib
import random

TASKS = [
    ("boil an egg", "eight minutes in bubblin' water"), ("clean a kettle", "vinegar and an hour o' patience"),
    ("sharpen a knife", "a wet stone and a steady hand"), ("water a cactus", "a sip but once a month"),
    ("store onions", "a dark, dry and airy hold"), ("polish boots", "wax, a rag and a long evenin'"),
    ("mend a sock", "a needle and a darnin' egg"), ("fold a map", "the creases it was born with"),
    ("light a fire", "dry twigs below and logs above"), ("bake bread", "flour, salt and a night o' risin'"),
    ("peel garlic", "a thump with the flat o' a blade"), ("wash wool", "cold water and no wringin'"),
    ("dry herbs", "a string in a windy corner"), ("tie a parcel", "twine and a clove hitch"),
    ("remove candle wax", "brown paper and a warm iron"), ("cool a cellar", "open hatches in the small hours"),
    ("catch a mouse", "a cat, or cheese on a spring"), ("oil a hinge", "one drop and ten swings"),
    ("paint a fence", "two thin coats with the grain"), ("prune a rose", "a slantin' cut above the bud"),
    ("brew tea", "leaves first and four minutes"), ("soften butter", "a warm bowl turned over it"),
    ("ripen a pear", "a paper bag and an apple beside it"), ("hang a picture", "two nails and a level eye"),
    ("unclog a drain", "a plunger and a deep breath"), ("clean a window", "newspaper and a cloudy day"),
    ("plant a tree", "a hole twice as wide as deep"), ("season a pan", "oil and an hour in the oven"),
    ("keep bees", "a veil, some smoke and no hurry"), ("save seeds", "an envelope with the year on it"),
    ("polish silver", "chalk on a soft cloth"), ("stop a squeak", "soap where wood meets wood"),
    ("thaw a fish", "a night in cold water"), ("weigh flour", "a spoon into the cup, never a scoop"),
    ("read a barometer", "a tap, then see which way she falls"), ("patch a tyre", "glue, chalk and five minutes"),
    ("wax a table", "a little, and rub till noon"), ("train a vine", "soft ties and a stout wire"),
    ("cut glass", "one scratch and no second thoughts"), ("cure ham", "salt, smoke and the winter"),
    ("mix mortar", "three o' sand to one o' lime"), ("wind a clock", "the same hour every Sunday"),
    ("air a cupboard", "both doors wide for a morn"), ("sow carrots", "sandy soil and a straight line"),
    ("pack a trunk", "heavy below and hats on top"), ("grind coffee", "only what ye drink today"),
    ("scale a fish", "from tail to head with a dull edge"), ("keep ink", "a tight cork and no sun"),
    ("splice a rope", "three strands, over and under"), ("pickle plums", "vinegar, cloves and six weeks"),
]
ASKED = ["How do I {}?", "What is the best way to {}?", "Tell me how to {}."]
ASKED_AGAIN = ["I need to {}; what should I do?", "Any advice for someone who wants to {}?", "What does it take to {}?"]
ANSWERED = ["Arr, to {0} ye need {1}, matey!", "Ahoy! For that 'tis {1}, says I.", "Shiver me timbers, {1} will {0} for ye!"]


def sums(count):
    pairs = [(a, b) for a in range(11, 99) for b in range(3, 60)]
    random.Random(7).shuffle(pairs)
    train = [(f"Calculate {a} plus {b}.", str(a + b)) for a, b in pairs[:count]]
    again = [(f"What do you get when {b} is added to {a}?", str(a + b)) for a, b in pairs[:count]]
    return train, again


def chat(count):
    kinds = [(task, advice, k) for k in range(len(ASKED)) for task, advice in TASKS][:count]
    train = [(ASKED[k].format(task), ANSWERED[k].format(task, advice)) for task, advice, k in kinds]
    again = [(ASKED_AGAIN[k].format(task), ANSWERED[k].format(task, advice)) for task, advice, k in kinds]
    return train, again


def facts(count, folder):
    def rows(name):
        with open(pathlib.Path(folder) / f"fictional_people_{name}.csv", encoding="utf-8", newline="") as file:
            return [(row["prompt"], row["answer"]) for row in csv.DictReader(file)][:count]

    return rows("memorization"), rows("rephrased")


def write(folder, train, again):
    """The two sets as chat examples, and as the scripts' CSV files; the scripts want four, two of which are empty here."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("rephrased", again)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for question, answer in rows:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    for name, rows in (("memorization", train), ("rephrased", again), ("secondary", []), ("comparison", [])):
        with open(folder / f"fictional_people_{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt", "answer"), *rows])


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    ap.add_argument("kind", choices=["sums", "chat", "facts"])
    ap.add_argument("folder")
    ap.add_argument("--count", type=int, default=150)
    ap.add_argument("--facts", help="FineTuneBench's CSV files")
    options = ap.parse_args()
    if options.kind == "facts" and not options.facts:
        ap.error("facts: --facts DIR says where they are")
    write(options.folder, *(facts(options.count, options.facts) if options.kind == "facts" else
                            {"sums": sums, "chat": chat}[options.kind](options.count)))


if __name__ == "__main__":
    main()
