/* Second moments against the gradients of the weights: with a matrix's inputs X known from the
 * reference and fewer rows than columns, its gradient dW = Gᵀ·X determines G, and both moments
 * follow. And draws: the same as the decoder's, and a matter of the seed alone. No TSan: minutes,
 * and its threads are those of test_trainer. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/base_layout.h"
#include "engine/model_moments.h"
#include "tests/unit/reference_model.h"

#define ROWS 9
#define DOCS 3
#define VOCABULARY 70
#define TOLERANCE 1e-5 /* of ‖difference‖ / ‖sum‖: F32, and the solution for G */

static const int32_t cu_seqlens[DOCS + 1] = {0, 4, 5, ROWS};

struct fixture {
    struct memory_model *memory;
    struct reference *reference;
    struct backend backend;
    struct model *model;
    struct model_moments_pass *pass;
    struct model_moments moments[256];
    struct batch batch;
    int32_t token[ROWS], position[ROWS], target[ROWS];
    float weight[ROWS];
};

static void fill_batch(struct fixture *f)
{
    for (int32_t d = 0; d < DOCS; d++)
        for (int32_t r = cu_seqlens[d]; r < cu_seqlens[d + 1]; r++) {
            f->token[r] = 7 * r + 1; /* all different: rows that are alike determine nothing */
            f->target[r] = (int32_t)(rng_at(5, 2, (uint64_t)r) % VOCABULARY);
            f->weight[r] = r == 6 ? 0 : 0.5f + 0.1f * (float)r;
            f->position[r] = r - cu_seqlens[d];
        }
    f->batch = (struct batch){.rows = ROWS,
                              .token = f->token,
                              .position = f->position,
                              .docs = DOCS,
                              .cu_seqlens = cu_seqlens};
}

static void clear_moments(struct fixture *f)
{
    for (int32_t i = 0; i < f->memory->count; i++) {
        struct model_moments *m = &f->moments[i];
        const int64_t *shape = f->memory->tensor[i].shape;

        if (m->h)
            memset(m->h, 0, (size_t)(shape[1] * shape[1]) * sizeof *m->h);
        if (m->g)
            memset(m->g, 0, (size_t)(shape[0] * shape[0]) * sizeof *m->g);
        m->weight = 0;
        m->rows = 0;
    }
}

static struct fixture *open_fixture(const struct model_config *config, enum dtype precision,
                                    int threads)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct err err = {0};

    assert_non_null(f);
    f->memory = memory_model_new(config, DTYPE_F32, 11);
    f->reference = reference_new(f->memory);
    struct model_source source = memory_model_source(f->memory);
    assert_int_equal(
        backend_open(&f->backend,
                     &(struct backend_options){.threads = threads, .precision = precision}, &err),
        0);
    assert_int_equal(model_open_source(&f->model, &f->backend, &source, &err), 0);
    assert_int_equal(model_moments_open(&f->pass, f->model, ROWS, &err), 0);
    for (int32_t i = 0; i < f->memory->count; i++) {
        const int64_t *shape = f->memory->tensor[i].shape;

        if (!model_tensor_is_linear(f->model, i))
            continue;
        f->moments[i].h = calloc((size_t)(shape[1] * shape[1]), sizeof(float));
        f->moments[i].g = calloc((size_t)(shape[0] * shape[0]), sizeof(float));
        assert_true(f->moments[i].h && f->moments[i].g);
    }
    fill_batch(f);
    return f;
}

static void close_fixture(struct fixture *f)
{
    for (int32_t i = 0; i < f->memory->count; i++) {
        free(f->moments[i].h);
        free(f->moments[i].g);
    }
    model_moments_free(f->pass);
    model_free(f->model);
    backend_close(&f->backend);
    reference_free(f->reference);
    memory_model_free(f->memory);
    free(f);
}

