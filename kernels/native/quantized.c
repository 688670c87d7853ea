/* Products with weights of 8 or 4 bits, in integers: rows of x are rounded to 8 bits in groups of 32 inputs, as the weights are.
 *
 * The format of codes and scales: kernels/quantized_format.py. A group's product is an exact integer, which is multiplied with both scales
 * and added in float32, groups in rising order, the bias last: an element's bits depend neither on the rows nor on the threads nor on the
 * instructions. Codes are read as unsigned numbers, zero at 128 or 8; what that adds, -zero times the group's sum of x, is the integers'
 * start. Every thread rounds the rows it multiplies by itself, which takes it less time than to wait for the others.
 */
#include "weight.h"

#include <stdlib.h>

#include "vector.h"

#define GROUP 32
#define BLOCK 16 /* columns whose codes are interleaved, four inputs of each in turn */
#define ROWS 96  /* rows of x, rounded, that stay in the second-level cache */
#define AHEAD 8192 /* bytes: what is called for so far ahead has come from memory when it is needed */
#define PAGE 4096  /* bytes: where the processor stops to call for what it will need by itself */
#define BLOCKS 32 /* most column blocks taken at once, */
#define UNIT 4    /* in fours, as many as tiles take */
#define PIECES (BLOCK / LANES)

/* Rows and blocks of the tiles: as many sums, of integers and of floats, as there are registers for. */
#if LANES == 16
enum { MOST_ROWS = 6, MOST_BLOCKS = 2 };
#else
enum { MOST_ROWS = 2, MOST_BLOCKS = 1 };
#endif

/* Some rows of x, rounded. */
typedef struct {
    int8_t *codes;   /* [rows, groups, GROUP] */
    float *scales;   /* [rows, groups] */
    int32_t *starts; /* [rows, groups] */
    int64_t groups;
} Rounded;

/* Whether a group's products of 4-bit codes are summed in halves of 16 bits, which hold them: 16 times 15 times 127. */
#if defined(__AVX2__) && !defined(__AVXVNNI__) && LANES == 8
#define SUMS_HALVES(BITS) ((BITS) == 4)
#else
#define SUMS_HALVES(BITS) 0
#endif

/* sum + the dot products of each lane's four unsigned bytes with the four signed bytes of x; in two halves where SUMS_HALVES. */
INLINE vi dot_four(int bits, vi sum, vu w, int32_t x) {
#if defined(__AVX2__) && LANES == 8
    if (SUMS_HALVES(bits)) return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x)));
#endif
#if defined(__AVX512VNNI__) && LANES == 16
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__) && LANES == 8
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX512BW__) && LANES == 16
    __m512i wide = _mm512_set1_epi32(x), odd = _mm512_srai_epi16(wide, 8), even = _mm512_srai_epi16(_mm512_slli_epi16(wide, 8), 8);
    sum += (vi)_mm512_madd_epi16((__m512i)(w & 0x00ff00ff), even);
    return sum + (vi)_mm512_madd_epi16((__m512i)((w >> 8) & 0x00ff00ff), odd);
#elif defined(__AVX2__) && LANES == 8
    __m256i wide = _mm256_set1_epi32(x), odd = _mm256_srai_epi16(wide, 8), even = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 8);
    sum += (vi)_mm256_madd_epi16((__m256i)(w & 0x00ff00ff), even);
    return sum + (vi)_mm256_madd_epi16((__m256i)((w >> 8) & 0x00ff00ff), odd);
#else
    for (int i = 0; i < 4; i++) sum += (vi)((w >> (8 * i)) & 0xff) * (int32_t)(int8_t)(uint8_t)((uint32_t)x >> (8 * i));
    return sum;
#endif
}

/* The sum of both halves of each lane. */
INLINE vi join_halves(vi sum) {
#if defined(__AVX2__) && LANES == 8
    return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#else
    return sum; /* there are none */
#endif
}

INLINE vu load_bytes(const uint8_t *p) {
    vu bytes;
    memcpy(&bytes, p, sizeof bytes);
    return bytes;
}

INLINE int32_t four_inputs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return four;
}

/* m rows from `row` of x on, which is `first` of y, times n blocks of columns from `block` on. Meanwhile `calls` lines are called for into the
 * second-level cache, from `next` on, for every two lines of the codes; for one row only the first ones of a page, after which the processor
 * goes on by itself. bits, calls, m, n are constants here. */
