/* planes.h's work on whole matrices: both sides of the vectors as floats, then products of them. */
#include <cblas.h>
#include <stdlib.h>

#include "engine/codec/linalg.h"
#include "engine/codec/planes.h"

/* difference = left · right. */
struct sides {
    float *left, *right; /* [rank, rows], [rank, cols] with all scales */
};

static void close_sides(struct sides *s)
{
    free(s->left);
    free(s->right);
}

static float sum_of(const uint32_t *bits, size_t step, const float *scale, int32_t count, int32_t i)
{
    float sum = 0;

    for (int32_t k = 0; k < count; k++)
        sum += bits[(size_t)k * step + (size_t)(i >> 5)] >> (i & 31) & 1 ? scale[k] : -scale[k];
    return sum;
}

static void fill_vector(struct sides *s, const struct delta_tensor *view, int32_t first,
                        int32_t count)
{
    const struct delta_planes *p = &view->planes;
    size_t words = ((size_t)view->cols + 31) / 32, left_words = ((size_t)p->planes + 31) / 32;
    float *left = s->left + (size_t)p->vector[first] * (size_t)view->rows;
    float *right = s->right + (size_t)p->vector[first] * (size_t)view->cols;

    for (int32_t c = 0; c < view->cols; c++)
        right[c] = p->col_scale[c] * sum_of(p->right_bits + (size_t)first * words, words,
                                            p->right_scale + first, count, c);
    for (int32_t r = 0; r < view->rows; r++) {
        const uint32_t *bits = p->left_bits + (size_t)r * left_words;
        float sum = 0;

        for (int32_t k = first; k < first + count; k++)
            sum += bits[k / 32] >> (k % 32) & 1 ? p->left_scale[k] : -p->left_scale[k];
        left[r] = p->row_scale[r] * sum;
    }
}

static int open_sides(struct sides *s, const void *data, int32_t rows, int32_t cols,
                      struct err *err)
{
    size_t rank = (size_t)planes_rank(data);
    struct delta_tensor view;
    void *memory;

    *s = (struct sides){.left = malloc(rank * (size_t)rows * sizeof(float) + 1),
                        .right = malloc(rank * (size_t)cols * sizeof(float) + 1)};
    if (!s->left || !s->right)
        return err_set(err, ERR_NO_MEMORY, "no memory to expand a delta of %zu vectors", rank);
    if (planes_view(data, rows, cols, &view, &memory, err))
        return -1;
    for (int32_t first = 0, next; first < view.planes.planes; first = next) {
        for (next = first + 1;
             next < view.planes.planes && view.planes.vector[next] == view.planes.vector[first];)
            next++;
        fill_vector(s, &view, first, next - first);
    }
    free(memory);
    return 0;
}

int planes_expand(const void *data, int32_t rows, int32_t cols, float *out, struct err *err)
{
    struct sides s;
    int rc = open_sides(&s, data, rows, cols, err);

    if (!rc)
        linalg_product_f32(true, rows, cols, planes_rank(data), s.left, s.right, out);
    close_sides(&s);
    return rc;
}

/* slope of rows and columns, [rows + cols]: sums of gradient ⊙ difference. */
static void element_slopes(const struct sides *s, int32_t rows, int32_t cols, int32_t rank,
                           const float *gradient, float *difference, float *slope)
{
    for (int32_t i = 0; i < rows + cols; i++)
        slope[i] = 0;
    linalg_product_f32(true, rows, cols, rank, s->left, s->right, difference);
    for (int64_t r = 0; r < rows; r++) {
        float sum = 0;

        for (int64_t c = 0; c < cols; c++) {
            float part = gradient[r * cols + c] * difference[r * cols + c];

            sum += part;
            slope[rows + c] += part;
        }
        slope[r] = sum;
    }
}

int planes_slope(const void *data, int32_t rows, int32_t cols, const float *gradient, float *slope,
                 struct err *err)
{
    int32_t rank = planes_rank(data);
    float *product = malloc((size_t)rows * (size_t)cols * sizeof *product); /* rank <= rows */
    struct sides s = {0};
    int rc = -1;

    if (!product) {
        err_set(err, ERR_NO_MEMORY, "no memory for the slopes of %d scales", rank);
        goto out;
    }
    if (open_sides(&s, data, rows, cols, err))
        goto out;
    if (rank > 0)
        linalg_product_f32(false, rank, cols, rows, s.left, gradient, product);
    for (int64_t v = 0; v < rank; v++)
        slope[v] = cblas_sdot(cols, product + v * cols, 1, s.right + v * cols, 1);
    element_slopes(&s, rows, cols, rank, gradient, product, slope + rank);
    rc = 0;
out:
    close_sides(&s);
    free(product);
    return rc;
}
