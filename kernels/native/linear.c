/* y = x w^T + bias with one reduction order per output element, whatever the number of rows, their place, or the threads.
 *
 * x [rows, inner], w [columns, inner], bias [columns] or NULL, y [rows, columns], all of one type, accumulated in float32. An element: blocks
 * of INNER positions; within a block the lanes of a vector, each taking every LANES-th position; a fixed tree over the lanes; blocks added
 * in rising order; the bias last; one rounding. Tiles only decide how many elements are in registers at once. Called from kernels/linear.py.
 */
#include "vector.h"

#define INNER 1024 /* 4 KiB of a float32 row: the rows of a tile stay in the first-level cache */
#define ROWS 96    /* a block of rows times INNER, */
#define COLUMNS 64 /* and a block of columns times INNER, stay in the second-level cache */
#define FEW_ROWS 4 /* up to here memory is the limit: a few columns from end to end, which is how it is read fastest */

/* Rows and columns of the tiles: as many sums as there are registers for; few rows take more columns, for more loads in flight. */
#if defined(__AVX512F__)
enum { MOST_ROWS = 6, MOST_COLUMNS = 8 };
#define FOR_EACH_TILE(DO) DO(6, 4) DO(4, 4) DO(2, 8) DO(1, 8)
#else
enum { MOST_ROWS = 3, MOST_COLUMNS = 8 };
#define FOR_EACH_TILE(DO) DO(3, 4) DO(2, 4) DO(1, 8)
#endif

typedef struct {
    const char *x, *w, *bias;
    char *y;
    int64_t rows, columns, inner, x_stride, w_stride, y_stride; /* strides in elements */
} problem;

/* sums[r * COLUMNS + c] (+)= dot products over `count` positions of m rows of x (float32) and n rows of w; m, n, type are constants here. */
INLINE void tile(int type, const float *x, int64_t x_stride, const char *w, int64_t w_step, int64_t count, int first, float *sums, int m, int n) {
    const int64_t width = element_size(type), whole = count / LANES * LANES;
    vf acc[MOST_ROWS][MOST_COLUMNS];
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++) acc[r][c] = (vf){};
    for (int64_t k = 0; k < whole; k += LANES) {
        vf a[MOST_ROWS];
        for (int r = 0; r < m; r++) a[r] = load(x + r * x_stride + k, F32);
        for (int c = 0; c < n; c++) {
            vf b = load(w + c * w_step + k * width, type);
            for (int r = 0; r < m; r++) acc[r][c] = multiply_add(a[r], b, acc[r][c]);
        }
    }
    if (whole < count) {
        for (int c = 0; c < n; c++) {
            vf b = load_part(w + c * w_step + whole * width, type, count - whole);
            for (int r = 0; r < m; r++) {
                vf a = load_part(x + r * x_stride + whole, F32, count - whole);
                acc[r][c] = multiply_add(a, b, acc[r][c]);
            }
        }
    }
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++) {
            float *sum = sums + r * COLUMNS + c;
            *sum = (first ? 0.0f : *sum) + sum_lanes(acc[r][c]);
        }
}

/* m rows of x against a block of columns, n at a time and the rest one by one. Halves of x are widened once for all columns. */
INLINE void strip(int type, const char *x, int64_t x_step, const char *w, int64_t w_step, int64_t count, int first, float *sums,
                  int64_t columns, int m, int n) {
    float wide[MOST_ROWS * INNER];
    const float *rows = (const float *)x;
    int64_t stride = x_step / 4, c = 0;
    if (type != F32) {
        for (int r = 0; r < m; r++)
            for (int64_t k = 0; k < count; k += LANES) {
                const char *from = x + r * x_step + k * 2;
                store(wide + r * INNER + k, F32, count - k < LANES ? load_part(from, type, count - k) : load(from, type));
            }
        rows = wide, stride = INNER;
    }
    for (; c + n <= columns; c += n) tile(type, rows, stride, w + c * w_step, w_step, count, first, sums + c, m, n);
    for (; c < columns; c++) tile(type, rows, stride, w + c * w_step, w_step, count, first, sums + c, m, 1);
}

INLINE void block(int type, const problem *p, int64_t row, int64_t column) {
    float sums[ROWS * COLUMNS];
    const int64_t width = element_size(type), x_step = p->x_stride * width, w_step = p->w_stride * width;
    const int64_t rows = p->rows - row < ROWS ? p->rows - row : ROWS;
    const int64_t columns = p->columns - column < COLUMNS ? p->columns - column : COLUMNS;
    if (p->inner == 0) memset(sums, 0, sizeof sums);
    const int64_t group = rows <= FEW_ROWS ? MOST_COLUMNS : COLUMNS;
    for (int64_t c = 0; c < columns; c += group)
        for (int64_t k = 0; k < p->inner; k += INNER) {
            const int64_t count = p->inner - k < INNER ? p->inner - k : INNER, wide = columns - c < group ? columns - c : group;
            const char *x = p->x + row * x_step + k * width, *w = p->w + (column + c) * w_step + k * width;
            int64_t r = 0;
#define STRIPS(M, N)              \
    for (; r + M <= rows; r += M) \
        strip(type, x + r * x_step, x_step, w, w_step, count, k == 0, sums + r * COLUMNS + c, wide, M, N);
            FOR_EACH_TILE(STRIPS)
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t n = columns - c < LANES ? columns - c : LANES;
            vf value = *(const vf_unaligned *)(sums + r * COLUMNS + c);
            if (p->bias) value += load_part(p->bias + (column + c) * width, type, n);
            store_part(p->y + ((row + r) * p->y_stride + column + c) * width, type, value, n);
        }
}

static void block_f32(const problem *p, int64_t row, int64_t column) { block(F32, p, row, column); }
static void block_bf16(const problem *p, int64_t row, int64_t column) { block(BF16, p, row, column); }
static void block_f16(const problem *p, int64_t row, int64_t column) { block(F16, p, row, column); }

/* Strides in elements; the last dimension of each is contiguous. */
void shoal_linear(int type, const void *x, int64_t x_stride, const void *w, int64_t w_stride, const void *bias, void *y, int64_t y_stride,
                  int64_t rows, int64_t columns, int64_t inner, int threads) {
    const problem p = {x, w, bias, y, rows, columns, inner, x_stride, w_stride, y_stride};
    void (*const compute)(const problem *, int64_t, int64_t) = type == F32 ? block_f32 : type == BF16 ? block_bf16 : block_f16;
    const int64_t row_blocks = (rows + ROWS - 1) / ROWS, blocks = row_blocks * ((columns + COLUMNS - 1) / COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && blocks > 1)
    for (int64_t i = 0; i < blocks; i++) compute(&p, i % row_blocks * ROWS, i / row_blocks * COLUMNS);
}
