/* Products with weights in panels of 32 columns, widened to float32 in registers or multiplied as they are (AVX512-BF16, AMX).
 *
 * A panel holds its positions one after the other, [inner][32], so that one vector holds one position of 16 columns and x is broadcast: no
 * sums over lanes, and memory is read from end to end. bfloat16 positions come in pairs, [inner / 2][32][2]: even and odd ones are a shift
 * and a mask away from float32, and a pair is what AVX512-BF16 multiplies. Missing columns and the last half of a pair are zeros. An element
 * of y is the sum over blocks of DEPTH positions, each summed in rising order (pairs: odd before even with AVX512-BF16), the bias last,
 * rounded once. Where there is AMX, bfloat16 takes its tiles: packed_amx.h.
 */
#include "weight.h"

#include <stdlib.h>

#include "amx.h"
#include "vector.h"

#define VECTORS (PANEL / LANES)
#define DEPTH 256  /* positions of a block: a panel's block stays in the first-level cache beside the rows of a tile */
#define ROWS 96    /* of a block of x */
#define WIDTH 528  /* floats there is room for in ROWS widened rows: 200 KB in the second-level cache */
#define SPARE 16   /* floats between widened rows: they lie in different sets of the cache */
#define AHEAD 8192 /* bytes: what is called for so far ahead has come from memory when it is needed */
#define PAGE 4096  /* bytes: where the processor stops to call for what it will need by itself */
#define FEW_ROWS (MULTIPLIES_PAIRS ? 6 : LANES / 8 + 1) /* up to here memory is the limit */
#define PANELS 16  /* most panels taken at once */

#ifdef __AVX512F__
#define TILE_ROWS 12 /* sums of 12 rows by two vectors, of 32 registers */
#else
#define TILE_ROWS 6 /* sums of 6 rows by two vectors, half a panel, of 16 registers; or of 2 rows by four */
#endif

typedef uint32_t pair_unaligned __attribute__((aligned(2), may_alias));

/* Of a weight in memory: whole pairs, or whole tiles. */
INLINE int64_t positions(int type, int64_t inner) {
    const int64_t whole = type != BF16 ? 1 : HAS_AMX ? 2 * AMX_PAIRS : 2;
    return ceil_div(inner, whole) * whole;
}

/* Bytes of a position of x as the tiles read it: float32, or half a pair. */
INLINE int64_t position_size(int type) { return type == BF16 && MULTIPLIES_PAIRS ? 2 : 4; }

/* acc[r][v] += one position of m rows of x (a pair of bfloat16) times `width` vectors of the panel's. three: where every third row is; with
 * x_step and twice x_step these are addresses the processor adds up by itself. */
INLINE void multiply_position(int type, const char *const *three, int64_t x_step, const char *panel, int m, int width, vf acc[][VECTORS]) {
#define X(TYPE, R, K) (((const TYPE *)(three[(R) / 3] + (R) % 3 * x_step))[K])
    if (type == BF16 && LANES == 8 && !MULTIPLIES_PAIRS && m <= FEW_ROWS) {
        for (int v = 0; v < width; v++) { /* read once: there are registers for both halves */
            const vu pairs = *(const vu_unaligned *)(panel + 4 * LANES * v);
            for (int r = 0; r < m; r++) acc[r][v] = multiply_add(splat(X(float, r, 0)), (vf)(pairs << 16), acc[r][v]);
            for (int r = 0; r < m; r++) acc[r][v] = multiply_add(splat(X(float, r, 1)), (vf)(pairs & 0xffff0000u), acc[r][v]);
        }
    } else if (type == BF16 && LANES == 8 && !MULTIPLIES_PAIRS) {
        for (int odd = 0; odd < 2; odd++) {
            vf b[VECTORS];
            for (int v = 0; v < width; v++) {
                const vu pairs = *(const vu_unaligned *)(panel + 4 * LANES * v);
                b[v] = (vf)(odd ? pairs & 0xffff0000u : pairs << 16);
            }
            for (int r = 0; r < m; r++) ADD_PRODUCTS(acc[r], X(float, r, odd), b, width);
        }
    } else if (type == BF16) {
        vu b[VECTORS];
        for (int v = 0; v < width; v++) b[v] = *(const vu_unaligned *)(panel + 4 * LANES * v);
        for (int r = 0; r < m; r++)
            for (int v = 0; v < width; v++) {
                if (MULTIPLIES_PAIRS) acc[r][v] = multiply_pairs(acc[r][v], X(pair_unaligned, r, 0), b[v]);
                else acc[r][v] = multiply_add(splat(X(float, r, 0)), (vf)(b[v] << 16), acc[r][v]);
            }
        for (int r = 0; r < m && !MULTIPLIES_PAIRS; r++)
            for (int v = 0; v < width; v++) acc[r][v] = multiply_add(splat(X(float, r, 1)), (vf)(b[v] & 0xffff0000u), acc[r][v]);
    } else {
        vf b[VECTORS];
        for (int v = 0; v < width; v++) b[v] = load(panel + v * LANES * element_size(type), type);
        for (int r = 0; r < m; r++)
            for (int v = 0; v < width; v++) acc[r][v] = multiply_add(splat(X(float, r, 0)), b[v], acc[r][v]);
    }
}

