/* out = act(x), or act(gate) * up for gate and up side by side, computed in float32 and rounded once. */
#include "rows.h"
#include "vector.h"

enum { RELU = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

INLINE vf activate(int type, int kind, vf x) {
    if (kind == RELU) return choose(x < splat(0.0f), splat(0.0f), x);
    if (kind == SILU && type == BF16) return rough_silu_lanes(x);
    if (kind == SILU) return x / (splat(1.0f) + exp_lanes(-x));
    if (kind == GELU) return splat(0.5f) * x * (splat(1.0f) + erf_lanes(x * splat(0.70710678118654752f)));
    vf inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    return splat(0.5f) * x * (splat(1.0f) + tanh_lanes(inner));
}

/* up may be null. */
INLINE void activate_row(int type, int kind, const char *gate, const char *up, char *out, int64_t size) {
    const int64_t step = element_size(type);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf v = activate(type, kind, load(gate + i * step, type));
        store(out + i * step, type, up ? v * load(up + i * step, type) : v);
    }
    if (i < size) {
        vf v = activate(type, kind, load_part(gate + i * step, type, size - i));
        store_part(out + i * step, type, up ? v * load_part(up + i * step, type, size - i) : v, size - i);
    }
}

INLINE void activate_typed(int type, int kind, const char *gate, const char *up, char *out, int64_t size) {
    if (kind == RELU) activate_row(type, RELU, gate, up, out, size);
    else if (kind == SILU) activate_row(type, SILU, gate, up, out, size);
    else if (kind == GELU) activate_row(type, GELU, gate, up, out, size);
    else activate_row(type, GELU_TANH, gate, up, out, size);
}

void activation_row(int type, int kind, int gated, const void *x, void *out, int64_t size) {
    const char *gate = x, *up = gated ? gate + size * element_size(type) : 0;
    if (type == F32) activate_typed(F32, kind, gate, up, out, size);
    else if (type == BF16) activate_typed(BF16, kind, gate, up, out, size);
    else activate_typed(F16, kind, gate, up, out, size);
}

/* x [rows, size], or with gated [rows, 2 * size], rows `stride` elements apart; out [rows, size] contiguous. */
void shoal_activation(int type, int kind, int gated, const void *x, int64_t stride, void *out, int64_t rows, int64_t size) {
    const int64_t step = element_size(type);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * size > 16384)
    for (int64_t row = 0; row < rows; row++)
        activation_row(type, kind, gated, (const char *)x + row * stride * step, (char *)out + row * size * step, size);
}