static struct model_loss add(struct fixture *f, const int32_t *target, const float *weight,
                             uint64_t seed)
{
    struct model_loss loss;
    struct err err = {0};

    if (model_moments_add(f->pass,
                          &(struct model_moments_args){
                              .weights = model_base_weights(f->model),
                              .batch = &f->batch,
                              .weight = weight,
                              .target = target,
                              .seed = seed,
                              .first = 100,
                          },
                          f->moments, &loss, &err))
        fail_msg("%s", err.message);
    return loss;
}

/* ------------------------------------------------------------------ what is expected */

/* The inputs of each matrix of a layer, [ROWS, …] */
struct inputs {
    double n[ROWS * 40], attn[ROWS * 64], n_mlp[ROWS * 40], act[ROWS * 128];
};

static void norm_rows(const struct model_config *c, const double *x, const double *w, double *n)
{
    for (int32_t r = 0; r < ROWS; r++) {
        double sum = 0;

        for (int32_t i = 0; i < c->hidden; i++)
            sum += x[r * c->hidden + i] * x[r * c->hidden + i];
        for (int32_t i = 0; i < c->hidden; i++)
            n[r * c->hidden + i] =
                x[r * c->hidden + i] * w[i] / sqrt(sum / c->hidden + (double)c->rms_norm_eps);
    }
}

