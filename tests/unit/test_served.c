/* What is served from compressed differences is what the expanded models say, of every codec there
 * is, on the CPU and on the test shim of a CUDA device, alone and in a mixed batch; and random
 * mixes of tenants, codecs and lengths give every request the answer that it gets alone.
 *
 * usage: test_served [MIXES]    60; make test-mixes runs 300 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/adapter.h"
#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/rng.h"
#include "engine/base/strbuf.h"
#include "engine/codec/codec.h"
#include "engine/cuda/shim/shim_control.h"
#include "engine/engine.h"
#include "engine/engine_parts.h"
#include "tests/unit/check.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/format_reader.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

#define MAX_TENANTS 16
#define V 512
#define MAX_ROWS 600 /* of a batch */

enum { CPU, SHIM, DEVICES };
static const char *const device_name[DEVICES] = {"cpu", "shim:0"};

static char folder[] = "/tmp/graft-served-XXXXXX";
static char base_path[128];
static struct engine *engine[DEVICES];
static int mixes = 60;

/* Each codec, where it can be in two sizes, and once with embeddings. */
static struct tenant {
    char codec[DELTA_FIXTURE_NAME], path[160];
    struct engine_delta *delta[DEVICES];
    struct model_weights expanded; /* on the CPU */
} tenant[MAX_TENANTS];
static int tenants;

/* ------------------------------------------------------------------ tenants */

static void add_tenant(const char *codec, int64_t bytes, bool embeddings)
{
    struct tenant *t = &tenant[tenants];
    const struct noisy_delta noise = {
        .codec = codec, .bytes = bytes, .seed = 1000 + (uint64_t)tenants, .embeddings = embeddings};

    assert_true(tenants < MAX_TENANTS);
    snprintf(t->codec, sizeof t->codec, "%s", codec);
    snprintf(t->path, sizeof t->path, "%s/delta%d.safetensors", folder, tenants++);
    CHECK(noisy_delta_write(engine[CPU], &noise, t->path, &err));
    for (int d = 0; d < DEVICES; d++)
        CHECK(engine_delta_open(&t->delta[d], engine[d], t->path, &err));
    expanded_weights_open(&t->expanded, engine[CPU], t->path);
}

static void open_tenants(void)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        add_tenant(codec, 0, false);
        if (delta_fixture_sizes(codec))
            add_tenant(codec, engine_info(engine[CPU])->bytes_16bit / 16, false);
        add_tenant(codec, 0, true);
    }
}

/* ------------------------------------------------------------------ logits */

struct document {
    int tenant; /* -1: the base */
    int32_t length;
    int32_t token[48];
};

static struct document document_of(uint64_t stream)
{
    struct document d = {.tenant = (int)(rng_at(1, stream, 0) % (uint64_t)(tenants + 1)) - 1,
                         .length = 1 + (int32_t)(rng_at(1, stream, 1) % 40)};

    for (int32_t i = 0; i < d.length; i++)
        d.token[i] = (int32_t)(rng_at(2, stream, (uint64_t)i) % V);
    return d;
}

/* Logits of all rows of some documents in one batch: [rows, V]. Weights: instead of the base's. */
static void decode(int device, const struct document *doc, int32_t docs,
                   const struct model_weights *weights, float *logits)
{
    static int32_t token[MAX_ROWS], position[MAX_ROWS], row[MAX_ROWS];
    int32_t cu_seqlens[64] = {0};
    const struct adapter *adapter[64];
    struct model_decoder *decoder;
    struct batch batch = {.token = token, .position = position, .docs = docs};

    for (int32_t d = 0; d < docs; d++) {
        const struct engine_delta *delta =
            doc[d].tenant < 0 || weights ? NULL : tenant[doc[d].tenant].delta[device];

        adapter[d] = delta ? engine_delta_adapter(delta) : NULL;
        for (int32_t i = 0; i < doc[d].length; i++) {
            assert_true(batch.rows < MAX_ROWS);
            token[batch.rows] = doc[d].token[i];
            row[batch.rows] = batch.rows;
            position[batch.rows++] = i;
        }
        cu_seqlens[d + 1] = batch.rows;
    }
    batch.cu_seqlens = cu_seqlens;
    batch.segments = (struct row_segments){docs, cu_seqlens, adapter};
    CHECK(model_decoder_open(&decoder, engine[device]->model, MAX_ROWS, MAX_ROWS, &err));
    CHECK(model_decode(decoder,
                       &(struct model_decode_args){.weights = weights,
                                                   .batch = &batch,
                                                   .logit_row = row,
                                                   .logit_count = batch.rows,
                                                   .logits = logits},
                       &err));
    model_decoder_free(decoder);
}

