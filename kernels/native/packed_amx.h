/* Some rows of bfloat16 with some panels, in AMX's tiles; a part of packed.c.
 *
 * Two tiles of rows by a panel, which is two tiles of columns: four products for four loads. x is read where it is, but for rows that do
 * not make a whole tile, or whose positions do not: those are copied. An element of y is the sum over blocks of 32 positions in rising
 * order, of which the even ones and the odd ones are summed apart: the instruction's own order, whatever the rows.
 */
#define AMX_BLOCK 256          /* most rows of a block of x, */
#define AMX_BLOCK_BYTES 786432 /* which stays in the second-level cache beside the panels that go by */
#define AMX_DEPTH 512          /* positions of a block: a panel's block stays in the first-level cache beside x's rows */

#define TILE_OF_BF16 (2 * AMX_ROWS)

/* Rows of a block of x: whole pairs of tiles. */
INLINE int64_t rows_of_bf16(int64_t inner) {
    const int64_t rows = AMX_BLOCK_BYTES / (2 * inner + 1) / (2 * AMX_ROWS) * (2 * AMX_ROWS);
    return rows > AMX_BLOCK ? AMX_BLOCK : rows < 2 * AMX_ROWS ? 2 * AMX_ROWS : rows;
}

/* Where rows of x are: the first `whole` as they lie, the others copied. Steps in bytes. */
typedef struct {
    const char *x, *copied;
    int64_t whole, x_step, copied_step;
} AmxRows;

/* `rows` rows of x from `row` on. Copies are kept in memory of this thread until the next ones, zeros up to `inner` positions. */
static AmxRows amx_rows(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t inner) {
    static _Thread_local char *memory;
    static _Thread_local int64_t size;
    const int64_t whole = inner == w->inner ? rows / AMX_ROWS * AMX_ROWS : 0, tiles = ceil_div(rows - whole, AMX_ROWS);
    const int64_t bytes = w->inner * 2, step = inner * 2 + 64; /* rows in different sets of the cache */
    if (tiles * AMX_ROWS * step > size) {
        free(memory);
        size = tiles * AMX_ROWS * step;
        memory = aligned_alloc(64, (size_t)size);
        if (!memory) abort();
        memset(memory, 0, (size_t)size); /* rows that are not there are multiplied, and their sums left where they are */
    }
    const AmxRows found = {(const char *)p->x + row * p->x_stride * 2, memory, whole, p->x_stride * 2, step};
    for (int64_t r = whole; r < rows; r++) {
        char *to = memory + (r - whole) * step;
        memcpy(to, found.x + r * found.x_step, (size_t)bytes);
        memset(to + bytes, 0, (size_t)(inner * 2 - bytes));
    }
    return found;
}

/* What is called for while some rows are multiplied, a little per 32 positions: `lines` of the cache from `next` on, and the beginnings of
 * two rows of y, or null. */
typedef struct {
    const char *next, *y;
    int64_t y_step;
} Calls;

/* to [16 or 32][32] = sums before, or zeros, + rows of x . panel over `count` positions: of one tile of rows, or two. x: where the tiles of
 * rows begin; step: bytes between their rows. lines and tiles are constants here. */
INLINE void multiply_tiles(const char *const x[2], const int64_t step[2], const char *panel, int64_t count, const float *before, float *to,
                           Calls calls, int lines, int tiles) {
    if (!before) {
        AMX_ZERO(0);
        AMX_ZERO(1);
        AMX_ZERO(2);
        AMX_ZERO(3);
    } else {
        AMX_LOAD(0, before, 4 * PANEL);
        AMX_LOAD(1, before + AMX_PAIRS, 4 * PANEL);
        if (tiles == 2) {
            AMX_LOAD(2, before + AMX_ROWS * PANEL, 4 * PANEL);
            AMX_LOAD(3, before + AMX_ROWS * PANEL + AMX_PAIRS, 4 * PANEL);
        }
    }
    for (int64_t at = 0; at < count * 2; at += 64, panel += 64 * PANEL) {
        for (int i = 0; i < lines; i++, calls.next += 64) __builtin_prefetch(calls.next, 0, 2); /* the first-level cache is full of x */
        for (int i = 0; i < 2 && calls.y; i++, calls.y += calls.y_step) __builtin_prefetch(calls.y, 1);
        AMX_LOAD(6, panel, 4 * PANEL);
        AMX_LOAD(4, x[0] + at, step[0]);
        AMX_MULTIPLY(0, 4, 6);
        AMX_LOAD(7, panel + 64, 4 * PANEL);
        AMX_MULTIPLY(1, 4, 7);
        if (tiles == 2) {
            AMX_LOAD(5, x[1] + at, step[1]);
            AMX_MULTIPLY(2, 5, 6);
            AMX_MULTIPLY(3, 5, 7);
        }
    }
    AMX_STORE(0, to, 4 * PANEL);
    AMX_STORE(1, to + AMX_PAIRS, 4 * PANEL);
    if (tiles == 2) {
        AMX_STORE(2, to + AMX_ROWS * PANEL, 4 * PANEL);
        AMX_STORE(3, to + AMX_ROWS * PANEL + AMX_PAIRS, 4 * PANEL);
    }
}

