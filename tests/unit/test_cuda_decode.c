/* Whole models on the CUDA backend against the CPU's: greedy answers of several tenants in one
 * batch, and that a sequence gets the same bits in it as alone. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "tests/unit/reference_model.h"
#include "tests/unit/shim_fixture.h"

static void must(int rc, const struct err *err)
{
    if (rc)
        fail_msg("%s", err->message);
}

static void open_backend(struct backend *b, bool cpu, enum dtype precision)
{
    struct err err = {0};

    if (cpu)
        must(backend_open(b, &(struct backend_options){.precision = precision}, &err), &err);
    else
        must(cuda_backend_open(b, &(struct cuda_options){.precision = precision}, &err), &err);
}

#define SEQUENCES 5
#define TENANTS 3
#define PROMPT 17 /* of the longest */
#define ANSWER 12
#define LEN (PROMPT + ANSWER)
#define V 70

struct server {
    struct backend backend;
    struct model *model;
    struct model_decoder *decoder;
    struct kv_cache cache;
    struct adapter tenant[TENANTS];
    struct packed_delta *packed[TENANTS * 16];
    int32_t deltas;
};

#define PLANES 40
#define MOST_WIDTH 256 /* of a matrix */

/* Signs, every third time planes. */
static void give_delta(struct server *s, struct adapter_linear *l, const struct tensor *w)
{
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1], words = (cols + 31) / 32;
    int32_t all = (rows + PLANES) * (words + 2);
    uint32_t *bits = malloc((size_t)all * sizeof *bits);
    float scale = 0.05f, plane_scale[PLANES], one[MOST_WIDTH];
    int32_t vector[PLANES];
    struct delta_tensor delta = {
        .kind = s->deltas % 3 == 2 ? DELTA_PLANES : DELTA_SIGN,
        .rows = rows,
        .cols = cols,
        .bits = bits,
        .scale = &scale,
        .scale_count = 1,
        .planes = {PLANES, PLANES / 2, vector, bits, bits + PLANES * words, plane_scale,
                   plane_scale, one, one},
    };
    struct err err = {0};

    assert_non_null(bits);
    assert_true(rows <= MOST_WIDTH && cols <= MOST_WIDTH);
    for (int32_t i = 0; i < all; i++)
        bits[i] = (uint32_t)rng_at(4, (uint64_t)s->deltas, (uint64_t)i);
    for (int32_t i = 0; i < PLANES; i++) {
        vector[i] = i / 2;
        plane_scale[i] = 0.075f;
    }
    for (int32_t i = 0; i < MOST_WIDTH; i++)
        one[i] = 1;
    must(s->backend.ops->delta_pack(&s->backend, &delta, &s->packed[s->deltas], &err), &err);
    l->delta = s->packed[s->deltas++];
    free(bits);
}

static void open_server(struct server *s, const struct memory_model *memory, bool cpu,
                        enum dtype precision)
{
    struct model_source source = memory_model_source(memory);
    const struct model_weights *w;
    struct err err = {0};

    memset(s, 0, sizeof *s);
    open_backend(&s->backend, cpu, precision);
    must(model_open_source(&s->model, &s->backend, &source, &err), &err);
    must(model_decoder_open(&s->decoder, s->model, SEQUENCES * PROMPT, SEQUENCES, &err), &err);
    must(model_kv_cache_open(&s->cache, s->model, SEQUENCES, LEN, &err), &err);
    w = model_base_weights(s->model);
    for (int32_t t = 0; t < TENANTS; t++) {
        s->tenant[t].layer = calloc((size_t)memory->config.layers, sizeof *s->tenant[t].layer);
        assert_non_null(s->tenant[t].layer);
        for (int32_t l = 0; l < memory->config.layers; l++) {
            struct adapter_layer *a = &s->tenant[t].layer[l];

            give_delta(s, &a->q, &w->layer[l].q.w);
            give_delta(s, &a->k, &w->layer[l].k.w);
            give_delta(s, &a->v, &w->layer[l].v.w);
            give_delta(s, &a->o, &w->layer[l].o.w);
            give_delta(s, &a->gate, &w->layer[l].gate.w);
            give_delta(s, &a->up, &w->layer[l].up.w);
            give_delta(s, &a->down, &w->layer[l].down.w);
        }
    }
}

static void close_server(struct server *s)
{
    for (int32_t i = 0; i < s->deltas; i++)
        s->backend.ops->delta_free(&s->backend, s->packed[i]);
    for (int32_t t = 0; t < TENANTS; t++)
        free(s->tenant[t].layer);
    model_kv_cache_close(&s->cache, s->model);
    model_decoder_free(s->decoder);
    model_free(s->model);
    backend_close(&s->backend);
}

/* Sequence s: a prompt of PROMPT - 3s tokens, then what `written` says; its tenant is s - 1, of
 * sequence 0 and the last the base. */
static int32_t prompt_of(int32_t s)
{
    return PROMPT - 3 * s;
}

