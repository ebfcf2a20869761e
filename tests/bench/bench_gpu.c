#include "tests/bench/bench_gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LLAMA .architecture = "llama", .context = 8192, .rms_norm_eps = 1e-5f, .rope_theta = 500000

static const struct bench_shape shapes[] = {
    {.name = "tiny",
     .config = {LLAMA, .layers = 2, .hidden = 64, .intermediate = 96, .heads = 4, .kv_heads = 2,
                .head_dim = 16, .vocabulary = 128, .tied_embeddings = true},
     .document = 24,
     .documents = 2,
     .past = 20,
     .tenants = 4,
     .repeats = 2},
    {.name = "0.5b", /* Qwen2.5-0.5B */
     .config = {LLAMA, .layers = 24, .hidden = 896, .intermediate = 4864, .heads = 14,
                .kv_heads = 2, .head_dim = 64, .vocabulary = 151936, .tied_embeddings = true,
                .attention_bias = true},
     .document = 4096,
     .documents = 4,
     .past = 512,
     .tenants = 64,
     .repeats = 8},
    {.name = "1b", /* Llama-3.2-1B */
     .config = {LLAMA, .layers = 16, .hidden = 2048, .intermediate = 8192, .heads = 32,
                .kv_heads = 8, .head_dim = 64, .vocabulary = 128256, .tied_embeddings = true},
     .document = 4096,
     .documents = 2,
     .past = 512,
     .tenants = 64,
     .repeats = 8},
    {.name = "8b", /* Llama-3.1-8B */
     .config = {LLAMA, .layers = 32, .hidden = 4096, .intermediate = 14336, .heads = 32,
                .kv_heads = 8, .head_dim = 128, .vocabulary = 128256},
     .document = 4096,
     .documents = 1,
     .past = 512,
     .tenants = 64,
     .repeats = 8},
};

double bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_peak(const struct bench *b)
{
    static const struct {
        const char *name;
        double flops;
    } known[] = {{"H100", 989.4e12}, {"H200", 989.4e12}, {"GH200", 989.4e12}, {"A100", 312e12}};

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strstr(b->device.description, known[i].name))
            return known[i].flops;
    return 0;
}

/* ------------------------------------------------------------------ models */

int64_t bench_block_weights(const struct model_config *c)
{
    int64_t query = (int64_t)c->heads * c->head_dim, key = (int64_t)c->kv_heads * c->head_dim;

    return c->layers * (2 * query * c->hidden + 2 * key * c->hidden +
                        3 * (int64_t)c->intermediate * c->hidden + 2 * c->hidden);
}

int64_t bench_head_weights(const struct model_config *c)
{
    return (int64_t)c->vocabulary * c->hidden;
}

struct material {
    const struct model_config *config;
    uint16_t *values; /* BF16, as many as the largest matrix has */
};

/* Shapes by name; all tensors are views of the same random numbers. */
static bool find_tensor(const void *context, const char *name, struct tensor *out)
{
    const struct material *m = context;
    const struct model_config *c = m->config;
    int64_t query = (int64_t)c->heads * c->head_dim, key = (int64_t)c->kv_heads * c->head_dim;
    const struct {
        const char *part;
        int64_t rows, cols;
    } shape[] = {
        {"embed_tokens.weight", c->vocabulary, c->hidden},
        {"lm_head.weight", c->vocabulary, c->hidden},
        {"q_proj.weight", query, c->hidden},
        {"k_proj.weight", key, c->hidden},
        {"v_proj.weight", key, c->hidden},
        {"o_proj.weight", c->hidden, query},
        {"gate_proj.weight", c->intermediate, c->hidden},
        {"up_proj.weight", c->intermediate, c->hidden},
        {"down_proj.weight", c->hidden, c->intermediate},
        {"q_proj.bias", query, 0},
        {"k_proj.bias", key, 0},
        {"v_proj.bias", key, 0},
        {"norm.weight", c->hidden, 0},
    };
    bool wanted = !(strstr(name, "bias") && !c->attention_bias) &&
                  !(strstr(name, "lm_head") && c->tied_embeddings) && !strstr(name, "q_norm") &&
                  !strstr(name, "k_norm") && !strstr(name, "o_proj.bias");

    for (size_t i = 0; wanted && i < sizeof shape / sizeof shape[0]; i++)
        if (strstr(name, shape[i].part)) {
            *out = tensor_view(m->values, DTYPE_BF16, shape[i].cols ? 2 : 1,
                               (const int64_t[]){shape[i].rows, shape[i].cols});
            return true;
        }
    return false;
}

