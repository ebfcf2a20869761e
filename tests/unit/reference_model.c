#include "tests/unit/reference_model.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/rng.h"

static void *must(void *memory)
{
    if (!memory) {
        fprintf(stderr, "out of memory\n");
        abort();
    }
    return memory;
}

/* ------------------------------------------------------------------ models in memory */

struct model_config memory_model_config(int32_t kv_heads, bool tied, bool bias, bool qk_norm)
{
    return (struct model_config){
        .architecture = "llama",
        .layers = 2,
        .hidden = 40,
        .intermediate = 56,
        .heads = 4,
        .kv_heads = kv_heads,
        .head_dim = 10,
        .vocabulary = 70,
        .context = 128,
        .rms_norm_eps = 1e-5f,
        .rope_theta = 10000,
        .tied_embeddings = tied,
        .attention_bias = bias,
        .qk_norm = qk_norm,
    };
}

static void add_tensor(struct memory_model *m, enum dtype dtype, uint64_t seed, const char *name,
                       int64_t rows, int64_t cols)
{
    const int64_t shape[2] = {rows, cols};
    int rank = cols > 0 ? 2 : 1;
    int64_t n = rows * (cols > 0 ? cols : 1);
    bool norm = strstr(name, "norm") != NULL;
    double size = rank == 2 ? 1.5 / sqrt((double)cols) : 0.3;
    void *data = must(malloc((size_t)n * 4 + 64));

    assert(m->count < 256);
    for (int64_t i = 0; i < n; i++) {
        float x = (float)((norm ? 1 : 0) +
                          size * (2 * rng_unit_at(seed, (uint64_t)m->count, (uint64_t)i) - 1));

        if (dtype == DTYPE_F32)
            ((float *)data)[i] = x;
        else
            ((uint16_t *)data)[i] = dtype == DTYPE_BF16 ? f32_to_bf16(x) : f32_to_f16(x);
    }
    snprintf(m->name[m->count], sizeof m->name[0], "%s", name);
    m->tensor[m->count++] = tensor_view(data, dtype, rank, shape);
}

static void add_layer(struct memory_model *m, enum dtype dtype, uint64_t seed, int32_t layer)
{
    const struct model_config *c = &m->config;
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim;
    int64_t k = (int64_t)c->kv_heads * c->head_dim, f = c->intermediate;
    const struct {
        const char *name;
        int64_t rows, cols;
        bool there;
    } list[] = {
        {"input_layernorm.weight", d, 0, true},
        {"self_attn.q_proj.weight", q, d, true},
        {"self_attn.k_proj.weight", k, d, true},
        {"self_attn.v_proj.weight", k, d, true},
        {"self_attn.o_proj.weight", d, q, true},
        {"self_attn.q_proj.bias", q, 0, c->attention_bias},
        {"self_attn.k_proj.bias", k, 0, c->attention_bias},
        {"self_attn.v_proj.bias", k, 0, c->attention_bias},
        {"self_attn.q_norm.weight", c->head_dim, 0, c->qk_norm},
        {"self_attn.k_norm.weight", c->head_dim, 0, c->qk_norm},
        {"post_attention_layernorm.weight", d, 0, true},
        {"mlp.gate_proj.weight", f, d, true},
        {"mlp.up_proj.weight", f, d, true},
        {"mlp.down_proj.weight", d, f, true},
    };
    char name[MODEL_NAME_MAX];

    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        if (!list[i].there)
            continue;
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, list[i].name);
        add_tensor(m, dtype, seed, name, list[i].rows, list[i].cols);
    }
}

struct memory_model *memory_model_new(const struct model_config *config, enum dtype dtype,
                                      uint64_t seed)
{
    struct memory_model *m = must(calloc(1, sizeof *m));

    m->config = *config;
    add_tensor(m, dtype, seed, "model.embed_tokens.weight", config->vocabulary, config->hidden);
    for (int32_t l = 0; l < config->layers; l++)
        add_layer(m, dtype, seed, l);
    add_tensor(m, dtype, seed, "model.norm.weight", config->hidden, 0);
    if (!config->tied_embeddings)
        add_tensor(m, dtype, seed, "lm_head.weight", config->vocabulary, config->hidden);
    return m;
}

void memory_model_free(struct memory_model *model)
{
    for (int32_t i = 0; model && i < model->count; i++)
        free(model->tensor[i].data);
    free(model);
}

