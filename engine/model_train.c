#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_pass.h"

/* Rows whose logits are held at once: 25 MB for 49,152 tokens. A device of its own memory has room
 * for more, and needs it to be busy. */
#define LOSS_CHUNK 128
#define LOSS_CHUNK_DEVICE 1024

struct layer_activations { /* what backward needs of one layer */
    struct tensor x, attn_rstd, q_raw, k_raw, q, k, v, lse, attn, x_mid, mlp_rstd, gate, up;
};

struct model_training {
    struct model *model;
    int32_t max_rows;
    bool teacher;
    void *memory;
    struct layer_activations *layer; /* [layers] */
    struct tensor rope, x_out, n, dn, dx, act, d_act, dq, dk, dv, d_attn, delta, nll, correct;
    struct tensor head_n, head_dn, logits; /* [rows of a chunk, …] */
    struct tensor teacher_x;               /* [max_rows, D], with a teacher */
    struct tensor teacher_logits;          /* [rows of a chunk, V], with a teacher */
    float *host_nll;                       /* [max_rows] */
    int32_t *host_correct;
    const struct model_watch *watch; /* of the pass that runs, or NULL */
    int32_t steps, all_steps;        /* that the watch is told */
};

static void place_layer(struct layer_activations *l, struct model_arena *a,
                        const struct model_config *c, enum dtype precision, int32_t rows)
{
    int64_t query = model_config_width(c, WIDTH_QUERY), key = model_config_width(c, WIDTH_KEY);

    l->x = model_arena_carve(a, precision, rows, c->hidden);
    l->attn_rstd = model_arena_carve(a, DTYPE_F32, rows, 0);
    if (c->qk_norm) {
        l->q_raw = model_arena_carve(a, precision, rows, query);
        l->k_raw = model_arena_carve(a, precision, rows, key);
    }
    l->q = model_arena_carve(a, precision, rows, query);
    l->k = model_arena_carve(a, precision, rows, key);
    l->v = model_arena_carve(a, precision, rows, key);
    l->lse = model_arena_carve(a, DTYPE_F32, rows, c->heads);
    l->attn = model_arena_carve(a, precision, rows, query);
    l->x_mid = model_arena_carve(a, precision, rows, c->hidden);
    l->mlp_rstd = model_arena_carve(a, DTYPE_F32, rows, 0);
    l->gate = model_arena_carve(a, precision, rows, c->intermediate);
    l->up = model_arena_carve(a, precision, rows, c->intermediate);
}

static int64_t place_training(struct model_training *t, const struct backend *b,
                              const struct model_config *c, char *memory)
{
    struct model_arena a = {.memory = memory};
    int64_t query = model_config_width(c, WIDTH_QUERY), key = model_config_width(c, WIDTH_KEY);
    int64_t chunk = b->ops->memory ? LOSS_CHUNK_DEVICE : LOSS_CHUNK;
    enum dtype precision = b->activation;

    chunk = t->max_rows < chunk ? t->max_rows : chunk;
    for (int32_t l = 0; l < c->layers; l++) {
        struct layer_activations scratch = {0};

        place_layer(t->layer ? &t->layer[l] : &scratch, &a, c, precision, t->max_rows);
    }
    t->rope = model_arena_carve(&a, DTYPE_F32, t->max_rows, c->head_dim);
    t->x_out = model_arena_carve(&a, precision, t->max_rows, c->hidden);
    t->n = model_arena_carve(&a, precision, t->max_rows, c->hidden);
    t->dn = model_arena_carve(&a, precision, t->max_rows, c->hidden);
    t->dx = model_arena_carve(&a, precision, t->max_rows, c->hidden);
    t->act = model_arena_carve(&a, precision, t->max_rows, c->intermediate);
    t->d_act = model_arena_carve(&a, precision, t->max_rows, c->intermediate);
    t->dq = model_arena_carve(&a, precision, t->max_rows, query);
    t->dk = model_arena_carve(&a, precision, t->max_rows, key);
    t->dv = model_arena_carve(&a, precision, t->max_rows, key);
    t->d_attn = model_arena_carve(&a, precision, t->max_rows, query);
    t->delta = model_arena_carve(&a, DTYPE_F32, t->max_rows, c->heads);
    t->nll = model_arena_carve(&a, DTYPE_F32, t->max_rows, 0);
    t->correct = model_arena_carve(&a, DTYPE_I32, t->max_rows, 0);
    t->head_n = model_arena_carve(&a, precision, chunk, c->hidden);
    t->head_dn = model_arena_carve(&a, precision, chunk, c->hidden);
    t->logits = model_arena_carve(&a, DTYPE_F32, chunk, c->vocabulary);
    if (t->teacher) {
        t->teacher_x = model_arena_carve(&a, precision, t->max_rows, c->hidden);
        t->teacher_logits = model_arena_carve(&a, DTYPE_F32, chunk, c->vocabulary);
    }
    return a.used;
}

