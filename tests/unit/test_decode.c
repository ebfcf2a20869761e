/* The serving pass: right against the reference, and blind to batch, chunks, threads and kernels.
 */
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
#include "engine/cpu/cpu_backend.h"
#include "tests/unit/reference_model.h"

#define V 70
#define LEN 150 /* crosses two blocks of keys */
#define SLOTS 6

struct fixture {
    struct memory_model *memory;
    struct backend backend;
    struct model *model;
    struct model_decoder *decoder;
    struct kv_cache cache;
};

static struct model_config config_of(void)
{
    struct model_config c = memory_model_config(2, true, true, true);

    c.context = 2 * LEN;
    return c;
}

static enum dtype precision = DTYPE_F32; /* of backends that are opened from here on */

static void open_fixture(struct fixture *f, enum dtype dtype, int threads,
                         const struct cpu_kernels *kernels)
{
    struct model_config config = config_of();
    struct err err = {0};

    f->memory = memory_model_new(&config, dtype, 21);
    struct model_source source = memory_model_source(f->memory);
    assert_int_equal(cpu_backend_open(&f->backend, threads, kernels, precision, &err), 0);
    assert_int_equal(model_open_source(&f->model, &f->backend, &source, &err), 0);
    assert_int_equal(model_decoder_open(&f->decoder, f->model, 2 * LEN, LEN, &err), 0);
    assert_int_equal(model_kv_cache_open(&f->cache, f->model, SLOTS, 2 * LEN, &err), 0);
}

static void close_fixture(struct fixture *f)
{
    model_kv_cache_close(&f->cache, f->model);
    model_decoder_free(f->decoder);
    model_free(f->model);
    backend_close(&f->backend);
    memory_model_free(f->memory);
}

static int32_t token_of(int32_t sequence, int32_t position)
{
    return (int32_t)(rng_at(9, (uint64_t)sequence, (uint64_t)position) % V);
}

/* A piece of one sequence, for one step. */
struct piece {
    int32_t sequence, from, to;
    const struct adapter *adapter;
};

/* Runs pieces of sequences together; sequence s lies in slot s. logits: of each piece's last row.
 */
static void run_pieces(struct fixture *f, const struct piece *piece, int32_t count, float *logits)
{
    static int32_t token[2 * LEN], position[2 * LEN];
    int32_t cu_seqlens[SLOTS + 1] = {0}, logit_row[SLOTS];
    const struct adapter *adapter[SLOTS];
    struct batch_slot slot[SLOTS];
    struct batch batch = {.token = token,
                          .position = position,
                          .docs = count,
                          .cu_seqlens = cu_seqlens,
                          .slot = slot};
    struct err err = {0};

    for (int32_t i = 0; i < count; i++) {
        for (int32_t p = piece[i].from; p < piece[i].to; p++) {
            token[batch.rows] = token_of(piece[i].sequence, p);
            position[batch.rows++] = p;
        }
        cu_seqlens[i + 1] = batch.rows;
        logit_row[i] = batch.rows - 1;
        adapter[i] = piece[i].adapter;
        slot[i] = (struct batch_slot){piece[i].sequence, piece[i].from};
    }
    batch.segments = (struct row_segments){count, cu_seqlens, adapter};
    assert_int_equal(model_decode(f->decoder,
                                  &(struct model_decode_args){.batch = &batch,
                                                              .cache = &f->cache,
                                                              .logit_row = logit_row,
                                                              .logit_count = count,
                                                              .logits = logits},
                                  &err),
                     0);
}

/* The whole sequence in one piece, alone. */
static void run_alone(struct fixture *f, int32_t sequence, const struct adapter *adapter,
                      float *logits)
{
    run_pieces(f, &(struct piece){sequence, 0, LEN, adapter}, 1, logits);
}

