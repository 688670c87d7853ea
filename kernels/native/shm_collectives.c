/* All-reduce, all-gather, broadcast and barrier of one group over shared memory, in fixed rank order. Called from parallel/shm.py.
 *
 * A synchronisation is one counter: the last rank to arrive publishes its number. Data go through per-rank slots, double-buffered by
 * chunk: chunk c + 2 may overwrite chunk c's buffer because a rank arrives at chunk c + 1 only when it has read all of chunk c.
 * Every element is summed in rank order (halves in float32, rounded once), by one rank or by all alike, so all ranks hold equal bits
 * and the result does not depend on the chunks.
 */
#ifdef __linux__
#include "shm.h"
#include "vector.h"

#define MEMBERS_AT 192
#define FLAT_BYTES 32768 /* up to here every rank adds up everything itself: one synchronisation instead of two */
#define BLOCK 512        /* elements summed at a time, in registers and the first-level cache */

enum { SUM_F32 = 1, SUM_F64 = 2, SUM_BF16 = 3, SUM_F16 = 4, SUM_I32 = 5, SUM_I64 = 6 }; /* codes of parallel/agreement.py */

static _Atomic uint32_t *counter(shoal_group *g) { return (_Atomic uint32_t *)g->base; }
static _Atomic uint32_t *generation(shoal_group *g) { return (_Atomic uint32_t *)(g->base + 64); }
static _Atomic uint32_t *sleepers(shoal_group *g) { return (_Atomic uint32_t *)(g->base + 128); }
static shoal_member *member(shoal_group *g, int m) { return (shoal_member *)(g->base + MEMBERS_AT) + m; }

static uint8_t *slot(shoal_group *g, int m) {
    int64_t control = (MEMBERS_AT + (int64_t)sizeof(shoal_member) * g->size + 4095) / 4096 * 4096;
    return g->base + control + (2 * (int64_t)m + (g->chunks & 1)) * g->slot_bytes;
}

/* Arrive, and wait for everyone. */
static int synchronise(shoal_group *g) {
    uint32_t number = ++g->syncs;
    uint32_t before = atomic_fetch_add(counter(g), 1);
    atomic_store_explicit(&member(g, g->rank)->arrived, number, memory_order_release);
    if (before + 1 == number * (uint32_t)g->size) {
        shoal_publish(generation(g), number, sleepers(g));
        return SHOAL_OK;
    }
    int status = shoal_wait_change(g, generation(g), number - 1, sleepers(g), ~(uint64_t)0);
    if (status == SHOAL_OK) return status;
    for (int m = 0; m < g->size; m++)
        if (atomic_load(&member(g, m)->arrived) != number) g->missing |= (uint64_t)1 << m;
    if (g->missing) return status;
    shoal_publish(generation(g), number, sleepers(g)); /* all came; the last one is late, or died, before it could say so */
    return SHOAL_OK;
}

static void announce(shoal_group *g, shoal_header *header) {
    header->seq = g->ops;
    memcpy(&member(g, g->rank)->headers[g->ops & 1], header, sizeof *header);
}

/* After the first synchronisation of an operation: does everyone mean the same? */
static int agree(shoal_group *g, const shoal_header *header) {
    for (int m = 0; m < g->size; m++)
        if (memcmp(&member(g, m)->headers[g->ops & 1], header, sizeof *header)) return SHOAL_MISMATCH;
    return SHOAL_OK;
}

#define DEFINE_SUM(NAME, T)                                                                      \
    static void NAME(void *out, const void *const *in, int n, int64_t from, int64_t to) {        \
        for (int64_t i = from; i < to; i += BLOCK) {                                             \
            int64_t count = to - i < BLOCK ? to - i : BLOCK;                                     \
            T sum[BLOCK];                                                                        \
            memcpy(sum, (const T *)in[0] + i, (size_t)count * sizeof(T));                        \
            for (int m = 1; m < n; m++) {                                                        \
                const T *x = (const T *)in[m] + i;                                               \
                for (int64_t j = 0; j < count; j++) sum[j] = sum[j] + x[j];                      \
            }                                                                                    \
            memcpy((T *)out + i, sum, (size_t)count * sizeof(T));                                \
        }                                                                                        \
    }