static bool find_tensor(const void *context, const char *name, struct tensor *out)
{
    const struct memory_model *m = context;

    for (int32_t i = 0; i < m->count; i++)
        if (strcmp(m->name[i], name) == 0) {
            *out = m->tensor[i];
            return true;
        }
    return false;
}

struct model_source memory_model_source(const struct memory_model *model)
{
    return (struct model_source){.config = &model->config, .tensor = find_tensor, .context = model};
}

/* ------------------------------------------------------------------ the reference: weights */

static double *place(struct reference *r, const struct memory_model *m, const char *name)
{
    for (int32_t i = 0; i < m->count; i++)
        if (strcmp(m->name[i], name) == 0)
            return r->memory + r->at[i];
    return NULL;
}

static struct reference_linear place_linear(struct reference *r, const struct memory_model *m,
                                            int32_t layer, const char *stem)
{
    struct reference_linear linear;
    char name[MODEL_NAME_MAX];

    snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, stem);
    linear.w = place(r, m, name);
    snprintf(name, sizeof name, "model.layers.%d.%s.bias", layer, stem);
    linear.b = place(r, m, name);
    return linear;
}

static double *place_norm(struct reference *r, const struct memory_model *m, int32_t layer,
                          const char *stem)
{
    char name[MODEL_NAME_MAX];

    snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, stem);
    return place(r, m, name);
}

static void place_all(struct reference *r, const struct memory_model *m)
{
    r->embed = place(r, m, "model.embed_tokens.weight");
    r->final_norm = place(r, m, "model.norm.weight");
    r->head = m->config.tied_embeddings ? r->embed : place(r, m, "lm_head.weight");
    for (int32_t l = 0; l < m->config.layers; l++) {
        struct reference_layer *layer = &r->layer[l];

        layer->attn_norm = place_norm(r, m, l, "input_layernorm");
        layer->q_norm = place_norm(r, m, l, "self_attn.q_norm");
        layer->k_norm = place_norm(r, m, l, "self_attn.k_norm");
        layer->mlp_norm = place_norm(r, m, l, "post_attention_layernorm");
        layer->q = place_linear(r, m, l, "self_attn.q_proj");
        layer->k = place_linear(r, m, l, "self_attn.k_proj");
        layer->v = place_linear(r, m, l, "self_attn.v_proj");
        layer->o = place_linear(r, m, l, "self_attn.o_proj");
        layer->gate = place_linear(r, m, l, "mlp.gate_proj");
        layer->up = place_linear(r, m, l, "mlp.up_proj");
        layer->down = place_linear(r, m, l, "mlp.down_proj");
    }
}

struct reference *reference_new(const struct memory_model *m)
{
    struct reference *r = must(calloc(1, sizeof *r));

    assert(m->config.layers <= 8 && m->config.head_dim <= 256);
    r->config = m->config;
    for (int32_t i = 0; i < m->count; i++)
        r->at[i + 1] = r->at[i] + tensor_elements(&m->tensor[i]);
    r->elements = r->at[m->count];
    r->memory = must(malloc((size_t)r->elements * sizeof *r->memory));
    for (int32_t i = 0; i < m->count; i++)
        for (int64_t k = 0; k < r->at[i + 1] - r->at[i]; k++) {
            float x;

            tensor_to_f32(&m->tensor[i], k, 1, &x);
            r->memory[r->at[i] + k] = (double)x;
        }
    /* The frequencies are F32 in every implementation. */
    for (int32_t i = 0; i < m->config.head_dim / 2; i++)
        r->inv_freq[i] =
            (double)(float)pow((double)m->config.rope_theta, -2.0 * i / m->config.head_dim);
    place_all(r, m);
    return r;
}

void reference_free(struct reference *r)
{
    if (r)
        free(r->memory);
    free(r);
}

/* ------------------------------------------------------------------ the reference: stages */

static void norm(const double *x, const double *w, double *n, int32_t width, double eps)
{
    double sum = 0;

    for (int32_t i = 0; i < width; i++)
        sum += x[i] * x[i];
    for (int32_t i = 0; i < width; i++)
        n[i] = x[i] / sqrt(sum / width + eps) * w[i];
}

static void linear(const struct reference_linear *l, const double *x, double *y, int32_t out,
                   int32_t in)
{
    for (int32_t o = 0; o < out; o++) {
        y[o] = l->b ? l->b[o] : 0;
        for (int32_t i = 0; i < in; i++)
            y[o] += l->w[o * in + i] * x[i];
    }
}