/* sums[r][0..31] (+)= x_r . panel over `count` positions, of m rows x_step bytes apart; half a panel after the other where there are not
 * registers enough. Meanwhile `calls` lines of the cache are called for from `next` on, for every two lines of the panel; for few rows only
 * the first ones of a page, after which the processor goes on by itself. m, type and calls are constants here. */
INLINE void tile(int type, const char *x, int64_t x_step, const char *panel, int64_t count, int first, float *sums, const char *next,
                 int calls, int m) {
    const int width = m * VECTORS > 2 * TILE_ROWS ? VECTORS / 2 : VECTORS, each = type == BF16 ? 2 : 1; /* positions at once */
    const int64_t size = each * element_size(type), lines = calls * size / 4;
    const int begins = calls == 2 && m <= FEW_ROWS;
    const char *page = next + -(uintptr_t)next % PAGE, *const last = next + count * PANEL * element_size(type);
    for (; begins && page < last; page += PAGE)
        for (int i = 0; i < 4; i++) call_for(page + i * 64);
    for (int part = 0; part < VECTORS; part += width) {
        vf acc[TILE_ROWS][VECTORS];
        const char *three[(TILE_ROWS + 2) / 3], *from = panel + part * LANES * size;
        for (int r = 0; r < m; r++)
            for (int v = 0; v < width; v++) acc[r][v] = (vf){};
        for (int i = 0; 3 * i < m; i++) three[i] = x + 3 * i * x_step;
        for (const char *end = panel + count / each * PANEL * size; from < end; from += PANEL * size) {
            for (int i = 0; i < lines && part == 0 && !begins; i++, next += 64) call_for(next);
            multiply_position(type, three, x_step, from, m, width, acc);
            for (int i = 0; 3 * i < m; i++) three[i] += each * position_size(type);
        }
        for (int r = 0; r < m; r++)
            for (int v = 0; v < width; v++) {
                vf_unaligned *sum = (vf_unaligned *)(sums + r * PANEL + (part + v) * LANES);
                *sum = first ? acc[r][v] : (vf)*sum + acc[r][v];
            }
    }
}

/* All rows of a block with a block of one panel, in tiles as equal as they can be. One tile calls for what it needs soon; of several, the
 * first two call for the next block, which then comes while the others compute. */
INLINE void strip(int type, const char *x, int64_t x_step, const char *panel, int64_t count, int first, float *sums, int64_t rows) {
    const int64_t tiles = ceil_div(rows, TILE_ROWS), bytes = count * PANEL * element_size(type);
    for (int64_t i = 0, row = 0; i < tiles; i++) {
        const int64_t m = (rows - row) / (tiles - i);
        const char *from = x + row * x_step, *next = tiles == 1 && rows > FEW_ROWS ? panel + AHEAD : panel + bytes + i * bytes / 2;
        float *to = sums + row * PANEL;
#define TILE(M, CALLS) case M: tile(type, from, x_step, panel, count, first, to, next, CALLS, M); break;
#if TILE_ROWS == 12
#define MORE_TILES(CALLS) TILE(7, CALLS) TILE(8, CALLS) TILE(9, CALLS) TILE(10, CALLS) TILE(11, CALLS) TILE(12, CALLS)
#else
#define MORE_TILES(CALLS)
#endif
#define TILES(CALLS) \
    switch (m) { TILE(1, CALLS) TILE(2, CALLS) TILE(3, CALLS) TILE(4, CALLS) TILE(5, CALLS) TILE(6, CALLS) MORE_TILES(CALLS) }
        if (tiles == 1) TILES(2)
        else if (i < 2) TILES(1)
        else TILES(0)
        row += m;
    }
}

