#include "engine/recall.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"
#include "engine/dataset.h"
#include "engine/engine_parts.h"
#include "engine/model.h"
#include "engine/session.h"
#include "engine/tokenizer.h"
#include "engine/trainer.h"

#define MAX_ANSWER (1 << 20) /* bytes */

/* ------------------------------------------------------------------ comparing */

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/* Cuts outer blanks, one final dot, and the blanks before it. */
static void trim(const char **text, size_t *len)
{
    bool dot = false;

    while (*len > 0 && is_blank(**text)) {
        (*text)++;
        (*len)--;
    }
    while (*len > 0 && (is_blank((*text)[*len - 1]) || (!dot && (*text)[*len - 1] == '.'))) {
        dot |= (*text)[*len - 1] == '.';
        (*len)--;
    }
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

static bool same(const char *a, const char *b, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (lower(a[i]) != lower(b[i]))
            return false;
    }
    return true;
}

struct recall_match recall_compare(const char *answer, size_t answer_len, const char *expected,
                                   size_t expected_len)
{
    struct recall_match match = {false, false};

    trim(&answer, &answer_len);
    trim(&expected, &expected_len);
    match.exact = answer_len == expected_len && same(answer, expected, expected_len);
    match.contained = match.exact;
    for (size_t i = 0; expected_len > 0 && i + expected_len <= answer_len && !match.contained; i++)
        match.contained = same(answer + i, expected, expected_len);
    return match;
}

/* ------------------------------------------------------------------ asking */

struct question {
    struct dataset_example example;
    struct dataset_question at;
    struct strbuf answer;
};

struct asking {
    const struct engine *engine;
    const struct recall_args *args;
    struct question *question; /* [count] */
    int64_t count, answered;
};

static int choose_questions(struct asking *a, struct err *err)
{
    const struct engine_dataset *dataset = a->args->dataset;
    int64_t most = a->args->questions, with_answer = 0, seen = 0;
    struct dataset_question at;

    for (int64_t i = 0; i < dataset_count(dataset); i++)
        with_answer += dataset_question(dataset, i, &at);
    if (with_answer == 0)
        return err_set(err, ERR_INVALID, "the dataset has no question that could be asked");
    a->count = with_answer < most ? with_answer : most;
    a->question = calloc((size_t)a->count, sizeof(*a->question));
    if (a->question == NULL) {
        a->count = 0;
        return err_set(err, ERR_NO_MEMORY, "out of memory for %lld questions", (long long)most);
    }
    for (int64_t k = 0; k < a->count; k++)
        strbuf_init(&a->question[k].answer, MAX_ANSWER);
    for (int64_t i = 0, k = 0; k < a->count; i++) {
        if (!dataset_question(dataset, i, &at))
            continue;
        if (seen++ != k * with_answer / a->count)
            continue;
        a->question[k].example = dataset_example(dataset, i);
        a->question[k++].at = at;
    }
    return 0;
}

static void on_event(void *context, const struct engine_event *event)
{
    struct asking *a = context;
    struct question *question = event->user;

    strbuf_add(&question->answer, event->text, event->text_len);
    a->answered += event->finish != ENGINE_FINISH_NONE;
}

static int tell(const struct asking *a, struct err *err)
{
    double rounds = a->args->rounds > 0 ? a->args->rounds : 1;

    return stage_tell(&a->args->listener, "recall",
                      (a->args->round + (double)a->answered / (double)a->count) / rounds, err);
}

static int ask(struct asking *a, struct engine_session *session, struct err *err)
{
    int32_t active = 1;
    uint64_t id;

    for (int64_t k = 0; k < a->count; k++) {
        struct question *q = &a->question[k];
        struct engine_request request = {.delta = a->args->delta,
                                         .top_p = 1,
                                         .max_tokens = q->at.end - q->at.begin + RECALL_MORE_TOKENS,
                                         .user = q};

        if (session_submit_tokens(session, q->example.token, (size_t)q->at.begin, &request, &id,
                                  err) != 0)
            return -1;
    }
    while (active > 0) {
        if (engine_session_step(session, on_event, a, &active, err) != 0 || tell(a, err) != 0)
            return -1;
    }
    return 0;
}

/* The expected answer as text. */
static void expected_text(const struct asking *a, const struct question *q, struct strbuf *out)
{
    for (int32_t i = q->at.begin; i < q->at.end; i++) {
        size_t len = 0;
        const char *piece = tokenizer_piece(a->engine->tokenizer, q->example.token[i], &len);

        if (piece != NULL)
            strbuf_add(out, piece, len);
    }
}

static int compare(const struct asking *a, struct engine_recall *out, struct err *err)
{
    int64_t exact = 0, contained = 0;
    struct strbuf expected;
    int rc = 0;

    strbuf_init(&expected, MAX_ANSWER);
    for (int64_t k = 0; k < a->count && rc == 0; k++) {
        const struct question *q = &a->question[k];
        struct recall_match match;

        strbuf_reset(&expected);
        expected_text(a, q, &expected);
        if (strbuf_failed(&expected) || strbuf_failed(&q->answer)) {
            rc = err_set(err, ERR_NO_MEMORY, "out of memory for an answer");
            break;
        }
        match = recall_compare(q->answer.data, q->answer.len, expected.data, expected.len);
        exact += match.exact;
        contained += match.contained;
    }
    strbuf_release(&expected);
    *out = (struct engine_recall){.asked = a->count,
                                  .exact = (double)exact / (double)a->count,
                                  .contained = (double)contained / (double)a->count};
    return rc;
}

/* Tokens of the longest question with its answer: the context that the session needs. */
static int32_t longest(const struct asking *a, int32_t context)
{
    int32_t most = 2;

    for (int64_t k = 0; k < a->count; k++) {
        int32_t need = a->question[k].at.end + RECALL_MORE_TOKENS;

        if (need > most)
            most = need;
    }
    return most < context ? most : context;
}

int recall_measure(struct engine *engine, const struct recall_args *args, struct engine_recall *out,
                   struct err *err)
{
    struct engine_session_options options = {.max_sequences = SESSION_DEFAULT_SEQUENCES};
    struct engine_session *session = NULL;
    struct asking a = {.engine = engine, .args = args};
    int rc = -1;

    if (choose_questions(&a, err) != 0)
        goto out;
    options.max_context = longest(&a, model_get_config(engine->model)->context);
    if (session_open(&session, engine, &options, args->weights, err) != 0 ||
        ask(&a, session, err) != 0 || compare(&a, out, err) != 0)
        goto out;
    rc = 0;
out:
    engine_session_free(session);
    for (int64_t k = 0; k < a.count; k++)
        strbuf_release(&a.question[k].answer);
    free(a.question);
    return rc;
}

int engine_recall(struct engine *engine, const struct engine_dataset *dataset,
                  const struct engine_recall_options *options, struct engine_recall *out,
                  struct err *err)
{
    const struct engine_recall_options o = *options;

    return recall_measure(
        engine,
        &(struct recall_args){.weights = o.trainer != NULL ? trainer_weights(o.trainer) : NULL,
                              .delta = o.trainer != NULL ? NULL : o.delta,
                              .dataset = dataset,
                              .questions = RECALL_MAX_QUESTIONS,
                              .listener = {o.progress, o.context}},
        out, err);
}
