/* multipart.h: a streaming reader for multipart/form-data (RFC 7578, RFC 2046), fed with pieces of
 * any size; whatever the pieces, the same calls come out.
 *
 * Usage: multipart_init, multipart_feed until the body ends, multipart_end, multipart_release.
 * For each part: on_part once, then on_data zero or more times, then on_part_end. The first error
 * sticks. Memory: one part's header block (8 kB) and the boundary; data is passed through.
 *
 * Client names are data: nothing here or behind it makes a path of a file name. */
#ifndef GRAFT_MULTIPART_H
#define GRAFT_MULTIPART_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"

#define MULTIPART_PARTS_MAX 16
#define MULTIPART_HEADER_MAX 8192 /* bytes of one part's header block */
#define MULTIPART_BOUNDARY_MAX 70 /* RFC 2046 */
#define MULTIPART_NAME_MAX 256    /* bytes of a field's name */
#define MULTIPART_FILE_NAME_MAX 1024

struct multipart_part {
    char name[MULTIPART_NAME_MAX + 1];
    bool has_file_name; /* the part is a file */
    char file_name[MULTIPART_FILE_NAME_MAX + 1];
    char content_type[128]; /* "" when absent; cut when longer */
};

/* 0 or -1 with err set, which stops the reader. */
struct multipart_events {
    int (*on_part)(void *context, const struct multipart_part *part, struct err *err);
    int (*on_data)(void *context, const char *data, size_t len, struct err *err);
    int (*on_part_end)(void *context, struct err *err);
    void *context;
};

struct multipart {
    struct multipart_events events;
    char delimiter[4 + MULTIPART_BOUNDARY_MAX + 1]; /* CRLF "--" boundary */
    size_t delimiter_len;
    int state;
    size_t matched; /* bytes of the delimiter seen so far */
    int parts;
    char *header; /* the current header block */
    size_t header_len;
    struct multipart_part part;
    struct err err; /* the first error */
};

/* `content_type`: the request's. ERR_INVALID where it is not multipart/form-data with a boundary of
 * 1 to 70 legal characters. */
int multipart_init(struct multipart *mp, const char *content_type,
                   const struct multipart_events *events, struct err *err);
int multipart_feed(struct multipart *mp, const char *data, size_t len, struct err *err);
/* ERR_INVALID unless the closing delimiter has been seen. */
int multipart_end(struct multipart *mp, struct err *err);
void multipart_release(struct multipart *mp); /* also after a failed init; idempotent */

#endif
