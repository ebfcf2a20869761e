"""What the demo shows: calm lines, a progress bar on a terminal, tables. No state of the demo lives here."""
import os
import shutil
import sys
import time

LIVE = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
COLOUR = LIVE and not os.environ.get("NO_COLOR")


def paint(code, text):
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def bold(text):
    return paint("1", text)


def dim(text):
    return paint("2", text)


def good(text):
    return paint("32", text)


def bad(text):
    return paint("31", text)


def out(text=""):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def step(title, explanation):
    """A numbered step: one line what happens and why."""
    step.number += 1
    out(f"\n{bold(f'{step.number}. {title}')}  {dim(explanation)}")


step.number = 0


def command(text, *more):
    """What the user could have typed; `more` are the lines after a backslash."""
    for line in (f"$ {text}", *(f"      {rest}" for rest in more)):
        out(dim(f"   {line}"))


def note(text):
    out(f"   {text}")


def seconds_text(seconds):
    seconds = int(seconds + 0.5)
    return f"{seconds // 60}:{seconds % 60:02d}"


def bytes_text(count):
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


class Progress:
    """A bar that redraws itself on a terminal, and a plain line now and then elsewhere."""

    EVERY = 10  # seconds between two plain lines

    def __init__(self):
        self.printed = None  # when the last plain line went out
        self.open = False    # a bar stands on the current line

    def show(self, done, total, loss, rate, left):
        words = f"step {done}/{total}"
        if loss is not None:
            words += f"  loss {loss:.3f}"
        if rate:
            words += f"  {rate:.0f} tokens/s"
        words += f"  {seconds_text(left)} left" if left is not None else ""
        if LIVE:
            width = max(10, min(30, shutil.get_terminal_size().columns - len(words) - 8))
            filled = width * done // max(total, 1)
            sys.stdout.write(f"\r\x1b[K   {good('━' * filled)}{dim('━' * (width - filled))}  {words}")
            sys.stdout.flush()
            self.open = True
        elif self.printed is None or done == total or time.monotonic() - self.printed >= self.EVERY:
            self.printed = time.monotonic()
            note(words)

    def end(self):
        if self.open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self.open = False


def clip(text, width):
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 1] + "…"


def answers(rows):
    """(question, expected, base's answer, fine-tune's answer, right) side by side, within the terminal's width."""
    columns = min(shutil.get_terminal_size((100, 24)).columns, 110)
    question = max(len(row[0]) for row in rows)
    tuned = max(12, max(len(clip(row[3], 16)) for row in rows))
    base = max(14, columns - question - tuned - 12)
    if base == 14:
        question = max(20, columns - base - tuned - 12)
    out(f"   {dim('question'.ljust(question))}  {dim('base'.ljust(base))}  {dim('fine-tune')}")
    for text, _, from_base, from_tuned, right in rows:
        mark = good("✓") if right else bad("✗")
        out(f"   {clip(text, question):<{question}}  {clip(from_base, base):<{base}}  {clip(from_tuned, tuned):<{tuned}} {mark}")


def table(rows):
    """(name, value, remark) aligned."""
    width = max(len(row[0]) for row in rows)
    value = max(len(row[1]) for row in rows)
    for name, text, remark in rows:
        out(f"   {name:<{width}}  {bold(text.rjust(value))}  {dim(remark)}".rstrip())
