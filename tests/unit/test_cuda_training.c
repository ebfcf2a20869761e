/* Whole models in training on the CUDA backend, by themselves and with a teacher: some steps
 * against the CPU's, and the same bits whatever the order of blocks and warps. */
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

#ifdef SHIM_ORDERS /* a GPU */
#define STEPS 20
#else /* where a step takes a million times as long */
#define STEPS 8
#endif
#define ROWS 32
#define MAX_TENSORS 64

static const int32_t cu_seqlens[] = {0, 13, 14, ROWS};
#define DOCS 3

static void must(int rc, const struct err *err)
{
    if (rc)
        fail_msg("%s", err->message);
}

/* Every tensor of a model in training: F32 masters, in BF16 with copies of the matrices. */
struct student {
    struct backend backend;
    struct model *model, *teacher; /* the latter: or NULL */
    struct model_training *pass;
    struct model_weights weights, grads;
    struct parameter parameter[MAX_TENSORS];
    int32_t count;
    struct tensor norm;
    double loss[STEPS];
};

static struct tensor device_tensor(struct student *s, enum dtype dtype, const struct tensor *like)
{
    struct tensor t = tensor_view(NULL, dtype, like->rank, like->shape);
    struct err err = {0};

    t.data = s->backend.ops->alloc(&s->backend,
                                   (size_t)tensor_elements(&t) * (size_t)dtype_size(dtype), &err);
    if (!t.data)
        fail_msg("%s", err.message);
    return t;
}

static void open_parameter(struct student *s, const struct tensor *start, struct tensor *w,
                           struct tensor *g)
{
    struct parameter *p = &s->parameter[s->count++];
    int64_t n = tensor_elements(start);
    uint16_t *half = malloc((size_t)n * sizeof *half);

    assert_non_null(half);
    p->w = device_tensor(s, DTYPE_F32, start);
    p->g = device_tensor(s, DTYPE_F32, start);
    p->m = device_tensor(s, DTYPE_F32, start);
    p->v = device_tensor(s, DTYPE_F32, start);
    s->backend.ops->upload(&s->backend, p->w.data, start->data, (size_t)n * sizeof(float));
    p->decay = start->rank == 2;
    *w = p->w;
    *g = p->g;
    if (s->backend.activation == DTYPE_BF16 && start->rank == 2) {
        p->copy = *w = device_tensor(s, DTYPE_BF16, start);
        for (int64_t i = 0; i < n; i++)
            half[i] = f32_to_bf16(((const float *)start->data)[i]);
        s->backend.ops->upload(&s->backend, w->data, half, (size_t)n * sizeof *half);
    }
    must(backend_check(&s->backend, &(struct err){0}), &(struct err){.message = "upload"});
    free(half);
}

static void open_student(struct student *s, const struct memory_model *memory,
                         const struct memory_model *teacher, bool cpu, enum dtype precision)
{
    struct model_source source = memory_model_source(memory);
    struct err err = {0};
    char name[MODEL_NAME_MAX];

    memset(s, 0, sizeof *s);
    if (cpu)
        must(backend_open(&s->backend, &(struct backend_options){.precision = precision}, &err),
             &err);
    else
        must(cuda_backend_open(&s->backend, &(struct cuda_options){.precision = precision}, &err),
             &err);
    must(model_open_source(&s->model, &s->backend, &source, &err), &err);
    if (teacher) {
        struct model_source from = memory_model_source(teacher);

        must(model_open_source(&s->teacher, &s->backend, &from, &err), &err);
    }
    must(model_training_open(&s->pass, s->model, ROWS, teacher != NULL, &err), &err);
    must(model_weights_alloc(&s->weights, s->model, &err), &err);
    must(model_weights_alloc(&s->grads, s->model, &err), &err);
    assert_int_equal(memory->count, model_tensor_count(s->model));
    for (int32_t i = 0; i < memory->count; i++) {
        struct tensor *w = model_tensor(s->model, &s->weights, i, name), start;
        struct tensor *g = model_tensor(s->model, &s->grads, i, name);

        assert_true(source.tensor(source.context, name, &start));
        open_parameter(s, &start, w, g);
    }
    if (memory->config.tied_embeddings) {
        s->weights.head = s->weights.embed;
        s->grads.head = s->grads.embed;
    }
    s->norm = device_tensor(s, DTYPE_F32, &(struct tensor){.rank = 1, .shape = {1}});
}

static void close_student(struct student *s)
{
    for (int32_t i = 0; i < s->count; i++) {
        s->backend.ops->free(&s->backend, s->parameter[i].w.data);
        s->backend.ops->free(&s->backend, s->parameter[i].g.data);
        s->backend.ops->free(&s->backend, s->parameter[i].m.data);
        s->backend.ops->free(&s->backend, s->parameter[i].v.data);
        s->backend.ops->free(&s->backend, s->parameter[i].copy.data);
    }
    s->backend.ops->free(&s->backend, s->norm.data);
    model_weights_release(&s->grads);
    model_weights_release(&s->weights);
    model_training_free(s->pass);
    model_free(s->model);
    model_free(s->teacher);
    s->backend.ops->close(&s->backend);
}

