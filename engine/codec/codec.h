/* codec.h: how the difference of one matrix (tuned - base) becomes fewer bytes, and back.
 *
 * A codec stores a matrix as a fixed number of parts; each part is one tensor of the artifact,
 * named <matrix>.<suffix> (api-spec/delta-format.md). Matrices go through one by one, so that a
 * model larger than memory can be compressed:
 *
 *   energy()    what there is to lose in a matrix   accept()  parts from outside: may they be used?
 *   allot()     divides bytes over all matrices     expand()  parts -> f32 difference
 *   compress()  makes the parts of one              view()    parts -> what a backend packs
 *   scales()    what distillation may still change  packed_bytes()  what that takes
 *
 * Deterministic. All functions are pure: any thread. */
#ifndef GRAFT_CODEC_H
#define GRAFT_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/err.h"
#include "engine/tensor.h"

#define CODEC_MAX_PARTS 4
/* How many times the bytes of its parts a delta may take when it is packed, where that is more than
 * CODEC_FREE_BYTES: an entropy coder would make of a small file as much as it likes. */
#define CODEC_MAX_GROWTH 200
#define CODEC_FREE_BYTES (INT64_C(256) << 20)

/* h: E[x·xᵀ] of the inputs, g: E[d·dᵀ] of the gradients of the log-likelihood at the outputs, both
 * symmetric; NULL: the identity. */
struct codec_matrix {
    int32_t rows, cols;
    const float *delta; /* [rows, cols] */
    const float *h, *g; /* [cols, cols], [rows, rows] */
};

/* What a matrix is to become. */
struct codec_plan {
    int32_t rows, cols;
    int32_t rank;         /* min(rows, cols) */
    const double *energy; /* [rank] as codec.energy found them, descending; or NULL */
    uint8_t *width;       /* [rank] out: bits of a value of each vector */
    int64_t bytes;        /* out: of all its parts */
};

/* How many of the first vectors are needed: none behind them has bits. */
int32_t codec_plan_vectors(const struct codec_plan *plan);

struct codec {
    const char *name; /* as metadata spell it */
    int part_count;
    const char *suffix[CODEC_MAX_PARTS];
    bool inputs, gradients; /* makes use of h, of g */
    bool own_size; /* its files have the size that comes of what they keep: none can be asked
                      for, and the bytes of its plans are the most there may be */
    bool imports;  /* its parts are those of an adapter (peft.h): allot() and compress()
                      refuse, compression_set_parts() takes them */
    double ratio;  /* 16-bit bytes of a model to bytes of its artifact, unless asked; 0: as
                      large as it likes */
    int32_t distill_steps; /* unless asked */
    double common_rate;    /* of a factor that distillation gives all scales of a matrix in common,
                              in its first step; 0: none */
    /* [min(rows, cols)] squared singular values in the metric of h and g; NULL: allot() needs none
     */
    int (*energy)(const struct codec_matrix *matrix, double *energy, struct err *err);
    /* Plans that together take at most `bytes`. *cost: what that is expected to lose, in nats a
     * token; NAN when it cannot say. ERR_INVALID: so few bytes cannot be had; the plans are then
     * the smallest there are. */
    int (*allot)(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err);
    /* part[].data is malloc'ed for the caller, who frees it after -1 too (NULL: not yet there).
     * ERR_INVALID: the difference is not finite, or too large for the format. */
    int (*compress)(const struct codec_matrix *matrix, const struct codec_plan *plan,
                    struct tensor part[], struct err *err);
    /* Parts from a file: ERR_INVALID unless every other function may use them. */
    int (*accept)(const struct tensor part[], int32_t rows, int32_t cols, struct err *err);
    int (*expand)(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err);
    /* Points into the parts and into *memory, which the caller frees when both are done with. */
    int (*view)(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err);
    /* Bytes that a backend keeps of it, about, from parts that accept() has not seen; NULL: as many
     * as the parts have. compress() makes parts of a CODEC_MAX_GROWTH-th of it at least. */
    int64_t (*packed_bytes)(const struct tensor part[], int32_t rows, int32_t cols);

    /* Scales that distillation may change, each a factor of some of the matrix's values; NULL:
     * there are none. */
    int32_t (*scales)(const struct tensor part[], int32_t rows, int32_t cols);
    /* So many of them, the first, are of whole vectors; those behind of single rows and columns,
     * many and noisy. NULL: all are. */
    int32_t (*vector_scales)(const struct tensor part[]);
    void (*read_scales)(const struct tensor part[], int32_t rows, int32_t cols, float *scale);
    /* To the data behind part, rounded to what can be stored. */
    void (*write_scales)(struct tensor part[], int32_t rows, int32_t cols, const float *scale);
    /* slope[i] = Σ gradient ⊙ ∂difference/∂log(scale i), from `gradient`, [rows, cols]. */
    int (*slope)(const struct tensor part[], int32_t rows, int32_t cols, const float *gradient,
                 float *slope, struct err *err);
};

/* ERR_INVALID that names the value and the remedy: a difference that is not finite. */
int codec_check_finite(const float *delta, int32_t rows, int32_t cols, struct err *err);
/* Likewise of a finite one that takes a larger scale than a file can hold. */
int codec_too_large(struct err *err);

/* NULL: unknown. */
const struct codec *codec_find(const char *name);
/* All there are, the default first; NULL behind the last. */
const struct codec *codec_at(size_t index);
const char *codec_default(void);
/* The names of all codecs, for messages, the default first; of those that do not import. */
const char *codec_names(void);
const char *codec_makers(void);

#endif
