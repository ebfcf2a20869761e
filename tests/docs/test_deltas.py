"""api-spec/deltas.md tells the truth: its blocks run in order, the codecs and flags it names are those there are."""
import json
import re
import subprocess
import unittest

import pages
from pages import harness

PAGE = "api-spec/deltas.md"


def objects(text):
    """The JSON objects in it; curl leaves out line ends."""
    found, at = [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            one, at = json.JSONDecoder().raw_decode(text, at)
            found.append(one)
        except ValueError:
            at += 1
    return found


class Deltas(pages.Pages):
    def test_blocks_run_in_order(self):
        (self.folder / "train.jsonl").write_bytes(harness.examples(harness.FACTS))
        out = self.run_blocks("".join(pages.blocks(PAGE, "sh")))
        self.assertRegex(out, r'"id": *"ft:smollm2-135m:org:moved:\w+"')
        printed = objects(out)
        compressed, adapted = [one for one in printed if "file" in one and "measured_kl" in one]
        self.assertEqual((compressed["codec"], adapted["codec"]), ("graft", "lora"))
        self.assertRegex(out, r'"id": *"ft:smollm2-135m:org:adapter:\w+"')
        self.assertGreaterEqual(compressed["ratio"], 16)
        measured, = [one["data"][0] for one in printed if isinstance(one.get("data"), list) and "kl" in one["data"][0]]
        self.assertGreater(measured["kl"], 0)
        job = self.server.wait_job(printed[-1]["id"])
        self.assertEqual((job["status"], job["graft"]["delta"]["codec"]), ("succeeded", "bitdelta"), job)
        answer = self.server.chat(job["fine_tuned_model"], "Hello")
        self.assertEqual(answer.status, 200, answer)

    def test_the_codecs_are_those_there_are(self):
        named = re.findall(r"^\| `([a-z-]+)`", pages.text_of(PAGE), re.M)
        refused = subprocess.run([harness.GRAFT, "delta", "compress", "--base", "-", "--tuned", "-", "-o", "-", "--codec", "?"],
                                 capture_output=True, text=True)
        self.assertEqual(named, refused.stderr.splitlines()[0].split('"?": ')[1].split(", "), refused.stderr)

    def test_the_limits_are_those_of_the_api(self):
        file = self.server.upload(harness.examples(harness.FACTS)).json["id"]
        for field, low, high in (("ratio", 1, 1024), ("distill_steps", 0, 10000)):
            self.assertIn(str(high), pages.text_of(PAGE))
            for value in (low - 1, high + 1):
                reply = self.server.create_job(file, graft={"compression": {field: value}})
                self.assertEqual((reply.status, reply.error["param"]), (400, f"graft.compression.{field}"), reply)


if __name__ == "__main__":
    unittest.main()