/* Positions of rows of x as the tiles read them, zeros up to an even count. */
INLINE void widen(int type, const char *x, int64_t x_step, int64_t rows, int64_t count, char *out, int64_t out_step) {
    const int64_t size = element_size(type);
    for (int64_t r = 0; r < rows; r++, x += x_step, out += out_step) {
        if (position_size(type) == 2) {
            ((uint16_t *)out)[count] = 0;
            memcpy(out, x, (size_t)count * 2);
            continue;
        }
        for (int64_t k = 0; k < count; k += LANES) /* the last vector ends within the row's spare places */
            *(vf_unaligned *)(out + 4 * k) = count - k < LANES ? load_part(x + k * size, type, count - k) : load(x + k * size, type);
    }
}

typedef struct {
    float x[ROWS * WIDTH], sums[PANELS * ROWS * PANEL];
} Scratch;

/* Two vectors of y, rounded; `left` columns of them and what follows are there. */
INLINE void put(int type, char *y, vf low, vf high, int64_t left) {
    char rounded[8 * LANES] __attribute__((aligned(64)));
    char *to = left >= 2 * LANES ? y : rounded;
    if (type == BF16) *(vu_unaligned *)to = pair_lanes(low, high);
    else store(to, type, low), store(to + LANES * element_size(type), type, high);
    if (to != y) memcpy(y, rounded, (size_t)(left * element_size(type)));
}

/* The sums of some rows with a panel, and the bias, rounded into y. */
INLINE void finish(int type, const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, const float *sums) {
    const int64_t size = element_size(type), first = panel * PANEL;
    char *y = (char *)p->y + (row * p->y_stride + first) * size;
    vf bias[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const int64_t left = w->columns - first - v * LANES, n = left < 0 ? 0 : left;
        const char *from = (const char *)w->bias + (first + v * LANES) * size;
        bias[v] = !w->bias || n == 0 ? splat(0.0f) : load_some(from, type, n);
    }
    for (int64_t r = 0; r < rows; r++, y += p->y_stride * size, sums += PANEL)
        for (int v = 0; v < VECTORS; v += 2) {
            const int64_t left = w->columns - first - v * LANES;
            vf low = *(const vf_unaligned *)(sums + v * LANES), high = *(const vf_unaligned *)(sums + (v + 1) * LANES);
            if (w->bias) low += bias[v], high += bias[v + 1];
            if (left > 0) put(type, y + v * LANES * size, low, high, left);
        }
}

/* Some rows with some panels. x is read where it is if it is as the tiles read it; otherwise as many positions are widened as fit. */
INLINE void block(int type, const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    const int64_t size = element_size(type), inner = positions(type, w->inner);
    const int ready = position_size(type) == size && inner == w->inner;
    const int64_t span = ready ? inner : (ROWS * WIDTH / rows - SPARE) / DEPTH * DEPTH;
    if (inner == 0) memset(s->sums, 0, sizeof s->sums);
    for (int64_t from = 0; from < inner; from += span) {
        const int64_t to = inner - from < span ? inner : from + span;
        const char *x = (const char *)p->x + (row * p->x_stride + from) * size;
        int64_t x_step = p->x_stride * size;
        if (!ready) {
            const int64_t step = (to - from + SPARE) * 4;
            widen(type, x, x_step, rows, (w->inner < to ? w->inner : to) - from, (char *)s->x, step);
            x = (const char *)s->x, x_step = step;
        }
        for (int64_t i = 0; i < panels; i++)
            for (int64_t k = from; k < to; k += DEPTH)
                strip(type, x + (k - from) * position_size(type), x_step, (const char *)w->data + ((panel + i) * inner + k) * PANEL * size,
                      to - k < DEPTH ? to - k : DEPTH, k == 0, s->sums + i * rows * PANEL, rows);
    }
    for (int64_t i = 0; i < panels; i++) finish(type, w, p, row, rows, panel + i, s->sums + i * rows * PANEL);
}

static void block_f32(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(F32, w, p, row, rows, panel, panels, s);
}
#if HAS_AMX
#include "packed_amx.h"
#else
#define TILE_OF_BF16 TILE_ROWS
INLINE int64_t rows_of_bf16(int64_t inner) { return (void)inner, ROWS; }
static void block_bf16(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(BF16, w, p, row, rows, panel, panels, s);
}
#endif
static void block_f16(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    block(F16, w, p, row, rows, panel, panels, s);
}

