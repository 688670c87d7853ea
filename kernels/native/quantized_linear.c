/* y = x w^T + bias with weights of 8 or 4 bits, in integers: rows of x are rounded to 8 bits in groups of 32 inputs, as the weights are.
 *
 * The format of codes and scales: kernels/quantized_format.py. A group's product is an exact integer, which is multiplied with both scales
 * and added in float32, groups in rising order: an element's bits depend neither on the number of rows nor on the threads nor on the
 * instructions. Codes are read as unsigned numbers, zero at 128 or 8; what that adds, -zero times the group's sum of x, is the integers'
 * start. Called from kernels/quantized_linear.py.
 */
#include "vector.h"

#define GROUP 32
#define BLOCK 16   /* columns whose codes are interleaved, four inputs of each in turn */
#define ROWS 96    /* rows of x that stay in the second-level cache */
#define BLOCKS 4   /* column blocks of a work item */
#define PIECES (BLOCK / LANES)

/* Rows and blocks of the tiles: as many sums, of integers and of floats, as there are registers for. */
#if LANES == 16
enum { MOST_ROWS = 6, MOST_BLOCKS = 4 };
#define FOR_EACH_TILE(DO) DO(6, 2) DO(4, 2) DO(2, 4) DO(1, 4)
#else
enum { MOST_ROWS = 2, MOST_BLOCKS = 2 };
#define FOR_EACH_TILE(DO) DO(2, 1) DO(1, 2)
#endif

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    const char *bias;
    char *y;
    const int8_t *x;       /* [rows, groups, GROUP] */
    const float *x_scales; /* [rows, groups] */
    const int32_t *starts; /* [rows, groups] */
    int64_t rows, columns, groups, y_stride;
    int type;
} problem;

/* sum + the dot products of each lane's four unsigned bytes with the four signed bytes of x. */
INLINE vi dot_four(vi sum, vu w, int32_t x) {
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

/* m rows from `row` on times n blocks of columns from `block` on; bits, m, n are constants here. */
INLINE void tile(int bits, const problem *p, int64_t row, int64_t block, int m, int n) {
    const int64_t groups = p->groups, group_bytes = BLOCK * GROUP * bits / 8, block_bytes = groups * group_bytes;
    const uint8_t *codes = p->codes + block * block_bytes;
    const uint16_t *scales = p->scales + block * groups * BLOCK;
    const int8_t *x = p->x + row * groups * GROUP;
    vf sums[MOST_ROWS][MOST_BLOCKS][PIECES];
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++)
            for (int h = 0; h < PIECES; h++) sums[r][c][h] = (vf){};
    for (int64_t g = 0; g < groups; g++) {
        vi dots[MOST_ROWS][MOST_BLOCKS][PIECES];
        for (int r = 0; r < m; r++)
            for (int c = 0; c < n; c++)
                for (int h = 0; h < PIECES; h++) dots[r][c][h] = (vi){} + p->starts[(row + r) * groups + g];
        for (int i = 0; i < GROUP; i += 8) {
            vu low[MOST_BLOCKS][PIECES], high[MOST_BLOCKS][PIECES];
            for (int c = 0; c < n; c++)
                for (int h = 0; h < PIECES; h++) {
                    const uint8_t *from = codes + c * block_bytes + g * group_bytes + i / 8 * (BLOCK * bits) + h * 4 * LANES;
                    low[c][h] = load_bytes(from);
                    if (bits == 8) high[c][h] = load_bytes(from + 4 * BLOCK);
                    else high[c][h] = (low[c][h] >> 4) & 0x0f0f0f0f, low[c][h] &= 0x0f0f0f0f;
                }
            for (int r = 0; r < m; r++) {
                const int8_t *inputs = x + (r * groups + g) * GROUP + i;
                for (int c = 0; c < n; c++)
                    for (int h = 0; h < PIECES; h++) {
                        dots[r][c][h] = dot_four(dots[r][c][h], low[c][h], four_inputs(inputs));
                        dots[r][c][h] = dot_four(dots[r][c][h], high[c][h], four_inputs(inputs + 4));
                    }
            }
        }
        for (int c = 0; c < n; c++)
            for (int h = 0; h < PIECES; h++) {
                vf scale = load(scales + (c * groups + g) * BLOCK + h * LANES, BF16);
                for (int r = 0; r < m; r++) {
                    vf both = scale * splat(p->x_scales[(row + r) * groups + g]);
                    sums[r][c][h] = multiply_add(__builtin_convertvector(dots[r][c][h], vf), both, sums[r][c][h]);
                }
            }
    }
    const int64_t size = element_size(p->type);
    for (int c = 0; c < n; c++)
        for (int h = 0; h < PIECES; h++) {
            const int64_t column = (block + c) * BLOCK + h * LANES, count = p->columns - column < LANES ? p->columns - column : LANES;
            if (count <= 0) continue;
            vf bias = p->bias ? load_part(p->bias + column * size, p->type, count) : splat(0.0f);
            for (int r = 0; r < m; r++) {
                char *out = p->y + ((row + r) * p->y_stride + column) * size;
                vf value = p->bias ? sums[r][c][h] + bias : sums[r][c][h];
                if (count == LANES) store(out, p->type, value);
                else store_part(out, p->type, value, count);
            }
        }
}