int64_t model_training_bytes(const struct backend *backend, const struct model_config *config,
                             int32_t max_rows, bool teacher)
{
    struct model_training t = {.max_rows = max_rows, .teacher = teacher};

    return place_training(&t, backend, config, NULL);
}

int model_training_open(struct model_training **out, struct model *model, int32_t max_rows,
                        bool teacher, struct err *err)
{
    const struct model_config *c = &model->config;
    struct model_training *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t)
        return err_set(err, ERR_NO_MEMORY, "no memory for a training pass");
    t->model = model;
    t->max_rows = max_rows;
    t->teacher = teacher;
    t->layer = calloc((size_t)c->layers, sizeof *t->layer);
    t->host_nll = calloc((size_t)max_rows, sizeof *t->host_nll);
    t->host_correct = calloc((size_t)max_rows, sizeof *t->host_correct);
    if (!t->layer || !t->host_nll || !t->host_correct) {
        err_set(err, ERR_NO_MEMORY, "no memory for a training pass of %d tokens", max_rows);
        goto fail;
    }
    t->memory = model->backend->ops->alloc(model->backend,
                                           (size_t)place_training(t, model->backend, c, NULL), err);
    if (!t->memory)
        goto fail;
    place_training(t, model->backend, c, t->memory);
    *out = t;
    return 0;
fail:
    model_training_free(t);
    return -1;
}

void model_training_free(struct model_training *training)
{
    if (!training)
        return;
    if (training->memory)
        training->model->backend->ops->free(training->model->backend, training->memory);
    free(training->host_correct);
    free(training->host_nll);
    free(training->layer);
    free(training);
}

/* Every tensor of a layer cut to the rows of this batch. */
static struct layer_activations activations_of(const struct model_training *t, int32_t layer,
                                               int32_t rows)
{
    struct layer_activations l = t->layer[layer];
    struct tensor *const all[] = {&l.x,    &l.attn_rstd, &l.q,        &l.k,    &l.v, &l.lse,
                                  &l.attn, &l.x_mid,     &l.mlp_rstd, &l.gate, &l.up};

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        *all[i] = model_first_rows(*all[i], rows);
    if (l.q_raw.data) {
        l.q_raw = model_first_rows(l.q_raw, rows);
        l.k_raw = model_first_rows(l.k_raw, rows);
    }
    return l;
}

/* ------------------------------------------------------------------ who watches */

#define FORWARD_STEPS 1 /* of a layer, as the watch is told */
#define BACKWARD_STEPS 3

static int watch_step(struct model_training *t, int32_t steps, struct err *err)
{
    t->steps += steps;
    return t->watch && t->watch->step
               ? t->watch->step(t->watch->context, t->steps, t->all_steps, err)
               : 0;
}

static void watch_gradient(const struct model_training *t, int32_t layer,
                           enum base_layout_part part, const struct tensor *g)
{
    if (t->watch)
        t->watch->gradient(t->watch->context, layer, part, g);
}

static void watch_input(const struct model_training *t, const struct tensor *x)
{
    if (t->watch)
        t->watch->input(t->watch->context, x);
}

static void watch_matrix(const struct model_training *t, int32_t layer, enum base_layout_part part,
                         const struct tensor *g, const struct tensor *x)
{
    watch_gradient(t, layer, part, g);
    watch_input(t, x);
}

static void watch_taken(const struct model_training *t, int32_t layer, enum base_layout_part part,
                        struct tensor x)
{
    if (t->watch && t->watch->taken)
        t->watch->taken(t->watch->context, layer, part, &x);
}