static void random_halves(uint16_t *out, int64_t count)
{
    const int64_t block = 1 << 20;

    for (int64_t i = 0; i < count && i < block; i++) {
        uint32_t z = (uint32_t)(i + 1) * 2654435761u;

        z = (z ^ z >> 15) * 2246822519u;
        out[i] = f32_to_bf16(((float)(z >> 8) / 8388608.0f - 1) * 0.03f);
    }
    for (int64_t i = block; i < count; i += block)
        memcpy(out + i, out, (size_t)(count - i < block ? count - i : block) * sizeof *out);
}

int bench_open_model(struct bench *b)
{
    const struct cuda_options options = {.ordinal = 0, .precision = DTYPE_BF16};
    struct material material = {.config = &b->config};
    struct model_source source = {&b->config, find_tensor, &material};
    int64_t most = bench_head_weights(&b->config);
    int64_t mlp = (int64_t)b->config.intermediate * b->config.hidden;
    int rc = -1;

    most = most > mlp ? most : mlp;
    material.values = malloc((size_t)most * sizeof *material.values);
    if (!material.values)
        return err_set(&b->err, ERR_NO_MEMORY, "no memory for %lld weights", (long long)most);
    random_halves(material.values, most);
    if (cuda_backend_open(&b->backend, &options, &b->err) == 0 &&
        model_open_source(&b->model, &b->backend, &source, &b->err) == 0)
        rc = b->backend.ops->check(&b->backend, &b->err);
    free(material.values);
    return rc;
}

void bench_close_model(struct bench *b)
{
    model_free(b->model);
    backend_close(&b->backend);
}

/* ------------------------------------------------------------------ main */

static int print_ceilings(const struct bench *b)
{
    const struct cuda_ceilings *c = &b->ceilings;

    printf("{\"what\": \"ceilings\", \"device\": \"%s\", \"gemm_bf16_tflops\": %.1f, "
           "\"gemm_f32_tflops\": %.1f, \"copy_gb_per_s\": %.0f, \"read_gb_per_s\": %.0f, "
           "\"launch_us\": %.2f}\n",
           b->device.description, c->gemm_bf16 / 1e12, c->gemm_f32 / 1e12, c->copy / 1e9,
           c->read / 1e9, c->launch * 1e6);
    return 0;
}

static int open_bench(struct bench *b, bool tiny)
{
    const struct cuda_ceiling_sizes sizes = {.gemm = tiny ? 48 : 8192,
                                             .bytes = tiny ? 1 << 16 : (int64_t)1 << 30,
                                             .repeats = tiny ? 1 : 20};
    int count;

    if (cuda_device_list(&b->device, 1, &count, &b->err))
        return -1;
    if (!b->device.usable)
        return err_set(&b->err, ERR_UNAVAILABLE, "%s", b->device.reason);
    return cuda_bench_ceilings(0, &sizes, &b->ceilings, &b->err);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "", *name = argc > 2 ? argv[2] : "8b";
    static struct bench b;
    int rc = -1;

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        if (strcmp(shapes[i].name, name) == 0)
            b.shape = &shapes[i];
    if (!b.shape) {
        fprintf(stderr, "bench_gpu: no shape %s\n", name);
        return 2;
    }
    b.config = b.shape->config;
    if (open_bench(&b, strcmp(name, "tiny") == 0) == 0) {
        if (strcmp(part, "ceilings") == 0)
            rc = print_ceilings(&b);
        else if (strcmp(part, "train") == 0)
            rc = bench_train(&b);
        else if (strcmp(part, "decode") == 0)
            rc = bench_decode(&b);
        else if (strcmp(part, "delta") == 0)
            rc = bench_delta(&b);
        else
            err_set(&b.err, ERR_INVALID, "ceilings, delta, train SHAPE or decode SHAPE");
    }
    if (rc)
        fprintf(stderr, "bench_gpu: %s %s: %s\n", part, name, b.err.message);
    return rc ? 1 : 0;
}
