/* Paged attention on the CPU: ragged rows of queries against keys and values in blocks, online softmax (arXiv:2205.14135).
 *
 * One work item is a run of queries of one row with all query heads of one key/value head, so that a key is read once for the group. Keys
 * are taken in tiles of 64 anchored at position 0, tile by tile in rising order, and every (query, head) has its own arithmetic in an order
 * that its position alone decides: not the batch, the chunk, the blocks' size or the number of threads. Only the keys a query sees are read.
 */
#include <stdlib.h>

#include "vector.h"

#define TILE 64
#define VECTORS (TILE / LANES)
#define ITEM_ROWS 32 /* (query, head) pairs of a work item: a tile of keys stays in the second-level cache for them */
#ifdef __AVX512F__
#define MAX_ROWS 4 /* accumulators: 4 rows x 4 keys of 32 registers */
#else
#define MAX_ROWS 2 /* 2 rows x 4 keys of 16 registers */
#endif

typedef struct {
    const char *q, *k_cache, *v_cache;
    char *out;
    const int32_t *block_table, *cu_seqlens_q, *seq_lens, *head_list, *head_start;
    const float *sinks;
    int64_t q_stride, table_stride, num_heads, num_kv_heads, head_dim, block_size, window;
    float scale, softcap;
} Attention;

/* A work item's rows: query vectors, output accumulators, running maximum and sum of each. width: head_dim in whole vectors. */
typedef struct {
    float *q, *o, *largest, *total;
    int64_t width;
    const char *keys[TILE], *values[TILE];
} Scratch;

/* The first or the second pair of every four lanes of a and b, alternating; and the pairs of both put together. */
#if LANES == 16
#define FIRST_OF(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define SECOND_OF(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define FIRST_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SECOND_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#else
#define FIRST_OF(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define SECOND_OF(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define FIRST_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#endif

/* The sums of four vectors, in the order of one tree. */
INLINE void sum_four(vf a, vf b, vf c, vf d, float *out) {
    vf ab = FIRST_OF(a, b) + SECOND_OF(a, b), cd = FIRST_OF(c, d) + SECOND_OF(c, d);
    vf all = FIRST_PAIRS(ab, cd) + SECOND_PAIRS(ab, cd);
#if LANES == 16
    all += UPPER(all);
#endif
    all += SECOND_FOUR(all);
    for (int i = 0; i < 4; i++) out[i] = all[i];
}

/* scores[r][j] = q_r . key_j for j in [first, stop), four keys at a time; the last key stands in for those beyond. */
INLINE void score_rows(const Attention *a, const Scratch *s, int type, int rows, int64_t row, int first, int stop, float scores[][TILE]) {
    const int64_t whole = a->head_dim / LANES, part = a->head_dim % LANES, step = LANES * element_size(type);
    for (int j = first; j < stop; j += 4) {
        const char *key[4], *next[4];
        for (int i = 0; i < 4; i++) {
            key[i] = s->keys[j + i < stop ? j + i : stop - 1];
            next[i] = s->keys[j + i + 4 < stop ? j + i + 4 : stop - 1];
        }
        vf sums[MAX_ROWS][4] = {0};
        for (int64_t c = 0; c < whole; c++) {
            vf k[4];
            for (int i = 0; i < 4; i++) k[i] = load(key[i] + c * step, type), __builtin_prefetch(next[i] + c * step);
            for (int r = 0; r < rows; r++) {
                vf q = *(const vf *)(s->q + (row + r) * s->width + c * LANES);
                for (int i = 0; i < 4; i++) sums[r][i] = multiply_add(q, k[i], sums[r][i]);
            }
        }
        if (part) {
            vf k[4];
            for (int i = 0; i < 4; i++) k[i] = load_part(key[i] + whole * step, type, part);
            for (int r = 0; r < rows; r++) {
                vf q = *(const vf *)(s->q + (row + r) * s->width + whole * LANES);
                for (int i = 0; i < 4; i++) sums[r][i] = multiply_add(q, k[i], sums[r][i]);
            }
        }
        for (int r = 0; r < rows; r++) {
            float four[4];
            sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3], four);
            for (int i = 0; i < 4 && j + i < stop; i++) scores[r][j + i] = four[i];
        }
    }
}

/* Scores to weights in place, for one row; the running maximum and sum are brought up to date. Returns what older sums are multiplied by.
 * One copy for all callers: how it is compiled must not depend on them. */
