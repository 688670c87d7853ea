/* Products with weights in panels of 32 columns, widened to float32 in registers or multiplied as they are (AVX512-BF16).
 *
 * Positions come in blocks of DEPTH; a panel's block holds them one after the other, [DEPTH][32], so that one vector holds one position of 16
 * columns and x is broadcast: no sums over lanes, and the blocks of neighbouring panels follow each other, so memory is read from end to
 * end. bfloat16 positions come in pairs, [DEPTH / 2][32][2]: even and odd ones are a shift and a mask away from float32, and a pair is what
 * AVX512-BF16 multiplies. Missing columns and the last half of a pair are zeros. An element of y is the sum over blocks of positions, each
 * summed in rising order (pairs: odd before even with AVX512-BF16), the bias last, rounded once.
 */
#include "weight.h"

#include "vector.h"

#define VECTORS (PANEL / LANES)
#define DEPTH 512           /* positions of a block: a panel's block stays in the first-level cache */
#define STRIDE (DEPTH + 16) /* of a widened row of x: rows in different cache sets */
#define ROWS 96             /* of a block of x: with DEPTH positions 200 KB in the second-level cache */
#define AHEAD 4096          /* bytes: what is read so far ahead has come from memory when it is needed */
#define PANELS 16           /* most panels of a task */

#ifdef __AVX512F__
#define TILE_ROWS 12 /* sums of 12 rows by two vectors, of 32 registers */
#else
#define TILE_ROWS 3 /* sums of 3 rows by four vectors, of 16 registers */
#endif

INLINE int64_t positions(int type, int64_t inner) { return type == BF16 ? (inner + 1) / 2 * 2 : inner; }

/* sums[r][0..31] (+)= x_r . panel over `count` positions, of m rows; m and type are constants here. */
INLINE void tile(int type, const float *x, const char *panel, int64_t count, int first, float *sums, int64_t step, int m) {
    vf acc[TILE_ROWS][VECTORS];
    for (int r = 0; r < m; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf){};
    if (type == BF16) {
        for (int64_t k = 0; k < count; k += 2, panel += 4 * PANEL) {
            vu b[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                b[v] = *(const vu_unaligned *)(panel + 4 * LANES * v);
                __builtin_prefetch(panel + 4 * LANES * v + AHEAD);
            }
            if (MULTIPLIES_PAIRS) {
                for (int r = 0; r < m; r++)
                    for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_pairs(acc[r][v], ((const uint32_t *)x)[r * STRIDE + k / 2], b[v]);
                continue;
            }
            for (int r = 0; r < m; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(splat(x[r * STRIDE + k]), (vf)(b[v] << 16), acc[r][v]);
            for (int r = 0; r < m; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(splat(x[r * STRIDE + k + 1]), (vf)(b[v] & 0xffff0000u), acc[r][v]);
        }
    } else {
        for (int64_t k = 0; k < count; k++, panel += PANEL * element_size(type)) {
            vf b[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                b[v] = load(panel + v * LANES * element_size(type), type);
                __builtin_prefetch(panel + v * LANES * element_size(type) + AHEAD);
            }
            for (int r = 0; r < m; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(splat(x[r * STRIDE + k]), b[v], acc[r][v]);
        }
    }
    for (int r = 0; r < m; r++)
        for (int v = 0; v < VECTORS; v++) {
            vf_unaligned *sum = (vf_unaligned *)(sums + r * step + v * LANES);
            *sum = first ? acc[r][v] : (vf)*sum + acc[r][v];
        }
}

/* All rows of a block with one panel, in tiles as equal as they can be. */
INLINE void strip(int type, const float *x, const char *panel, int64_t count, int first, float *sums, int64_t step, int64_t rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0, row = 0; i < tiles; i++) {
        const int64_t m = (rows - row) / (tiles - i);
        const float *from = x + row * STRIDE;
        float *to = sums + row * step;
        switch (m) {
#define TILE(M) case M: tile(type, from, panel, count, first, to, step, M); break;
            TILE(1) TILE(2) TILE(3)
#if TILE_ROWS == 12
            TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
        }
        row += m;
    }
}

/* Positions of rows of x as the tiles read them: float32, or pairs of bfloat16; zeros up to an even count. */
INLINE void widen(int type, const char *x, int64_t x_step, int64_t rows, int64_t count, float *out) {
    const int64_t size = element_size(type);
    for (int64_t r = 0; r < rows; r++, x += x_step, out += STRIDE) {
        if (type == BF16 && MULTIPLIES_PAIRS) {
            ((uint16_t *)out)[count] = 0;
            memcpy(out, x, (size_t)count * 2);
            continue;
        }
        for (int64_t k = 0; k < count; k += LANES) /* the last vector ends within the row's 16 spare places */
            *(vf_unaligned *)(out + k) = count - k < LANES ? load_part(x + k * size, type, count - k) : load(x + k * size, type);
    }
}

typedef struct {
    float x[ROWS * STRIDE], sums[ROWS * PANELS * PANEL];
} Scratch;

/* Some rows with some panels. */
INLINE void block(int type, const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    const int64_t size = element_size(type), inner = positions(type, w->inner), step = panels * PANEL;
    const int64_t padded = (w->columns + PANEL - 1) / PANEL * PANEL;
    if (inner == 0) memset(s->sums, 0, sizeof s->sums);
    for (int64_t k = 0; k < inner; k += DEPTH) {
        const int64_t count = inner - k < DEPTH ? inner - k : DEPTH, real = w->inner - k < DEPTH ? w->inner - k : DEPTH;
        widen(type, (const char *)p->x + (row * p->x_stride + k) * size, p->x_stride * size, rows, real, s->x);
        for (int64_t i = 0; i < panels; i++)
            strip(type, s->x, (const char *)w->data + (k * padded + (panel + i) * PANEL * count) * size, count, k == 0, s->sums + i * PANEL,
                  step, rows);
    }
    const int64_t first = panel * PANEL, columns = w->columns - first < step ? w->columns - first : step;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t n = columns - c < LANES ? columns - c : LANES;
            vf value = *(const vf_unaligned *)(s->sums + r * step + c);
            if (w->bias) value += load_part((const char *)w->bias + (first + c) * size, type, n);
            char *y = (char *)p->y + ((row + r) * p->y_stride + first + c) * size;
            if (n == LANES) store(y, type, value);
            else store_part(y, type, value, n);
        }
}

static void block_f32(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(F32, w, p, row, rows, panel, panels, s);
}
static void block_bf16(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(BF16, w, p, row, rows, panel, panels, s);
}
static void block_f16(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(F16, w, p, row, rows, panel, panels, s);
}

/* Tasks are taken as threads come, a block of rows after the other for the same panels, which then are in the cache. */
void multiply_packed(const Weight *w, const Rows *p, int64_t *next, int threads) {
    static _Thread_local Scratch scratch;
    void (*const compute)(const Weight *, const Rows *, int64_t, int64_t, int64_t, int64_t, Scratch *) =
        w->type == F32 ? block_f32 : w->type == BF16 ? block_bf16 : block_f16;
    const int64_t all = (w->columns + PANEL - 1) / PANEL, row_blocks = (p->rows + ROWS - 1) / ROWS;
    int64_t panels = all / (threads * 4);
    panels = panels < 1 ? 1 : panels > PANELS ? PANELS : panels;
    const int64_t tasks = row_blocks * ((all + panels - 1) / panels);
    for (;;) {
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= tasks) break;
        const int64_t row = i % row_blocks * ROWS, panel = i / row_blocks * panels;
        compute(w, p, row, p->rows - row < ROWS ? p->rows - row : ROWS, panel, all - panel < panels ? all - panel : panels, &scratch);
    }
}

