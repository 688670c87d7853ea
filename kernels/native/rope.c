/* Rotary positions (arXiv:2104.09864), in place: half-split pairs of the first rotary_dim of every head, computed in float32. */
#include "rows.h"
#include "vector.h"

INLINE void rotate_head(int type, char *x, const float *cos, const float *sin, int64_t half) {
    const int64_t step = element_size(type);
    int64_t d = 0;
    for (; d + LANES <= half; d += LANES) {
        vf a = load(x + d * step, type), b = load(x + (half + d) * step, type), c = load(cos + d, F32), s = load(sin + d, F32);
        store(x + d * step, type, a * c - b * s);
        store(x + (half + d) * step, type, b * c + a * s);
    }
    if (d < half) {
        int64_t n = half - d;
        vf a = load_part(x + d * step, type, n), b = load_part(x + (half + d) * step, type, n);
        vf c = load_part(cos + d, F32, n), s = load_part(sin + d, F32, n);
        store_part(x + d * step, type, a * c - b * s, n);
        store_part(x + (half + d) * step, type, b * c + a * s, n);
    }
}

void rope_row(int type, void *x, int64_t head_stride, const float *cos_sin, int64_t num_heads, int64_t rotary_dim) {
    const int64_t step = element_size(type), half = rotary_dim / 2;
    for (int64_t h = 0; h < num_heads; h++) {
        char *head = (char *)x + h * head_stride * step;
        if (type == F32) rotate_head(F32, head, cos_sin, cos_sin + half, half);
        else if (type == BF16) rotate_head(BF16, head, cos_sin, cos_sin + half, half);
        else rotate_head(F16, head, cos_sin, cos_sin + half, half);
    }
}

/* x [num_tokens, num_heads, head_dim], strides in elements, the last dimension contiguous; cos_sin [num_tokens, rotary_dim] float32:
 * cosines of the rotary_dim / 2 frequencies, then sines. */
void shoal_rope(int type, void *x, int64_t token_stride, int64_t head_stride, const float *cos_sin, int64_t num_tokens, int64_t num_heads,
                int64_t rotary_dim) {
#pragma omp parallel for schedule(static) if (num_tokens > 1 && num_tokens * num_heads * rotary_dim > 65536)
    for (int64_t t = 0; t < num_tokens; t++)
        rope_row(type, (char *)x + t * token_stride * element_size(type), head_stride, cos_sin + t * rotary_dim, num_heads, rotary_dim);
}