static void rotate(const struct reference *r, double *x, int32_t heads, int32_t position)
{
    int32_t half = r->config.head_dim / 2;

    for (int32_t h = 0; h < heads; h++, x += 2 * half)
        for (int32_t i = 0; i < half; i++) {
            double angle = (double)((float)position * (float)r->inv_freq[i]);
            double a = x[i], b = x[half + i];

            x[i] = a * cos(angle) - b * sin(angle);
            x[half + i] = b * cos(angle) + a * sin(angle);
        }
}

static void norm_heads(const struct reference *r, double *x, int32_t heads, const double *w)
{
    double n[256];

    for (int32_t h = 0; w && h < heads; h++, x += r->config.head_dim) {
        norm(x, w, n, r->config.head_dim, (double)r->config.rms_norm_eps);
        memcpy(x, n, (size_t)r->config.head_dim * sizeof *x);
    }
}

void reference_attn_in(const struct reference *r, int32_t layer, const struct batch *batch,
                       const double *x, double *q, double *k, double *v)
{
    const struct model_config *c = &r->config;
    const struct reference_layer *w = &r->layer[layer];
    int32_t d = c->hidden, query = c->heads * c->head_dim, key = c->kv_heads * c->head_dim;
    double *n = must(malloc((size_t)d * sizeof *n));

    for (int32_t t = 0; t < batch->rows; t++, x += d, q += query, k += key, v += key) {
        norm(x, w->attn_norm, n, d, (double)c->rms_norm_eps);
        linear(&w->q, n, q, query, d);
        linear(&w->k, n, k, key, d);
        linear(&w->v, n, v, key, d);
        norm_heads(r, q, c->heads, w->q_norm);
        norm_heads(r, k, c->kv_heads, w->k_norm);
        rotate(r, q, c->heads, batch->position[t]);
        rotate(r, k, c->kv_heads, batch->position[t]);
    }
    free(n);
}

static void attend(const struct model_config *c, const double *q, const double *k, const double *v,
                   int32_t keys, double *out)
{
    int32_t e = c->head_dim, ld = c->kv_heads * c->head_dim;
    double *p = must(malloc((size_t)keys * sizeof *p)), sum = 0, max = -INFINITY;

    for (int32_t s = 0; s < keys; s++) {
        p[s] = 0;
        for (int32_t i = 0; i < e; i++)
            p[s] += q[i] * k[s * ld + i] / sqrt((double)e);
        max = p[s] > max ? p[s] : max;
    }
    for (int32_t s = 0; s < keys; s++)
        sum += p[s] = exp(p[s] - max);
    for (int32_t i = 0; i < e; i++)
        out[i] = 0;
    for (int32_t s = 0; s < keys; s++)
        for (int32_t i = 0; i < e; i++)
            out[i] += p[s] / sum * v[s * ld + i];
    free(p);
}

void reference_attention(const struct reference *r, const struct batch *batch, const double *q,
                         const double *k, const double *v, double *out)
{
    const struct model_config *c = &r->config;
    int32_t e = c->head_dim, query = c->heads * e, key = c->kv_heads * e;

    for (int32_t d = 0; d < batch->docs; d++) {
        int32_t start = batch->cu_seqlens[d];

        for (int32_t t = start; t < batch->cu_seqlens[d + 1]; t++)
            for (int32_t h = 0; h < c->heads; h++) {
                int32_t kv = h / (c->heads / c->kv_heads);

                attend(c, q + t * query + h * e, k + start * key + kv * e, v + start * key + kv * e,
                       t - start + 1, out + t * query + h * e);
            }
    }
}

void reference_attn_out(const struct reference *r, int32_t layer, int32_t rows, const double *attn,
                        const double *x, double *y)
{
    int32_t d = r->config.hidden, query = r->config.heads * r->config.head_dim;
    double *o = must(malloc((size_t)d * sizeof *o));

    for (int32_t t = 0; t < rows; t++) {
        linear(&r->layer[layer].o, attn + t * query, o, d, query);
        for (int32_t i = 0; i < d; i++)
            y[t * d + i] = x[t * d + i] + o[i];
    }
    free(o);
}

void reference_mlp(const struct reference *r, int32_t layer, int32_t rows, const double *x,
                   double *y)
{
    const struct reference_layer *w = &r->layer[layer];
    int32_t d = r->config.hidden, f = r->config.intermediate;
    double *n = must(malloc((size_t)(2 * d + 2 * f) * sizeof *n));
    double *o = n + d, *gate = o + d, *up = gate + f;

    for (int32_t t = 0; t < rows; t++) {
        norm(x + t * d, w->mlp_norm, n, d, (double)r->config.rms_norm_eps);
        linear(&w->gate, n, gate, f, d);
        linear(&w->up, n, up, f, d);
        for (int32_t i = 0; i < f; i++)
            gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
        linear(&w->down, gate, o, d, f);
        for (int32_t i = 0; i < d; i++)
            y[t * d + i] = x[t * d + i] + o[i];
    }
    free(n);
}

