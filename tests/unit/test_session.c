/* The continuous batch on a tiny random model: what others run never changes an answer, and
 * requests end as they should. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/engine.h"
#include "engine/session.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

#define TENANTS 4 /* the last is the base */
#define REQUESTS 12

static char folder[] = "/tmp/graft-session-XXXXXX";
static struct engine *engine;
static struct engine_delta *tenant[TENANTS];

/* ------------------------------------------------------------------ deltas */

static int make_delta(int which, struct err *err)
{
    const struct noisy_delta noise = {.codec = which % 2 ? "graft" : "bitdelta",
                                      .seed = 1000 * (uint64_t)(which + 1)};
    char path[128];

    snprintf(path, sizeof(path), "%s/delta%d.safetensors", folder, which);
    return noisy_delta_write(engine, &noise, path, err) ||
           engine_delta_open(&tenant[which], engine, path, err);
}

/* ------------------------------------------------------------------ running */

struct answer {
    struct strbuf text;
    enum engine_finish finish;
    int32_t prompt_tokens, completion_tokens;
    int events_after_end;
};

static void on_event(void *context, const struct engine_event *event)
{
    struct answer *answer = event->user;

    answer->events_after_end += answer->finish != ENGINE_FINISH_NONE;
    strbuf_add(&answer->text, event->text, event->text_len);
    answer->finish = event->finish;
    answer->prompt_tokens = event->prompt_tokens;
    answer->completion_tokens = event->completion_tokens;
}

static struct engine_session *open_session(int32_t sequences, int32_t context)
{
    struct engine_session_options options = {sequences, context};
    struct engine_session *session;
    struct err err = {0};

    if (engine_session_open(&session, engine, &options, &err) != 0)
        fail_msg("%s", err.message);
    return session;
}

static uint64_t submit(struct engine_session *session, struct engine_request request,
                       struct answer *answer)
{
    struct err err = {0};
    uint64_t id = 0;

    memset(answer, 0, sizeof(*answer));
    strbuf_init(&answer->text, 1 << 16);
    request.user = answer;
    if (engine_session_submit(session, &request, &id, &err) != 0)
        fail_msg("%s", err.message);
    return id;
}

static int32_t step(struct engine_session *session)
{
    struct err err = {0};
    int32_t active;

    if (engine_session_step(session, on_event, NULL, &active, &err) != 0)
        fail_msg("%s", err.message);
    return active;
}

static void run_alone(struct engine_request request, struct answer *answer)
{
    struct engine_session *session = open_session(8, 0);

    submit(session, request, answer);
    while (step(session) > 0)
        ;
    engine_session_free(session);
}

static const struct engine_message hello[] = {{"user", "Tell me of the sea, and of the ships."}};

static struct engine_request simple(void)
{
    return (struct engine_request){
        .messages = hello, .message_count = 1, .top_p = 1, .max_tokens = 20};
}

/* ------------------------------------------------------------------ batch invariance */

static char long_text[REQUESTS][400];
static struct engine_message messages[REQUESTS][1];

/* Tenants, lengths (up to several chunks) and samplers all mixed. */
static struct engine_request mixed(int i)
{
    size_t len = (size_t)(i * 29 % 17) * 20;

    for (size_t k = 0; k < len; k++)
        long_text[i][k] = "abc defg hi jk"[(k * 7 + (size_t)i) % 14];
    long_text[i][len] = '\0';
    messages[i][0] = (struct engine_message){"user", long_text[i]};
    return (struct engine_request){
        .messages = messages[i],
        .message_count = 1,
        .delta = tenant[i % TENANTS],
        .temperature = i % 3 == 0 ? 0 : 0.9,
        .top_p = i % 2 == 0 ? 1 : 0.8,
        .seed = (uint64_t)i * 31,
        .max_tokens = 6 + i * 3,
    };
}

static void run_mix(const int order[REQUESTS], int stagger, struct answer *answers)
{
    struct engine_session *session = open_session(8, 0);

    for (int i = 0; i < REQUESTS; i++) {
        submit(session, mixed(order[i]), &answers[order[i]]);
        for (int k = 0; k < stagger * i % 3; k++)
            step(session);
    }
    while (step(session) > 0)
        ;
    engine_session_free(session);
}