static double relative(const float *got, const float *want, int32_t rows)
{
    double difference = 0, size = 0;

    for (int64_t i = 0; i < (int64_t)rows * V; i++) {
        difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        size += (double)want[i] * want[i];
    }
    return sqrt(difference / size);
}

static void expect_near(const struct document *d, const char *how, const float *got,
                        const float *want)
{
    double error = relative(got, want, d->length);

    if (!(error <= 1e-4))
        fail_msg("%s, tenant %d (%s): logits are off by %.3g", how, d->tenant,
                 d->tenant < 0 ? "base" : tenant[d->tenant].codec, error);
}

static void served_equals_expanded(int device)
{
    static float alone[MAX_ROWS * V], want[MAX_ROWS * V], base[MAX_ROWS * V];

    for (int t = -1; t < tenants; t++)
        for (uint64_t k = 0; k < 3; k++) {
            struct document d = document_of(k);

            d.tenant = t;
            shim_seed(k);
            decode(device, &d, 1, NULL, alone);
            decode(CPU, &d, 1, t < 0 ? NULL : &tenant[t].expanded, want);
            expect_near(&d, "alone", alone, want);
            if (t < 0)
                continue;
            d.tenant = -1; /* and what the delta changes is more than what is let through */
            decode(CPU, &d, 1, NULL, base);
            assert_true(relative(base, want, d.length) > 1e-2);
        }
}

static void test_alone_on_the_cpu(void **state)
{
    served_equals_expanded(CPU);
}

static void test_alone_on_cuda(void **state)
{
    served_equals_expanded(SHIM);
}

static void mixed_equals_expanded(int device, uint64_t batches, int documents)
{
    static float mixed[MAX_ROWS * V], alone[48 * V], want[48 * V];

    for (uint64_t batch = 0; batch < batches; batch++) {
        struct document doc[24];
        int64_t row = 0;

        for (int i = 0; i < documents; i++)
            doc[i] = document_of(100 + 100 * batch + (uint64_t)i);
        shim_seed(batch);
        decode(device, doc, documents, NULL, mixed);
        for (int i = 0; i < documents; i++) {
            const struct document *d = &doc[i];

            decode(CPU, d, 1, d->tenant < 0 ? NULL : &tenant[d->tenant].expanded, want);
            expect_near(d, "mixed", mixed + row * V, want);
            decode(device, d, 1, NULL, alone);
            assert_memory_equal(alone, mixed + row * V, (size_t)d->length * V * sizeof *alone);
            row += d->length;
        }
    }
}

static void test_mixed_on_the_cpu(void **state)
{
    mixed_equals_expanded(CPU, 4, 24);
}

static void test_mixed_on_cuda(void **state)
{
    mixed_equals_expanded(SHIM, 2, 9);
}

/* ------------------------------------------------------------------ by another program */

