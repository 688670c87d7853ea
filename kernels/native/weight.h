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

/* count / by, rounded up. */
static inline int64_t ceil_div(int64_t count, int64_t by) { return (count + by - 1) / by; }

/* A part of what is left to the threads of a team, smaller and smaller: memory is read from end to end for long, and all are done at once.
 * next: how much of `all` is taken; a part lies within one of the runs of `run` that all consists of, and is `most` at most. Returns its
 * size and where it begins; 0: nothing is left. */
static inline int64_t take(int64_t *next, int64_t all, int64_t run, int64_t most, int threads, int64_t *first) {
    int64_t size, from = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
        if (from >= all) return 0;
        const int64_t share = ceil_div(all - from, 2 * (int64_t)threads), left = run - from % run;
        size = share < most ? share : most;
        size = size < left ? size : left;
    } while (!__atomic_compare_exchange_n(next, &from, from + size, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    *first = from;
    return size;
}

#endif