static void what_others_run_never_changes_an_answer(void **state)
{
    static const int orders[3][REQUESTS] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},
                                            {11, 3, 7, 0, 8, 4, 1, 10, 6, 2, 9, 5},
                                            {5, 4, 9, 8, 1, 0, 11, 2, 3, 10, 7, 6}};
    struct answer alone[REQUESTS], mix[REQUESTS];

    for (int i = 0; i < REQUESTS; i++)
        run_alone(mixed(i), &alone[i]);
    for (int o = 0; o < 3; o++) {
        run_mix(orders[o], o, mix);
        for (int i = 0; i < REQUESTS; i++) {
            assert_string_equal(mix[i].text.data, alone[i].text.data);
            assert_int_equal(mix[i].finish, alone[i].finish);
            assert_int_equal(mix[i].completion_tokens, alone[i].completion_tokens);
            assert_int_equal(mix[i].prompt_tokens, alone[i].prompt_tokens);
            assert_int_equal(mix[i].events_after_end, 0);
            strbuf_release(&mix[i].text);
        }
    }
    for (int i = 0; i < REQUESTS; i++)
        strbuf_release(&alone[i].text);
}

static void tenants_answer_differently(void **state)
{
    struct answer answer[TENANTS];

    for (int t = 0; t < TENANTS; t++) {
        struct engine_request request = simple();

        request.delta = tenant[t];
        run_alone(request, &answer[t]);
    }
    for (int a = 0; a < TENANTS; a++) {
        for (int b = 0; b < a; b++)
            assert_string_not_equal(answer[a].text.data, answer[b].text.data);
    }
    for (int t = 0; t < TENANTS; t++)
        strbuf_release(&answer[t].text);
}

/* ------------------------------------------------------------------ ends */

static void cancelled_requests_end_and_others_go_on(void **state)
{
    struct engine_session *session = open_session(8, 0);
    struct answer alone, kept, answers[11];
    uint64_t id[11];
    int cancelled = 0;

    run_alone(simple(), &alone);
    for (int i = 0; i < 11; i++)
        id[i] = submit(session, simple(), &answers[i]);
    submit(session, simple(), &kept);
    step(session);
    step(session);
    for (int i = 0; i < 11; i++) { /* eight run, three wait */
        engine_session_cancel(session, id[i]);
        engine_session_cancel(session, id[i]);
    }
    engine_session_cancel(session, 999999);
    assert_int_equal(step(session), 1);
    for (int i = 0; i < 11; i++) {
        cancelled += answers[i].finish == ENGINE_FINISH_CANCEL;
        strbuf_release(&answers[i].text);
    }
    assert_int_equal(cancelled, 11);
    while (step(session) > 0)
        ;
    assert_string_equal(kept.text.data, alone.text.data);
    engine_session_free(session);
    strbuf_release(&kept.text);
    strbuf_release(&alone.text);
}

/* Each cancelled request is followed by a new one, from inside of the event. */
static void on_event_submit(void *context, const struct engine_event *event)
{
    struct answer *answer = event->user;

    if (event->finish == ENGINE_FINISH_CANCEL)
        submit(context, simple(), answer + 1);
    on_event(NULL, event);
}

static void an_event_may_submit(void **state)
{
    struct engine_session *session = open_session(1, 0);
    struct answer answers[6], alone; /* 0, 2, 4 are cancelled; 1, 3, 5 follow them */
    uint64_t id[6];
    int32_t active;

    run_alone(simple(), &alone);
    for (int i = 0; i < 6; i += 2)
        id[i] = submit(session, simple(), &answers[i]);
    step(session); /* one runs, two wait, the last of them at the queue's end */
    for (int i = 0; i < 6; i += 2)
        engine_session_cancel(session, id[i]);
    do {
        assert_int_equal(engine_session_step(session, on_event_submit, session, &active, NULL), 0);
    } while (active > 0);
    for (int i = 0; i < 6; i++) {
        if (i % 2 == 1)
            assert_string_equal(answers[i].text.data, alone.text.data);
        else
            assert_int_equal(answers[i].finish, ENGINE_FINISH_CANCEL);
        strbuf_release(&answers[i].text);
    }
    engine_session_free(session);
    strbuf_release(&alone.text);
}