/* What the reader of delta-format.md makes of a file, added to the base. */
static void read_by_python(const char *path, struct model_weights *weights)
{
    char script[160], out[160], command[800], name[96], *values;
    const float *difference[64] = {NULL};
    struct model *model = engine[CPU]->model;
    struct model_weights *base = (struct model_weights *)(uintptr_t)model_base_weights(model);
    long long elements;
    size_t len, at = 0;
    FILE *reader;

    snprintf(script, sizeof script, "%s/reader.py", folder);
    snprintf(out, sizeof out, "%s/values", folder);
    format_reader_write(script);
    snprintf(command, sizeof command, "python3 %s %s %s %s >%s/names", script, path, base_path, out,
             folder);
    assert_int_equal(system(command), 0);
    CHECK(file_read_all(out, 1 << 24, &values, &len, &err));
    snprintf(command, sizeof command, "%s/names", folder);
    reader = fopen(command, "r");
    assert_non_null(reader);
    assert_true(model_tensor_count(model) <= 64);
    while (fscanf(reader, "%95s %lld %*s", name, &elements) == 2) {
        char ours[MODEL_NAME_MAX] = "";

        for (int32_t i = 0; i < model_tensor_count(model); i++) {
            const struct tensor *t = model_tensor(model, base, i, ours);

            if (strcmp(ours, name) == 0) {
                difference[i] = (const float *)(void *)(values + at);
                assert_int_equal(tensor_elements(t), elements);
            }
        }
        at += (size_t)elements * sizeof(float);
        assert_true(at <= len);
    }
    fclose(reader);
    assert_int_equal(at, len);
    expanded_weights_add(weights, engine[CPU], difference);
    free(values);
}

static void test_the_readers_logits(void **state)
{
    static float got[48 * V], want[48 * V];

    format_reader_need_python();
    for (int t = 0; t < tenants; t++) {
        struct document d = document_of(7);
        struct model_weights weights;

        d.tenant = t;
        read_by_python(tenant[t].path, &weights);
        decode(CPU, &d, 1, &weights, want);
        decode(CPU, &d, 1, NULL, got);
        expect_near(&d, "by the reader", got, want);
        expanded_weights_free(&weights, engine[CPU]);
    }
}

/* ------------------------------------------------------------------ random mixes */

#define REQUESTS 32
#define SHIM_REQUESTS 11 /* its threads take turns */

struct answer {
    struct strbuf text;
    enum engine_finish finish;
    int32_t completion_tokens;
};

static void on_event(void *context, const struct engine_event *event)
{
    struct answer *answer = event->user;

    strbuf_add(&answer->text, event->text, event->text_len);
    answer->finish = event->finish;
    answer->completion_tokens = event->completion_tokens;
}

/* Request i of all that are mixed: its tenant, length, sampler and seed are a function of i. */
static void submit(struct engine_session *session, int device, uint64_t i, struct answer *answer)
{
    char text[201];
    size_t len = rng_at(3, i, 0) % (device == CPU ? sizeof text : 60);
    struct engine_message message = {"user", text};
    struct engine_request request = {
        .messages = &message,
        .message_count = 1,
        .delta = i % (uint64_t)(tenants + 1) ? tenant[i % (uint64_t)(tenants + 1) - 1].delta[device]
                                             : NULL,
        .temperature = i % 3 == 0 ? 0 : 0.9,
        .top_p = i % 2 == 0 ? 1 : 0.8,
        .seed = 31 * i,
        .max_tokens = 1 + (int32_t)(rng_at(3, i, 1) % (device == CPU ? 24 : 6)),
        .user = answer};
    uint64_t id;

    for (size_t k = 0; k < len; k++)
        text[k] = "abc defg hi jk"[rng_at(4, i, k) % 14];
    text[len] = '\0';
    memset(answer, 0, sizeof *answer);
    strbuf_init(&answer->text, 1 << 16);
    CHECK(engine_session_submit(session, &request, &id, &err));
}

static struct engine_session *open_session(int device)
{
    struct engine_session_options options = {8, 0};
    struct engine_session *session;

    CHECK(engine_session_open(&session, engine[device], &options, &err));
    return session;
}

static int32_t step(struct engine_session *session)
{
    int32_t active;

    CHECK(engine_session_step(session, on_event, NULL, &active, &err));
    return active;
}

