/* Paged attention on the CPU: ragged rows of queries against keys and values in blocks, online softmax (arXiv:2205.14135).
 *
 * A work item is a run of queries of one row with all query heads of some key/value heads, so that a key is read once for the group; or one
 * query each of neighbouring rows whose block tables begin alike, so that the tiles they share are read once for all. Keys are taken in tiles
 * of 64 anchored at position 0, tile by tile in rising order (attention_tile.h).
 * Every (query, head) has its own arithmetic in an order that its position alone decides: not the batch, the chunk, the blocks' size, what is
 * shared or the number of threads. Only the keys a query sees count; AMX may read others of their blocks as well.
 */
#include "attention_tile.h"

#include <omp.h>
#include <stdlib.h>

#ifndef _OPENMP
#define omp_get_max_threads() 1
#endif

#define ITEM_PAIRS 64 /* (query, head) pairs of a work item: enough to pay for turning a tile, little enough for the second-level cache */
#define TILE_BYTES (1 << 18) /* most of a tile of keys and values of an item: the next one is in the second-level cache when its turn comes */

/* One tile of an item, of the keys base + [first, stop) of a row; places: of the first key/value head's keys. No item: there is none. */
typedef struct {
    const AttentionItem *item;
    int64_t row, base;
    int first, stop;
    const char *places[TILE];
} Tile;

INLINE int64_t oldest_key(const Attention *a, int64_t position) {
    return a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
}

/* Where the first query of a row in an item stands. */
INLINE int64_t first_position(const Attention *a, const AttentionItem *t, int64_t row) {
    return a->seq_lens[row] - a->cu_seqlens_q[row + 1] + (t->rows > 1 ? a->cu_seqlens_q[row] : t->first);
}
INLINE int64_t keys_seen(const Attention *a, const AttentionItem *t, int64_t row) { return first_position(a, t, row) + t->queries; }

/* Whether a tile is one that all rows of its item share. */
INLINE int is_shared(const Tile *t) { return t->base < (int64_t)t->item->tiles * TILE; }

/* Goes on to the next tile: shared ones first, then row by row, then those of the next item that is to be done. The last queries of a prompt
 * see most keys: they go first. */
static void next_tile(const AttentionWork *w, int64_t *next, Tile *t) {
    const Attention *a = &w->a;
    const int64_t head = a->head_dim * element_size(w->type), token = a->num_kv_heads * head;
    if (t->item) t->base += TILE;
    while (t->item && t->base >= keys_seen(a, t->item, t->row)) {
        t->base = (int64_t)t->item->tiles * TILE;
        if (++t->row == t->item->row + t->item->rows) t->item = 0;
    }
    if (!t->item) {
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= w->num_items) return;
        t->item = &w->items[w->num_items - 1 - i], t->row = t->item->row;
        t->base = oldest_key(a, first_position(a, t->item, t->row)) / TILE * TILE;
    }
    const int64_t oldest = oldest_key(a, first_position(a, t->item, t->row)) - t->base, newest = keys_seen(a, t->item, t->row) - t->base;
    t->first = oldest > 0 ? (int)oldest : 0, t->stop = newest < TILE ? (int)newest : TILE;

    const int64_t first = t->base + t->first;
    const int32_t *block = a->block_table + t->row * a->table_stride + first / a->block_size;
    int64_t inside = first % a->block_size;
    for (int j = t->first; j < t->stop; block++, inside = 0) {
        const char *place = a->k_cache + (*block * a->block_size + inside) * token + t->item->kv * head;
        for (; j < t->stop && inside < a->block_size; j++, inside++, place += token) t->places[j] = place;
    }
}

/* One key/value head of a tile. Of the next tile as much is called for meanwhile, piece by piece as it lies in memory: so the processor finds
 * a stream to fetch by itself. */
INLINE void place_head(const Attention *a, Scratch *s, int type, const Tile *t, const Tile *later, int64_t kv) {
    const int64_t head = a->head_dim * element_size(type), values = a->v_cache - a->k_cache, offset = (kv - t->item->kv) * head;
    for (int j = t->first; j < t->stop; j++) s->keys[j] = t->places[j] + offset, s->values[j] = s->keys[j] + values;
    const int64_t kvs = later->item ? later->item->kvs : 1;
    int64_t j = TILE * (kv - t->item->kv) / kvs, piece = TILE * (kv - t->item->kv) % kvs;
    for (int i = 0; i < TILE; i++) {
        s->ahead[i] = later->item && j < TILE ? later->places[j] + piece * head : s->keys[t->first];
        if (++piece == kvs) piece = 0, j++;
    }
}

