/* y *= sigmoid(x . w): a row times one number that another row decides. Products are summed in float32; the logit, its sigmoid and every
 * element of y are rounded to their type, as by single operations. */
#include "rows.h"
#include "vector.h"

INLINE vf rounded(int type, vf x) {
    char buffer[4 * LANES] __attribute__((aligned(64)));
    store(buffer, type, x);
    return load(buffer, type);
}

INLINE void gate(int type, const char *x, const char *w, int64_t inner, char *y, int64_t size) {
    const int64_t step = element_size(type);
    vf sums[4] = {0};
    for (int64_t i = 0, part = 0; i < inner; i += LANES, part = (part + 1) % 4)
        sums[part] = multiply_add(load_some(x + i * step, type, inner - i), load_some(w + i * step, type, inner - i), sums[part]);
    const vf logit = rounded(type, splat(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]))));
    const vf factor = rounded(type, splat(1.0f) / (splat(1.0f) + exp_lanes(-logit)));
    for (int64_t i = 0; i < size; i += LANES)
        store_some(y + i * step, type, load_some(y + i * step, type, size - i) * factor, size - i);
}

void sigmoid_gate_row(int type, const void *x, const void *weight, int64_t inner, void *y, int64_t size) {
    if (type == F32) gate(F32, x, weight, inner, y, size);
    else if (type == BF16) gate(BF16, x, weight, inner, y, size);
    else gate(F16, x, weight, inner, y, size);
}

/* x [rows, inner], y [rows, size], contiguous; weight [inner]. */
void shoal_sigmoid_gate(int type, const void *x, const void *weight, int64_t inner, void *y, int64_t rows, int64_t size) {
    const int64_t step = element_size(type);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * (inner + size) > 65536)
    for (int64_t row = 0; row < rows; row++)
        sigmoid_gate_row(type, (const char *)x + row * inner * step, weight, inner, (char *)y + row * size * step, size);
}