static __attribute__((noinline)) float weigh_row(const Attention *a, const Scratch *s, int64_t row, int first, int stop, float *scores) {
    for (int j = 0; j < first; j++) scores[j] = -INFINITY;
    for (int j = stop; j < TILE; j++) scores[j] = -INFINITY;
    vf *vectors = (vf *)scores;
    vf best = splat(-INFINITY);
    for (int i = 0; i < VECTORS; i++) {
        vf x = vectors[i] * splat(a->scale);
        if (a->softcap > 0.0f) {
            vf capped = tanh_lanes(x / splat(a->softcap)) * splat(a->softcap);
            x = choose(vectors[i] == splat(-INFINITY), vectors[i], capped);
        }
        vectors[i] = x;
        best = max_lanes(x, best);
    }
    float before = s->largest[row], largest = largest_lane(best);
    largest = largest > before ? largest : before;
    vf sum = splat(0.0f);
    for (int i = 0; i < VECTORS; i++) {
        vectors[i] = exp_lanes(vectors[i] - splat(largest));
        sum += vectors[i];
    }
    float factor = exp_lanes(splat(before - largest))[0];
    s->largest[row] = largest;
    s->total[row] = s->total[row] * factor + sum_lanes(sum);
    return factor;
}

/* o_r = o_r * factor_r + sum_j weights[r][j] value_j over `count` vectors of the head from vector c on; keys in rising order. */
INLINE void add_values(const Scratch *s, int type, int rows, int64_t row, int first, int stop, float weights[][TILE], const float *factor,
                       int64_t c, int count, int64_t part) {
    const int64_t size = element_size(type);
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++)
            sums[r][i] = *(const vf *)(s->o + (row + r) * s->width + (c + i) * LANES) * splat(factor[r]);
    for (int j = first; j < stop; j++) {
        const char *value = s->values[j] + c * LANES * size, *next = s->values[j + 4 < stop ? j + 4 : j] + c * LANES * size;
        vf v[4];
        for (int i = 0; i < count; i++) {
            v[i] = part ? load_part(value, type, part) : load(value + i * LANES * size, type);
            __builtin_prefetch(next + i * LANES * size);
        }
        for (int r = 0; r < rows; r++) {
            vf weight = splat(weights[r][j]);
            for (int i = 0; i < count; i++) sums[r][i] = multiply_add(weight, v[i], sums[r][i]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) *(vf *)(s->o + (row + r) * s->width + (c + i) * LANES) = sums[r][i];
}

/* One tile for rows that see the same keys of it. */
INLINE void attend_rows(const Attention *a, const Scratch *s, int type, int rows, int64_t row, int first, int stop) {
    float scores[MAX_ROWS][TILE] __attribute__((aligned(64)));
    float factor[MAX_ROWS];
    score_rows(a, s, type, rows, row, first, stop, scores);
    for (int r = 0; r < rows; r++) factor[r] = weigh_row(a, s, row + r, first, stop, scores[r]);
    const int64_t whole = a->head_dim / LANES, part = a->head_dim % LANES;
    int64_t c = 0;
    for (; c + 4 <= whole; c += 4) add_values(s, type, rows, row, first, stop, scores, factor, c, 4, 0);
    for (; c < whole; c++) add_values(s, type, rows, row, first, stop, scores, factor, c, 1, 0);
    if (part) add_values(s, type, rows, row, first, stop, scores, factor, c, 1, part);
}

/* Where the keys [first, stop) of a sequence lie, for one key/value head; entry i belongs to position base + i. */
INLINE void find_keys(const Attention *a, Scratch *s, int type, const int32_t *blocks, int64_t kv, int64_t base, int64_t first, int64_t stop) {
    const int64_t size = element_size(type), token = a->num_kv_heads * a->head_dim * size, head = kv * a->head_dim * size;
    int64_t block = first / a->block_size, inside = first % a->block_size;
    for (int64_t j = first; j < stop; j++) {
        int64_t offset = ((int64_t)blocks[block] * a->block_size + inside) * token + head;
        s->keys[j - base] = a->k_cache + offset;
        s->values[j - base] = a->v_cache + offset;
        if (++inside == a->block_size) inside = 0, block++;
    }
}

/* Some of a row's queries, from number `first` of the batch on, with the `group` query heads of one key/value head: `count` pairs of query
 * and head, query by query. to_position: what turns a query's number in the batch into its position. */
typedef struct {
    int64_t first, group, count, to_position;
    const int32_t *heads;
} Item;

INLINE void start_item(const Attention *a, Scratch *s, int type, const Item *t) {
    const int64_t size = element_size(type), dim = a->head_dim;
    for (int64_t m = 0; m < t->count; m++) {
        const char *query = a->q + ((t->first + m / t->group) * a->q_stride + t->heads[m % t->group] * dim) * size;
        for (int64_t d = 0; d < s->width; d += LANES) {
            *(vf *)(s->q + m * s->width + d) = dim - d >= LANES ? load(query + d * size, type) : load_part(query + d * size, type, dim - d);
            *(vf *)(s->o + m * s->width + d) = splat(0.0f);
        }
        s->largest[m] = -INFINITY, s->total[m] = 0.0f;
    }
}

/* One tile of keys, from position base on, for all pairs; those that see the same part of it go together. */
INLINE void attend_tile(const Attention *a, const Scratch *s, int type, const Item *t, int64_t window, int64_t base) {
    for (int64_t m = 0; m < t->count;) {
        int first = 0, stop = 0, rows = 0;
        for (; rows < MAX_ROWS && m + rows < t->count; rows++) {
            int64_t position = t->first + (m + rows) / t->group + t->to_position;
            int64_t lowest = position - window + 1 - base, highest = position + 1 - base;
            int from = lowest > 0 ? (lowest < TILE ? (int)lowest : TILE) : 0, to = highest < TILE ? (int)highest : TILE;
            if (rows && (from != first || to != stop)) break;
            first = from, stop = to;
        }
        if (stop <= first) { /* none of this tile is seen */
            m += rows;
            continue;
        }
#if MAX_ROWS == 4
        if (rows == 4) attend_rows(a, s, type, 4, m, first, stop);
        else
#endif
            if (rows >= 2) rows = 2, attend_rows(a, s, type, 2, m, first, stop);
        else rows = 1, attend_rows(a, s, type, 1, m, first, stop);
        m += rows;
    }
}

INLINE void finish_item(const Attention *a, const Scratch *s, int type, const Item *t) {
    const int64_t size = element_size(type), dim = a->head_dim;
    for (int64_t m = 0; m < t->count; m++) {
        int64_t head = t->heads[m % t->group];
        float factor = 1.0f, total = s->total[m];
        if (a->sinks) { /* one more term in the sum, with no value */
            float sink = a->sinks[head], largest = sink > s->largest[m] ? sink : s->largest[m];
            factor = exp_lanes(splat(s->largest[m] - largest))[0];
            total = total * factor + exp_lanes(splat(sink - largest))[0];
        }
        vf inverse = splat(factor / total);
        char *out = a->out + ((t->first + m / t->group) * a->num_heads + head) * dim * size;
        for (int64_t d = 0; d < dim; d += LANES) {
            vf value = *(const vf *)(s->o + m * s->width + d) * inverse;
            if (dim - d >= LANES) store(out + d * size, type, value);
            else store_part(out + d * size, type, value, dim - d);
        }
    }
}

INLINE void attend_item(const Attention *a, Scratch *s, int type, int64_t row, int64_t first, int64_t stop, int64_t kv) {
    const int64_t group = a->head_start[kv + 1] - a->head_start[kv];
    const Item t = {first, group, (stop - first) * group, a->seq_lens[row] - a->cu_seqlens_q[row + 1], a->head_list + a->head_start[kv]};
    const int32_t *blocks = a->block_table + row * a->table_stride;
    const int64_t window = a->window > 0 ? a->window : INT64_MAX / 2, end = stop + t.to_position;
    const int64_t oldest = first + t.to_position - window + 1 > 0 ? first + t.to_position - window + 1 : 0;
    start_item(a, s, type, &t);
    for (int64_t base = oldest / TILE * TILE; base < end; base += TILE) {
        find_keys(a, s, type, blocks, kv, base, oldest > base ? oldest : base, end < base + TILE ? end : base + TILE);
        attend_tile(a, s, type, &t, window, base);
    }
    finish_item(a, s, type, &t);
}

static void attend_f32(const Attention *a, Scratch *s, int64_t row, int64_t first, int64_t stop, int64_t kv) {
    attend_item(a, s, F32, row, first, stop, kv);
}
static void attend_bf16(const Attention *a, Scratch *s, int64_t row, int64_t first, int64_t stop, int64_t kv) {
    attend_item(a, s, BF16, row, first, stop, kv);
}
static void attend_f16(const Attention *a, Scratch *s, int64_t row, int64_t first, int64_t stop, int64_t kv) {
    attend_item(a, s, F16, row, first, stop, kv);
}

/* The query heads of every key/value head: heads[starts[kv]] to heads[starts[kv + 1] - 1]. Returns the most of one. */
static int64_t group_heads(const int32_t *q_to_kv, int64_t num_heads, int64_t num_kv_heads, int32_t *heads, int32_t *starts) {
    int64_t most = 1, found = 0;
    for (int64_t kv = 0; kv < num_kv_heads; kv++) {
        starts[kv] = (int32_t)found;
        for (int64_t head = 0; head < num_heads; head++)
            if (q_to_kv[head] == kv) heads[found++] = (int32_t)head;
        if (found - starts[kv] > most) most = found - starts[kv];
    }
    starts[num_kv_heads] = (int32_t)found;
    return most;
}

/* All work items: runs of `run` queries of a row, with every key/value head. Returns 0, or -1 when there is no memory. */
static int attend_all(const Attention *a, int type, int32_t (*runs)[2], int64_t num_rows, int64_t run, int64_t most) {
    void (*attend)(const Attention *, Scratch *, int64_t, int64_t, int64_t, int64_t) =
        type == F32 ? attend_f32 : type == BF16 ? attend_bf16 : attend_f16;
    const int64_t width = (a->head_dim + LANES - 1) / LANES * LANES, rows = run * most;
    int64_t num_runs = 0, work = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        work += (int64_t)a->seq_lens[row] * (a->cu_seqlens_q[row + 1] - a->cu_seqlens_q[row]);
        for (int64_t first = a->cu_seqlens_q[row]; first < a->cu_seqlens_q[row + 1]; first += run, num_runs++)
            runs[num_runs][0] = (int32_t)row, runs[num_runs][1] = (int32_t)first;
    }
    int failed = 0;
#pragma omp parallel if (num_runs * a->num_kv_heads > 1 && work * a->num_heads * a->head_dim > 65536)
    {
        size_t bytes = sizeof(float) * (size_t)(2 * rows * width + 2 * rows);
        float *buffer = aligned_alloc(64, (bytes + 63) / 64 * 64);
        Scratch scratch = {buffer, buffer + rows * width, buffer + 2 * rows * width, buffer + 2 * rows * width + rows, width, {0}, {0}};
        if (!buffer) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_runs * a->num_kv_heads; i++) { /* the last queries of a prompt see most keys: they go first */
            int64_t index = num_runs - 1 - i / a->num_kv_heads, row = runs[index][0], first = runs[index][1];
            int64_t stop = first + run < a->cu_seqlens_q[row + 1] ? first + run : a->cu_seqlens_q[row + 1];
            if (buffer) attend(a, &scratch, row, first, stop, i % a->num_kv_heads);
        }
        free(buffer);
    }
    return failed ? -1 : 0;
}

