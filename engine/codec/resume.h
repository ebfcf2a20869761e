/* resume.h: what an interrupted compression goes on from: two files beside the one that is to be
 * made, NAME.undistilled, a delta like any other that only lacks distillation, and NAME.scales,
 * which holds how far that came. Both say what they belong to: other weights, rows, options, kind
 * of device or precision do not go on from them. Both carry a digest of what is taken from them: a
 * damaged one is as none. Written durably. */
#ifndef GRAFT_CODEC_RESUME_H
#define GRAFT_CODEC_RESUME_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/sha256.h"
#include "engine/codec/compression.h"
#include "engine/trainer.h"

struct resume {
    char *undistilled, *scales; /* paths */
    char identity[SHA256_HEX];
    int32_t tensors; /* of the source */
};

/* What else the result depends on. */
struct resume_key {
    const struct artifact_source *source;
    const struct codec *codec;
    const struct backend *backend; /* what computes it: its kind and precision */
    int64_t bytes, seed;
    int32_t steps;
    const struct trainer_source *calibration;
};

/* Reads all of the tuned weights. */
int resume_open(struct resume *resume, const char *out_path, const struct resume_key *key,
                struct err *err);
void resume_close(struct resume *resume); /* a zeroed struct is fine; files stay */
void resume_remove(const struct resume *resume);

/* The parts, and what is known of them. */
struct resume_facts {
    double predicted_kl; /* or NAN */
    int64_t calibration_tokens;
    struct engine_delta_curve predicted;
};
int resume_save_parts(const struct resume *resume, const struct compression *compression,
                      const struct resume_facts *facts, struct err *err);
/* *found: the compression has the parts now; else they are to be made, whatever it has. */
int resume_load_parts(const struct resume *resume, const struct artifact_source *source,
                      struct compression *compression, struct resume_facts *facts, bool *found,
                      struct err *err);

/* Some vectors of floats, by number, behind `step` steps. */
struct resume_vectors {
    float **vector;        /* [count] */
    const int32_t *length; /* [count] */
    int32_t count;
};
int resume_save_vectors(const struct resume *resume, const struct resume_vectors *vectors,
                        int32_t step, struct err *err);
/* The step; 0 where there is nothing to go on from, and the vectors are as they were. */
int32_t resume_load_vectors(const struct resume *resume, const struct resume_vectors *vectors);

#endif