/* What is not called for beside keys, where a tile has fewer than TILE. */
INLINE void call_for_rest(const Attention *a, const Scratch *s, int type, int first, int stop) {
    const int64_t head = a->head_dim * element_size(type), values = a->v_cache - a->k_cache;
    for (int j = first ? 0 : stop; j < TILE; j = j + 1 == first ? stop : j + 1)
        for (int64_t d = 0; d < head; d += 64) call_for(s->ahead[j] + d), call_for(s->ahead[j] + values + d);
}

#if HAS_AMX
#include "attention_amx.h"
#endif

/* One key/value head of a tile, for `count` pairs from number `pair` of the item on. */
INLINE void attend_pairs(const Attention *a, Scratch *s, int type, const Tile *t, int64_t pair, int64_t count) {
#if HAS_AMX
    if (type == BF16) {
        amx_attend(a, s, t, pair, count);
        return;
    }
#endif
    const int many = type == F16 || count > MAX_ROWS || (PAIRED(type) && a->head_dim % CHUNK(type));
    const Loops loops = choose_loops(type, many);
    turn_keys(a, s, type, many, t->first, t->stop);
    call_for_rest(a, s, type, t->first, t->stop);
    if (PAIRED(type) && many) spread_pairs(a, s, t->first, t->stop);
    else if (type != F32 && many) widen_values(a, s, type, t->first, t->stop);
    for (int64_t m = pair, rows = 0, end = pair + count; m < end; m += rows) {
        int first[MAX_ROWS], stop[MAX_ROWS];
        for (rows = 0; rows < MAX_ROWS && m + rows < end; rows++) {
            const int64_t position = s->pairs[m + rows].position, from = oldest_key(a, position) - t->base, to = position + 1 - t->base;
            if (from >= TILE || to <= 0) break;
            first[rows] = from > 0 ? (int)from : 0, stop[rows] = to < TILE ? (int)to : TILE;
        }
        if (!rows) { /* this one sees none of the tile */
            rows = 1;
            continue;
        }
        while (rows & (rows - 1) && rows != MAX_ROWS) rows--; /* there is no copy of the loops for it */
        attend_rows(a, s, &loops, m, first, stop, (int)rows);
    }
}

/* Pairs by key/value head, then query, then head. */
INLINE void start_item(const Attention *a, Scratch *s, int type, const AttentionItem *t) {
    const int64_t size = element_size(type), dim = a->head_dim;
    int64_t m = 0;
    for (int64_t kv = t->kv; kv < t->kv + t->kvs; kv++)
        for (int64_t i = 0; i < t->rows * t->queries; i++)
            for (int64_t h = a->head_start[kv]; h < a->head_start[kv + 1]; h++, m++) {
                const int64_t row = t->rows > 1 ? t->row + i : t->row, in_row = t->rows > 1 ? 0 : i;
                const Pair p = {(t->rows > 1 ? a->cu_seqlens_q[row] : t->first) + in_row, a->head_list[h], first_position(a, t, row) + in_row};
                const char *query = a->q + (p.query * a->q_stride + p.head * dim) * size;
                s->pairs[m] = p;
                for (int64_t d = 0; d < s->width; d += CHUNK(type)) {
                    if (PAIRED(type)) *(vu *)(s->q + (m * s->width + d) / 2) = load_pairs(query + d * size, dim - d);
                    else if (dim - d >= LANES) *(vf *)(s->q + m * s->width + d) = load(query + d * size, type);
                    else *(vf *)(s->q + m * s->width + d) = load_part(query + d * size, type, dim - d);
                }
                memset(s->o + m * s->width, 0, sizeof(float) * (size_t)s->width);
                memset(s->total + m * LANES, 0, sizeof(vf));
                s->largest[m] = -INFINITY;
            }
#if HAS_AMX
    if (type == BF16) turn_queries(s, m);
#endif
}

