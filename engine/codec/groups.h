/* groups.h: values rounded in groups that share a scale and a zero point, as bytes and back: the
 * quantisation of delta_come.h. Any thread. */
#ifndef GRAFT_CODEC_GROUPS_H
#define GRAFT_CODEC_GROUPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GROUPS_SIZE 128 /* values of a group */

struct group {
    float scale;       /* as f16 has it, above 0 */
    uint8_t zero, top; /* codes are 0..top */
};

/* The grid of least squared error for x[0], x[step], …, count of them. False: none that f16 has a
 * scale for; *out is not set. */
bool group_of(struct group *out, const double *x, int64_t step, int32_t count, int width);
/* The code nearest to x, which is finite, and what it stands for. */
uint8_t group_code(const struct group *group, double x, double *value);

int32_t groups_count(int32_t n);
/* Of one side of a vector. */
size_t groups_bytes(int32_t n, int width);
void groups_write(const struct group *group, const uint8_t *code, int32_t n, int width, void *out);
/* out[0], out[step], …. */
void groups_read(const void *data, int32_t n, int width, float *out, int64_t step);
/* Are all its scales finite and not negative? */
int groups_valid(const void *data, int32_t n);

#endif