static void test_logits_are_the_references(void **state)
{
    struct fixture f;
    float logits[V];
    static double x[LEN * 40], want[LEN * V];
    int32_t token[LEN], position[LEN], cu_seqlens[2] = {0, LEN};
    struct batch batch = {
        .rows = LEN, .token = token, .position = position, .docs = 1, .cu_seqlens = cu_seqlens};
    double difference = 0, size = 0;

    open_fixture(&f, DTYPE_F32, 2, NULL);
    run_alone(&f, 0, NULL, logits);
    for (int32_t i = 0; i < LEN; i++) {
        token[i] = token_of(0, i);
        position[i] = i;
    }
    struct reference *r = reference_new(f.memory);
    reference_forward(r, &batch, x);
    reference_head(r, LEN, x, want);
    for (int32_t i = 0; i < V; i++) {
        double w = want[(LEN - 1) * V + i];

        difference += ((double)logits[i] - w) * ((double)logits[i] - w);
        size += w * w;
    }
    assert_true(sqrt(difference / size) < 5e-6);
    reference_free(r);
    close_fixture(&f);
}

static void test_chunks_and_company_change_nothing(void **state)
{
    struct fixture f;
    float alone[3][V], mixed[3 * V], last[V];

    open_fixture(&f, DTYPE_F32, 2, NULL);
    for (int32_t s = 0; s < 3; s++)
        run_alone(&f, s, NULL, alone[s]);
    model_kv_cache_close(&f.cache, f.model);
    struct err err = {0};
    assert_int_equal(model_kv_cache_open(&f.cache, f.model, SLOTS, 2 * LEN, &err), 0);

    /* Sequence 1 in odd pieces and at last token by token, the others beside it. */
    run_pieces(&f, (struct piece[]){{1, 0, 17, NULL}}, 1, mixed);
    run_pieces(&f, (struct piece[]){{0, 0, 64, NULL}, {1, 17, 81, NULL}}, 2, mixed);
    run_pieces(&f, (struct piece[]){{2, 0, 90, NULL}, {1, 81, 148, NULL}, {0, 64, 65, NULL}}, 3,
               mixed);
    run_pieces(&f, (struct piece[]){{1, 148, 149, NULL}, {0, 65, LEN, NULL}}, 2, mixed);
    assert_memory_equal(mixed + V, alone[0], sizeof alone[0]);
    run_pieces(&f, (struct piece[]){{2, 90, LEN, NULL}, {1, 149, LEN, NULL}}, 2, mixed);
    assert_memory_equal(mixed, alone[2], sizeof alone[2]);
    assert_memory_equal(mixed + V, alone[1], sizeof alone[1]);
    run_alone(&f, 1, NULL, last);
    assert_memory_equal(last, alone[1], sizeof last);
    close_fixture(&f);
}

static void test_threads_and_kernels_change_nothing(void **state)
{
    float want[V], got[V];
    struct fixture f;

    open_fixture(&f, DTYPE_F32, 1, &cpu_kernels_plain);
    run_alone(&f, 4, NULL, want);
    close_fixture(&f);
    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++)
        for (int threads = 1; threads <= 3; threads++) {
            open_fixture(&f, DTYPE_F32, threads, *k);
            run_alone(&f, 4, NULL, got);
            assert_memory_equal(got, want, sizeof want);
            close_fixture(&f);
        }
}

static void test_half_weights_are_read_as_they_are(void **state)
{
    const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F16};

    for (int i = 0; i < 2; i++) {
        struct fixture f, wide;
        float half[V], full[V];

        open_fixture(&f, dtypes[i], 2, NULL);
        open_fixture(&wide, DTYPE_F32, 2, NULL);
        for (int32_t t = 0; t < wide.memory->count; t++) /* the same values, in F32 */
            tensor_to_f32(&f.memory->tensor[t], 0, tensor_elements(&f.memory->tensor[t]),
                          wide.memory->tensor[t].data);
        struct err err = {0};
        struct model_source source = memory_model_source(wide.memory);
        model_decoder_free(wide.decoder);
        model_kv_cache_close(&wide.cache, wide.model);
        model_free(wide.model);
        assert_int_equal(model_open_source(&wide.model, &wide.backend, &source, &err), 0);
        assert_int_equal(model_decoder_open(&wide.decoder, wide.model, 2 * LEN, LEN, &err), 0);
        assert_int_equal(model_kv_cache_open(&wide.cache, wide.model, SLOTS, 2 * LEN, &err), 0);
        run_alone(&f, 0, NULL, half);
        run_alone(&wide, 0, NULL, full);
        assert_memory_equal(half, full, sizeof half);
        close_fixture(&f);
        close_fixture(&wide);
    }
}