/* Rows r to r + 31 of a block of `rows`, as far as they are there, with a block of a panel: the sums before into `to`. One group of rows
 * waits for memory and calls for what it needs soon; of several, the first ones call for the next block, which then comes while they compute. */
INLINE void amx_group(const AmxRows *a, int64_t rows, int64_t r, int64_t from, const char *panel, int64_t count, const float *before, float *to,
                      char *y, int64_t y_step) {
    const int64_t groups = ceil_div(rows, 2 * AMX_ROWS), callers = groups < 4 ? 2 : 4;
    const int one = rows - r <= AMX_ROWS, group = (int)(r / (2 * AMX_ROWS));
    const char *x[2];
    int64_t step[2];
    for (int i = 0; i < 2; i++) {
        const int64_t row = r + i * AMX_ROWS, copied = row >= a->whole;
        step[i] = copied ? a->copied_step : a->x_step;
        x[i] = (copied ? a->copied + (row - a->whole) * step[i] : a->x + row * step[i]) + from * 2;
    }
    const char *next = groups == 1 ? panel + AHEAD : panel + (count + group * count / callers) * PANEL * 2;
    const Calls calls = {next, y, y_step};
#define MULTIPLY(LINES, TILES) multiply_tiles(x, step, panel, count, before, to, calls, LINES, TILES)
    if (groups == 1 && one) MULTIPLY(PANEL, 1);
    else if (groups == 1) MULTIPLY(PANEL, 2);
    else if (one) MULTIPLY(0, 1);
    else if (group >= callers) MULTIPLY(0, 2);
    else if (callers == 2) MULTIPLY(PANEL / 2, 2);
    else MULTIPLY(PANEL / 4, 2);
}

static void block_bf16(const Weight *w, const Rows *p, int64_t row, int64_t rows, int64_t panel, int64_t panels, Scratch *s) {
    const int64_t inner = positions(BF16, w->inner), blocks = ceil_div(inner, AMX_DEPTH), step = p->y_stride * 2;
    const int64_t depth = blocks ? ceil_div(inner / (2 * AMX_PAIRS), blocks) * (2 * AMX_PAIRS) : 0; /* blocks as equal as they can be */
    const AmxRows a = amx_rows(w, p, row, rows, inner);
    float *whole = s->x; /* sums over all positions of some rows */
    amx_begin();
    for (int64_t i = panel; i < panel + panels; i++) {
        int64_t from = 0;
        do {
            const char *block = (const char *)w->data + (i * inner + from) * PANEL * 2;
            const int64_t count = inner - from < depth ? inner - from : depth;
            const int last = from + count == inner;
            for (int64_t r = 0; r < rows; r += 2 * AMX_ROWS) {
                float *sums = s->sums + r * PANEL;
                char *y = (char *)p->y + (row + r) * step + i * PANEL * 2;
                amx_group(&a, rows, r, from, block, count, from ? sums : 0, last ? whole : sums, last ? y : 0, step);
                if (last) finish(BF16, w, p, row + r, rows - r < 2 * AMX_ROWS ? rows - r : 2 * AMX_ROWS, i, whole);
            }
            from += count;
        } while (from < inner);
    }
    amx_end();
}
