"""The official openai Python SDK as the client, unchanged but for its base_url: files -> job -> events -> checkpoints ->
chat -> models -> delete, and the errors between. The client validates every response strictly against its own types,
so that a missing or mistyped field fails here."""
import asyncio
import io
import pathlib
import re
import sys
import time
import unittest

import openai

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "api"))
import harness  # noqa: E402

EPOCHS = 4
PEOPLE = harness.FACTS


def client(key, kind=openai.OpenAI):
    return kind(base_url=SERVER.url + "/v1", api_key=key, max_retries=0, timeout=120, _strict_response_validation=True)


def setUpModule():
    global SERVER, CLIENT
    SERVER = harness.Server()
    unittest.addModuleCleanup(SERVER.stop)
    CLIENT = client(SERVER.key)


def upload(lines, name="train.jsonl"):
    return CLIENT.files.create(file=(name, io.BytesIO(lines)), purpose="fine-tune")


def create(file_id, epochs=EPOCHS, **more):
    return CLIENT.fine_tuning.jobs.create(
        model=SERVER.model, training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": 4}}}, **more)


def ended(job_id, seconds=180):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        job = CLIENT.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.3)
    raise AssertionError(f"{job_id} is still {job.status} after {seconds} s")


class FineTune(unittest.TestCase):
    """One job, followed from its file to its answers."""

    @classmethod
    def setUpClass(cls):
        cls.lines = harness.examples(PEOPLE)
        cls.file = upload(cls.lines)
        cls.created = create(cls.file.id, suffix="towns", seed=11, metadata={"purpose": "test"})
        cls.job = ended(cls.created.id)
        if cls.job.status != "succeeded":
            raise AssertionError(f"the job {cls.job.status}: {cls.job.error}")

    def test_the_file_is_as_uploaded(self):
        found = CLIENT.files.retrieve(self.file.id)
        self.assertEqual((found.filename, found.bytes, found.purpose, found.object),
                         ("train.jsonl", len(self.lines), "fine-tune", "file"))
        self.assertEqual(CLIENT.files.content(self.file.id).read(), self.lines)
        self.assertIn(self.file.id, [file.id for file in CLIENT.files.list(purpose="fine-tune")])
        self.assertEqual(CLIENT.files.wait_for_processing(self.file.id).id, self.file.id)

    def test_the_job_at_first(self):
        self.assertIn(self.created.status, ("validating_files", "queued"))
        self.assertEqual((self.created.seed, self.created.training_file, self.created.model, self.created.object),
                         (11, self.file.id, SERVER.model, "fine_tuning.job"))
        self.assertEqual(self.created.metadata, {"purpose": "test"})
        self.assertEqual(self.created.method.supervised.hyperparameters.n_epochs, EPOCHS)
        self.assertEqual(self.created.method.supervised.hyperparameters.learning_rate_multiplier, "auto")
        self.assertIsNone(self.created.fine_tuned_model)
        self.assertIsNone(self.created.error)

    def test_the_job_at_last(self):
        self.assertRegex(self.job.fine_tuned_model, rf"^ft:{re.escape(SERVER.model)}:[\w-]+:towns:\w{{8}}$")
        self.assertGreater(self.job.trained_tokens, 0)
        self.assertGreaterEqual(self.job.finished_at, self.job.created_at)
        self.assertIsNone(self.job.estimated_finish)
        self.assertEqual(self.job.hyperparameters.n_epochs, EPOCHS)
        self.assertIsInstance(self.job.hyperparameters.learning_rate_multiplier, (int, float))

    def test_the_result_file_has_a_line_for_each_step(self):
        rows = CLIENT.files.content(self.job.result_files[0]).read().decode().splitlines()
        self.assertEqual(rows[0], "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
        self.assertEqual([int(row.split(",")[0]) for row in rows[1:]], list(range(1, EPOCHS * 3 + 1)))
        self.assertLess(float(rows[-1].split(",")[1]), float(rows[1].split(",")[1]))
        self.assertEqual(CLIENT.files.retrieve(self.job.result_files[0]).purpose, "fine-tune-results")

    def test_events_tell_the_story_newest_first(self):
        events = list(CLIENT.fine_tuning.jobs.list_events(self.job.id, limit=100))
        texts = [event.message for event in reversed(events) if event.type == "message"]
        story = [rf"^Created fine-tuning job: {self.job.id}$", rf"^Validating training file: {self.file.id}$",
                 "^Files validated, moving job to queued state$", "^Fine-tuning job started$",
                 *(f"^Checkpoint created at step {step} with Snapshot ID: ft:.*:ckpt-step-{step}$" for step in (6, 9, 12)),
                 rf"^New fine-tuned model created: {re.escape(self.job.fine_tuned_model)}$",
                 "^The job has successfully completed$"]
        at = 0
        for text in texts:
            at += at < len(story) and re.match(story[at], text) is not None
        self.assertEqual(at, len(story), f"missing or out of order: {story[at:at + 1]} in {texts}")
        steps = [event.data for event in reversed(events) if event.type == "metrics"]
        self.assertEqual(steps[-1]["step"], steps[-1]["total_steps"])
        self.assertEqual(sorted(step["step"] for step in steps), [step["step"] for step in steps])
        for key in ("train_loss", "train_mean_token_accuracy", "total_steps"):
            self.assertIn(key, steps[0])
        times = [event.created_at for event in events]
        self.assertEqual(times, sorted(times, reverse=True))

    def test_the_auto_pager_sees_each_event_once(self):
        whole = [event.id for event in CLIENT.fine_tuning.jobs.list_events(self.job.id, limit=100)]
        pages = CLIENT.fine_tuning.jobs.list_events(self.job.id, limit=3)
        self.assertEqual(len(pages.data), 3)
        self.assertTrue(pages.has_more)
        self.assertEqual([event.id for event in pages], whole)

    def test_checkpoints_are_models(self):
        points = list(CLIENT.fine_tuning.jobs.checkpoints.list(self.job.id))
        self.assertEqual(sorted(point.step_number for point in points), [6, 9, 12])  # the last three epochs
        for point in points:
            self.assertEqual(point.fine_tuning_job_id, self.job.id)
            self.assertTrue(point.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{point.step_number}"))
            self.assertGreater(point.metrics.train_loss, 0)
        answer = self.ask(points[0].fine_tuned_model_checkpoint)
        self.assertEqual(answer.model, points[0].fine_tuned_model_checkpoint)

    def ask(self, model, **more):
        options = {"temperature": 0, "max_tokens": 8, **more}
        return CLIENT.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PEOPLE[0][0]}], **options)

    def test_chat(self):
        answer = self.ask(self.job.fine_tuned_model)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertLessEqual(answer.usage.completion_tokens, 8)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertEqual(self.ask(self.job.fine_tuned_model).choices[0].message.content,
                         answer.choices[0].message.content)
        self.assertIsInstance(self.ask(SERVER.model).choices[0].message.content, str)

    def test_the_same_seed_gives_the_same_answer(self):
        words = {self.ask(self.job.fine_tuned_model, temperature=1.5, seed=5).choices[0].message.content for _ in range(3)}
        self.assertEqual(len(words), 1)

    def test_a_stream_says_what_the_answer_says(self):
        whole = self.ask(self.job.fine_tuned_model)
        chunks = list(self.ask(self.job.fine_tuned_model, stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
                         whole.choices[0].message.content)
        self.assertEqual([chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1],
                         whole.choices[0].finish_reason)
        self.assertEqual((len(chunks[-1].choices), chunks[-1].usage), (0, whole.usage))
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)

    def test_many_streams_at_once_by_the_async_client(self):
        async def one(api):
            words = ""
            async for chunk in await api.chat.completions.create(
                    model=self.job.fine_tuned_model, messages=[{"role": "user", "content": PEOPLE[0][0]}], temperature=0,
                    max_tokens=8, stream=True):
                words += chunk.choices[0].delta.content or ""
            return words

        async def all_of_them():
            async with client(SERVER.key, openai.AsyncOpenAI) as api:
                return await asyncio.gather(*(one(api) for _ in range(10)))

        self.assertEqual(set(asyncio.run(all_of_them())),
                         {self.ask(self.job.fine_tuned_model).choices[0].message.content})

    def test_models_list_and_delete(self):
        second = ended(create(self.file.id, epochs=1).id)
        name = second.fine_tuned_model
        ids = [model.id for model in CLIENT.models.list()]
        for expected in (SERVER.model, name, self.job.fine_tuned_model):
            self.assertIn(expected, ids)
        self.assertEqual(CLIENT.models.retrieve(name).id, name)
        self.assertTrue(CLIENT.models.delete(name).deleted)
        self.assertNotIn(name, [model.id for model in CLIENT.models.list()])
        with self.assertRaises(openai.NotFoundError):
            CLIENT.models.retrieve(name)
        with self.assertRaises(openai.NotFoundError) as caught:
            self.ask(name)
        self.assertEqual(caught.exception.code, "model_not_found")

    def test_cancelling_what_has_ended_is_a_bad_request(self):
        with self.assertRaises(openai.BadRequestError):
            CLIENT.fine_tuning.jobs.cancel(self.job.id)