/* ------------------------------------------------------------------ adapters */

/* A fine-tune of every part of the model, as an adapter and as changed weights. */
struct tuned {
    struct adapter adapter;
    struct adapter_layer layer[2];
    struct packed_delta *packed[32];
    int32_t packed_count;
    void *memory[64];
    int32_t memory_count;
    struct memory_model *merged; /* base + difference */
};

static float *keep(struct tuned *t, size_t floats)
{
    float *p = calloc(floats, sizeof *p);

    assert_non_null(p);
    t->memory[t->memory_count++] = p;
    return p;
}

static struct tensor *merged_tensor(struct tuned *t, int32_t layer, const char *stem)
{
    char name[MODEL_NAME_MAX];

    if (layer < 0)
        snprintf(name, sizeof name, "%s", stem);
    else
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, stem);
    for (int32_t i = 0; i < t->merged->count; i++)
        if (strcmp(t->merged->name[i], name) == 0)
            return &t->merged->tensor[i];
    fail_msg("no tensor %s", name);
    return NULL;
}

static struct packed_delta *add_signs(struct fixture *f, struct tuned *t, struct tensor *w,
                                      uint64_t seed, bool per_row)
{
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1], words = (cols + 31) / 32;
    uint32_t *bits = (uint32_t *)keep(t, (size_t)(rows * words));
    float *scale = keep(t, (size_t)rows), *value = w->data;
    struct err err = {0};

    for (int32_t r = 0; r < rows; r++) {
        scale[r] = 0.02f + (per_row ? 0.001f * (float)r : 0);
        for (int32_t c = 0; c < cols; c++) {
            bool plus = rng_at(seed, (uint64_t)r, (uint64_t)c) & 1;

            bits[r * words + c / 32] |= (uint32_t)plus << c % 32;
            value[r * cols + c] += plus ? scale[r] : -scale[r];
        }
    }
    assert_int_equal(
        f->backend.ops->delta_pack(&f->backend,
                                   &(struct delta_tensor){.kind = DELTA_SIGN,
                                                          .rows = rows,
                                                          .cols = cols,
                                                          .bits = bits,
                                                          .scale = scale,
                                                          .scale_count = per_row ? rows : 1},
                                   &t->packed[t->packed_count], &err),
        0);
    return t->packed[t->packed_count++];
}

static struct packed_delta *add_dense(struct fixture *f, struct tuned *t, struct tensor *w,
                                      uint64_t seed)
{
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1];
    uint16_t *half = (uint16_t *)keep(t, (size_t)(rows * cols));
    float *value = w->data;
    struct err err = {0};

    for (int32_t i = 0; i < rows * cols; i++) {
        half[i] = f32_to_f16(0.1f * (float)rng_unit_at(seed, 1, (uint64_t)i) - 0.05f);
        value[i] += f16_to_f32(half[i]);
    }
    assert_int_equal(f->backend.ops->delta_pack(
                         &f->backend,
                         &(struct delta_tensor){.kind = DELTA_DENSE,
                                                .rows = rows,
                                                .cols = cols,
                                                .dense = tensor_view(half, DTYPE_F16, 2, w->shape)},
                         &t->packed[t->packed_count], &err),
                     0);
    return t->packed[t->packed_count++];
}