INLINE void tile(int bits, const Weight *w, const Rows *p, const Rounded *x, int64_t row, int64_t first, int64_t block, const uint8_t *next,
                 int calls, int m, int n) {
    const int64_t groups = x->groups, group_bytes = BLOCK * GROUP * bits / 8, block_bytes = groups * group_bytes;
    const uint8_t *codes = (const uint8_t *)w->data + block * block_bytes;
    const uint16_t *scales = (const uint16_t *)w->scales + block * groups * BLOCK;
    vf sums[MOST_ROWS][MOST_BLOCKS][PIECES];
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++)
            for (int h = 0; h < PIECES; h++) sums[r][c][h] = (vf){};
    const int begins = calls == 2 && m == 1;
    for (int64_t g = 0; g < groups; g++, next += begins ? group_bytes : 0) {
        if (begins && (uintptr_t)next % PAGE < (uintptr_t)group_bytes)
            for (int i = 0; i < 8; i++) call_for(next + i * 64);
        vi dots[MOST_ROWS][MOST_BLOCKS][PIECES];
        for (int r = 0; r < m; r++)
            for (int c = 0; c < n; c++)
                for (int h = 0; h < PIECES; h++) dots[r][c][h] = (vi){} + (SUMS_HALVES(bits) ? 0 : x->starts[(row + r) * groups + g]);
        for (int i = 0; i < GROUP; i += 8) {
            vu low[MOST_BLOCKS][PIECES], high[MOST_BLOCKS][PIECES];
            for (int c = 0; c < n; c++)
                for (int h = 0; h < PIECES; h++) {
                    const uint8_t *from = codes + c * block_bytes + g * group_bytes + i / 8 * (BLOCK * bits) + h * 4 * LANES;
                    low[c][h] = load_bytes(from);
                    if (bits == 8) high[c][h] = load_bytes(from + 4 * BLOCK);
                    else high[c][h] = (low[c][h] >> 4) & 0x0f0f0f0f, low[c][h] &= 0x0f0f0f0f;
                }
            for (int c = 0; c < calls * n * BLOCK * bits / 128 && !begins; c++, next += 64) call_for(next);
            for (int r = 0; r < m; r++) {
                const int8_t *inputs = x->codes + ((row + r) * groups + g) * GROUP + i;
                for (int c = 0; c < n; c++)
                    for (int h = 0; h < PIECES; h++) {
                        dots[r][c][h] = dot_four(bits, dots[r][c][h], low[c][h], four_inputs(inputs));
                        dots[r][c][h] = dot_four(bits, dots[r][c][h], high[c][h], four_inputs(inputs + 4));
                    }
            }
        }
        for (int c = 0; c < n; c++)
            for (int h = 0; h < PIECES; h++) {
                vf scale = load(scales + (c * groups + g) * BLOCK + h * LANES, BF16);
                for (int r = 0; r < m; r++) {
                    vf both = scale * splat(x->scales[(row + r) * groups + g]);
                    if (SUMS_HALVES(bits)) dots[r][c][h] = join_halves(dots[r][c][h]) + x->starts[(row + r) * groups + g];
                    sums[r][c][h] = multiply_add(__builtin_convertvector(dots[r][c][h], vf), both, sums[r][c][h]);
                }
            }
    }
    const int64_t size = element_size(w->type);
    for (int c = 0; c < n; c++)
        for (int h = 0; h < PIECES; h++) {
            const int64_t column = (block + c) * BLOCK + h * LANES, count = w->columns - column < LANES ? w->columns - column : LANES;
            if (count <= 0) continue;
            vf bias = w->bias ? load_part((const char *)w->bias + column * size, w->type, count) : splat(0.0f);
            for (int r = 0; r < m; r++) {
                char *out = (char *)p->y + ((first + r) * p->y_stride + column) * size;
                vf value = w->bias ? sums[r][c][h] + bias : sums[r][c][h];
                if (count == LANES) store(out, w->type, value);
                else store_part(out, w->type, value, count);
            }
        }
}

/* `rows` rows of x, the first of which is `first` of y, times blocks of columns [block, last): blocks after blocks, all rows with each, in
 * tiles as equal as they can be. One tile waits for memory, which is read fastest block by block; of several, the first two call for the next
 * blocks, which then come while the others compute. */
INLINE void task(int bits, const Weight *w, const Rows *p, const Rounded *x, int64_t rows, int64_t first, int64_t block, int64_t last) {
    const int64_t tiles = ceil_div(rows, MOST_ROWS), bytes = x->groups * BLOCK * GROUP * bits / 8;
    for (int64_t c = block, n; c < last; c += n) {
        n = tiles == 1 || last - c < MOST_BLOCKS ? 1 : MOST_BLOCKS;
        const uint8_t *codes = (const uint8_t *)w->data + c * bytes;
        for (int64_t i = 0, row = 0, m; i < tiles; i++, row += m) {
            const uint8_t *next = tiles == 1 ? codes + AHEAD : codes + n * bytes + i * n * bytes / 2;
            m = (rows - row) / (tiles - i);
#define TILE(M, N, CALLS) tile(bits, w, p, x, row, first + row, c, next, CALLS, M, N)
#define TILES(M)                                         \
    case M:                                              \
        if (tiles == 1) TILE(M, 1, 2);                   \
        else if (n == 1) TILE(M, 1, 0);                  \
        else if (i < 2) TILE(M, MOST_BLOCKS, 1);         \
        else TILE(M, MOST_BLOCKS, 0);                    \
        break;
            switch (m) {
                TILES(1) TILES(2)
#if LANES == 16
                TILES(3) TILES(4) TILES(5) TILES(6)
#endif
            }
        }
    }
}