/* The outputs of the first `count` pairs, divided by their sums. */
INLINE void finish_item(const Attention *a, const Scratch *s, int type, int64_t count) {
    const int64_t size = element_size(type), dim = a->head_dim;
    for (int64_t m = 0; m < count; m++) {
        const Pair *p = s->pairs + m;
        float factor = 1.0f, total = HAS_AMX && type == BF16 ? s->total[m] : sum_lanes(*(const vf *)(s->total + m * LANES));
        if (a->sinks) { /* one more term in the sum, with no value */
            float sink = a->sinks[p->head] * LOG2_E, largest = sink > s->largest[m] ? sink : s->largest[m];
            factor = exp2_lanes(splat(s->largest[m] - largest))[0];
            total = total * factor + exp2_lanes(splat(sink - largest))[0];
        }
        const vf inverse = splat(factor / total);
        const float *o = s->o + m * s->width;
        char *out = a->out + (p->query * a->num_heads + p->head) * dim * size;
        for (int64_t d = 0; d < dim; d += CHUNK(type)) {
            const int64_t n = dim - d < CHUNK(type) ? dim - d : CHUNK(type);
            vf value = *(const vf *)(o + d) * inverse;
            if (PAIRED(type)) {
                store_pairs(out + d * size, lanes_to_pairs(value, *(const vf *)(o + d + LANES) * inverse), n);
            } else if (n == LANES) store(out + d * size, type, value);
            else store_part(out + d * size, type, value, n);
        }
    }
}

/* Items until none is left. */
INLINE void attend(const AttentionWork *w, Scratch *s, int type, int64_t *next) {
    const Attention *a = &w->a;
    Tile tiles[2] = {0}, *t = tiles, *later = tiles + 1;
    next_tile(w, next, t);
    for (const AttentionItem *started = 0; t->item;) {
        const AttentionItem *item = t->item;
        if (item != started) start_item(a, s, type, item);
        *later = *t, started = item;
        next_tile(w, next, later);
        int64_t pair = 0;
        for (int64_t kv = item->kv; kv < item->kv + item->kvs; kv++) {
            const int64_t group = a->head_start[kv + 1] - a->head_start[kv];
            place_head(a, s, type, t, later, kv);
            if (is_shared(t)) attend_pairs(a, s, type, t, pair, item->rows * group);
            else attend_pairs(a, s, type, t, pair + (t->row - item->row) * group, item->queries * group);
            pair += item->rows * item->queries * group;
        }
        if (later->item != item) finish_item(a, s, type, pair);
        Tile *done = t;
        t = later, later = done;
    }
}

static void attend_f32(const AttentionWork *w, Scratch *s, int64_t *next) { attend(w, s, F32, next); }
static void attend_bf16(const AttentionWork *w, Scratch *s, int64_t *next) {
    amx_begin();
    attend(w, s, BF16, next);
    amx_end();
}
static void attend_f16(const AttentionWork *w, Scratch *s, int64_t *next) { attend(w, s, F16, next); }

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

/* Whole tiles that two rows of one query each have in the same blocks, and see all of. */
static int64_t shared_tiles(const Attention *a, int64_t row, int64_t other) {
    const int64_t keys = a->seq_lens[row] < a->seq_lens[other] ? a->seq_lens[row] : a->seq_lens[other];
    const int64_t longest = a->seq_lens[row] > a->seq_lens[other] ? a->seq_lens[row] : a->seq_lens[other];
    const int32_t *blocks = a->block_table + row * a->table_stride, *others = a->block_table + other * a->table_stride;
    if (a->window > 0 && longest > a->window) return 0;
    int64_t same = 0;
    while (same * a->block_size < keys / TILE * TILE && blocks[same] == others[same]) same++;
    return (same * a->block_size < keys ? same * a->block_size : keys) / TILE;
}

INLINE int64_t num_queries(const Attention *a, int64_t row) { return a->cu_seqlens_q[row + 1] - a->cu_seqlens_q[row]; }

/* How many rows from `row` on, at most `most`, share at least the tiles that the first two share; and those tiles. */
static int64_t sharing_rows(const Attention *a, int64_t row, int64_t num_rows, int64_t most, int64_t *tiles) {
    int64_t rows = 1;
    *tiles = 0;
    for (; rows < most && row + rows < num_rows && num_queries(a, row + rows - 1) == 1 && num_queries(a, row + rows) == 1; rows++) {
        const int64_t found = shared_tiles(a, row + rows - 1, row + rows);
        if (found == 0 || found < *tiles) break;
        if (rows == 1) *tiles = found;
    }
    return rows;
}

