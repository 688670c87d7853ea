/* Paged attention on the CPU: ragged rows of queries against keys and values in blocks, online softmax (arXiv:2205.14135).
 *
 * One work item is a run of queries of one row with all query heads of one key/value head, so that a key is read once for the group. Keys
 * are taken in tiles of 64 anchored at position 0, tile by tile in rising order. A tile of keys is turned on its side, so that a vector holds
 * one dimension of 16 keys: scores and outputs are products with one number of a query (or a weight) broadcast, without sums over lanes.
 * Every (query, head) has its own arithmetic in an order that its position alone decides: not the batch, the chunk, the blocks' size or the
 * number of threads. Only the keys a query sees are read.
 */
#include "attention.h"

#include <stdlib.h>

#include "vector.h"

#define TILE 64
#define VECTORS (TILE / LANES)
#define ITEM_ROWS 64 /* (query, head) pairs of a work item: enough to pay for turning a tile, little enough for the second-level cache */
#ifdef __AVX512F__
#define MAX_ROWS 6 /* sums of 6 rows by 4 vectors, of 32 registers */
#else
#define MAX_ROWS 2 /* sums of 2 rows by 4 vectors, of 16 registers */
#endif

/* What a thread works with. Of the item: query vectors [pairs][width], outputs, running maximum and sum; of the tile: where keys and values
 * lie, keys on their side [width][TILE], values [TILE][width] where they are widened, scores [pairs][TILE]. width: head_dim in whole
 * vectors. */
typedef struct {
    float *q, *o, *largest, *total, *turned, *widened, *scores;
    int64_t width;
    const char *keys[TILE], *values[TILE];
} Scratch;

#define EXCHANGE(S, FIRST, SECOND)                        \
    for (int i = 0; i < LANES; i++)                       \
        if (!(i & S)) {                                   \
            vf a = rows[i], b = rows[i + S];              \
            rows[i] = FIRST, rows[i + S] = SECOND;        \
        }

