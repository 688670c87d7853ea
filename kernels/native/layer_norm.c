/* LayerNorm of rows of float32, bfloat16 or float16: the mean, then the mean of squares of what is left, in float32, rounded once. */
#include "rows.h"
#include "vector.h"

/* x less `centre` where there is an element, zeros elsewhere. */
INLINE vf centred(const char *p, int type, int64_t n, float centre) {
    vf v = load_some(p, type, n) - splat(centre);
    for (int64_t lane = n; lane < LANES; lane++) v[lane] = 0.0f;
    return v;
}

/* The mean of x - centre, or of its squares. */
INLINE float mean(int type, const char *x, int64_t size, float centre, int squares) {
    const int64_t step = element_size(type);
    vf sums[4] = {0};
    for (int64_t i = 0, part = 0; i < size; i += LANES, part = (part + 1) % 4) {
        const vf v = centred(x + i * step, type, size - i, centre);
        sums[part] += squares ? v * v : v;
    }
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
}

INLINE void norm_row(int type, const char *x, const char *weight, const char *bias, char *out, int64_t size, float eps) {
    const int64_t step = element_size(type);
    const float centre = mean(type, x, size, 0.0f, 0);
    const vf factor = splat(1.0f / sqrtf(mean(type, x, size, centre, 1) + eps));
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i;
        vf v = centred(x + i * step, type, n, centre) * factor * load_some(weight + i * step, type, n);
        if (bias) v += load_some(bias + i * step, type, n);
        store_some(out + i * step, type, v, n);
    }
}

void layer_norm_row(int type, const void *x, const void *weight, const void *bias, void *out, int64_t size, float eps) {
    if (type == F32) norm_row(F32, x, weight, bias, out, size, eps);
    else if (type == BF16) norm_row(BF16, x, weight, bias, out, size, eps);
    else norm_row(F16, x, weight, bias, out, size, eps);
}

/* x [outer, inner, size] with strides in elements, the last dimension contiguous; out alike, contiguous; weight, bias [size], bias or
 * null. */
void shoal_layer_norm(int type, const void *x, int64_t x_outer, int64_t x_inner, const void *weight, const void *bias, void *out,
                      int64_t outer, int64_t inner, int64_t size, float eps) {
    const int64_t step = element_size(type);
#pragma omp parallel for schedule(static) if (outer * inner > 1 && outer * inner * size > 65536)
    for (int64_t row = 0; row < outer * inner; row++) {
        const char *from = (const char *)x + (row / inner * x_outer + row % inner * x_inner) * step;
        layer_norm_row(type, from, weight, bias, (char *)out + row * size * step, size, eps);
    }
}