static void task_8(const Weight *w, const Rows *p, const Rounded *x, int64_t rows, int64_t first, int64_t block, int64_t last) {
    task(8, w, p, x, rows, first, block, last);
}
static void task_4(const Weight *w, const Rows *p, const Rounded *x, int64_t rows, int64_t first, int64_t block, int64_t last) {
    task(4, w, p, x, rows, first, block, last);
}

/* One group of a row: codes, their scale, and the start of its dot products. The inputs [first, last) of the group are in x, the rest is 0.
 * A value that is not finite makes the scale not a number. */
INLINE void quantize_group(int type, const char *x, int first, int last, int zero, int8_t *codes, float *scale, int32_t *start) {
    float values[GROUP] __attribute__((aligned(64))) = {0};
    const int64_t size = element_size(type);
    vf *vectors = (vf *)values, largest = splat(0.0f), poison = splat(0.0f);
    if (first == 0 && last == GROUP) {
        for (int i = 0; i < GROUP / LANES; i++) vectors[i] = load(x + i * LANES * size, type);
    } else {
        for (int i = first; i < last; i++) values[i] = load_part(x + (i - first) * size, type, 1)[0];
    }
    for (int i = 0; i < GROUP / LANES; i++) {
        largest = max_lanes((vf)((vu)vectors[i] & 0x7fffffffu), largest);
        poison += vectors[i] * splat(0.0f);
    }
    const float most = largest_lane(largest);
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    *scale = (most > 1e-30f ? most / 127.0f : 0.0f) + sum_lanes(poison);
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t code = (int32_t)__builtin_rintf(values[i] * inverse);
        codes[i] = (int8_t)code;
        sum += (int8_t)code;
    }
    *start = -zero * sum;
}

/* Rows [first, first + rows) of x, rounded. lead: the place of an x's first input in its group. */
INLINE void round_rows(int type, const Rows *p, int64_t first, int64_t rows, int64_t inner, int64_t lead, int zero, const Rounded *out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < out->groups; g++) {
            const int64_t begin = g * GROUP - lead, i = r * out->groups + g; /* the group's first input, in x's own numbers */
            const int from = begin < 0 ? (int)-begin : 0, to = inner - begin < GROUP ? (int)(inner - begin) : GROUP;
            const char *x = (const char *)p->x + ((first + r) * p->x_stride + begin + from) * element_size(type);
            quantize_group(type, x, from, to, zero, out->codes + i * GROUP, out->scales + i, out->starts + i);
        }
}

/* Memory of this thread for `parts` groups; it is kept for the next product, and grows to the widest weight's ROWS rows. */
static Rounded rounded(int64_t parts, int64_t groups) {
    static _Thread_local char *memory;
    static _Thread_local int64_t size;
    if (parts > size) {
        free(memory);
        size = parts;
        memory = aligned_alloc(64, (size_t)(parts * (GROUP + 8) + 63) / 64 * 64);
        if (!memory) abort();
    }
    float *scales = (float *)(memory + parts * GROUP);
    return (Rounded){(int8_t *)memory, scales, (int32_t *)(scales + parts), groups};
}

/* Columns are taken as threads come, all of a block of rows before the next one's. */
void multiply_quantized(const Weight *w, const Rows *p, int64_t *next, int threads) {
    const int zero = w->kind == QUANTIZED_8 ? 128 : 8;
    const int64_t groups = ceil_div(w->lead + w->inner, GROUP), all = ceil_div(w->columns, BLOCK), units = ceil_div(all, UNIT);
    const Rounded x = rounded((p->rows < ROWS ? p->rows : ROWS) * groups, groups);
    int64_t held = -1;
    for (int64_t unit, count; (count = take(next, ceil_div(p->rows, ROWS) * units, units, BLOCKS / UNIT, threads, &unit));) {
        const int64_t first = unit / units * ROWS, rows = p->rows - first < ROWS ? p->rows - first : ROWS;
        const int64_t block = unit % units * UNIT, last = block + count * UNIT;
        if (held != first) {
            if (w->type == F32) round_rows(F32, p, first, rows, w->inner, w->lead, zero, &x);
            else if (w->type == BF16) round_rows(BF16, p, first, rows, w->inner, w->lead, zero, &x);
            else round_rows(F16, p, first, rows, w->inner, w->lead, zero, &x);
            held = first;
        }
        (w->kind == QUANTIZED_8 ? task_8 : task_4)(w, p, &x, rows, first, block, all < last ? all : last);
    }
}
