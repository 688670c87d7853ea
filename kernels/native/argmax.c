/* The number of every row's largest element: the first among equals; the first that is not a number, when there is one. */
#include "rows.h"
#include "vector.h"

INLINE int any_lane(vi mask) {
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= mask[lane];
    return any != 0;
}

INLINE vf block(const char *row, int64_t i, int64_t size, int type) {
    const char *p = row + i * element_size(type);
    if (size - i >= LANES) return load(p, type);
    vf x = load_part(p, type, size - i);
    for (int64_t lane = size - i; lane < LANES; lane++) x[lane] = -INFINITY;
    return x;
}

INLINE int64_t largest(const char *row, int64_t size, int type) {
    vf best = splat(-INFINITY);
    vi strange = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        vf x = block(row, i, size, type);
        strange |= x != x;
        best = max_lanes(x, best);
    }
    const int any = any_lane(strange);
    const vf most = splat(largest_lane(best));
    for (int64_t i = 0; i < size; i += LANES) {
        vf x = block(row, i, size, type);
        vi found = any ? x != x : x == most;
        if (!any_lane(found)) continue;
        for (int lane = 0; lane < LANES; lane++)
            if (found[lane]) return i + lane;
    }
    return 0;
}

int64_t largest_of_row(int type, const void *x, int64_t size) {
    if (type == F32) return largest(x, size, F32);
    return type == BF16 ? largest(x, size, BF16) : largest(x, size, F16);
}

/* values [rows, size] float32, rows stride elements apart; out [rows]. */
void shoal_argmax(const float *values, int64_t stride, int64_t rows, int64_t size, int64_t *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1 && rows * size > 65536)
    for (int64_t row = 0; row < rows; row++) out[row] = largest_of_row(F32, values + row * stride, size);
}
