/* bench_gpu.h: what the parts of bench_gpu share: shapes of models, material, one JSON line each.
 *
 *   bench_gpu ceilings|delta|train SHAPE|decode SHAPE     (bench_gpu.c)
 *
 * Weights are random and made on the device. What does not fit the device's memory is made smaller,
 * and the line says so: fewer layers, fewer tenants. */
#ifndef GRAFT_TESTS_BENCH_GPU_H
#define GRAFT_TESTS_BENCH_GPU_H

#include "engine/cuda/cuda_bench.h"
#include "engine/model.h"

struct bench_shape {
    const char *name; /* "8b" */
    struct model_config config;
    int32_t document;  /* tokens of a training example */
    int32_t documents; /* of a step */
    int32_t past;      /* tokens that a sequence holds when it decodes */
    int32_t tenants;   /* at most, one sequence each */
    int32_t repeats;   /* steps that count */
};

struct bench {
    struct backend backend;
    struct cuda_device device; /* as it was before anything was opened */
    struct cuda_ceilings ceilings;
    const struct bench_shape *shape;
    struct model_config config; /* the shape's, with as many layers as fit */
    struct model *model;
    struct err err;
};

double bench_now(void); /* seconds */
/* Weights of all blocks and norms; of the head alone. */
int64_t bench_block_weights(const struct model_config *config);
int64_t bench_head_weights(const struct model_config *config);
/* Opens the backend and a model of b->config, in BF16, with random weights. */
int bench_open_model(struct bench *b);
void bench_close_model(struct bench *b);
/* The chip's advertised bf16 products per second; 0: not known here. */
double bench_peak(const struct bench *b);

int bench_train(struct bench *b);
int bench_decode(struct bench *b);
int bench_delta(struct bench *b);

#endif