/* ------------------------------------------------------------------ forward */

/* Who reads the batch: the model or its teacher. Both leave their activations in the same place. */
struct forward_run {
    const struct model_weights *weights;
    const struct batch *batch;
    struct tensor x_out; /* [rows, D]: behind the last layer */
};

static void forward_layer(const struct model_training *t, const struct forward_run *run,
                          int32_t layer, struct tensor y)
{
    struct backend *b = t->model->backend;
    const struct model_config *c = &t->model->config;
    const struct layer_weights *w = &run->weights->layer[layer];
    int32_t rows = run->batch->rows;
    struct layer_activations l = activations_of(t, layer, rows);

    b->ops->attn_in(b, &(struct attn_in_args){
                           .config = c,
                           .weights = w,
                           .layer = layer,
                           .batch = run->batch,
                           .rope = model_first_rows(t->rope, rows),
                           .x = l.x,
                           .n = model_first_rows(t->n, rows),
                           .q = l.q,
                           .k = l.k,
                           .v = l.v,
                           .rstd = l.attn_rstd,
                           .q_raw = l.q_raw,
                           .k_raw = l.k_raw,
                       });
    watch_taken(t, layer, BASE_LAYOUT_Q, model_first_rows(t->n, rows));
    b->ops->attention(b, &(struct attention_args){
                             .config = c,
                             .layer = layer,
                             .batch = run->batch,
                             .q = l.q,
                             .k = l.k,
                             .v = l.v,
                             .out = l.attn,
                             .lse = l.lse,
                         });
    watch_taken(t, layer, BASE_LAYOUT_O, l.attn);
    b->ops->attn_out(b, &(struct attn_out_args){
                            .weights = w,
                            .layer = layer,
                            .batch = run->batch,
                            .attn = l.attn,
                            .x = l.x,
                            .y = l.x_mid,
                        });
    b->ops->mlp(b, &(struct mlp_args){
                       .config = c,
                       .weights = w,
                       .layer = layer,
                       .batch = run->batch,
                       .x = l.x_mid,
                       .n = model_first_rows(t->n, rows),
                       .gate = l.gate,
                       .up = l.up,
                       .act = model_first_rows(t->act, rows),
                       .rstd = l.mlp_rstd,
                       .y = y,
                   });
    watch_taken(t, layer, BASE_LAYOUT_GATE, model_first_rows(t->n, rows));
    watch_taken(t, layer, BASE_LAYOUT_DOWN, model_first_rows(t->act, rows));
}

static int forward(struct model_training *t, const struct forward_run *run, struct err *err)
{
    struct backend *b = t->model->backend;
    int32_t rows = run->batch->rows, layers = t->model->config.layers;

    b->ops->embed(b, &(struct embed_args){
                         .batch = run->batch,
                         .embed = run->weights->embed,
                         .x = layers > 0 ? model_first_rows(t->layer[0].x, rows) : run->x_out,
                     });
    for (int32_t l = 0; l < layers; l++) {
        forward_layer(t, run, l,
                      l + 1 < layers ? model_first_rows(t->layer[l + 1].x, rows) : run->x_out);
        if (watch_step(t, FORWARD_STEPS, err))
            return -1;
    }
    return 0;
}

static size_t teacher_bytes(const struct model_training *t, int32_t rows)
{
    return (size_t)rows * (size_t)t->teacher_x.shape[1] * (size_t)dtype_size(t->teacher_x.dtype);
}

/* The teacher comes first: backward needs the model's own activations. */
static int forward_both(struct model_training *t, const struct model_loss_args *args,
                        struct err *err)
{
    int32_t rows = args->batch->rows;
    struct forward_run run = {.batch = args->batch};
    struct backend *b = t->model->backend;

    model_begin_batch(t->model, args->batch, model_first_rows(t->rope, rows));
    if (args->teacher_rows) {
        b->ops->upload(b, t->teacher_x.data, args->teacher_rows, teacher_bytes(t, rows));
    } else if (args->teacher) {
        run.weights = args->teacher;
        run.x_out = model_first_rows(t->teacher_x, rows);
        if (forward(t, &run, err))
            return -1;
    }
    run.weights = args->weights;
    run.x_out = model_first_rows(t->x_out, rows);
    return forward(t, &run, err);
}