/* Halves, summed in float32 and rounded once. */
INLINE void sum_halves(int type, uint16_t *out, const void *const *in, int n, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += LANES) {
        int64_t count = to - i;
        vf sum = splat(0.0f);
        for (int m = 0; m < n; m++) {
            const uint16_t *x = (const uint16_t *)in[m] + i;
            vf value = count >= LANES ? load(x, type) : load_part(x, type, count);
            sum = m == 0 ? value : sum + value;
        }
        if (count >= LANES) store(out + i, type, sum);
        else store_part(out + i, type, sum, count);
    }
}

static void sum_bf16(void *out, const void *const *in, int n, int64_t from, int64_t to) { sum_halves(BF16, out, in, n, from, to); }
static void sum_f16(void *out, const void *const *in, int n, int64_t from, int64_t to) { sum_halves(F16, out, in, n, from, to); }

DEFINE_SUM(sum_f32, float)
DEFINE_SUM(sum_f64, double)
DEFINE_SUM(sum_i32, uint32_t) /* unsigned: wraps around as torch's integers do */
DEFINE_SUM(sum_i64, uint64_t)

typedef void (*sum_function)(void *, const void *const *, int, int64_t, int64_t);

static sum_function sum_of(uint32_t dtype, int64_t *width) {
    switch (dtype) {
    case SUM_F32: *width = 4; return sum_f32;
    case SUM_F64: *width = 8; return sum_f64;
    case SUM_BF16: *width = 2; return sum_bf16;
    case SUM_F16: *width = 2; return sum_f16;
    case SUM_I32: *width = 4; return sum_i32;
    default: *width = 8; return sum_i64;
    }
}

/* Elements [from, to) of a chunk of `count` that member m adds up: whole cache lines. */
static void share(int64_t count, int m, int n, int64_t *from, int64_t *to) {
    int64_t each = (count / n + 63) / 64 * 64;
    *from = each * m < count ? each * m : count;
    *to = m == n - 1 || each * (m + 1) > count ? count : each * (m + 1);
}

/* One chunk of an all-reduce, its slots filled and the first synchronisation done. */
static int reduce_chunk(shoal_group *g, uint8_t *data, int64_t count, int64_t width, sum_function sum, int flat) {
    const void *in[SHOAL_MAX_RANKS];
    for (int m = 0; m < g->size; m++) in[m] = m == g->rank ? data : slot(g, m);
    if (flat) {
        sum(data, in, g->size, 0, count);
        return SHOAL_OK;
    }
    int64_t from, to;
    share(count, g->rank, g->size, &from, &to);
    sum(slot(g, g->rank), in, g->size, from, to); /* nobody else reads this part of our slot before the next synchronisation */
    int status = synchronise(g);
    if (status != SHOAL_OK) return status;
    for (int m = 0; m < g->size; m++) {
        share(count, m, g->size, &from, &to);
        memcpy(data + from * width, slot(g, m) + from * width, (size_t)((to - from) * width));
    }
    return SHOAL_OK;
}

int shoal_shm_all_reduce(shoal_group *g, shoal_header *header, uint8_t *data) {
    int64_t width;
    sum_function sum = sum_of(header->dtype, &width);
    int64_t per_chunk = g->slot_bytes / width, done = 0;
    int flat = g->size == 2 || header->numel * width <= FLAT_BYTES;
    g->ops++;
    int status = shoal_begin(g, header->op, g->ops, 0);
    announce(g, header);
    for (int first = 1; status == SHOAL_OK && (first || done < header->numel); first = 0) {
        int64_t count = header->numel - done < per_chunk ? header->numel - done : per_chunk;
        g->chunks++;
        memcpy(slot(g, g->rank), data + done * width, (size_t)(count * width));
        status = synchronise(g);
        if (status == SHOAL_OK && first) status = agree(g, header);
        if (status == SHOAL_OK) status = reduce_chunk(g, data + done * width, count, width, sum, flat);
        done += count;
    }
    if (status == SHOAL_OK) shoal_end(g);
    return status;
}

