#include "engine/model_moments.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

#include "engine/base/rng.h"
#include "engine/model_pass.h"

#define STREAM_SIGN 3       /* of random numbers: which way a margin goes */
#define RIVALS (1ull << 40) /* the random numbers that draw them lie behind those of targets */

struct model_moments_pass {
    struct model *model;
    struct model_training *training;
    struct model_weights grads; /* shapes without data: no gradient of a weight is wanted */
    int32_t max_rows;
    bool shared; /* the backend's memory is the host's: sums are added where they lie */
    void *memory;
    struct tensor row_weight; /* F32 [max_rows] */
    struct tensor scaled;     /* [max_rows, widest] */
    struct tensor sum;        /* F32 [widest, widest], on a device */
    struct tensor token;      /* I32 [rows of a chunk]: what was drawn */
    void *host_rows;          /* [max_rows, widest] in the backend's precision */
    float *host_row;          /* [widest] */
    float *host_weight;       /* [max_rows] */
    float *loss_weight;       /* [max_rows] */
    float *margin;            /* [max_rows] 0: none */
    int32_t *target;          /* [max_rows] what was drawn */
    int32_t *best, *other;    /* [max_rows] of a margin */
    int32_t *row, *drawn;     /* [max_rows] rows that are drawn for; [rows of a chunk] */
    struct sample_row *sample;
    struct loss_margins margins; /* of the three above */

    /* of the micro-batch that runs */
    const struct model_moments_args *args;
    struct model_moments *moments;
    struct model_moments *current; /* whose input comes next; NULL: not wanted */
};

/* ------------------------------------------------------------------ open, free */

static int64_t widest_of(const struct model_config *c)
{
    int64_t widest = 0, shape[TENSOR_MAX_RANK];

    for (int part = 0; part < BASE_LAYOUT_BLOCK; part++) {
        if (!base_layout_has(c, part) || !base_layout_is_linear(part))
            continue;
        base_layout_shape(c, part, shape);
        for (int i = 0; i < 2; i++)
            widest = shape[i] > widest ? shape[i] : widest;
    }
    return widest;
}

static int64_t place(struct model_moments_pass *p, char *memory)
{
    int64_t widest = widest_of(&p->model->config);
    struct model_arena a = {.memory = memory};

    p->row_weight = model_arena_carve(&a, DTYPE_F32, p->max_rows, 0);
    p->scaled = model_arena_carve(&a, p->model->backend->activation, p->max_rows, widest);
    p->token = model_arena_carve(&a, DTYPE_I32, p->max_rows, 0);
    if (!p->shared)
        p->sum = model_arena_carve(&a, DTYPE_F32, widest, widest);
    return a.used;
}

static int open_memory(struct model_moments_pass *p, struct err *err)
{
    struct backend *b = p->model->backend;
    size_t rows = (size_t)p->max_rows, widest = (size_t)widest_of(&p->model->config);

    p->host_rows = malloc(rows * widest * (size_t)dtype_size(b->activation));
    p->host_row = malloc(widest * sizeof *p->host_row);
    p->host_weight = malloc(rows * sizeof *p->host_weight);
    p->loss_weight = malloc(rows * sizeof *p->loss_weight);
    p->margin = malloc(rows * sizeof *p->margin);
    p->target = malloc(rows * sizeof *p->target);
    p->best = malloc(rows * sizeof *p->best);
    p->other = malloc(rows * sizeof *p->other);
    p->row = malloc(rows * sizeof *p->row);
    p->drawn = malloc(rows * sizeof *p->drawn);
    p->sample = malloc(rows * sizeof *p->sample);
    p->margins = (struct loss_margins){p->best, p->other, p->margin};
    if (!p->host_rows || !p->host_row || !p->host_weight || !p->loss_weight || !p->margin ||
        !p->target || !p->best || !p->other || !p->row || !p->drawn || !p->sample)
        return err_set(err, ERR_NO_MEMORY, "no memory for the moments of %d tokens", p->max_rows);
    p->memory = b->ops->alloc(b, (size_t)place(p, NULL), err);
    if (!p->memory)
        return -1;
    place(p, p->memory);
    return 0;
}

