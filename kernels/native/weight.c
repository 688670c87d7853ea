/* Products with prepared weights, by their kind. Called from kernels/weight.py. */
#include "weight.h"

#include <omp.h>

#ifndef _OPENMP
#define omp_get_num_threads() 1
#endif

void multiply(const Weight *w, const Rows *p, int64_t *next, int threads) {
    switch (w->kind) {
    case PACKED: multiply_packed(w, p, next, threads); break;
    }
}

/* y = x w^T + bias with up to `threads` threads; bias, of w's type, or null. */
void shoal_multiply(const Weight *weight, const void *x, int64_t x_stride, const void *bias, void *y, int64_t y_stride, int64_t rows,
                    int threads) {
    const Rows p = {x, y, x_stride, y_stride, rows};
    Weight w = *weight;
    int64_t next = 0;
    w.bias = bias;
    if (w.columns <= PANEL || w.columns * w.inner * rows < 65536) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(&w, &p, &next, omp_get_num_threads());
}