static double dot(const double *a, const double *b, int32_t n)
{
    double sum = 0;

    for (int32_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* What the matrices of `layer` take; x [ROWS, D] goes through the layer. */
static void inputs_of(const struct fixture *f, int32_t layer, double *x, struct inputs *in)
{
    const struct model_config *c = &f->memory->config;
    const struct reference_layer *l = &f->reference->layer[layer];
    static double q[ROWS * 64], k[ROWS * 64], v[ROWS * 64], y[ROWS * 40];

    norm_rows(c, x, l->attn_norm, in->n);
    reference_attn_in(f->reference, layer, &f->batch, x, q, k, v);
    reference_attention(f->reference, &f->batch, q, k, v, in->attn);
    reference_attn_out(f->reference, layer, ROWS, in->attn, x, y);
    norm_rows(c, y, l->mlp_norm, in->n_mlp);
    for (int32_t r = 0; r < ROWS; r++)
        for (int32_t i = 0; i < c->intermediate; i++) {
            const double *n = in->n_mlp + r * c->hidden;
            double gate = dot(l->gate.w + i * c->hidden, n, c->hidden);

            in->act[r * c->intermediate + i] =
                gate / (1 + exp(-gate)) * dot(l->up.w + i * c->hidden, n, c->hidden);
        }
    reference_mlp(f->reference, layer, ROWS, y, x);
}

/* Solves a·z = b for symmetric positive a [n, n] and b [n, m], in place. */
static void solve(double *a, double *b, int32_t n, int32_t m)
{
    for (int32_t p = 0; p < n; p++)
        for (int32_t r = 0; r < n; r++) {
            double factor = a[r * n + p] / a[p * n + p];

            if (r == p)
                continue;
            for (int32_t i = 0; i < n; i++)
                a[r * n + i] -= factor * a[p * n + i];
            for (int32_t i = 0; i < m; i++)
                b[r * m + i] -= factor * b[p * m + i];
        }
    for (int32_t p = 0; p < n; p++)
        for (int32_t i = 0; i < m; i++)
            b[p * m + i] /= a[p * n + p];
}

/* g [ROWS, out] of dw [out, in] = gᵀ·x. */
static void gradients_of(const float *dw, const double *x, int32_t out, int32_t in, double *g)
{
    double gram[ROWS * ROWS];

    for (int32_t r = 0; r < ROWS; r++) {
        for (int32_t s = 0; s < ROWS; s++)
            gram[r * ROWS + s] = dot(x + r * in, x + s * in, in);
        for (int32_t o = 0; o < out; o++) {
            double sum = 0;

            for (int32_t i = 0; i < in; i++)
                sum += x[r * in + i] * (double)dw[o * in + i];
            g[r * out + o] = sum;
        }
    }
    solve(gram, g, ROWS, out);
}

/* ‖sum - Σ_r u_r·x_r·x_rᵀ‖ / ‖Σ‖ over the part that is summed; u NULL: 1. */
static double gram_error(const float *sum, const double *x, const double *u, int32_t n)
{
    double difference = 0, size = 0;

    for (int32_t i = 0; i < n; i++)
        for (int32_t j = i; j < n; j++) {
            double want = 0;

            for (int32_t r = 0; r < ROWS; r++)
                want += (u ? u[r] : 1) * x[r * n + i] * x[r * n + j];
            difference += pow(want - (double)sum[i * n + j], 2);
            size += want * want;
        }
    return sqrt(difference / size);
}

static void check_matrix(struct fixture *f, int32_t index, const float *dw, const double *x,
                         double tolerance)
{
    const struct model_moments *m = &f->moments[index];
    int32_t out = (int32_t)f->memory->tensor[index].shape[0];
    int32_t in = (int32_t)f->memory->tensor[index].shape[1];
    static double g[ROWS * 128];
    double u[ROWS], weight = 0;

    gradients_of(dw, x, out, in, g);
    for (int32_t r = 0; r < ROWS; r++)
        weight += u[r] = dot(g + r * out, g + r * out, out);
    double of_g = gram_error(m->g, g, NULL, out), of_h = gram_error(m->h, x, u, in);
    if (!(of_g < tolerance && of_h < tolerance && fabs(m->weight / weight - 1) < tolerance))
        fail_msg("%s: g is off by %g, h by %g, the weight by %g", f->memory->name[index], of_g,
                 of_h, m->weight / weight - 1);
    assert_int_equal(m->rows, ROWS);
}

static const double *input_of(const struct inputs *in, const char *name)
{
    if (strstr(name, "o_proj"))
        return in->attn;
    if (strstr(name, "down_proj"))
        return in->act;
    return strstr(name, "gate_proj") || strstr(name, "up_proj") ? in->n_mlp : in->n;
}

/* The gradients of the weights, as training computes them. */
static struct model_loss weight_gradients(struct fixture *f, struct model_weights *grads)
{
    struct model_training *training;
    struct model_loss loss;
    struct err err = {0};
    char name[MODEL_NAME_MAX];

    assert_int_equal(model_weights_alloc(grads, f->model, &err), 0);
    for (int32_t i = 0; i < f->memory->count; i++) {
        struct tensor *g = model_tensor(f->model, grads, i, name);

        g->data = f->backend.ops->alloc(&f->backend, (size_t)tensor_elements(g) * 4, &err);
        assert_non_null(g->data);
    }
    assert_int_equal(model_training_open(&training, f->model, ROWS, false, &err), 0);
    assert_int_equal(model_loss(training,
                                &(struct model_loss_args){
                                    .weights = model_base_weights(f->model),
                                    .grads = grads,
                                    .batch = &f->batch,
                                    .target = f->target,
                                    .weight = f->weight,
                                },
                                &loss, &err),
                     0);
    model_training_free(training);
    return loss;
}

static void check_model(int32_t kv_heads, bool tied, bool bias, bool qk_norm)
{
    struct model_config config = memory_model_config(kv_heads, tied, bias, qk_norm);
    struct fixture *f = open_fixture(&config, DTYPE_F32, 2);
    struct model_weights grads;
    struct model_loss want = weight_gradients(f, &grads), got = add(f, f->target, f->weight, 0);
    static double x[ROWS * 40];
    static struct inputs in;
    char name[MODEL_NAME_MAX];
    int32_t layer = -1, checked = 0;

    assert_true(want.weighted == got.weighted && want.correct == got.correct);
    for (int32_t r = 0; r < ROWS; r++)
        memcpy(x + r * config.hidden, f->reference->embed + f->token[r] * config.hidden,
               (size_t)config.hidden * sizeof *x);
    for (int32_t i = 0; i < f->memory->count; i++) {
        float *dw = model_tensor(f->model, &grads, i, name)->data;

        if (strstr(name, "input_layernorm"))
            inputs_of(f, ++layer, x, &in);
        if (model_tensor_is_linear(f->model, i)) {
            check_matrix(f, i, dw, input_of(&in, name), TOLERANCE);
            checked++;
        }
        f->backend.ops->free(&f->backend, dw);
    }
    assert_int_equal(checked, 7 * config.layers);
    model_weights_release(&grads);
    close_fixture(f);
}

static void test_grouped_tied(void **state)
{
    check_model(2, true, false, false);
}

static void test_multi_head_untied(void **state)
{
    check_model(4, false, false, false);
}

static void test_biases_and_head_norms(void **state)
{
    check_model(1, false, true, true);
}

/* ------------------------------------------------------------------ inputs alone */

static void add_inputs(struct fixture *f)
{
    struct model_moments_args args = {
        .weights = model_base_weights(f->model), .batch = &f->batch, .inputs_only = true};
    struct err err = {0};

    if (model_moments_add(f->pass, &args, f->moments, NULL, &err))
        fail_msg("%s", err.message);
}

/* Of the first matrix that reads them; of the others nothing, and of no gradient. */
static void check_inputs(struct fixture *f, double tolerance)
{
    const struct model_config *c = &f->memory->config;
    static double x[ROWS * 40];
    static struct inputs in;
    int32_t layer = -1, first = 0;

    for (int32_t r = 0; r < ROWS; r++)
        memcpy(x + r * c->hidden, f->reference->embed + f->token[r] * c->hidden,
               (size_t)c->hidden * sizeof *x);
    for (int32_t i = 0; i < f->memory->count; i++) {
        const struct model_moments *m = &f->moments[i];
        const char *name = f->memory->name[i];
        int32_t rows = (int32_t)f->memory->tensor[i].shape[0];
        bool reads_first =
            !strstr(name, "k_proj") && !strstr(name, "v_proj") && !strstr(name, "up_proj");

        if (strstr(name, "input_layernorm"))
            inputs_of(f, ++layer, x, &in);
        if (!m->h)
            continue;
        assert_true((model_moments_reads(f->model, i) == i) == reads_first);
        assert_int_equal(m->rows, reads_first ? ROWS : 0);
        for (int32_t k = 0; k < rows * rows; k++)
            assert_true(m->g[k] == 0);
        if (reads_first) {
            const double *want = input_of(&in, name);
            double error = gram_error(m->h, want, NULL, (int32_t)f->memory->tensor[i].shape[1]);

            if (!(error < tolerance))
                fail_msg("%s: h is off by %g", name, error);
            assert_true(m->weight == ROWS);
            first++;
        } else {
            assert_true(m->h[0] == 0 && m->weight == 0);
            assert_in_range(i - model_moments_reads(f->model, i), 1, 2); /* of the same layer */
            assert_non_null(strstr(f->memory->name[model_moments_reads(f->model, i)],
                                   strstr(name, "up_proj") ? "gate_proj" : "q_proj"));
        }
    }
    assert_int_equal(first, 4 * c->layers);
}

static void test_inputs_alone(void **state)
{
    for (int strange = 0; strange < 2; strange++) {
        struct model_config config =
            memory_model_config(strange ? 1 : 2, !strange, strange, strange);
        struct fixture *f = open_fixture(&config, DTYPE_F32, 2);
        struct fixture *bf16 = open_fixture(&config, DTYPE_BF16, 2);

        add_inputs(f);
        check_inputs(f, 1e-5);
        add_inputs(bf16);
        check_inputs(bf16, 6e-2);
        close_fixture(f);
        close_fixture(bf16);
    }
}

/* ------------------------------------------------------------------ steps */

struct steps {
    double last;
    int32_t count, until;
};

static int note_step(void *context, double share, struct err *err)
{
    struct steps *s = context;

    assert_true(share > s->last && share <= 1);
    s->last = share;
    return ++s->count == s->until ? err_set(err, ERR_CANCELLED, "enough") : 0;
}

/* It is asked after each layer, and once told to stop does not go on. */
static void test_steps(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config, DTYPE_F32, 1);

    for (int inputs_only = 0; inputs_only < 2; inputs_only++) {
        int32_t all = inputs_only ? config.layers : 2 * config.layers;

        for (int32_t until = 1; until <= all + 1; until++) {
            struct steps steps = {.until = until};
            struct model_moments_args args = {.weights = model_base_weights(f->model),
                                              .batch = &f->batch,
                                              .inputs_only = inputs_only,
                                              .step = note_step,
                                              .context = &steps};
            struct err err = {0};
            int rc = model_moments_add(f->pass, &args, f->moments, NULL, &err);

            assert_int_equal(rc, until <= all ? -1 : 0);
            assert_int_equal(steps.count, until <= all ? until : all);
            assert_true(until <= all ? err.kind == ERR_CANCELLED : steps.last == 1);
        }
    }
    close_fixture(f);
}

/* ------------------------------------------------------------------ sums */

/* Largest ‖a·scale - b‖ / ‖b‖ of all sums of two fixtures. */
static double difference(const struct fixture *a, double scale, const struct fixture *b)
{
    double worst = 0;

    for (int32_t i = 0; i < a->memory->count; i++)
        for (int which = 0; which < 2; which++) {
            const float *p = which ? a->moments[i].g : a->moments[i].h;
            const float *q = which ? b->moments[i].g : b->moments[i].h;
            int64_t n = a->memory->tensor[i].shape[which ? 0 : 1];
            double off = 0, size = 0;

            for (int64_t r = 0; p && r < n; r++)
                for (int64_t c = r; c < n; c++) {
                    off += pow((double)p[r * n + c] * scale - (double)q[r * n + c], 2);
                    size += pow((double)q[r * n + c], 2);
                }
            if (p && !(sqrt(off / size) <= worst))
                worst = sqrt(off / size);
        }
    return worst;
}

static void test_sums_add_up(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *once = open_fixture(&config, DTYPE_F32, 1);
    struct fixture *twice = open_fixture(&config, DTYPE_F32, 1);

    add(once, once->target, once->weight, 0);
    add(twice, twice->target, twice->weight, 0);
    add(twice, twice->target, twice->weight, 0);
    assert_true(difference(once, 2, twice) < 1e-6);
    assert_int_equal(twice->moments[2].rows, 2 * ROWS);
    close_fixture(once);
    close_fixture(twice);
}

/* What is not wanted is not looked at, and the rest is the same. */
static void test_unwanted_sums(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *all = open_fixture(&config, DTYPE_F32, 1);
    struct fixture *some = open_fixture(&config, DTYPE_F32, 1);

    for (int32_t i = 0; i < some->memory->count; i++) {
        float **unwanted = i % 2 ? &some->moments[i].h : &some->moments[i].g;

        free(*unwanted);
        *unwanted = NULL;
    }
    add(all, all->target, all->weight, 0);
    add(some, some->target, some->weight, 0);
    assert_true(difference(some, 1, all) == 0);
    close_fixture(all);
    close_fixture(some);
}

static void test_threads_change_nothing(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *one = open_fixture(&config, DTYPE_F32, 1);
    struct fixture *three = open_fixture(&config, DTYPE_F32, 3);

    add(one, NULL, NULL, 7);
    add(three, NULL, NULL, 7);
    assert_true(difference(one, 1, three) == 0);
    close_fixture(one);
    close_fixture(three);
}

static void test_bf16_is_near(void **state)
{
    struct model_config config = memory_model_config(2, true, false, true);
    struct fixture *f32 = open_fixture(&config, DTYPE_F32, 1);
    struct fixture *bf16 = open_fixture(&config, DTYPE_BF16, 1);

    add(f32, f32->target, f32->weight, 0);
    add(bf16, bf16->target, bf16->weight, 0);
    double error = difference(bf16, 1, f32);
    if (!(error < 6e-2))
        fail_msg("off by %g", error);
    close_fixture(f32);
    close_fixture(bf16);
}

static void test_mirror(void **state)
{
    int64_t n = 131;
    float *m = malloc((size_t)(n * n) * sizeof *m);

    assert_non_null(m);
    for (int64_t i = 0; i < n * n; i++)
        m[i] = i % n >= i / n ? (float)i : NAN;
    model_moments_mirror(m, n);
    for (int64_t i = 0; i < n * n; i++) {
        int64_t a = i / n, b = i % n;

        assert_true(m[i] == (float)(a < b ? a * n + b : b * n + a));
    }
    free(m);
}

/* ------------------------------------------------------------------ draws */

/* What the decoder answers to each row's prefix under the seed that add() was given. */
static void drawn_by_decoder(struct fixture *f, uint64_t seed, int32_t *target)
{
    struct model_decoder *decoder;
    struct sample_row sample[ROWS];
    struct batch batch = f->batch;
    int32_t row[ROWS];
    struct err err = {0};

    for (int32_t r = 0; r < ROWS; r++) {
        row[r] = r;
        sample[r] = (struct sample_row){1, 1, seed, 100 + (uint64_t)r};
    }
    batch.serving = true;
    assert_int_equal(model_decoder_open(&decoder, f->model, ROWS, ROWS, &err), 0);
    assert_int_equal(model_decode(decoder,
                                  &(struct model_decode_args){.batch = &batch,
                                                              .logit_row = row,
                                                              .logit_count = ROWS,
                                                              .sample = sample,
                                                              .chosen = target},
                                  &err),
                     0);
    model_decoder_free(decoder);
}

static void test_targets_are_drawn_from_the_model(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *given = open_fixture(&config, DTYPE_F32, 1);
    struct fixture *drawn = open_fixture(&config, DTYPE_F32, 1);
    int32_t first[ROWS], target[ROWS], other = 0;

    for (uint64_t seed = 0; seed < 8; seed++) {
        clear_moments(given);
        clear_moments(drawn);
        drawn_by_decoder(given, seed, target);
        struct model_loss want = add(given, target, NULL, 0), got = add(drawn, NULL, NULL, seed);
        assert_true(fabs(want.nll - got.nll) < 1e-9 * want.nll);
        assert_true(difference(given, 1, drawn) == 0);
        if (seed == 0)
            memcpy(first, target, sizeof first);
        other += memcmp(first, target, sizeof first) != 0;
    }
    assert_true(other > 5);
    close_fixture(given);
    close_fixture(drawn);
}

static void test_a_broken_model_is_told(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config, DTYPE_F32, 1);
    struct err err = {0};

    ((float *)f->memory->tensor[0].data)[f->token[3] * config.hidden] = NAN;
    assert_int_equal(model_moments_add(f->pass,
                                       &(struct model_moments_args){
                                           .weights = model_base_weights(f->model),
                                           .batch = &f->batch,
                                       },
                                       f->moments, NULL, &err),
                     -1);
    assert_int_equal(err.kind, ERR_INVALID);
    close_fixture(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grouped_tied),
        cmocka_unit_test(test_multi_head_untied),
        cmocka_unit_test(test_biases_and_head_norms),
        cmocka_unit_test(test_inputs_alone),
        cmocka_unit_test(test_steps),
        cmocka_unit_test(test_sums_add_up),
        cmocka_unit_test(test_unwanted_sums),
        cmocka_unit_test(test_threads_change_nothing),
        cmocka_unit_test(test_bf16_is_near),
        cmocka_unit_test(test_mirror),
        cmocka_unit_test(test_targets_are_drawn_from_the_model),
        cmocka_unit_test(test_a_broken_model_is_told),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