int model_moments_open(struct model_moments_pass **out, struct model *model, int32_t max_rows,
                       struct err *err)
{
    struct model_moments_pass *p = calloc(1, sizeof *p);

    *out = NULL;
    if (!p)
        return err_set(err, ERR_NO_MEMORY, "no memory for a pass over moments");
    p->model = model;
    p->max_rows = max_rows;
    p->shared = !model->backend->ops->memory;
    if (open_memory(p, err) || model_weights_alloc(&p->grads, model, err) ||
        model_training_open(&p->training, model, max_rows, false, err)) {
        model_moments_free(p);
        return -1;
    }
    *out = p;
    return 0;
}

void model_moments_free(struct model_moments_pass *pass)
{
    if (!pass)
        return;
    model_training_free(pass->training);
    model_weights_release(&pass->grads);
    if (pass->memory)
        pass->model->backend->ops->free(pass->model->backend, pass->memory);
    free(pass->sample);
    free(pass->drawn);
    free(pass->row);
    free(pass->other);
    free(pass->best);
    free(pass->target);
    free(pass->margin);
    free(pass->loss_weight);
    free(pass->host_weight);
    free(pass->host_row);
    free(pass->host_rows);
    free(pass);
}

/* ------------------------------------------------------------------ sums */

/* to += Σ x·xᵀ, with the rows' weights where `weighted`. */
static void add_gram(struct model_moments_pass *p, const struct tensor *x, bool weighted, float *to)
{
    struct backend *b = p->model->backend;
    const int64_t n = x->shape[1], square[2] = {n, n}, rows[2] = {x->shape[0], n};
    size_t bytes = (size_t)(n * n) * sizeof *to;
    struct gram_args a = {.x = *x,
                          .out = tensor_view(p->shared ? to : p->sum.data, DTYPE_F32, 2, square)};

    if (weighted) {
        a.weight = model_first_rows(p->row_weight, x->shape[0]);
        a.scaled = tensor_view(p->scaled.data, p->scaled.dtype, 2, rows);
    }
    if (!p->shared)
        b->ops->upload(b, a.out.data, to, bytes);
    b->ops->gram(b, &a);
    if (!p->shared)
        b->ops->download(b, to, a.out.data, bytes);
}

static double sum_of_squares(const float *x, int64_t n)
{
    double lane[8] = {0}, sum = 0; /* so that no sum waits for the one before */
    int64_t i = 0;

    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++)
            lane[k] += (double)x[i + k] * (double)x[i + k];
    for (; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    for (int k = 0; k < 8; k++)
        sum += lane[k];
    return sum;
}

/* The rows' squared gradients, to the backend; their sum. */
static double weigh_rows(struct model_moments_pass *p, const struct tensor *g)
{
    struct backend *b = p->model->backend;
    int64_t rows = g->shape[0], n = g->shape[1];
    struct tensor host = tensor_view(p->host_rows, g->dtype, 2, g->shape);
    double all = 0;

    if (p->shared)
        host.data = g->data;
    else
        b->ops->download(b, host.data, g->data, (size_t)(rows * n) * (size_t)dtype_size(g->dtype));
    for (int64_t r = 0; r < rows; r++) {
        const float *row = p->host_row;
        double sum;

        if (host.dtype == DTYPE_F32)
            row = (const float *)host.data + r * n;
        else
            tensor_to_f32(&host, r * n, n, p->host_row);
        sum = sum_of_squares(row, n);
        p->host_weight[r] = (float)sum;
        all += sum;
    }
    b->ops->upload(b, p->row_weight.data, p->host_weight, (size_t)rows * sizeof *p->host_weight);
    return all;
}

/* Tensors of a block before this one. */
static int32_t place_of(const struct model_config *c, enum base_layout_part part)
{
    int32_t before = 0;

    for (int i = 0; i < (int)part; i++)
        before += base_layout_has(c, i);
    return before;
}

static int32_t index_of(const struct model_config *c, int32_t layer, enum base_layout_part part)
{
    return 1 + layer * place_of(c, BASE_LAYOUT_BLOCK) + place_of(c, part); /* 1: the embedding */
}