/* Panels are taken as threads come, all for a block of rows, which then is in the cache. */
void multiply_packed(const Weight *w, const Rows *p, int64_t *next, int threads) {
    static _Thread_local Scratch scratch;
    if (p->rows == 0 || w->columns == 0) return;
    void (*const compute)(const Weight *, const Rows *, int64_t, int64_t, int64_t, int64_t, Scratch *) =
        w->type == F32 ? block_f32 : w->type == BF16 ? block_bf16 : block_f16;
    const int64_t most = w->type == BF16 ? rows_of_bf16(w->inner) : ROWS, tile = w->type == BF16 ? TILE_OF_BF16 : TILE_ROWS;
    const int64_t row_blocks = ceil_div(p->rows, most), rows = ceil_div(ceil_div(p->rows, row_blocks), tile) * tile; /* as equal as can be */
    const int64_t all = ceil_div(w->columns, PANEL), blocks = ceil_div(p->rows, rows);
    for (int64_t first, panels; (panels = take(next, blocks * all, all, PANELS, threads, &first));) {
        const int64_t row = first / all * rows;
        compute(w, p, row, p->rows - row < rows ? p->rows - row : rows, first % all, panels, &scratch);
    }
}

/* Bytes of a packed weight. */
int64_t shoal_packed_bytes(int type, int64_t columns, int64_t inner) {
    return (columns + PANEL - 1) / PANEL * PANEL * positions(type, inner) * element_size(type);
}

/* Where position k of column c lies, in elements. */
INLINE int64_t place(int type, int64_t inner, int64_t k, int64_t c) {
    const int64_t start = c / PANEL * PANEL * positions(type, inner);
    return start + (type == BF16 ? k / 2 * 2 * PANEL + c % PANEL * 2 + k % 2 : k * PANEL + c % PANEL);
}

/* As many positions of a whole panel as vectors hold, turned: 4 bytes of every column at a time, a pair of elements of 2 bytes. Returns how
 * many positions these are. */
INLINE int64_t turn_block(int type, const char *w, int64_t w_step, int64_t count, char *out) {
    const int64_t each = type == F32 ? 1 : 2, whole = count / (LANES * each) * LANES * each;
    for (int64_t k = 0; k < whole; k += LANES * each)
        for (int c = 0; c < PANEL; c += LANES) {
            vf rows[LANES];
            for (int i = 0; i < LANES; i++) memcpy(&rows[i], w + (c + i) * w_step + k * element_size(type), sizeof rows[i]);
            transpose(rows);
            for (int i = 0; i < LANES; i++) {
                const vu words = (vu)rows[i];
                char *to = out + (k / each + i) * PANEL * 4 + c * 4;
                if (type != F16) *(vu_unaligned *)to = words;
                else {
                    to = out + (k + 2 * i) * PANEL * 2 + c * 2;
                    *(vh_unaligned *)to = __builtin_convertvector(words & 0xffff, vh);
                    *(vh_unaligned *)(to + PANEL * 2) = __builtin_convertvector(words >> 16, vh);
                }
            }
        }
    return whole;
}

/* Positions [block, block + count) of 32 columns from `first` on, of elements of `size` bytes; what is not there is 0. */
INLINE void pack_block(int type, const char *w, int64_t w_step, int64_t columns, int64_t inner, int64_t first, int64_t block, int64_t count,
                       char *out) {
    const int64_t size = element_size(type), left = inner - block < count ? inner - block : count;
    const char *from = w + first * w_step + block * size;
    const int64_t turned = first + PANEL <= columns ? turn_block(type, from, w_step, left, out) : 0;
    for (int64_t c = 0; c < PANEL; c++) {
        const int64_t there = first + c < columns ? left : 0;
        const char *row = from + c * w_step;
        for (int64_t k = turned; k < count; k++) {
            const int64_t to = type == BF16 ? k / 2 * 2 * PANEL + 2 * c + k % 2 : k * PANEL + c;
            if (type == F32) ((uint32_t *)out)[to] = k < there ? ((const uint32_t *)row)[k] : 0;
            else ((uint16_t *)out)[to] = k < there ? ((const uint16_t *)row)[k] : 0;
        }
    }
}

/* w [columns, inner], rows w_stride elements apart, into out: shoal_packed_bytes. */
void shoal_pack(int type, const void *w, int64_t w_stride, int64_t columns, int64_t inner, void *out, int threads) {
    const int64_t size = element_size(type), depth = positions(type, inner);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t first = 0; first < columns; first += PANEL)
        for (int64_t block = 0; block < depth; block += DEPTH) {
            const int64_t count = depth - block < DEPTH ? depth - block : DEPTH;
            char *to = (char *)out + (first * depth + block * PANEL) * size;
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
            const int64_t from = place(type, w->inner, k, ids[i]), to = i * w->inner + k;
            if (type == F32) ((float *)out)[to] = ((const float *)w->data)[from];
            else ((uint16_t *)out)[to] = ((const uint16_t *)w->data)[from];
        }
}