void reference_head(const struct reference *r, int32_t rows, const double *x, double *logits)
{
    int32_t d = r->config.hidden, vocabulary = r->config.vocabulary;
    struct reference_linear head = {.w = r->head};
    double *n = must(malloc((size_t)d * sizeof *n));

    for (int32_t t = 0; t < rows; t++) {
        norm(x + t * d, r->final_norm, n, d, (double)r->config.rms_norm_eps);
        linear(&head, n, logits + t * vocabulary, vocabulary, d);
    }
    free(n);
}

static double log_sum_exp(const double *logit, int32_t n)
{
    double sum = 0, max = -INFINITY;

    for (int32_t i = 0; i < n; i++)
        max = logit[i] > max ? logit[i] : max;
    for (int32_t i = 0; i < n; i++)
        sum += exp(logit[i] - max);
    return log(sum) + max;
}

double reference_head_loss(const struct reference *r, int32_t rows, const double *x,
                           const int32_t *target, const float *weight)
{
    int32_t vocabulary = r->config.vocabulary;
    double *logits = must(malloc((size_t)(rows * vocabulary) * sizeof *logits)), loss = 0;

    reference_head(r, rows, x, logits);
    for (int32_t t = 0; t < rows; t++) {
        const double *l = logits + t * vocabulary;

        loss += (double)weight[t] * (log_sum_exp(l, vocabulary) - l[target[t]]);
    }
    free(logits);
    return loss;
}

void reference_gaps(const struct reference *r, int32_t rows, const double *x, const int32_t *best,
                    const int32_t *other, double *gap)
{
    int32_t vocabulary = r->config.vocabulary;
    double *logits = must(malloc((size_t)(rows * vocabulary) * sizeof *logits));

    reference_head(r, rows, x, logits);
    for (int32_t t = 0; t < rows; t++)
        gap[t] = logits[t * vocabulary + best[t]] - logits[t * vocabulary + other[t]];
    free(logits);
}

double reference_divergence(const struct reference *r, int32_t rows, const double *x,
                            const double *teacher_logits, const float *weight)
{
    int32_t vocabulary = r->config.vocabulary;
    double *logits = must(malloc((size_t)(rows * vocabulary) * sizeof *logits)), loss = 0;

    reference_head(r, rows, x, logits);
    for (int32_t t = 0; t < rows; t++) {
        const double *l = logits + t * vocabulary, *teacher = teacher_logits + t * vocabulary;
        double lse = log_sum_exp(l, vocabulary), lse_teacher = log_sum_exp(teacher, vocabulary);

        for (int32_t i = 0; i < vocabulary; i++) {
            double log_p = teacher[i] - lse_teacher;

            loss += (double)weight[t] * exp(log_p) * (log_p - (l[i] - lse));
        }
    }
    free(logits);
    return loss;
}

void reference_forward(const struct reference *r, const struct batch *batch, double *x)
{
    const struct model_config *c = &r->config;
    size_t rows = (size_t)batch->rows, d = (size_t)c->hidden;
    size_t query = (size_t)(c->heads * c->head_dim), key = (size_t)(c->kv_heads * c->head_dim);
    double *q = must(malloc(rows * (2 * query + 2 * key) * sizeof *q));
    double *attn = q + rows * query, *k = attn + rows * query, *v = k + rows * key;

    for (size_t t = 0; t < rows; t++)
        memcpy(x + t * d, r->embed + (size_t)batch->token[t] * d, d * sizeof *x);
    for (int32_t l = 0; l < c->layers; l++) {
        reference_attn_in(r, l, batch, x, q, k, v);
        reference_attention(r, batch, q, k, v, attn);
        reference_attn_out(r, l, batch->rows, attn, x, x);
        reference_mlp(r, l, batch->rows, x, x);
    }
    free(q);
}

double reference_loss(const struct reference *r, const struct batch *batch, const int32_t *target,
                      const float *weight)
{
    double *x = must(malloc((size_t)(batch->rows * r->config.hidden) * sizeof *x)), loss;

    reference_forward(r, batch, x);
    loss = reference_head_loss(r, batch->rows, x, target, weight);
    free(x);
    return loss;
}