static struct packed_delta *pack_one(struct fixture *f, struct tuned *t,
                                     const struct delta_tensor *delta)
{
    struct err err = {0};

    if (f->backend.ops->delta_pack(&f->backend, delta, &t->packed[t->packed_count], &err))
        fail_msg("%s", err.message);
    return t->packed[t->packed_count++];
}

static bool bit_at(const uint32_t *bits, int32_t words, int32_t row, int32_t col)
{
    return bits[row * words + col / 32] >> col % 32 & 1;
}

/* 23 vectors of 1, 2 or 3 planes; what they make is added in double precision. */
static struct packed_delta *add_planes(struct fixture *f, struct tuned *t, struct tensor *w,
                                       uint64_t seed)
{
    enum { RANK = 23, PLANES = 45 };
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1];
    int32_t words = (cols + 31) / 32, left_words = (PLANES + 31) / 32;
    uint32_t *right = (uint32_t *)keep(t, (size_t)(PLANES * words));
    uint32_t *left = (uint32_t *)keep(t, (size_t)(rows * left_words));
    int32_t *vector = (int32_t *)keep(t, PLANES);
    float *scale = keep(t, (size_t)(2 * PLANES + rows + cols)), *value = w->data;
    float *row_scale = scale + 2 * PLANES, *col_scale = row_scale + rows;

    for (int32_t i = 0; i < PLANES * words; i++)
        right[i] = (uint32_t)rng_at(seed, 3, (uint64_t)i);
    for (int32_t i = 0; i < rows * left_words; i++)
        left[i] = (uint32_t)rng_at(seed, 4, (uint64_t)i);
    for (int32_t p = 0, v = 0, n = 0; p < PLANES; p++, n++) {
        if (n == v % 3 + 1) {
            v++;
            n = 0;
        }
        vector[p] = v;
        scale[p] = 0.1f + 0.1f * (float)n;
        scale[PLANES + p] = 0.05f + 0.02f * (float)n;
    }
    for (int32_t i = 0; i < rows + cols; i++)
        row_scale[i] = 0.4f + 0.4f * (float)rng_unit_at(seed, 5, (uint64_t)i);
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < cols; c++) {
            double sum = 0;

            for (int32_t p = 0; p < PLANES; p++)
                for (int32_t q = 0; q < PLANES; q++)
                    if (vector[p] == vector[q])
                        sum += (double)scale[p] * (bit_at(right, words, p, c) ? 1 : -1) *
                               (double)scale[PLANES + q] *
                               (bit_at(left, left_words, r, q) ? 1 : -1);
            value[r * cols + c] += (float)((double)row_scale[r] * sum * (double)col_scale[c]);
        }
    return pack_one(f, t,
                    &(struct delta_tensor){.kind = DELTA_PLANES,
                                           .rows = rows,
                                           .cols = cols,
                                           .planes = {.planes = PLANES,
                                                      .rank = RANK,
                                                      .vector = vector,
                                                      .right_bits = right,
                                                      .left_bits = left,
                                                      .right_scale = scale,
                                                      .left_scale = scale + PLANES,
                                                      .row_scale = row_scale,
                                                      .col_scale = col_scale}});
}

/* The left factor in half precision, the right one in full. */
static struct packed_delta *add_factors(struct fixture *f, struct tuned *t, struct tensor *w,
                                        uint64_t seed)
{
    enum { RANK = 19 };
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1];
    uint16_t *left = (uint16_t *)keep(t, (size_t)(rows * RANK));
    float *right = keep(t, (size_t)(RANK * cols)), *value = w->data;

    for (int32_t i = 0; i < rows * RANK; i++)
        left[i] = f32_to_bf16(0.2f * (float)rng_unit_at(seed, 6, (uint64_t)i) - 0.1f);
    for (int32_t i = 0; i < RANK * cols; i++)
        right[i] = 0.4f * (float)rng_unit_at(seed, 7, (uint64_t)i) - 0.2f;
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < cols; c++) {
            double sum = 0;

            for (int32_t k = 0; k < RANK; k++)
                sum += (double)bf16_to_f32(left[r * RANK + k]) * (double)right[k * cols + c];
            value[r * cols + c] += (float)(1.5 * sum);
        }
    return pack_one(
        f, t,
        &(struct delta_tensor){
            .kind = DELTA_FACTORS,
            .rows = rows,
            .cols = cols,
            .factors = {.left = tensor_view(left, DTYPE_BF16, 2, (int64_t[]){rows, RANK}),
                        .right = tensor_view(right, DTYPE_F32, 2, (int64_t[]){RANK, cols}),
                        .scale = 1.5f}});
}