/* ------------------------------------------------------------------ loss and backward */

static void backward_layer(const struct model_training *t, const struct model_loss_args *args,
                           int32_t layer)
{
    struct backend *b = t->model->backend;
    const struct model_config *c = &t->model->config;
    const struct layer_weights *w = &args->weights->layer[layer];
    struct layer_weights *grads = &args->grads->layer[layer];
    int32_t rows = args->batch->rows;
    struct layer_activations l = activations_of(t, layer, rows);
    struct tensor dx = model_first_rows(t->dx, rows), d_attn = model_first_rows(t->d_attn, rows);
    struct tensor n = model_first_rows(t->n, rows), dn = model_first_rows(t->dn, rows);
    struct tensor dq = model_first_rows(t->dq, rows), dk = model_first_rows(t->dk, rows);
    struct tensor dv = model_first_rows(t->dv, rows), act = model_first_rows(t->act, rows);

    watch_gradient(t, layer, BASE_LAYOUT_DOWN, &dx);
    b->ops->mlp_backward(b, &(struct mlp_backward_args){
                                .config = c,
                                .weights = w,
                                .grads = grads,
                                .x = l.x_mid,
                                .rstd = l.mlp_rstd,
                                .gate = l.gate,
                                .up = l.up,
                                .n = n,
                                .dn = dn,
                                .act = act,
                                .d_act = model_first_rows(t->d_act, rows),
                                .dx = dx,
                            });
    watch_input(t, &act);
    watch_matrix(t, layer, BASE_LAYOUT_GATE, &l.gate, &n);
    watch_matrix(t, layer, BASE_LAYOUT_UP, &l.up, &n);
    watch_matrix(t, layer, BASE_LAYOUT_O, &dx, &l.attn);
    b->ops->attn_out_backward(b, &(struct attn_out_backward_args){
                                     .weights = w,
                                     .grads = grads,
                                     .attn = l.attn,
                                     .dy = dx,
                                     .d_attn = d_attn,
                                 });
    b->ops->attention_backward(b, &(struct attention_backward_args){
                                      .config = c,
                                      .batch = args->batch,
                                      .q = l.q,
                                      .k = l.k,
                                      .v = l.v,
                                      .out = l.attn,
                                      .lse = l.lse,
                                      .d_out = d_attn,
                                      .delta = model_first_rows(t->delta, rows),
                                      .dq = dq,
                                      .dk = dk,
                                      .dv = dv,
                                  });
    b->ops->attn_in_backward(b, &(struct attn_in_backward_args){
                                    .config = c,
                                    .weights = w,
                                    .grads = grads,
                                    .batch = args->batch,
                                    .rope = model_first_rows(t->rope, rows),
                                    .x = l.x,
                                    .rstd = l.attn_rstd,
                                    .q_raw = l.q_raw,
                                    .k_raw = l.k_raw,
                                    .dq = dq,
                                    .dk = dk,
                                    .dv = dv,
                                    .n = n,
                                    .dn = dn,
                                    .dx = dx,
                                });
    watch_matrix(t, layer, BASE_LAYOUT_Q, &dq, &n);
    watch_matrix(t, layer, BASE_LAYOUT_K, &dk, &n);
    watch_matrix(t, layer, BASE_LAYOUT_V, &dv, &n);
}

static int loss_and_gradient(struct model_training *t, const struct model_loss_args *args,
                             struct err *err)
{
    struct backend *b = t->model->backend;
    int32_t rows = args->batch->rows;
    struct head_loss_args head = {
        .config = &t->model->config,
        .final_norm = args->weights->final_norm,
        .head = args->weights->head,
        .batch = args->batch,
        .target = args->target,
        .weight = args->weight,
        .margins = args->margins,
        .x = model_first_rows(t->x_out, rows),
        .nll = model_first_rows(t->nll, rows),
        .correct = model_first_rows(t->correct, rows),
        .n = t->head_n,
        .dn = t->head_dn,
        .logits = t->logits,
    };