/* Two slots: the first is waited for, the third has no turn yet. */
static void a_delta_may_be_given_when_it_is_wanted(void **state)
{
    struct engine_session *session = open_session(2, 0);
    struct engine_request later = simple(), known = simple();
    struct answer answers[4], alone;
    uint64_t id[4];
    void *who;

    known.delta = tenant[0];
    later.delta_later = true;
    run_alone(known, &alone);
    for (int i = 0; i < 4; i++)
        id[i] = submit(session, i == 1 ? simple() : later, &answers[i]);
    assert_int_equal(step(session), 4);
    assert_true(engine_session_wants(session, &who) && who == &answers[0]);
    engine_session_give(session, id[0], tenant[0]);
    assert_false(engine_session_wants(session, &who));
    while (step(session) > 2)
        assert_int_equal(answers[2].completion_tokens + answers[3].completion_tokens, 0);
    assert_string_equal(answers[0].text.data, alone.text.data);
    assert_true(engine_session_wants(session, &who) && who == &answers[2]);
    engine_session_withdraw(session, id[2]);
    assert_true(engine_session_wants(session, &who) && who == &answers[3]);
    engine_session_cancel(session, id[3]);
    assert_false(engine_session_wants(session, &who));
    assert_int_equal(step(session), 0);
    assert_int_equal(answers[2].finish, ENGINE_FINISH_NONE);
    assert_int_equal(answers[3].finish, ENGINE_FINISH_CANCEL);
    engine_session_free(session);
    for (int i = 0; i < 4; i++)
        strbuf_release(&answers[i].text);
    strbuf_release(&alone.text);
}

/* ------------------------------------------------------------------ memory */

/* Sanitizers bring their own malloc; there the case is skipped. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS_MALLOC 0
static atomic_long allocations;
#else
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define COUNTS_MALLOC 0
static atomic_long allocations;
#endif
#endif
#ifndef COUNTS_MALLOC
#define COUNTS_MALLOC 1
static atomic_long allocations;

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);

void *malloc(size_t size)
{
    allocations++;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    allocations++;
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
    allocations++;
    return __libc_realloc(memory, size);
}
#endif
#endif

static void count_tokens(void *context, const struct engine_event *event)
{
    *(int *)context += event->text_len > 0;
}

static void a_step_allocates_nothing(void **state)
{
    struct engine_session *session;
    struct answer answers[REQUESTS];
    int32_t active;
    void *volatile probe; /* else a compiler takes the pair away */
    int texts = 0;
    long before;

    if (!COUNTS_MALLOC) {
        print_message("# a sanitizer owns malloc here\n");
        skip();
    }
    session = open_session(8, 0);
    before = allocations;
    probe = malloc(16); /* does the counter count? */
    free(probe);
    assert_true(allocations > before);
    for (int i = 0; i < REQUESTS; i++)
        submit(session, mixed(i), &answers[i]);
    before = allocations;
    do {
        if (engine_session_step(session, count_tokens, &texts, &active, NULL) != 0)
            fail();
    } while (active > 0);
    assert_int_equal(allocations - before, 0);
    assert_true(texts > REQUESTS);
    engine_session_free(session);
    for (int i = 0; i < REQUESTS; i++)
        strbuf_release(&answers[i].text);
}

static void a_stop_string_ends_the_answer_before_it(void **state)
{
    struct answer whole, cut;
    struct engine_request request = simple();
    char stop[4] = {0};
    const char *stops[2] = {"this does not occur in it", stop}, *at;

    run_alone(request, &whole);
    assert_true(whole.text.len > 12);
    memcpy(stop, whole.text.data + whole.text.len / 2, 3);
    /* The three bytes may be part of a character: then take them from the start of one. */
    for (size_t i = whole.text.len / 2;
         ((unsigned char)stop[0] & 0xc0) == 0x80 || (unsigned char)stop[1] >= 0x80 ||
         (unsigned char)stop[2] >= 0x80 || (unsigned char)stop[0] >= 0x80;
         i++) {
        if (i + 3 > whole.text.len) {
            print_message("# the random model said no three ASCII characters in a row\n");
            skip();
        }
        memcpy(stop, whole.text.data + i, 3);
    }
    request.stop = stops;
    request.stop_count = 2;
    run_alone(request, &cut);
    at = strstr(whole.text.data, stop);
    assert_int_equal(cut.text.len, at - whole.text.data);
    assert_memory_equal(cut.text.data, whole.text.data, cut.text.len);
    assert_int_equal(cut.finish, ENGINE_FINISH_STOP);
    strbuf_release(&whole.text);
    strbuf_release(&cut.text);
}