/* A block of rows times up to BLOCKS blocks of columns. */
INLINE void item(int bits, const problem *p, int64_t row, int64_t block) {
    const int64_t all = (p->columns + BLOCK - 1) / BLOCK, last_block = all - block < BLOCKS ? all : block + BLOCKS;
    const int64_t last_row = p->rows - row < ROWS ? p->rows : row + ROWS;
#define STRIPS(M, N)                                         \
    for (; row + M <= last_row; row += M) {                  \
        int64_t c = block;                                   \
        for (; c + N <= last_block; c += N) tile(bits, p, row, c, M, N); \
        for (; c < last_block; c++) tile(bits, p, row, c, M, 1);         \
    }
    FOR_EACH_TILE(STRIPS)
}

static void item_8(const problem *p, int64_t row, int64_t block) { item(8, p, row, block); }
static void item_4(const problem *p, int64_t row, int64_t block) { item(4, p, row, block); }

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

INLINE void quantize(int type, const char *x, int64_t x_stride, int64_t inner, int64_t lead, int zero, int64_t groups, int64_t index,
                     int8_t *codes, float *scales, int32_t *starts) {
    const int64_t row = index / groups, begin = index % groups * GROUP - lead; /* the group's first input, in x's own numbers */
    const int first = begin < 0 ? (int)-begin : 0, last = inner - begin < GROUP ? (int)(inner - begin) : GROUP;
    const char *from = x + (row * x_stride + begin + first) * element_size(type);
    quantize_group(type, from, first, last, zero, codes + index * GROUP, scales + index, starts + index);
}

/* x [rows, inner] in one of the types of vector.h, its first input number `lead` of its group; scratch: rows * groups * (GROUP + 8) bytes,
 * aligned to 64. Strides in elements. */
void shoal_quantized_linear(int type, int bits, const void *x, int64_t x_stride, const void *codes, const void *scales, const void *bias,
                            void *y, int64_t y_stride, int64_t rows, int64_t columns, int64_t inner, int64_t lead, void *scratch,
                            int threads) {
    const int64_t groups = (lead + inner + GROUP - 1) / GROUP, parts = rows * groups;
    int8_t *x_codes = scratch;
    float *x_scales = (float *)(x_codes + parts * GROUP);
    int32_t *starts = (int32_t *)(x_scales + parts);
    const problem p = {codes, scales, bias, y, x_codes, x_scales, starts, rows, columns, groups, y_stride, type};
    void (*const compute)(const problem *, int64_t, int64_t) = bits == 8 ? item_8 : item_4;
    const int zero = bits == 8 ? 128 : 8;
    const int64_t row_items = (rows + ROWS - 1) / ROWS, items = row_items * ((columns + BLOCK * BLOCKS - 1) / (BLOCK * BLOCKS));
#pragma omp parallel num_threads(threads) if (threads > 1 && items > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < parts; i++) {
            if (type == F32) quantize(F32, x, x_stride, inner, lead, zero, groups, i, x_codes, x_scales, starts);
            else if (type == BF16) quantize(BF16, x, x_stride, inner, lead, zero, groups, i, x_codes, x_scales, starts);
            else quantize(F16, x, x_stride, inner, lead, zero, groups, i, x_codes, x_scales, starts);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++) compute(&p, i % row_items * ROWS, i / row_items * BLOCKS);
    }
}