/* Two to twelve of them, at random times: more than run at once have to wait. */
static void run_mix(int device, uint64_t requests, uint64_t mix, const struct answer *alone)
{
    struct engine_session *session = open_session(device);
    int count = 2 + (int)(rng_at(5, mix, 0) % 11);
    struct answer answer[12];
    uint64_t which[12];

    shim_seed(mix);
    for (int k = 0; k < count; k++) {
        which[k] = rng_at(6, mix, (uint64_t)k) % requests;
        submit(session, device, which[k], &answer[k]);
        for (uint64_t steps = rng_at(7, mix, (uint64_t)k) % 4; steps > 1; steps--)
            step(session);
    }
    while (step(session) > 0)
        ;
    for (int k = 0; k < count; k++) {
        const struct answer *want = &alone[which[k]];

        if (answer[k].text.len != want->text.len ||
            memcmp(answer[k].text.data, want->text.data, want->text.len) != 0 ||
            answer[k].finish != want->finish ||
            answer[k].completion_tokens != want->completion_tokens)
            fail_msg("mix %d: request %d says \"%s\", alone \"%s\"", (int)mix, (int)which[k],
                     answer[k].text.data, want->text.data);
        strbuf_release(&answer[k].text);
    }
    engine_session_free(session);
}

static void run_mixes(int device, int requests, int count)
{
    struct answer alone[REQUESTS];
    int different = 0;

    for (int i = 0; i < requests; i++) {
        struct engine_session *session = open_session(device);

        submit(session, device, (uint64_t)i, &alone[i]);
        while (step(session) > 0)
            ;
        engine_session_free(session);
        different += i > 0 && strcmp(alone[i].text.data, alone[i - 1].text.data) != 0;
    }
    assert_true(different > requests / 2);
    for (int mix = 0; mix < count; mix++)
        run_mix(device, (uint64_t)requests, (uint64_t)mix, alone);
    print_message("# %d mixes of %d tenants on %s\n", count, tenants, device_name[device]);
    for (int i = 0; i < requests; i++)
        strbuf_release(&alone[i].text);
}

static void test_mixes_on_the_cpu(void **state)
{
    run_mixes(CPU, REQUESTS, mixes);
}

static void test_mixes_on_cuda(void **state)
{
    run_mixes(SHIM, SHIM_REQUESTS, mixes / 20);
}

/* ------------------------------------------------------------------ */

static int setup(void **state)
{
    /* 160: two of Delta-CoMe's groups, the second not full */
    struct tiny_model model = {.context = 512, .seed = 3, .intermediate = 160};
    char source[128];

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(source, sizeof source, "%s/hf", folder);
    snprintf(base_path, sizeof base_path, "%s/base.safetensors", folder);
    CHECK(tiny_model_write(source, &model, &err));
    CHECK(engine_import(source, base_path, NULL, &err));
    for (int d = 0; d < DEVICES; d++) {
        struct engine_options options = {
            .device = device_name[d], .threads = 2, .precision = ENGINE_PRECISION_F32};

        CHECK(engine_open(&engine[d], base_path, &options, &err));
    }
    open_tenants();
    return 0;
}

static int teardown(void **state)
{
    for (int t = 0; t < tenants; t++) {
        expanded_weights_free(&tenant[t].expanded, engine[CPU]);
        for (int d = 0; d < DEVICES; d++)
            engine_delta_free(tenant[t].delta[d]);
    }
    for (int d = 0; d < DEVICES; d++)
        engine_free(engine[d]);
    return shim_memory_used() != 0 ? -1 : file_remove_tree(folder, NULL);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alone_on_the_cpu),   cmocka_unit_test(test_alone_on_cuda),
        cmocka_unit_test(test_mixed_on_the_cpu),   cmocka_unit_test(test_mixed_on_cuda),
        cmocka_unit_test(test_the_readers_logits), cmocka_unit_test(test_mixes_on_the_cpu),
        cmocka_unit_test(test_mixes_on_cuda),
    };

    if (argc > 1)
        mixes = atoi(argv[1]);
    return cmocka_run_group_tests(tests, setup, teardown);
}