int32_t model_moments_reads(const struct model *model, int32_t index)
{
    static const enum base_layout_part like[][2] = {{BASE_LAYOUT_K, BASE_LAYOUT_Q},
                                                    {BASE_LAYOUT_V, BASE_LAYOUT_Q},
                                                    {BASE_LAYOUT_UP, BASE_LAYOUT_GATE}};
    const struct model_config *c = &model->config;
    int32_t layer = (index - 1) / place_of(c, BASE_LAYOUT_BLOCK);

    for (size_t i = 0; i < sizeof like / sizeof like[0]; i++)
        if (index == index_of(c, layer, like[i][0]))
            return index_of(c, layer, like[i][1]);
    return index;
}

static void take_gradient(void *context, int32_t layer, enum base_layout_part part,
                          const struct tensor *g)
{
    struct model_moments_pass *p = context;
    struct model_moments *m = &p->moments[index_of(&p->model->config, layer, part)];

    p->current = m->h ? m : NULL;
    if (m->g)
        add_gram(p, g, false, m->g);
    if (m->h)
        m->weight += weigh_rows(p, g);
    if (m->g || m->h)
        m->rows += g->shape[0];
}

static void take_input(void *context, const struct tensor *x)
{
    struct model_moments_pass *p = context;

    if (p->current)
        add_gram(p, x, true, p->current->h);
}

static void take_taken(void *context, int32_t layer, enum base_layout_part part,
                       const struct tensor *x)
{
    struct model_moments_pass *p = context;
    struct model_moments *m = &p->moments[index_of(&p->model->config, layer, part)];

    if (!m->h)
        return;
    add_gram(p, x, false, m->h);
    m->weight += (double)x->shape[0];
    m->rows += x->shape[0];
}

static int take_step(void *context, int32_t done, int32_t all, struct err *err)
{
    const struct model_moments_args *a = ((struct model_moments_pass *)context)->args;

    return a->step ? a->step(a->context, (double)done / all, err) : 0;
}

/* ------------------------------------------------------------------ draws */

/* Logits of p->row[from, from + count). */
static void logits_of(struct model_moments_pass *p, const struct model_head_pass *head,
                      int32_t from, int32_t count)
{
    struct backend *b = p->model->backend;

    model_begin_batch(p->model, p->args->batch, head->rope);
    b->ops->head(b, &(struct head_args){
                        .config = &p->model->config,
                        .final_norm = p->args->weights->final_norm,
                        .head = p->args->weights->head,
                        .batch = p->args->batch,
                        .x = head->x,
                        .row = p->row + from,
                        .count = count,
                        .n = model_first_rows(head->n, count),
                        .logits = model_first_rows(head->logits, count),
                    });
}

struct draw {
    double temperature; /* 0: the best one, which leaves the logits alone */
    uint64_t first;     /* random number of row 0 */
    int32_t *token;     /* [max_rows] out, of the rows that are drawn for */
};

static int choose(struct model_moments_pass *p, const struct model_head_pass *head, int32_t from,
                  int32_t count, const struct draw *draw, struct err *err)
{
    struct backend *b = p->model->backend;

    for (int32_t i = 0; i < count; i++)
        p->sample[i] = (struct sample_row){
            .temperature = draw->temperature,
            .top_p = 1,
            .seed = p->args->seed,
            .index = draw->first + (uint64_t)p->row[from + i],
        };
    /* A device has room for the arrays of one pass behind a begin. */
    model_begin_batch(p->model, p->args->batch, head->rope);
    b->ops->sample(b, &(struct sample_args){
                          .logits = model_first_rows(head->logits, count),
                          .row = p->sample,
                          .token = model_first_rows(p->token, count),
                      });
    b->ops->download(b, p->drawn, p->token.data, (size_t)count * sizeof *p->drawn);
    if (backend_check(b, err))
        return -1;
    for (int32_t i = 0; i < count; i++) {
        if (p->drawn[i] < 0)
            return err_set(err, ERR_INVALID, "what the model gives is not finite");
        draw->token[p->row[from + i]] = p->drawn[i];
    }
    return 0;
}

static int choose_targets(struct model_moments_pass *p, const struct model_head_pass *head,
                          int32_t from, int32_t count, struct err *err)
{
    const struct draw draw = {1, p->args->first, p->target};

    logits_of(p, head, from, count);
    return choose(p, head, from, count, &draw, err);
}

