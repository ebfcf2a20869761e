#include "engine/codec/lessons.h"

#include <stdlib.h>
#include <string.h>

int lessons_open(struct lessons *l, const int32_t *length, int64_t count, int64_t row_bytes,
                 struct err *err)
{
    *l = (struct lessons){.row_bytes = row_bytes};
    l->first = calloc((size_t)count + 1, sizeof *l->first);
    l->known = calloc((size_t)count + 1, sizeof *l->known);
    if (!l->first || !l->known)
        goto no_memory;
    for (int64_t i = 0; i < count; i++)
        l->first[i + 1] = l->first[i] + length[i];
    if (l->first[count] > LESSONS_BYTES / row_bytes)
        return 0;
    l->rows = malloc((size_t)(l->first[count] * row_bytes) + 1);
    if (l->rows)
        return 0;
no_memory:
    lessons_close(l);
    return err_set(err, ERR_NO_MEMORY, "no memory for what a teacher gives for %lld examples",
                   (long long)count);
}

void lessons_close(struct lessons *l)
{
    free(l->first);
    free(l->known);
    free(l->rows);
    *l = (struct lessons){0};
}

static size_t bytes_of(const struct lessons *l, int32_t example)
{
    return (size_t)((l->first[example + 1] - l->first[example]) * l->row_bytes);
}

bool lessons_recall(const struct lessons *l, const int32_t *example, int32_t count, char *rows)
{
    if (!l->rows)
        return false;
    for (int32_t i = 0; i < count; i++)
        if (!l->known[example[i]])
            return false;
    for (int32_t i = 0; i < count; rows += bytes_of(l, example[i++]))
        memcpy(rows, l->rows + l->first[example[i]] * l->row_bytes, bytes_of(l, example[i]));
    return true;
}

void lessons_keep(struct lessons *l, const int32_t *example, int32_t count, const char *rows)
{
    if (!l->rows)
        return;
    for (int32_t i = 0; i < count; rows += bytes_of(l, example[i++])) {
        memcpy(l->rows + l->first[example[i]] * l->row_bytes, rows, bytes_of(l, example[i]));
        l->known[example[i]] = true;
    }
}
