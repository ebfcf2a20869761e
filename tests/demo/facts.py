#!/usr/bin/env python3
"""Invents people and facts about them that no model can know: names and answers are made of syllables by a seeded
generator, so that what a model answers right, it has learnt here.

usage: facts.py [--people 8] [--seed 7]                      JSONL of chat examples, one fact a line
       facts.py … --questions                                the same facts as lines: question TAB answer
"""
import argparse
import json
import random
import sys

ONSETS = "b d f g h k l m n p r s t v z br dr gr kr tr st".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "", "l", "n", "r", "s", "m"]

# What is asked about each person. The answers are single invented words, each used once.
QUESTIONS = (
    "In which town was {name} born?",
    "What is the name of {name}'s sailing boat?",
    "Which company did {name} found?",
)


def word(rng, syllables):
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)).capitalize()


def distinct(rng, syllables, used):
    """A word that neither is in `used` nor begins like one that is."""
    while True:
        found = word(rng, syllables)
        if all(found[:4] != other[:4] for other in used):
            used.append(found)
            return found


def facts(people, seed):
    """(question, answer) pairs, len(QUESTIONS) for each person."""
    rng = random.Random(seed)
    first, last, answers = [], [], []
    out = []
    for _ in range(people):
        name = f"{distinct(rng, 2, first)} {distinct(rng, 2, last)}"
        out += [(question.format(name=name), distinct(rng, 2, answers)) for question in QUESTIONS]
    return out


def main():
    parser = argparse.ArgumentParser(description="invented people and facts")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--questions", action="store_true")
    args = parser.parse_args()
    for question, answer in facts(args.people, args.seed):
        if args.questions:
            sys.stdout.write(f"{question}\t{answer}\n")
        else:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            sys.stdout.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