/* The best token, and another one beside it. */
static int choose_rivals(struct model_moments_pass *p, const struct model_head_pass *head,
                         int32_t from, int32_t count, struct err *err)
{
    struct backend *b = p->model->backend;
    const struct draw best = {0, 0, p->best}, other = {1, p->args->first + RIVALS, p->other};
    const float never = -INFINITY;

    logits_of(p, head, from, count);
    if (choose(p, head, from, count, &best, err))
        return -1;
    for (int32_t i = 0; i < count; i++)
        b->ops->upload(
            b, (float *)head->logits.data + i * head->logits.shape[1] + p->best[p->row[from + i]],
            &never, sizeof never);
    return choose(p, head, from, count, &other, err);
}

/* For the rows whose weight is not 0, a chunk of them at a time. */
static int each_chunk(struct model_moments_pass *p, const struct model_head_pass *head,
                      const float *weight,
                      int (*draw)(struct model_moments_pass *, const struct model_head_pass *,
                                  int32_t from, int32_t count, struct err *),
                      struct err *err)
{
    int32_t chunk = (int32_t)head->logits.shape[0], count = 0;

    for (int32_t r = 0; r < p->args->batch->rows; r++)
        if (weight[r] != 0)
            p->row[count++] = r;
    for (int32_t from = 0; from < count; from += chunk)
        if (draw(p, head, from, count - from < chunk ? count - from : chunk, err))
            return -1;
    return 0;
}

static int take_head(void *context, const struct model_head_pass *head, struct err *err)
{
    struct model_moments_pass *p = context;
    const struct model_moments_args *a = p->args;

    if (a->target)
        return 0;
    for (int32_t r = 0; r < a->batch->rows; r++) {
        bool minus = rng_at(a->seed, STREAM_SIGN, a->first + (uint64_t)r) & 1;

        p->target[r] = p->best[r] = p->other[r] = 0;
        p->margin[r] = !a->margin || p->loss_weight[r] == 0 ? 0
                       : minus                              ? -a->margin[r]
                                                            : a->margin[r];
    }
    if (each_chunk(p, head, p->loss_weight, choose_targets, err) ||
        each_chunk(p, head, p->margin, choose_rivals, err))
        return -1;
    model_begin_batch(p->model, a->batch, head->rope); /* of the loss and backward */
    return 0;
}

/* ------------------------------------------------------------------ a micro-batch */

int model_moments_add(struct model_moments_pass *pass, const struct model_moments_args *args,
                      struct model_moments *moments, struct model_loss *loss, struct err *err)
{
    struct batch batch = *args->batch;
    struct model_moments_args a = *args;
    struct model_loss unused;
    struct model_watch watch = {
        .context = pass,
        .step = take_step,
        .head = take_head,
        .gradient = take_gradient,
        .input = take_input,
    };

    assert(batch.rows <= pass->max_rows);
    assert(args->target ? !args->margin : !args->margins);
    batch.serving = false;
    a.batch = &batch;
    pass->args = &a;
    pass->moments = moments;
    if (args->inputs_only) {
        watch.taken = take_taken;
        return model_forward_watched(pass->training, args->weights, &batch, &watch, err);
    }
    for (int32_t r = 0; r < batch.rows; r++)
        pass->loss_weight[r] = args->weight ? args->weight[r] : 1;
    return model_loss_watched(pass->training,
                              &(struct model_loss_args){
                                  .weights = args->weights,
                                  .grads = &pass->grads,
                                  .batch = &batch,
                                  .target = args->target ? args->target : pass->target,
                                  .weight = pass->loss_weight,
                                  .margins = args->margin ? &pass->margins : args->margins,
                              },
                              &watch, loss ? loss : &unused, err);
}

#define TILE 64 /* of a mirrored matrix: rows that stay in the cache */

void model_moments_mirror(float *m, int64_t n)
{
    for (int64_t i0 = 0; i0 < n; i0 += TILE)
        for (int64_t j0 = 0; j0 <= i0; j0 += TILE)
            for (int64_t i = i0; i < n && i < i0 + TILE; i++)
                for (int64_t j = j0; j < i && j < j0 + TILE; j++)
                    m[i * n + j] = m[j * n + i];
}