    if (args->teacher) {
        head.teacher_x = model_first_rows(t->teacher_x, rows);
        head.teacher_norm = args->teacher->final_norm;
        head.teacher_head = args->teacher->head;
        head.teacher_logits = t->teacher_logits;
    }
    if (args->grads) {
        head.dx = model_first_rows(t->dx, rows);
        head.d_final_norm = args->grads->final_norm;
        head.d_head = args->grads->head;
    }
    b->ops->head_loss(b, &head);
    if (!args->grads)
        return 0;
    for (int32_t l = t->model->config.layers - 1; l >= 0; l--) {
        backward_layer(t, args, l);
        if (watch_step(t, BACKWARD_STEPS, err))
            return -1;
    }
    b->ops->embed_backward(b, &(struct embed_backward_args){
                                  .batch = args->batch,
                                  .dx = model_first_rows(t->dx, rows),
                                  .d_embed = args->grads->embed,
                              });
    return 0;
}

static int watch_head(const struct model_training *t, int32_t rows, struct err *err)
{
    if (!t->watch)
        return 0;
    return t->watch->head(t->watch->context,
                          &(struct model_head_pass){
                              .rope = model_first_rows(t->rope, rows),
                              .x = model_first_rows(t->x_out, rows),
                              .n = t->head_n,
                              .logits = t->logits,
                              .nll = model_first_rows(t->nll, rows),
                              .correct = model_first_rows(t->correct, rows),
                          },
                          err);
}

int model_loss(struct model_training *t, const struct model_loss_args *args, struct model_loss *out,
               struct err *err)
{
    struct backend *b = t->model->backend;
    struct batch batch = *args->batch;
    struct model_loss_args a = *args;

    batch.serving = false;
    a.batch = &batch;
    assert(batch.rows > 0 && batch.rows <= t->max_rows);
    assert(!batch.slot && batch.segments.count == 0);
    assert(!args->teacher || (t->teacher && !args->margins));
    assert(!args->teacher_rows || args->teacher);
    model_assert_batch(t->model, &batch, NULL);
    if (forward_both(t, &a, err) || watch_head(t, batch.rows, err) || loss_and_gradient(t, &a, err))
        return -1;
    b->ops->download(b, t->host_nll, t->nll.data, (size_t)batch.rows * sizeof *t->host_nll);
    b->ops->download(b, t->host_correct, t->correct.data,
                     (size_t)batch.rows * sizeof *t->host_correct);
    if (backend_check(b, err))
        return -1;
    *out = (struct model_loss){0};
    for (int32_t r = 0; r < batch.rows; r++) {
        if (args->weight[r] == 0)
            continue;
        out->nll += (double)t->host_nll[r];
        out->weighted += (double)args->weight[r] * (double)t->host_nll[r];
        out->correct += t->host_correct[r];
        out->rows++;
    }
    return 0;
}

int model_teacher_rows(const struct model_training *t, int32_t rows, void *host, struct err *err)
{
    struct backend *b = t->model->backend;

    assert(t->teacher && rows <= t->max_rows);
    b->ops->download(b, host, t->teacher_x.data, teacher_bytes(t, rows));
    return backend_check(b, err);
}

int model_loss_watched(struct model_training *t, const struct model_loss_args *args,
                       const struct model_watch *watch, struct model_loss *out, struct err *err)
{
    int rc;

    assert(args->grads && !args->teacher);
    t->watch = watch;
    t->steps = 0;
    t->all_steps = t->model->config.layers * (FORWARD_STEPS + BACKWARD_STEPS);
    rc = model_loss(t, args, out, err);
    t->watch = NULL;
    return rc;
}

int model_forward_watched(struct model_training *t, const struct model_weights *weights,
                          const struct batch *batch, const struct model_watch *watch,
                          struct err *err)
{
    int rc;

    assert(batch->rows > 0 && batch->rows <= t->max_rows && !batch->serving);
    model_assert_batch(t->model, batch, NULL);
    t->watch = watch;
    t->steps = 0;
    t->all_steps = t->model->config.layers * FORWARD_STEPS;
    rc = forward_both(t, &(struct model_loss_args){.weights = weights, .batch = batch}, err);
    t->watch = NULL;
    return rc ? -1 : backend_check(t->model->backend, err);
}