class Jobs(unittest.TestCase):
    def test_cancel(self):
        job = create(upload(harness.examples(PEOPLE)).id, epochs=50)
        CLIENT.fine_tuning.jobs.cancel(job.id)
        job = ended(job.id, 60)
        self.assertEqual(job.status, "cancelled")
        self.assertIsNone(job.fine_tuned_model)

    def test_a_broken_line_fails_the_job_with_words(self):
        lines = harness.examples(PEOPLE).splitlines(keepends=True)
        lines[6] = b'{"messages": [{"content": "no role"}]}\n'
        job = ended(create(upload(b"".join(lines)).id).id)
        self.assertEqual((job.status, job.error.code, job.error.param), ("failed", "invalid_training_file", "training_file"))
        self.assertIn("Example 7", job.error.message)

    def test_too_few_examples_fail_the_job_with_words(self):
        job = ended(create(upload(harness.examples(PEOPLE[:7])).id).id)
        self.assertEqual((job.status, job.error.code), ("failed", "invalid_n_examples"))
        self.assertEqual(job.error.message, "Training file has 7 example(s), but must have at least 10 examples")

    def test_the_auto_pager_sees_each_job_once_newest_first(self):
        made = [create(upload(harness.examples(PEOPLE[:2])).id).id for _ in range(5)]
        seen = [job.id for job in CLIENT.fine_tuning.jobs.list(limit=2)]
        self.assertEqual(len(set(seen)), len(seen))
        self.assertEqual([job for job in seen if job in made], made[::-1])

    def test_the_auto_pager_sees_each_file_once(self):
        made = [upload(harness.examples(PEOPLE[:2]), f"{i}.jsonl").id for i in range(5)]
        seen = [file.id for file in CLIENT.files.list(limit=2)]
        self.assertEqual(len(set(seen)), len(seen))
        self.assertEqual([file for file in seen if file in made], made[::-1])
        self.assertEqual([file.id for file in CLIENT.files.list(limit=2, order="asc") if file.id in made], made)


