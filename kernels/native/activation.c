/* out = act(gate) * up for gate and up side by side, computed in float32 and rounded once. */
#include "vector.h"

enum { SILU = 0, GELU_TANH = 1 };

INLINE vf activate(int kind, vf x) {
    if (kind == SILU) return x / (splat(1.0f) + exp_lanes(-x));
    vf inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    return splat(0.5f) * x * (splat(1.0f) + tanh_lanes(inner));
}

INLINE void gated_row(int type, int kind, const char *gate, const char *up, char *out, int64_t size) {
    const int64_t step = element_size(type);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i * step, type, activate(kind, load(gate + i * step, type)) * load(up + i * step, type));
    if (i < size) {
        vf v = activate(kind, load_part(gate + i * step, type, size - i)) * load_part(up + i * step, type, size - i);
        store_part(out + i * step, type, v, size - i);
    }
}

/* gate_up [rows, 2 * size] with rows `stride` elements apart; out [rows, size] contiguous. */
void shoal_gated_activation(int type, int kind, const void *gate_up, int64_t stride, void *out, int64_t rows, int64_t size) {
    const int64_t step = element_size(type);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const char *gate = (const char *)gate_up + row * stride * step, *up = gate + size * step;
        char *to = (char *)out + row * size * step;
        if (type == F32 && kind == SILU) gated_row(F32, SILU, gate, up, to, size);
        else if (type == F32) gated_row(F32, GELU_TANH, gate, up, to, size);
        else if (type == BF16 && kind == SILU) gated_row(BF16, SILU, gate, up, to, size);
        else if (type == BF16) gated_row(BF16, GELU_TANH, gate, up, to, size);
        else if (kind == SILU) gated_row(F16, SILU, gate, up, to, size);
        else gated_row(F16, GELU_TANH, gate, up, to, size);
    }
}