/* Bytes of a packed weight. */
int64_t shoal_packed_bytes(int type, int64_t columns, int64_t inner) {
    return (columns + PANEL - 1) / PANEL * PANEL * positions(type, inner) * element_size(type);
}

/* Where position k of column c lies, in elements. */
INLINE int64_t place(int type, int64_t columns, int64_t inner, int64_t k, int64_t c) {
    const int64_t padded = (columns + PANEL - 1) / PANEL * PANEL, depth = positions(type, inner), block = k / DEPTH * DEPTH, in = k % DEPTH;
    const int64_t start = block * padded + c / PANEL * PANEL * (depth - block < DEPTH ? depth - block : DEPTH);
    return start + (type == BF16 ? in / 2 * 2 * PANEL + c % PANEL * 2 + in % 2 : in * PANEL + c % PANEL);
}

/* Positions [block, block + count) of 32 columns from `first` on, of elements of `size` bytes; what is not there is 0. */
INLINE void pack_block(int type, const char *w, int64_t w_step, int64_t columns, int64_t inner, int64_t first, int64_t block, int64_t count,
                       char *out) {
    const int64_t size = element_size(type);
    for (int64_t c = 0; c < PANEL; c++) {
        const int64_t there = first + c < columns ? (inner - block < count ? inner - block : count) : 0;
        const char *row = w + (first + c) * w_step + block * size;
        for (int64_t k = 0; k < count; k++) {
            const int64_t to = type == BF16 ? k / 2 * 2 * PANEL + 2 * c + k % 2 : k * PANEL + c;
            if (type == F32) ((uint32_t *)out)[to] = k < there ? ((const uint32_t *)row)[k] : 0;
            else ((uint16_t *)out)[to] = k < there ? ((const uint16_t *)row)[k] : 0;
        }
    }
}

/* w [columns, inner], rows w_stride elements apart, into out: shoal_packed_bytes. */
void shoal_pack(int type, const void *w, int64_t w_stride, int64_t columns, int64_t inner, void *out, int threads) {
    const int64_t size = element_size(type), depth = positions(type, inner), padded = (columns + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t first = 0; first < columns; first += PANEL)
        for (int64_t block = 0; block < depth; block += DEPTH) {
            const int64_t count = depth - block < DEPTH ? depth - block : DEPTH;
            char *to = (char *)out + (block * padded + first * count) * size;
            if (type == F32) pack_block(F32, w, w_stride * size, columns, inner, first, block, count, to);
            else if (type == BF16) pack_block(BF16, w, w_stride * size, columns, inner, first, block, count, to);
            else pack_block(F16, w, w_stride * size, columns, inner, first, block, count, to);
        }
}

/* Rows ids[0..count-1] of the weight, as they were before packing: out [count, inner]. */
void shoal_unpack_rows(const Weight *w, const int64_t *ids, int64_t count, void *out, int threads) {
    const int type = w->type;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count * w->inner > 65536)
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < w->inner; k++) {
            const int64_t from = place(type, w->columns, w->inner, k, ids[i]), to = i * w->inner + k;
            if (type == F32) ((float *)out)[to] = ((const float *)w->data)[from];
            else ((uint16_t *)out)[to] = ((const uint16_t *)w->data)[from];
        }
}
