/* A weight as the products take it, prepared once when the model is loaded, and the products with it.
 *
 * y = x w^T + bias for x [rows, inner], w [columns, inner]. Every element of y has one order of sums, whatever the rows, their place or the
 * threads, so the same product serves deterministic runs. Another way to keep a weight is another kind: its number here, its struct made in
 * Python (kernels/weight.py), its case in weight.c.
 */
#ifndef SHOAL_WEIGHT_H
#define SHOAL_WEIGHT_H

#include <stdint.h>

enum { PACKED = 0, QUANTIZED_8 = 1, QUANTIZED_4 = 2 };

#define PANEL 32 /* columns of a panel: two vectors of AVX-512, four of AVX2 */

/* Mirrored by kernels/weight.py. type: of x and y, and of the elements where the kind keeps them (vector.h). */
typedef struct {
    int32_t kind, type;
    int64_t columns, inner;
    int64_t lead; /* of quantised weights: kernels/quantized_format.py */
    const void *data, *scales, *bias; /* scales: null where the kind has none; bias: [columns] of type, or null */
} Weight;

/* Rows of x and y, strides in elements, the last dimension of both contiguous. */
typedef struct {
    const void *x;
    void *y;
    int64_t x_stride, y_stride, rows;
} Rows;

/* Called by every thread of a team; next: a counter at 0, shared by the team. No barrier at the end: y is whole after the next one. */
void multiply(const Weight *w, const Rows *p, int64_t *next, int threads);
void multiply_packed(const Weight *w, const Rows *p, int64_t *next, int threads);
void multiply_quantized(const Weight *w, const Rows *p, int64_t *next, int threads);
/* With a team of its own. */
void shoal_multiply(const Weight *weight, const void *x, int64_t x_stride, const void *bias, void *y, int64_t y_stride, int64_t rows,
                    int threads);
void shoal_unpack_rows(const Weight *w, const int64_t *ids, int64_t count, void *out, int threads);

#endif