/* Lists the heads and the items. Returns 0, or -1 when there is no memory; attention_end gives back what is there in either case. */
int attention_begin(AttentionWork *w, const Attention *a, int type, const int32_t *q_to_kv, int64_t num_rows, int threads) {
    *w = (AttentionWork){.a = *a, .type = type};
    w->heads = malloc(sizeof(int32_t) * (size_t)(a->num_heads + a->num_kv_heads + 1));
    if (!w->heads) return -1;
    int32_t *starts = w->heads + a->num_heads;
    const int64_t most = group_heads(q_to_kv, a->num_heads, a->num_kv_heads, w->heads, starts), run = most < ITEM_PAIRS ? ITEM_PAIRS / most : 1;
    w->a.head_list = w->heads, w->a.head_start = starts;
    int64_t runs = 0;
    for (int64_t row = 0; row < num_rows; row++) runs += (num_queries(a, row) + run - 1) / run;
    w->items = malloc(sizeof(AttentionItem) * (size_t)(runs * a->num_kv_heads + 1));
    if (!w->items) return -1;
    /* As many key/value heads to an item as leave two items to a thread: they lie side by side in memory. */
    const int64_t least = (2 * threads + runs - 1) / (runs + !runs), head_bytes = 2 * TILE * a->head_dim * element_size(type);
    for (int64_t row = 0, rows; row < num_rows; row += rows) {
        int64_t tiles;
        rows = sharing_rows(a, row, num_rows, run, &tiles);
        const int64_t queries = num_queries(a, row) < run ? num_queries(a, row) : run, pairs = rows * queries * most;
        int64_t kvs = a->num_kv_heads / least;
        if (kvs * pairs > ITEM_PAIRS) kvs = ITEM_PAIRS / pairs;
        if (kvs * head_bytes > TILE_BYTES) kvs = TILE_BYTES / head_bytes;
        kvs = kvs < 1 ? 1 : kvs;
        if (pairs * kvs > w->pairs) w->pairs = pairs * kvs;
        for (int64_t kv = 0; kv < a->num_kv_heads; kv += kvs) /* all queries for the same heads: their keys stay in the cache */
            for (int64_t first = a->cu_seqlens_q[row]; first < a->cu_seqlens_q[row + 1]; first += run) {
                const int64_t left = a->cu_seqlens_q[row + 1] - first;
                w->items[w->num_items++] =
                    (AttentionItem){.row = (int32_t)row, .rows = (int32_t)rows, .first = (int32_t)first,
                                    .queries = (int32_t)(left < run ? left : run), .tiles = (int32_t)tiles, .kv = (int32_t)kv,
                                    .kvs = (int32_t)(a->num_kv_heads - kv < kvs ? a->num_kv_heads - kv : kvs)};
            }
    }
    return 0;
}

void attention_end(AttentionWork *w) { free(w->heads), free(w->items); }

INLINE int64_t scratch_width(const AttentionWork *w) {
    const int64_t chunk = HAS_AMX && w->type == BF16 ? 2 * AMX_PAIRS : CHUNK(w->type);
    return (w->a.head_dim + chunk - 1) / chunk * chunk;
}
INLINE int64_t scratch_rows(const AttentionWork *w) { return (w->pairs + SPARE_ROWS + LANES - 1) / LANES * LANES; }

int64_t attention_scratch_bytes(const AttentionWork *w) {
    const int64_t width = scratch_width(w), rows = scratch_rows(w);
    const int64_t floats = rows * (2 * width + 1 + LANES) + 2 * TILE * width + SCORE_ROWS * TILE + SPARE_ROWS * width;
    return (int64_t)sizeof(float) * floats + rows * (int64_t)sizeof(Pair);
}

float *make_attention_scratch(int64_t bytes) {
    float *scratch = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
    if (scratch) memset(scratch, 0, (size_t)bytes); /* parts no key was put into are multiplied, and masked afterwards */
    return scratch;
}

void attention_team(const AttentionWork *w, int64_t *next, float *scratch) {
    const int64_t width = scratch_width(w), rows = scratch_rows(w);
    Scratch s = {.width = width, .rows = rows, .q = scratch};
    s.o = s.q + rows * width, s.largest = s.o + rows * width, s.total = s.largest + rows, s.turned = s.total + rows * LANES;
    s.spread = s.turned + TILE * width, s.weights = s.spread + TILE * width, s.sums = s.weights + SCORE_ROWS * TILE;
    s.pairs = (Pair *)(s.sums + SPARE_ROWS * width);
    if (w->type == F32) attend_f32(w, &s, next);
    else if (w->type == BF16) attend_bf16(w, &s, next);
    else attend_f16(w, &s, next);
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
    int status = attention_begin(&work, &a, type, q_to_kv, num_rows, omp_get_max_threads());
    for (int64_t row = 0; row < num_rows; row++) pairs += (int64_t)seq_lens[row] * (cu_seqlens_q[row + 1] - cu_seqlens_q[row]);
    if (!status) {
#pragma omp parallel if (work.num_items > 1 && pairs * num_heads * head_dim > 65536) reduction(| : status)
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