/* Rows become columns: blocks of 1, 2, 4 (and 8) lanes beside the diagonal change places. */
INLINE void transpose(vf rows[LANES]) {
#if LANES == 16
    EXCHANGE(1, SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    EXCHANGE(2, SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(4, SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(8, SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#else
    EXCHANGE(1, SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14), SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
    EXCHANGE(2, SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13), SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
    EXCHANGE(4, SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#endif
}

/* Keys [first, stop) of the tile on their side, zeros for the others of their vectors. Later keys and the values are called for meanwhile.
 * Whole vectors of bfloat16 are turned as pairs of dimensions. */
INLINE void turn_keys(const Attention *a, const Scratch *s, int type, int first, int stop) {
    const int64_t size = element_size(type), dim = a->head_dim;
    const int pairs = type == BF16 && dim % (2 * LANES) == 0;
    for (int group = first / LANES * LANES; group < stop; group += LANES)
        for (int64_t d = 0; d < s->width; d += pairs ? 2 * LANES : LANES) {
            vf rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const int j = group + i, there = j >= first && j < stop;
                const char *key = there ? s->keys[j] + d * size : 0;
                rows[i] = !there ? splat(0.0f) : pairs ? load(key, F32) : dim - d >= LANES ? load(key, type) : load_part(key, type, dim - d);
                if (there) __builtin_prefetch(s->values[j] + d * size);
                if (j + LANES < stop && j + LANES >= first) __builtin_prefetch(s->keys[j + LANES] + d * size);
            }
            transpose(rows);
            float *out = s->turned + d * TILE + group;
            for (int i = 0; i < LANES; i++) {
                if (pairs) *(vf *)(out + 2 * i * TILE) = (vf)((vu)rows[i] << 16), *(vf *)(out + (2 * i + 1) * TILE) = (vf)((vu)rows[i] & 0xffff0000u);
                else *(vf *)(out + i * TILE) = rows[i];
            }
        }
}

/* Values [first, stop) of the tile in float32; s->values then point there. */
INLINE void widen_values(const Attention *a, Scratch *s, int type, int first, int stop) {
    const int64_t size = element_size(type), dim = a->head_dim;
    for (int j = first; j < stop; j++) {
        float *out = s->widened + j * s->width;
        for (int64_t d = 0; d < dim; d += LANES)
            *(vf *)(out + d) = dim - d >= LANES ? load(s->values[j] + d * size, type) : load_part(s->values[j] + d * size, type, dim - d);
        s->values[j] = (const char *)out;
    }
}

/* scores[row + r][j] = q . key_j of four vectors of keys from number `from` on; dimensions in rising order. */
INLINE void score_rows(const Attention *a, const Scratch *s, int64_t row, int64_t from, int rows) {
    vf sums[MAX_ROWS][4] = {0};
    for (int64_t d = 0; d < a->head_dim; d++) {
        vf k[4];
        for (int i = 0; i < 4; i++) k[i] = *(const vf *)(s->turned + d * TILE + (from + i) * LANES);
        for (int r = 0; r < rows; r++) {
            vf q = splat(s->q[(row + r) * s->width + d]);
            for (int i = 0; i < 4; i++) sums[r][i] = multiply_add(q, k[i], sums[r][i]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) *(vf *)(s->scores + (row + r) * TILE + (from + i) * LANES) = sums[r][i];
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
INLINE void add_values(const Scratch *s, int type, int rows, int64_t row, int first, int stop, const float *factor, int64_t c, int count,
                       int64_t part) {
    const int64_t size = element_size(type);
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++)
            sums[r][i] = *(const vf *)(s->o + (row + r) * s->width + (c + i) * LANES) * splat(factor[r]);
    for (int j = first; j < stop; j++) {
        const char *value = s->values[j] + c * LANES * size;
        vf v[4];
        for (int i = 0; i < count; i++) v[i] = part ? load_part(value, type, part) : load(value + i * LANES * size, type);
        for (int r = 0; r < rows; r++) {
            vf weight = splat(s->scores[(row + r) * TILE + j]);
            for (int i = 0; i < count; i++) sums[r][i] = multiply_add(weight, v[i], sums[r][i]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) *(vf *)(s->o + (row + r) * s->width + (c + i) * LANES) = sums[r][i];
}

/* Scores to outputs, for rows that see the same keys of the tile. */
INLINE void attend_rows(const Attention *a, const Scratch *s, int type, int64_t row, int first, int stop, int rows) {
    float factor[MAX_ROWS];
    for (int r = 0; r < rows; r++) factor[r] = weigh_row(a, s, row + r, first, stop, s->scores + (row + r) * TILE);
    const int64_t whole = a->head_dim / LANES, part = a->head_dim % LANES;
    int64_t c = 0;
    for (; c + 4 <= whole; c += 4) add_values(s, type, rows, row, first, stop, factor, c, 4, 0);
    for (; c < whole; c++) add_values(s, type, rows, row, first, stop, factor, c, 1, 0);
    if (part) add_values(s, type, rows, row, first, stop, factor, c, 1, part);
}

/* Calls F with as many rows as there is a copy of it for, at most ROWS, which it is set to. */
#if MAX_ROWS == 6
#define WITH_ROWS(ROWS, F)              \
    if (ROWS >= 6) ROWS = 6, F(6);      \
    else if (ROWS >= 4) ROWS = 4, F(4); \
    else if (ROWS >= 2) ROWS = 2, F(2); \
    else F(1);
#else
#define WITH_ROWS(ROWS, F)         \
    if (ROWS >= 2) ROWS = 2, F(2); \
    else F(1);
#endif

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

/* One tile of keys, positions base + [first, stop), for all pairs: scores of all together, the rest by those that see the same part of it. */
INLINE void attend_tile(const Attention *a, Scratch *s, int type, const Item *t, int64_t window, int64_t base, int first, int stop) {
    turn_keys(a, s, type, first, stop);
    for (int from = 0; from < VECTORS; from += 4) {
        if (first >= (from + 4) * LANES || from * LANES >= stop) continue;
        for (int64_t m = 0, rows; m < t->count; m += rows) {
            rows = t->count - m;
#define SCORE(ROWS) score_rows(a, s, m, from, ROWS)
            WITH_ROWS(rows, SCORE)
        }
    }
    const int widened = type == F16 || (type == BF16 && t->count > MAX_ROWS);
    if (widened) widen_values(a, s, type, first, stop);
    for (int64_t m = 0, rows; m < t->count; m += rows) {
        int begin = 0, end = 0;
        for (rows = 0; rows < MAX_ROWS && m + rows < t->count; rows++) {
            int64_t position = t->first + (m + rows) / t->group + t->to_position;
            int64_t lowest = position - window + 1 - base, highest = position + 1 - base;
            int from = lowest > 0 ? (lowest < TILE ? (int)lowest : TILE) : 0, to = highest < TILE ? (int)highest : TILE;
            if (rows && (from != begin || to != end)) break;
            begin = from, end = to;
        }
        if (end <= begin) continue; /* none of this tile is seen */
        if (type == BF16 && !widened) {
#define ATTEND_HALVES(ROWS) attend_rows(a, s, BF16, m, begin, end, ROWS)
            WITH_ROWS(rows, ATTEND_HALVES)
        } else {
#define ATTEND(ROWS) attend_rows(a, s, F32, m, begin, end, ROWS)
            WITH_ROWS(rows, ATTEND)
        }
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
        const int64_t from = oldest > base ? oldest : base, to = end < base + TILE ? end : base + TILE;
        find_keys(a, s, type, blocks, kv, base, from, to);
        attend_tile(a, s, type, &t, window, base, (int)(from - base), (int)(to - base));
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

/* Lists the heads and the runs. Returns 0, or -1 when there is no memory; attention_end gives back what is there in either case. */
int attention_begin(AttentionWork *w, const Attention *a, int type, const int32_t *q_to_kv, int64_t num_rows) {
    const int64_t num_tokens = a->cu_seqlens_q[num_rows];
    *w = (AttentionWork){.a = *a, .type = type};
    w->heads = malloc(sizeof(int32_t) * (size_t)(a->num_heads + a->num_kv_heads + 1));
    w->runs = malloc(sizeof(int32_t[2]) * (size_t)(num_tokens + 1));
    if (!w->heads || !w->runs) return -1;
    int32_t *starts = w->heads + a->num_heads;
    w->most = group_heads(q_to_kv, a->num_heads, a->num_kv_heads, w->heads, starts);
    w->run = w->most < ITEM_ROWS ? ITEM_ROWS / w->most : 1;
    w->a.head_list = w->heads, w->a.head_start = starts;
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t first = a->cu_seqlens_q[row]; first < a->cu_seqlens_q[row + 1]; first += w->run, w->num_runs++)
            w->runs[w->num_runs][0] = (int32_t)row, w->runs[w->num_runs][1] = (int32_t)first;
    return 0;
}

void attention_end(AttentionWork *w) { free(w->heads), free(w->runs); }

INLINE int64_t scratch_width(const AttentionWork *w) { return (w->a.head_dim + LANES - 1) / LANES * LANES; }
INLINE int64_t scratch_rows(const AttentionWork *w) { return (w->run * w->most + LANES - 1) / LANES * LANES; }

int64_t attention_scratch_bytes(const AttentionWork *w) {
    const int64_t width = scratch_width(w), rows = scratch_rows(w);
    return (int64_t)sizeof(float) * (2 * rows * width + 2 * rows + 2 * TILE * width + rows * TILE);
}

float *make_attention_scratch(int64_t bytes) {
    float *scratch = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
    if (scratch) memset(scratch, 0, (size_t)bytes); /* parts no key was put into are multiplied, and masked afterwards */
    return scratch;
}

void attention_team(const AttentionWork *w, int64_t *next, float *scratch) {
    const Attention *a = &w->a;
    void (*attend)(const Attention *, Scratch *, int64_t, int64_t, int64_t, int64_t) =
        w->type == F32 ? attend_f32 : w->type == BF16 ? attend_bf16 : attend_f16;
    const int64_t width = scratch_width(w), rows = scratch_rows(w);
    Scratch s = {.width = width, .q = scratch};
    s.o = s.q + rows * width, s.largest = s.o + rows * width, s.total = s.largest + rows, s.turned = s.total + rows;
    s.widened = s.turned + TILE * width, s.scores = s.widened + TILE * width;
    for (;;) { /* the last queries of a prompt see most keys: they go first */
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= w->num_runs * a->num_kv_heads) break;
        const int32_t *run = w->runs[w->num_runs - 1 - i / a->num_kv_heads];
        const int64_t end = a->cu_seqlens_q[run[0] + 1], stop = run[1] + w->run < end ? run[1] + w->run : end;
        attend(a, &s, run[0], run[1], stop, i % a->num_kv_heads);
    }
}

/* q [num_tokens, num_heads, head_dim] with rows q_stride elements apart; caches [num_blocks, block_size, num_kv_heads, head_dim], contiguous,
 * of the same type; out contiguous. q_to_kv [num_heads]; sinks [num_heads] or null; window and softcap 0: none.
 * Returns 0, or -1 when there is no memory. */
int shoal_paged_attention(int type, const void *q, int64_t q_stride, const void *k_cache, const void *v_cache, const int32_t *block_table,
                          int64_t table_stride, const int32_t *cu_seqlens_q, const int32_t *seq_lens, int64_t num_rows,
                          const int32_t *q_to_kv, const float *sinks, void *out, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                          int64_t block_size, float scale, int64_t window, float softcap) {
    const Attention a = {q,     k_cache,  v_cache,      out,       block_table,  cu_seqlens_q, seq_lens,   0,     0,      sinks,
                         q_stride, table_stride, num_heads, num_kv_heads, head_dim,     block_size, window, scale, softcap};
    AttentionWork work;
    int64_t next = 0, pairs = 0;
    int status = attention_begin(&work, &a, type, q_to_kv, num_rows);
    for (int64_t row = 0; row < num_rows; row++) pairs += (int64_t)seq_lens[row] * (cu_seqlens_q[row + 1] - cu_seqlens_q[row]);
    if (!status) {
#pragma omp parallel if (work.num_runs * num_kv_heads > 1 && pairs * num_heads * head_dim > 65536) reduction(| : status)
        {
            float *scratch = make_attention_scratch(attention_scratch_bytes(&work));
            if (scratch) attention_team(&work, &next, scratch);
            else status = -1;
            free(scratch);
        }
    }
    attention_end(&work);
    return status ? -1 : 0;
}
