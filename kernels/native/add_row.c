/* x += y and x *= factor for a row of float32, bfloat16 or float16, rounded once. */
#include "rows.h"
#include "vector.h"

INLINE void add(int type, char *x, const char *y, int64_t size) {
    const int64_t step = element_size(type);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i * step, type, load(x + i * step, type) + load(y + i * step, type));
    if (i < size) store_part(x + i * step, type, load_part(x + i * step, type, size - i) + load_part(y + i * step, type, size - i), size - i);
}

INLINE void scale(int type, char *x, float factor, int64_t size) {
    const int64_t step = element_size(type);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i * step, type, load(x + i * step, type) * splat(factor));
    if (i < size) store_part(x + i * step, type, load_part(x + i * step, type, size - i) * splat(factor), size - i);
}

void add_row(int type, void *x, const void *y, int64_t size) {
    if (type == F32) add(F32, x, y, size);
    else if (type == BF16) add(BF16, x, y, size);
    else add(F16, x, y, size);
}

void scale_row(int type, void *x, float factor, int64_t size) {
    if (type == F32) scale(F32, x, factor, size);
    else if (type == BF16) scale(BF16, x, factor, size);
    else scale(F16, x, factor, size);
}