/* Copy bytes [from, from + count) of a member's contiguous part into its columns of the output. */
static void place(uint8_t *out, int64_t out_row, int64_t row, const uint8_t *part, int64_t from, int64_t count) {
    while (count > 0) {
        int64_t column = from % row, piece = row - column < count ? row - column : count;
        memcpy(out + from / row * out_row + column, part, (size_t)piece);
        part += piece, from += piece, count -= piece;
    }
}

/* rows[m]: bytes of one row of member m's part; every part has `outer` rows. out: outer rows of the sum of rows. */
int shoal_shm_all_gather(shoal_group *g, shoal_header *header, const uint8_t *data, uint8_t *out, int64_t outer, const int64_t *rows) {
    int64_t longest = 0, out_row = 0, starts[SHOAL_MAX_RANKS];
    for (int m = 0; m < g->size; m++) {
        starts[m] = out_row;
        out_row += rows[m];
        if (rows[m] * outer > longest) longest = rows[m] * outer;
    }
    int64_t own = rows[g->rank] * outer;
    g->ops++;
    int status = shoal_begin(g, header->op, g->ops, 0);
    announce(g, header);
    for (int64_t done = 0; status == SHOAL_OK && (done == 0 || done < longest); done += g->slot_bytes) {
        g->chunks++;
        int64_t count = own - done < g->slot_bytes ? own - done : g->slot_bytes;
        if (count > 0) memcpy(slot(g, g->rank), data + done, (size_t)count);
        status = synchronise(g);
        if (status == SHOAL_OK && done == 0) status = agree(g, header);
        for (int m = 0; status == SHOAL_OK && m < g->size; m++) {
            int64_t theirs = rows[m] * outer - done < g->slot_bytes ? rows[m] * outer - done : g->slot_bytes;
            const uint8_t *part = m == g->rank ? data + done : slot(g, m);
            if (theirs > 0) place(out + starts[m], out_row, rows[m], part, done, theirs);
        }
    }
    if (status == SHOAL_OK) shoal_end(g);
    return status;
}

int shoal_shm_broadcast(shoal_group *g, shoal_header *header, uint8_t *data, int64_t bytes) {
    g->ops++;
    int status = shoal_begin(g, header->op, g->ops, 0);
    announce(g, header);
    int root = (int)header->root;
    for (int64_t done = 0; status == SHOAL_OK && (done == 0 || done < bytes); done += g->slot_bytes) {
        g->chunks++;
        size_t count = (size_t)(bytes - done < g->slot_bytes ? bytes - done : g->slot_bytes);
        if (g->rank == root) memcpy(slot(g, root), data + done, count);
        status = synchronise(g);
        if (status == SHOAL_OK && done == 0) status = agree(g, header);
        if (status == SHOAL_OK && g->rank != root) memcpy(data + done, slot(g, root), count);
    }
    if (status == SHOAL_OK) shoal_end(g);
    return status;
}

int shoal_shm_barrier(shoal_group *g, shoal_header *header) {
    g->ops++;
    int status = shoal_begin(g, header->op, g->ops, 0);
    announce(g, header);
    if (status == SHOAL_OK) status = synchronise(g);
    if (status == SHOAL_OK) status = agree(g, header);
    if (status == SHOAL_OK) shoal_end(g);
    return status;
}

/* For Python to check its mirror of the struct. */
int64_t shoal_shm_group_bytes(void) { return (int64_t)sizeof(shoal_group); }
#endif
