/* The number of every row's largest float32: the first among equals; the first that is not a number, when there is one. */
#include "vector.h"

static int64_t largest(const float *row, int64_t size) {
    vf best = splat(-INFINITY);
    vi strange = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf x = load(row + i, F32);
        strange |= x != x;
        best = max_lanes(x, best);
    }
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= strange[lane];
    float most = largest_lane(best);
    for (; i < size; i++) {
        any |= row[i] != row[i];
        most = row[i] > most ? row[i] : most;
    }
    for (i = 0; i < size; i++)
        if (any ? row[i] != row[i] : row[i] == most) return i;
    return 0;
}

/* values [rows, size], rows stride elements apart; out [rows]. */
void shoal_argmax(const float *values, int64_t stride, int64_t rows, int64_t size, int64_t *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1 && rows * size > 65536)
    for (int64_t row = 0; row < rows; row++) out[row] = largest(values + row * stride, size);
}