static void an_answer_ends_at_max_tokens_and_at_the_context(void **state)
{
    struct engine_session *session = open_session(8, 64);
    struct engine_request request = simple();
    struct answer few, many;

    request.max_tokens = 3;
    submit(session, request, &few);
    request.max_tokens = 0;
    submit(session, request, &many);
    while (step(session) > 0)
        ;
    if (few.finish == ENGINE_FINISH_LENGTH)
        assert_int_equal(few.completion_tokens, 3);
    if (many.finish == ENGINE_FINISH_LENGTH)
        assert_int_equal(many.completion_tokens, 64 - many.prompt_tokens);
    assert_true(many.finish == ENGINE_FINISH_LENGTH || few.finish == ENGINE_FINISH_LENGTH);
    engine_session_free(session);
    strbuf_release(&few.text);
    strbuf_release(&many.text);
}

/* One limit is meant for models of many lengths: a shorter one's own holds for it. */
static void no_context_is_longer_than_the_model_s(void **state)
{
    struct engine_session *session = open_session(8, 1 << 20);
    struct engine_request request = simple();
    struct engine_message too_long = {"user", NULL};
    struct strbuf text;
    struct err err = {0};
    uint64_t id;

    strbuf_init(&text, 1 << 16);
    for (int i = 0; i < 600; i++)
        strbuf_addf(&text, "%d ", i);
    too_long.content = text.data;
    request.messages = &too_long;
    request.message_count = 1;
    assert_int_equal(engine_session_submit(session, &request, &id, &err), -1);
    assert_string_equal(err.code, "context_length_exceeded");
    assert_non_null(strstr(err.message, " 512 tokens"));
    engine_session_free(session);
    strbuf_release(&text);
}