static struct tensor replace(struct tuned *t, struct tensor *vector, uint64_t seed)
{
    float *own = keep(t, (size_t)vector->shape[0]), *value = vector->data;

    for (int32_t i = 0; i < vector->shape[0]; i++)
        own[i] = value[i] += 0.2f * (float)rng_unit_at(seed, 2, (uint64_t)i);
    return tensor_view(own, DTYPE_F32, 1, vector->shape);
}

static void make_tuned(struct fixture *f, struct tuned *t, uint64_t seed)
{
    struct model_config config = config_of();

    memset(t, 0, sizeof *t);
    t->merged = memory_model_new(&config, DTYPE_F32, 21);
    t->adapter.layer = t->layer;
    for (int32_t l = 0; l < 2; l++) {
        struct adapter_layer *a = &t->layer[l];

        a->q.delta = add_signs(f, t, merged_tensor(t, l, "self_attn.q_proj.weight"), seed, true);
        a->k.delta = add_signs(f, t, merged_tensor(t, l, "self_attn.k_proj.weight"), seed, false);
        a->o.delta = add_signs(f, t, merged_tensor(t, l, "self_attn.o_proj.weight"), seed, true);
        a->up.delta = add_signs(f, t, merged_tensor(t, l, "mlp.up_proj.weight"), seed, true);
        a->down.delta = add_dense(f, t, merged_tensor(t, l, "mlp.down_proj.weight"), seed);
        a->attn_norm = replace(t, merged_tensor(t, l, "input_layernorm.weight"), seed);
        a->k_norm = replace(t, merged_tensor(t, l, "self_attn.k_norm.weight"), seed);
        a->mlp_norm = replace(t, merged_tensor(t, l, "post_attention_layernorm.weight"), seed);
        a->v.b = replace(t, merged_tensor(t, l, "self_attn.v_proj.bias"), seed);
    }
    t->adapter.final_norm = replace(t, merged_tensor(t, -1, "model.norm.weight"), seed);
    t->adapter.embed = t->adapter.head =
        add_dense(f, t, merged_tensor(t, -1, "model.embed_tokens.weight"), seed);
}

/* Factored differences; `seed` is even: embeddings and head of planes, else of plain factors. */
static void make_factored(struct fixture *f, struct tuned *t, uint64_t seed)
{
    struct model_config config = config_of();

    memset(t, 0, sizeof *t);
    t->merged = memory_model_new(&config, DTYPE_F32, 21);
    t->adapter.layer = t->layer;
    for (int32_t l = 0; l < 2; l++) {
        struct adapter_layer *a = &t->layer[l];

        a->q.delta = add_planes(f, t, merged_tensor(t, l, "self_attn.q_proj.weight"), seed);
        a->k.delta = add_factors(f, t, merged_tensor(t, l, "self_attn.k_proj.weight"), seed);
        a->v.delta = add_signs(f, t, merged_tensor(t, l, "self_attn.v_proj.weight"), seed, true);
        a->o.delta = add_planes(f, t, merged_tensor(t, l, "self_attn.o_proj.weight"), seed);
        a->gate.delta = add_factors(f, t, merged_tensor(t, l, "mlp.gate_proj.weight"), seed);
        a->up.delta = add_planes(f, t, merged_tensor(t, l, "mlp.up_proj.weight"), seed);
        a->down.delta = add_planes(f, t, merged_tensor(t, l, "mlp.down_proj.weight"), seed);
    }
    t->adapter.embed = t->adapter.head = (seed % 2 ? add_factors : add_planes)(
        f, t, merged_tensor(t, -1, "model.embed_tokens.weight"), seed);
}

