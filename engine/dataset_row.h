/* dataset_row.h: one line of a training file, from JSON to a conversation.
 *
 * A row is reused for every line of a file; what it points to lives until the next parse. */
#ifndef GRAFT_DATASET_ROW_H
#define GRAFT_DATASET_ROW_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"

enum dataset_format { DATASET_FORMAT_UNKNOWN, DATASET_FORMAT_CHAT, DATASET_FORMAT_LEGACY };

struct dataset_row {
    bool validation;            /* the file is a validation file: wording and codes */
    const char *file_id;        /* for messages */
    enum dataset_format format; /* of the file; the first row decides */
    int64_t number;             /* of the row, 1-based: also the line */

    json_t *root;
    struct engine_message *message; /* [count] */
    float *weight;                  /* [count]: 0 unless an assistant's message to be trained */
    char **joined;                  /* [count]: contents that were arrays of parts, else NULL */
    int32_t count;
};

int dataset_row_init(struct dataset_row *row, const struct engine_dataset_options *options,
                     struct err *err);
void dataset_row_release(struct dataset_row *row);

/* Reads the next line (without its line break) and counts it. */
int dataset_row_parse(struct dataset_row *row, const char *line, size_t len, struct err *err);

/* The two shapes of the contract's validation errors. "The job failed due to an invalid training
 * file. ..." with code invalid_training_file, and "The job failed due to a file format error in the
 * training file. Invalid file format. ..." with invalid_file_format. */
int dataset_row_invalid(const struct dataset_row *row, struct err *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int dataset_row_malformed(const struct dataset_row *row, struct err *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* "training" or "validation"; the parameter's name. */
const char *dataset_row_kind(const struct dataset_row *row);
const char *dataset_row_param(const struct dataset_row *row);

#endif