/* q [num_tokens, num_heads, head_dim] with rows q_stride elements apart; caches [num_blocks, block_size, num_kv_heads, head_dim], contiguous,
 * of the same type; out contiguous. q_to_kv [num_heads]; sinks [num_heads] or null; window and softcap 0: none.
 * Returns 0, or -1 when there is no memory. */
int shoal_paged_attention(int type, const void *q, int64_t q_stride, const void *k_cache, const void *v_cache, const int32_t *block_table,
                          int64_t table_stride, const int32_t *cu_seqlens_q, const int32_t *seq_lens, int64_t num_rows,
                          const int32_t *q_to_kv, const float *sinks, void *out, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                          int64_t block_size, float scale, int64_t window, float softcap) {
    int32_t *heads = malloc(sizeof(int32_t) * (size_t)(num_heads + num_kv_heads + 1));
    int32_t(*runs)[2] = malloc(sizeof(int32_t[2]) * (size_t)(cu_seqlens_q[num_rows] + 1));
    int status = -1;
    if (heads && runs) {
        int32_t *starts = heads + num_heads;
        const int64_t most = group_heads(q_to_kv, num_heads, num_kv_heads, heads, starts);
        const Attention a = {q,     k_cache,  v_cache,      out,       block_table,  cu_seqlens_q, seq_lens,   heads,  starts, sinks,
                             q_stride, table_stride, num_heads, num_kv_heads, head_dim,     block_size, window, scale,  softcap};
        status = attend_all(&a, type, runs, num_rows, most < ITEM_ROWS ? ITEM_ROWS / most : 1, most);
    }
    free(heads), free(runs);
    return status;
}