static void bad_requests_are_refused_by_name(void **state)
{
    struct engine_session *session = open_session(8, 64);
    struct engine_message too_long[] = {
        {"user",
         "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen twenty twenty-one twenty-two and on"}};
    struct engine_request request;
    struct err err = {0};
    uint64_t id;
    int32_t active = -1;

    request = simple();
    request.messages = too_long;
    assert_int_equal(engine_session_submit(session, &request, &id, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_string_equal(err.code, "context_length_exceeded");
    assert_string_equal(err.param, "messages");

    request = simple();
    request.temperature = NAN;
    err_clear(&err);
    assert_int_equal(engine_session_submit(session, &request, &id, &err), -1);
    assert_string_equal(err.param, "temperature");

    request = simple();
    request.top_p = 1.5;
    err_clear(&err);
    assert_int_equal(engine_session_submit(session, &request, &id, &err), -1);
    assert_string_equal(err.param, "top_p");

    assert_int_equal(engine_session_step(session, on_event, NULL, &active, NULL), 0);
    assert_int_equal(active, 0);
    engine_session_free(session);
}

/* Megabytes of it would keep everybody waiting. */
static void what_can_not_fit_is_not_tokenized(void **state)
{
    static char text[1 << 20];
    const struct engine_message message = {"user", text};
    struct engine_session *session = open_session(8, 64);
    struct engine_request request = simple();
    struct err err = {0};
    long before = allocations;
    uint64_t id;

    memset(text, 'a', sizeof text - 1);
    request.messages = &message;
    assert_int_equal(engine_session_submit(session, &request, &id, &err), -1);
    assert_string_equal(err.code, "context_length_exceeded");
    assert_non_null(strstr(err.message, "resulted in at least "));
    if (COUNTS_MALLOC)
        assert_int_equal(allocations - before, 0);
    engine_session_free(session);
}

static void the_seed_decides_and_nothing_else(void **state)
{
    struct engine_request request = simple();
    struct answer a, b, c;

    request.temperature = 1.5;
    request.seed = 7;
    run_alone(request, &a);
    run_alone(request, &b);
    request.seed = 8;
    run_alone(request, &c);
    assert_string_equal(a.text.data, b.text.data);
    assert_string_not_equal(a.text.data, c.text.data);
    strbuf_release(&a.text);
    strbuf_release(&b.text);
    strbuf_release(&c.text);
}

/* A model has more ids than its tokenizer has tokens: what only pads is counted and has no text. */
static void ids_without_a_token_have_no_text(void **state)
{
    struct tiny_model model = {.context = 512, .seed = 3, .vocabulary = 4096};
    struct engine *usual = engine, *padded = NULL;
    struct engine_options options = {.device = "cpu", .threads = 2};
    struct engine_request request = simple();
    struct answer answer;
    struct err err = {0};
    char source[128], base[128];

    snprintf(source, sizeof(source), "%s/padded", folder);
    snprintf(base, sizeof(base), "%s/padded.safetensors", folder);
    if (tiny_model_write(source, &model, &err) != 0 ||
        engine_import(source, base, NULL, &err) != 0 ||
        engine_open(&padded, base, &options, &err) != 0)
        fail_msg("%s", err.message);
    request.temperature = 100;
    request.max_tokens = 200;
    engine = padded;
    run_alone(request, &answer);
    engine = usual;
    assert_int_equal(answer.finish, ENGINE_FINISH_LENGTH);
    assert_int_equal(answer.completion_tokens, 200);
    assert_true(utf8_valid(answer.text.data, answer.text.len));
    assert_true(answer.text.len > 0 && answer.text.len < 200); /* an eighth of them are tokens */
    strbuf_release(&answer.text);
    engine_free(padded);
}

static void a_session_may_be_freed_in_the_middle(void **state)
{
    struct engine_session *session = open_session(8, 0);
    struct answer answers[12];

    for (int i = 0; i < 12; i++)
        submit(session, mixed(i), &answers[i]);
    step(session);
    step(session);
    engine_session_free(session);
    for (int i = 0; i < 12; i++)
        strbuf_release(&answers[i].text);
}

/* ------------------------------------------------------------------ */

static int setup(void **state)
{
    struct tiny_model model = {.context = 512, .seed = 3};
    struct engine_options options = {.device = "cpu", .threads = 2};
    struct err err = {0};
    char source[128], base[128];

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(source, sizeof(source), "%s/hf", folder);
    snprintf(base, sizeof(base), "%s/base.safetensors", folder);
    if (tiny_model_write(source, &model, &err) != 0 ||
        engine_import(source, base, NULL, &err) != 0 ||
        engine_open(&engine, base, &options, &err) != 0)
        goto fail;
    for (int t = 0; t < TENANTS - 1; t++) {
        if (make_delta(t, &err) != 0)
            goto fail;
    }
    return 0;
fail:
    fprintf(stderr, "%s\n", err.message);
    return -1;
}

static int teardown(void **state)
{
    for (int t = 0; t < TENANTS; t++)
        engine_delta_free(tenant[t]);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_others_run_never_changes_an_answer),
        cmocka_unit_test(tenants_answer_differently),
        cmocka_unit_test(cancelled_requests_end_and_others_go_on),
        cmocka_unit_test(an_event_may_submit),
        cmocka_unit_test(a_delta_may_be_given_when_it_is_wanted),
        cmocka_unit_test(a_step_allocates_nothing),
        cmocka_unit_test(a_stop_string_ends_the_answer_before_it),
        cmocka_unit_test(an_answer_ends_at_max_tokens_and_at_the_context),
        cmocka_unit_test(no_context_is_longer_than_the_model_s),
        cmocka_unit_test(bad_requests_are_refused_by_name),
        cmocka_unit_test(what_can_not_fit_is_not_tokenized),
        cmocka_unit_test(the_seed_decides_and_nothing_else),
        cmocka_unit_test(ids_without_a_token_have_no_text),
        cmocka_unit_test(a_session_may_be_freed_in_the_middle),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