/* One step of sequences [from, to): the whole prompt, or the token written last. */
static void decode_step(struct server *s, int32_t from, int32_t to, int32_t step,
                        int32_t written[SEQUENCES][ANSWER], float *logits)
{
    int32_t token[SEQUENCES * PROMPT], position[SEQUENCES * PROMPT];
    int32_t cu_seqlens[SEQUENCES + 1] = {0}, logit_row[SEQUENCES];
    const struct adapter *adapter[SEQUENCES];
    struct batch_slot slot[SEQUENCES];
    struct batch batch = {.token = token,
                          .position = position,
                          .docs = to - from,
                          .cu_seqlens = cu_seqlens,
                          .slot = slot};
    struct err err = {0};

    for (int32_t i = 0; i < to - from; i++) {
        int32_t sequence = from + i, begin = step == 0 ? 0 : prompt_of(sequence) + step - 1;
        int32_t end = prompt_of(sequence) + step;

        for (int32_t p = begin; p < end; p++) {
            token[batch.rows] = p < prompt_of(sequence)
                                    ? (int32_t)(rng_at(6, (uint64_t)sequence, (uint64_t)p) % V)
                                    : written[sequence][p - prompt_of(sequence)];
            position[batch.rows++] = p;
        }
        cu_seqlens[i + 1] = batch.rows;
        logit_row[i] = batch.rows - 1;
        slot[i] = (struct batch_slot){sequence, begin};
        adapter[i] = sequence == 0 || sequence > TENANTS ? NULL : &s->tenant[sequence - 1];
    }
    batch.segments = (struct row_segments){to - from, cu_seqlens, adapter};
    must(model_decode(s->decoder,
                      &(struct model_decode_args){.batch = &batch,
                                                  .cache = &s->cache,
                                                  .logit_row = logit_row,
                                                  .logit_count = to - from,
                                                  .logits = logits},
                      &err),
         &err);
}

static int32_t best_of(const float *logits, int32_t *second)
{
    int32_t best = 0;

    for (int32_t i = 1; i < V; i++)
        best = logits[i] > logits[best] ? i : best;
    *second = best == 0;
    for (int32_t i = 0; i < V; i++)
        *second = i != best && logits[i] > logits[*second] ? i : *second;
    return best;
}

static double relative(const float *got, const float *want)
{
    double difference = 0, size = 0;

    for (int32_t i = 0; i < V; i++) {
        difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        size += (double)want[i] * want[i];
    }
    return sqrt(difference / size);
}

/* Both sides read what the CPU wrote. */
static void decode_beside(enum dtype precision, double tolerance)
{
    struct model_config config = memory_model_config(2, false, true, true);
    struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 8);
    static float want[SEQUENCES][V], got[SEQUENCES][V], kept[ANSWER][SEQUENCES][V], alone[V];
    int32_t written[SEQUENCES][ANSWER];
    int64_t graphs = shim_graphs();
    struct server cpu, cuda;

    open_server(&cpu, memory, true, precision);
    open_server(&cuda, memory, false, precision);
    for (int32_t step = 0; step < ANSWER; step++) {
        shim_seed((uint64_t)step);
        decode_step(&cpu, 0, SEQUENCES, step, written, want[0]);
        decode_step(&cuda, 0, SEQUENCES, step, written, got[0]);
        for (int32_t s = 0; s < SEQUENCES; s++) {
            int32_t second, unused, best = best_of(want[s], &second);

            if (!(relative(got[s], want[s]) <= tolerance))
                fail_msg("sequence %d, step %d: logits are off by %.3g", s, step,
                         relative(got[s], want[s]));
            if (precision == DTYPE_F32 && want[s][best] - want[s][second] > 1e-3f)
                assert_int_equal(best_of(got[s], &unused), best);
            written[s][step] = best;
        }
        memcpy(kept[step], got, sizeof got);
    }
    /* Alone, each sequence gets the same bits. */
    for (int32_t s = 0; s < SEQUENCES; s++)
        for (int32_t step = 0; step < ANSWER; step++) {
            decode_step(&cuda, s, s + 1, step, written, alone);
            assert_memory_equal(alone, kept[step][s], sizeof alone);
        }
    /* Steps of one shape are one graph: all but the prompts' and the first two of each shape. */
    if (graphs >= 0) {
        graphs = shim_graphs() - graphs;
        assert_true(graphs > SEQUENCES * (ANSWER - 4) && graphs < (SEQUENCES + 1) * ANSWER);
    }
    close_server(&cuda);
    close_server(&cpu);
    memory_model_free(memory);
}

static void test_decoding_f32(void **state)
{
    decode_beside(DTYPE_F32, 1e-4);
}

static void test_decoding_bf16(void **state)
{
    decode_beside(DTYPE_BF16, 2e-2);
}

static int nothing_is_left(void **state)
{
    return shim_memory_used() != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decoding_f32),
        cmocka_unit_test(test_decoding_bf16),
    };

    return cmocka_run_group_tests(tests, NULL, nothing_is_left);
}