static void free_tuned(struct fixture *f, struct tuned *t)
{
    for (int32_t i = 0; i < t->packed_count; i++) {
        assert_true(f->backend.ops->delta_bytes(t->packed[i]) > 0);
        f->backend.ops->delta_free(&f->backend, t->packed[i]);
    }
    for (int32_t i = 0; i < t->memory_count; i++)
        free(t->memory[i]);
    memory_model_free(t->merged);
}

typedef void make_adapter(struct fixture *f, struct tuned *t, uint64_t seed);

static void check_adapter(make_adapter *make, uint64_t seed)
{
    struct fixture f, merged;
    struct tuned t;
    struct err err = {0};
    float adapted[V], want[V], base[V];
    double difference = 0, size = 0, moved = 0;

    open_fixture(&f, DTYPE_F32, 2, NULL);
    make(&f, &t, seed);
    run_alone(&f, 0, &t.adapter, adapted);
    run_alone(&f, 0, NULL, base);
    open_fixture(&merged, DTYPE_F32, 2, NULL);
    model_decoder_free(merged.decoder);
    model_kv_cache_close(&merged.cache, merged.model);
    model_free(merged.model);
    struct model_source source = memory_model_source(t.merged);
    assert_int_equal(model_open_source(&merged.model, &merged.backend, &source, &err), 0);
    assert_int_equal(model_decoder_open(&merged.decoder, merged.model, LEN, 1, &err), 0);
    assert_int_equal(model_kv_cache_open(&merged.cache, merged.model, 1, LEN, &err), 0);
    run_alone(&merged, 0, NULL, want);
    for (int32_t i = 0; i < V; i++) {
        difference += pow((double)(adapted[i] - want[i]), 2);
        moved += pow((double)(base[i] - want[i]), 2);
        size += pow((double)want[i], 2);
    }
    assert_true(sqrt(difference / size) < 1e-5);
    assert_true(sqrt(moved / size) > 0.1); /* else this test would see nothing */
    close_fixture(&merged);
    free_tuned(&f, &t);
    close_fixture(&f);
}

static void test_an_adapter_is_base_plus_difference(void **state)
{
    check_adapter(make_tuned, 31);
    check_adapter(make_factored, 32);
    check_adapter(make_factored, 33);
}

static void test_factored_deltas_do_not_see_threads_and_kernels(void **state)
{
    float want[V], got[V];

    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++)
        for (int threads = 1; threads <= 2; threads++) {
            bool first = k == cpu_kernels_usable() && threads == 1;
            struct fixture f;
            struct tuned t;

            open_fixture(&f, DTYPE_F32, threads, *k);
            make_factored(&f, &t, 34);
            run_alone(&f, 4, &t.adapter, first ? want : got);
            if (!first)
                assert_memory_equal(got, want, sizeof want);
            free_tuned(&f, &t);
            close_fixture(&f);
        }
}

#define MIXES 300
#define MIX_LENGTHS 3

/* Random sequences of random tenants (of signs, dense, planes, factors, or the base's) and lengths,
 * cut in two at random places: each gets the logits that it gets alone in one piece. */