static void train(struct student *s)
{
    int32_t vocabulary = model_get_config(s->model)->vocabulary;
    int32_t token[ROWS], position[ROWS], target[ROWS], trained = 0;
    float weight[ROWS];
    struct batch batch = {
        .rows = ROWS, .token = token, .position = position, .docs = DOCS, .cu_seqlens = cu_seqlens};
    struct err err = {0};

    for (int32_t step = 0; step < STEPS; step++) {
        struct model_loss loss;

        /* Four batches, again and again: there is something to learn. */
        for (int32_t r = 0, doc = 0; r < ROWS; r++) {
            doc += r == cu_seqlens[doc + 1];
            token[r] = (int32_t)(rng_at(1, (uint64_t)step % 4, (uint64_t)r) % (uint32_t)vocabulary);
            target[r] = (token[r] * 7 + 3) % vocabulary;
            position[r] = r - cu_seqlens[doc];
            weight[r] = r % 5 == 0 ? 0.0f : 1.0f;
            trained += weight[r] != 0;
        }
        for (int32_t r = 0; r < ROWS; r++)
            weight[r] /= (float)trained;
        trained = 0;
        must(model_loss(s->pass,
                        &(struct model_loss_args){
                            .weights = &s->weights,
                            .grads = &s->grads,
                            .batch = &batch,
                            .target = target,
                            .weight = weight,
                            .teacher = s->teacher ? model_base_weights(s->teacher) : NULL,
                        },
                        &loss, &err),
             &err);
        s->loss[step] = loss.weighted;
        s->backend.ops->gradient_norm(
            &s->backend, &(struct gradient_norm_args){s->parameter, s->count, s->norm});
        s->backend.ops->adamw(&s->backend, &(struct adamw_args){.parameter = s->parameter,
                                                                .count = s->count,
                                                                .norm = s->norm,
                                                                .max_norm = 1,
                                                                .learning_rate = 2e-3f,
                                                                .beta1 = 0.9f,
                                                                .beta2 = 0.99f,
                                                                .epsilon = 1e-8f,
                                                                .weight_decay = 0.01f,
                                                                .step = step + 1});
        must(backend_check(&s->backend, &err), &err);
    }
}

/* The masters of all tensors, one behind the other. */
static float *download_weights(struct student *s, int64_t *count)
{
    float *all;

    *count = 0;
    for (int32_t i = 0; i < s->count; i++)
        *count += tensor_elements(&s->parameter[i].w);
    all = malloc((size_t)*count * sizeof *all);
    assert_non_null(all);
    for (int32_t i = 0, at = 0; i < s->count; i++) {
        int64_t n = tensor_elements(&s->parameter[i].w);

        s->backend.ops->download(&s->backend, all + at, s->parameter[i].w.data,
                                 (size_t)n * sizeof *all);
        at += (int32_t)n;
    }
    must(backend_check(&s->backend, &(struct err){0}), &(struct err){.message = "download"});
    return all;
}

/* The loss of each step: within 1e-4 of the CPU's in F32, within 1e-2 in BF16. */
static void losses_agree(const struct memory_model *memory, const struct memory_model *teacher,
                         enum dtype precision)
{
    struct student *cpu = malloc(sizeof *cpu), *shim = malloc(sizeof *shim);
    double tolerance = precision == DTYPE_BF16 ? 1e-2 : 1e-4;

    assert_true(cpu && shim);
    open_student(cpu, memory, teacher, true, precision);
    open_student(shim, memory, teacher, false, precision);
    train(cpu);
    train(shim);
    for (int32_t i = 0; i < STEPS; i++)
        if (!(fabs(shim->loss[i] - cpu->loss[i]) <= tolerance * fabs(cpu->loss[i])))
            fail_msg("step %d: a loss of %.7f, the CPU's is %.7f", i + 1, shim->loss[i],
                     cpu->loss[i]);
    assert_true(cpu->loss[STEPS - 1] < 0.9 * cpu->loss[0]); /* or nothing was shown */
    close_student(shim);
    close_student(cpu);
    free(shim);
    free(cpu);
}

static void test_losses(void **state)
{
    static const struct {
        int32_t kv_heads;
        bool tied, bias, qk_norm;
    } models[] = {{2, true, false, false}, {4, false, true, false}, {1, true, false, true}};

    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct model_config config = memory_model_config(models[i].kv_heads, models[i].tied,
                                                         models[i].bias, models[i].qk_norm);
        struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 11 + i);

        shim_seed(i);
        if (i != 2)
            losses_agree(memory, NULL, DTYPE_F32);
        if (i != 1)
            losses_agree(memory, NULL, DTYPE_BF16);
        memory_model_free(memory);
    }
}

/* Steps towards what another model says of the same tokens. */
static void test_teacher(void **state)
{
    struct model_config config = memory_model_config(2, true, false, true);
    struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 21);
    struct memory_model *teacher = memory_model_new(&config, DTYPE_F32, 22);

    shim_seed(3);
    losses_agree(memory, teacher, DTYPE_F32);
    losses_agree(memory, teacher, DTYPE_BF16);
    memory_model_free(teacher);
    memory_model_free(memory);
}

/* Training again, with blocks and warps in another order, ends at the same bits. */
static void test_bits(void **state)
{
    struct model_config config = memory_model_config(2, true, true, true);
    struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 5);
    struct student *shim = malloc(sizeof *shim);

    assert_non_null(shim);
    for (int precision = 0; precision < 2; precision++) {
        float *first = NULL;

        for (uint64_t seed = 0; seed < 2; seed++) {
            int64_t count;
            float *all;

            shim_seed(seed);
            open_student(shim, memory, NULL, false, precision ? DTYPE_BF16 : DTYPE_F32);
            train(shim);
            all = download_weights(shim, &count);
            close_student(shim);
            if (!first) {
                first = all;
                continue;
            }
            assert_memory_equal(first, all, (size_t)count * sizeof *all);
            free(all);
        }
        free(first);
    }
    memory_model_free(memory);
    free(shim);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_losses),
        cmocka_unit_test(test_teacher),
        cmocka_unit_test(test_bits),
    };

    return cmocka_run_group_tests_name("training", tests, NULL, NULL);
}
