/* RMSNorm of rows of float32, bfloat16 or float16, computed in float32 and rounded once. */
#include "rows.h"
#include "vector.h"

INLINE void norm_row(int type, const char *x, const char *weight, char *out, int64_t size, float eps, float offset) {
    const int64_t step = element_size(type), whole = size / (4 * LANES) * (4 * LANES);
    vf sums[4] = {0};
    int64_t i = 0;
    for (; i < whole; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            vf v = load(x + (i + part * LANES) * step, type);
            sums[part] += v * v;
        }
    for (; i < size; i += LANES) {
        vf v = size - i >= LANES ? load(x + i * step, type) : load_part(x + i * step, type, size - i);
        sums[0] += v * v;
    }
    float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
    vf factor = splat(1.0f / sqrtf(mean + eps));
    for (i = 0; i + LANES <= size; i += LANES)
        store(out + i * step, type, load(x + i * step, type) * factor * (load(weight + i * step, type) + splat(offset)));
    if (i < size) {
        vf v = load_part(x + i * step, type, size - i) * factor * (load_part(weight + i * step, type, size - i) + splat(offset));
        store_part(out + i * step, type, v, size - i);
    }
}

void rms_norm_row(int type, const void *x, const void *weight, void *out, int64_t size, float eps, float offset) {
    if (type == F32) norm_row(F32, x, weight, out, size, eps, offset);
    else if (type == BF16) norm_row(BF16, x, weight, out, size, eps, offset);
    else norm_row(F16, x, weight, out, size, eps, offset);
}

/* x [outer, inner, size] with strides in elements, the last dimension contiguous; out alike (it may be x); weight [size].
 * offset is added to the weight: 1 where the stored weight is w - 1. */
void shoal_rms_norm(int type, const void *x, int64_t x_outer, int64_t x_inner, const void *weight, void *out, int64_t out_outer,
                    int64_t out_inner, int64_t outer, int64_t inner, int64_t size, float eps, float offset) {
    const int64_t step = element_size(type);
#pragma omp parallel for schedule(static) if (outer * inner > 1 && outer * inner * size > 65536)
    for (int64_t row = 0; row < outer * inner; row++) {
        const char *from = (const char *)x + (row / inner * x_outer + row % inner * x_inner) * step;
        char *to = (char *)out + (row / inner * out_outer + row % inner * out_inner) * step;
        rms_norm_row(type, from, weight, to, size, eps, offset);
    }
}