static void test_random_mixes_of_tenants_give_the_bits_of_solo_runs(void **state)
{
    static const int32_t length[MIX_LENGTHS] = {2, 7, 19};
    static float alone[SLOTS][4][MIX_LENGTHS][V], mixed[SLOTS * V];
    struct fixture f;
    struct tuned t[3];
    const struct adapter *of[4] = {NULL, &t[0].adapter, &t[1].adapter, &t[2].adapter};

    open_fixture(&f, DTYPE_F32, 2, NULL);
    make_tuned(&f, &t[0], 51);
    make_factored(&f, &t[1], 52);
    make_factored(&f, &t[2], 53);
    for (int32_t s = 0; s < SLOTS; s++)
        for (int a = 0; a < 4; a++)
            for (int l = 0; l < MIX_LENGTHS; l++)
                run_pieces(&f, &(struct piece){s, 0, length[l], of[a]}, 1, alone[s][a][l]);
    for (uint64_t mix = 0; mix < MIXES; mix++) {
        struct piece head[SLOTS], tail[SLOTS];
        int32_t count = 0, a[SLOTS], l[SLOTS];

        for (int32_t s = 0; s < SLOTS; s++) {
            uint64_t random = rng_at(54, mix, (uint64_t)s);

            if (random % 4 == 0) /* not in this mix */
                continue;
            a[count] = (int32_t)(random >> 8 & 3);
            l[count] = (int32_t)((random >> 16 & 255) % MIX_LENGTHS);
            int32_t end = length[l[count]];
            int32_t cut = 1 + (int32_t)((random >> 24 & 255) % (uint64_t)(end - 1));

            head[count] = (struct piece){s, 0, cut, of[a[count]]};
            tail[count] = (struct piece){s, cut, end, of[a[count]]};
            count++;
        }
        if (count == 0)
            continue;
        run_pieces(&f, head, count, mixed);
        run_pieces(&f, tail, count, mixed);
        for (int32_t i = 0; i < count; i++)
            if (memcmp(mixed + i * V, alone[tail[i].sequence][a[i]][l[i]], sizeof alone[0][0][0]))
                fail_msg("mix %d: sequence %d of tenant %d differs", (int)mix, tail[i].sequence,
                         a[i]);
    }
    for (int i = 0; i < 3; i++)
        free_tuned(&f, &t[i]);
    close_fixture(&f);
}

static void test_tenants_do_not_touch_each_other(void **state)
{
    struct fixture f;
    struct tuned a, b;
    float alone[4][V], mixed[4 * V];

    open_fixture(&f, DTYPE_F32, 2, NULL);
    make_tuned(&f, &a, 41);
    make_tuned(&f, &b, 42);
    const struct adapter *of[4] = {&a.adapter, NULL, &b.adapter, &a.adapter};
    for (int32_t s = 0; s < 4; s++)
        run_alone(&f, s, of[s], alone[s]);
    for (int32_t at = 0; at < LEN; at += 30) { /* all four together, in pieces */
        struct piece piece[4];

        for (int32_t s = 0; s < 4; s++)
            piece[s] = (struct piece){s, at, at + 30, of[s]};
        run_pieces(&f, piece, 4, mixed);
    }
    for (int32_t s = 0; s < 4; s++)
        assert_memory_equal(mixed + s * V, alone[s], sizeof alone[s]);
    assert_memory_not_equal(alone[0], alone[3], sizeof alone[0]);
    free_tuned(&f, &a);
    free_tuned(&f, &b);
    close_fixture(&f);
}

