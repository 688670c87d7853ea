/* Logits capped, cap tanh(x / cap), in float32; and the largest of a row so capped. */
#include "rows.h"
#include "vector.h"

enum { BLOCK = 1024 }; /* capped at once on the way to the largest */

INLINE void cap_some(int type, const char *x, float *out, int64_t size, float cap) {
    const int64_t step = element_size(type);
    for (int64_t i = 0; i < size; i += LANES) {
        const vf v = tanh_lanes(load_some(x + i * step, type, size - i) / splat(cap)) * splat(cap);
        store_some(out + i, F32, v, size - i);
    }
}

static void cap_row(int type, const void *x, float *out, int64_t size, float cap) {
    if (type == F32) cap_some(F32, x, out, size, cap);
    else if (type == BF16) cap_some(BF16, x, out, size, cap);
    else cap_some(F16, x, out, size, cap);
}

int64_t largest_capped_of_row(int type, const void *x, int64_t size, float cap, float *value) {
    float block[BLOCK];
    int64_t best = -1;
    for (int64_t i = 0; i < size && !(best >= 0 && isnan(*value)); i += BLOCK) {
        const int64_t n = size - i < BLOCK ? size - i : BLOCK;
        cap_row(type, (const char *)x + i * element_size(type), block, n, cap);
        const int64_t found = largest_of_row(F32, block, n);
        if (best < 0 || block[found] > *value || isnan(block[found])) best = i + found, *value = block[found];
    }
    return best;
}

/* x [rows, size] float32, contiguous, in place. */
void shoal_softcap(float *x, int64_t rows, int64_t size, float cap, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1 && rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) cap_row(F32, x + row * size, x + row * size, size, cap);
}