class Errors(unittest.TestCase):
    def test_a_wrong_key(self):
        with self.assertRaises(openai.AuthenticationError) as caught:
            client("gk-" + "0" * 43).models.list()
        self.assertEqual(caught.exception.code, "invalid_api_key")
        self.assertTrue(caught.exception.request_id)

    def test_what_is_not_there(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            CLIENT.files.retrieve("file-" + "a" * 24)
        self.assertEqual(caught.exception.param, "id")
        with self.assertRaises(openai.NotFoundError) as caught:
            CLIENT.fine_tuning.jobs.retrieve("ftjob-" + "a" * 24)
        self.assertEqual(caught.exception.code, "fine_tune_not_found")
        with self.assertRaises(openai.NotFoundError):
            CLIENT.models.retrieve("no-such-model")

    def test_a_file_that_is_no_jsonl(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            upload(b"not json at all\n")
        self.assertIn("Expected file to have JSONL format", caught.exception.message)

    def test_bad_values_name_their_field(self):
        messages = [{"role": "user", "content": "x"}]
        for options, param in (({"temperature": 3}, "temperature"), ({"top_p": -1}, "top_p"), ({"max_tokens": -1}, "max_tokens")):
            with self.subTest(param), self.assertRaises(openai.BadRequestError) as caught:
                CLIENT.chat.completions.create(model=SERVER.model, messages=messages, **options)
            self.assertEqual(caught.exception.param, param)

    def test_a_prompt_beyond_the_context(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            CLIENT.chat.completions.create(model=SERVER.model, messages=[{"role": "user", "content": "word " * 20000}])
        self.assertEqual((caught.exception.code, caught.exception.param), ("context_length_exceeded", "messages"))

    def test_headers_of_every_response(self):
        ids = set()
        for raw in (CLIENT.models.with_raw_response.list(), CLIENT.files.with_raw_response.list(),
                    CLIENT.fine_tuning.jobs.with_raw_response.list()):
            self.assertEqual(raw.headers["openai-version"], "2020-10-01")
            self.assertGreaterEqual(float(raw.headers["openai-processing-ms"]), 0)
            self.assertTrue(raw.headers["content-type"].startswith("application/json"))
            ids.add(raw.request_id)
        self.assertEqual(len(ids), 3)
        self.assertNotIn(None, ids)

    def test_a_deleted_file_is_gone(self):
        file = upload(harness.examples(PEOPLE))
        self.assertTrue(CLIENT.files.delete(file.id).deleted)
        for call in (CLIENT.files.retrieve, CLIENT.files.content, CLIENT.files.delete):
            with self.assertRaises(openai.NotFoundError):
                call(file.id)


if __name__ == "__main__":
    unittest.main()