static void test_bad_deltas_are_refused(void **state)
{
    struct fixture f;
    struct packed_delta *packed;
    struct err err = {0};
    float scale[2] = {1, 1};
    uint32_t bits[3] = {0};

    open_fixture(&f, DTYPE_F32, 1, NULL);
    assert_int_equal(f.backend.ops->delta_pack(&f.backend,
                                               &(struct delta_tensor){.kind = DELTA_SIGN,
                                                                      .rows = 3,
                                                                      .cols = 5,
                                                                      .bits = bits,
                                                                      .scale = scale,
                                                                      .scale_count = 2},
                                               &packed, &err),
                     -1);
    assert_int_equal(err.kind, ERR_INVALID);
    err_clear(&err);
    struct delta_tensor planes = {.kind = DELTA_PLANES,
                                  .rows = 3,
                                  .cols = 5,
                                  .planes = {.planes = 2, .rank = 2, .vector = (int32_t[]){1, 0}}};
    assert_int_equal(f.backend.ops->delta_pack(&f.backend, &planes, &packed, &err), -1);
    assert_non_null(strstr(err.message, "plane 1 belongs to vector 0 of 2"));
    planes.planes.vector = (int32_t[]){0, 2};
    err_clear(&err);
    assert_int_equal(f.backend.ops->delta_pack(&f.backend, &planes, &packed, &err), -1);
    assert_non_null(strstr(err.message, "plane 1 belongs to vector 2 of 2"));
    struct delta_tensor factors = {
        .kind = DELTA_FACTORS,
        .rows = 3,
        .cols = 5,
        .factors = {.left = tensor_view(scale, DTYPE_F32, 2, (int64_t[]){3, 2}),
                    .right = tensor_view(scale, DTYPE_F32, 2, (int64_t[]){1, 5})}};
    err_clear(&err);
    assert_int_equal(f.backend.ops->delta_pack(&f.backend, &factors, &packed, &err), -1);
    assert_non_null(strstr(err.message, "factors that do not make a matrix of 3 by 5"));
    factors.factors.right.shape[0] = 2; /* not read before it is refused */
    for (int i = 0; i < 2; i++) {
        factors.factors.scale = i ? NAN : 0;
        err_clear(&err);
        assert_int_equal(f.backend.ops->delta_pack(&f.backend, &factors, &packed, &err), -1);
        assert_non_null(strstr(err.message, "factors with a scale of"));
    }
    close_fixture(&f);
}

/* A vector that can not be taken is not the backend's to free. */
static void test_weights_of_an_unknown_type_are_refused(void **state)
{
    struct model_config config = config_of();
    struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 21);
    struct model_source source = memory_model_source(memory);
    struct backend backend;
    struct model *model;
    struct err err = {0};
    int32_t norm = 0;

    while (strcmp(memory->name[norm], "model.norm.weight") != 0)
        norm++;
    memory->tensor[norm].dtype = DTYPE_I8;
    assert_int_equal(cpu_backend_open(&backend, 1, NULL, DTYPE_F32, &err), 0);
    assert_int_equal(model_open_source(&model, &backend, &source, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, "model.norm.weight: weights of dtype I8"));
    assert_null(model);
    backend_close(&backend);
    memory_model_free(memory);
}

/* In BF16 too, and the logits are near those of F32. */
static void test_bf16(void **state)
{
    double error = 0, size = 0;
    float f32[V], bf16[V];
    struct fixture f;

    open_fixture(&f, DTYPE_F32, 2, NULL);
    run_alone(&f, 1, NULL, f32);
    close_fixture(&f);
    precision = DTYPE_BF16;
    open_fixture(&f, DTYPE_F32, 2, NULL);
    assert_int_equal(f.cache.k.dtype, DTYPE_BF16);
    run_alone(&f, 1, NULL, bf16);
    close_fixture(&f);
    for (int i = 0; i < V; i++) {
        error += (double)(f32[i] - bf16[i]) * (f32[i] - bf16[i]);
        size += (double)f32[i] * f32[i];
    }
    assert_true(error > 0 && sqrt(error / size) < 2e-2);
    test_chunks_and_company_change_nothing(state);
    test_threads_and_kernels_change_nothing(state);
    test_tenants_do_not_touch_each_other(state);
    precision = DTYPE_F32;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits_are_the_references),
        cmocka_unit_test(test_chunks_and_company_change_nothing),
        cmocka_unit_test(test_threads_and_kernels_change_nothing),
        cmocka_unit_test(test_half_weights_are_read_as_they_are),
        cmocka_unit_test(test_an_adapter_is_base_plus_difference),
        cmocka_unit_test(test_factored_deltas_do_not_see_threads_and_kernels),
        cmocka_unit_test(test_tenants_do_not_touch_each_other),
        cmocka_unit_test(test_random_mixes_of_tenants_give_the_bits_of_solo_runs),
        cmocka_unit_test(test_bad_deltas_are_refused),
        cmocka_unit_test(test_weights_of_an_unknown_type_are_refused),
        cmocka_unit_test(test_bf16),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
