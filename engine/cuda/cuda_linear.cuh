/* cuda_linear.cuh: y = residual + x·Wᵀ + bias + delta of the row's group, summed in float, rounded
 * once.
 *
 * In training the product is cuBLASLt's (gemm.h) and there are no groups. In serving it is our own
 * kernel (cuda_linear.cu): the sum of an output is made of SPLIT parts, part s over the s-th eighth
 * of the columns, in order. Nothing of that depends on the other rows, on how many there are, or on
 * whose they are: a row's bits are its own.
 *
 * The delta is a part of the same kernel, not a pass of its own. So nothing is rounded before it is
 * added, no buffer of floats goes to memory and back, what is read of x serves both, and a stage is
 * one launch whatever the tenants. Rows are taken in the order of their groups; a tenant's signs
 * are read by the tiles of eight rows that hold its rows, which is once where it has no more than
 * one tile. In that product the other tenants' columns are zero: they add nothing, exactly.
 *
 * Where a tenant's difference is two factors, a launch before brings its rows down to `rank` sums
 * each, and an output adds its left side's product with those behind its SPLIT parts. Where it is
 * planes, a launch before does so too, and their left side is a part of each of the SPLIT
 * (cuda_planes.cuh). */
#ifndef GRAFT_CUDA_CUDA_LINEAR_CUH
#define GRAFT_CUDA_CUDA_LINEAR_CUH

#include "engine/cuda/cuda.h"

#define LINEAR_MATRICES 3

struct linear_matrix {
    const void *w;        /* [out, in] in the precision */
    const float *bias;    /* [out], or NULL */
    const char *own;      /* what group 0 has of its own: a group_linear, or a delta_view */
    const void *residual; /* [rows, out] in the precision, may be y; or NULL */
    void *y;              /* [rows, out] */
    int32_t out;
    int32_t first_tile; /* of 16 outputs, counted over all matrices of the job */
    float *sums;        /* of row i from i · sums_stride on: x by the right side of its delta */
};

/* Products of the same rows. */
struct linear_job {
    struct linear_matrix matrix[LINEAR_MATRICES];
    int32_t count, tiles;
    const void *x; /* [rows, in] in the precision */
    int32_t in, rows;
    const int32_t *order; /* [rows]: rows by group, those of the base alone last */
    int32_t grouped;      /* rows that are of a group */
    const int32_t *row;   /* [rows]: row i's row of the batch; NULL: i */
    int64_t own_stride;   /* bytes from group to group at `own` */
    int64_t sums_stride;  /* 0: no row has factors or planes */
    bool own_bias;        /* `own` is a group_linear */
    bool wide;            /* y is F32 */
};

static __device__ __forceinline__ struct linear_matrix matrix_at(const struct linear_job &job,
                                                                 unsigned number)
{
    struct linear_matrix matrix = job.matrix[0];

    if (number == 1)
        matrix = job.matrix[1];
    if (number == 2)
        matrix = job.matrix[2];
    return matrix;
}

/* Serving: one launch, and one before it for each of factors and planes. */
void cuda_linear_serve(struct cuda *cuda, struct linear_job *job);
/* The one before it for planes, once the job says where sums go. */
void cuda_planes(struct cuda *cuda, const struct linear_job *job);

struct linear_call {
    const struct linear *linear;
    size_t own; /* offset of the group_linear in struct group_layer */
    const void *residual;
    void *y;
};
/* Products of all rows of the batch, in either regime. */
void cuda_linear(struct cuda *cuda, const struct batch *batch, int32_t layer, const void *x,
                 const struct linear_call *call, int count);

#endif
