/* Attention of some (query, head) pairs over one tile of keys: scores, weights, weights times values.
 *
 * A tile of keys is turned on its side, so that a vector holds one dimension of 16 keys (8 without AVX-512): scores and outputs are products
 * with one number of a query (or a weight) broadcast, without sums over lanes. With AVX512-BF16 the numbers of bfloat16 caches are pairs, as
 * they lie in memory: of dimensions in queries and keys, of neighbouring keys in values and in the weights, which are rounded for that. Such
 * outputs have the even dimensions of every 32 before the odd ones.
 *
 * Scores are powers of 2 from here on: scaled by log2 e besides. A pair's arithmetic is the same whatever pairs are beside it, and nothing but
 * the keys it sees is multiplied.
 */
#ifndef SHOAL_ATTENTION_TILE_H
#define SHOAL_ATTENTION_TILE_H

#include "amx.h"
#include "attention.h"
#include "vector.h"

#define TILE 64
#define VECTORS (TILE / LANES)
#define LOG2_E 1.44269504088896341f
#define SLACK 8 /* weights may grow to 2^8 before sums are scaled anew */
#define MAX_ROWS 6
#ifdef __AVX512F__
#define WIDE(ROWS) 4 /* vectors that are summed side by side: of 6 rows there are 24 sums, of 32 registers */
#else
#define WIDE(ROWS) ((ROWS) > 2 ? 2 : 4) /* 12 or 8 sums, of 16 registers */
#endif

/* Pairs whose scores there is room for, and that are read at once, wherever they begin. */
#if HAS_AMX
#define AMX_GROUPS 4 /* of as many pairs as a tile has rows, taken together */
#define SCORE_ROWS (AMX_GROUPS * AMX_ROWS)
#define SPARE_ROWS AMX_ROWS
#else
#define SCORE_ROWS MAX_ROWS
#define SPARE_ROWS MAX_ROWS
#endif

/* Whether numbers of a type are multiplied in pairs. */
#define PAIRED(TYPE) ((TYPE) == BF16 && MULTIPLIES_PAIRS)
#define CHUNK(TYPE) (PAIRED(TYPE) ? 2 * LANES : LANES) /* dimensions of a vector */
/* Whether keys are turned in pairs of dimensions, and widened then: half as many shuffles. */
#define TURNS_PAIRS(TYPE) ((TYPE) == BF16 && LANES == 8 && !MULTIPLIES_PAIRS)

/* One query with one head. query: its number in the batch. */
typedef struct {
    int64_t query, head, position;
} Pair;

/* What a thread works with. Of an item: pairs, query vectors [pairs][width], outputs [pairs][width], running maximum (as it was when the
 * sums were last scaled) [pairs] and sum [pairs][LANES]; of the tile: keys on their side [width][TILE], values [TILE][width] where they are
 * widened or paired; of some rows: scores, then weights [SCORE_ROWS][TILE]. With AMX (attention_amx.h) sums are [pairs], queries are on their
 * side too, behind the others, keys are copied where they need be, and outputs may be added up elsewhere, sums [AMX_ROWS][width]. width:
 * head_dim in whole chunks; pairs of bfloat16 take half the space. */
typedef struct {
    Pair *pairs;
    float *q, *o, *largest, *total, *turned, *spread, *weights, *sums;
    int64_t width, rows; /* rows: the pairs there is room for */
    const char *keys[TILE], *values[TILE], *ahead[TILE]; /* where the tile's keys and values lie; what is called for meanwhile */
} Scratch;

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

/* The first `count` elements of two bytes at p, of 2 * LANES at most, zeros after them; none where half a tile of AMX is beyond the head. */
INLINE vu load_pairs(const char *p, int64_t count) {
    if (LANES < AMX_PAIRS && count <= 0) return (vu){};
#ifdef __AVX512BW__
    return (vu)_mm512_maskz_loadu_epi16(count >= 2 * LANES ? ~0u : (1u << count) - 1, p);
#else
    if (count >= 2 * LANES) return *(const words *)p;
    vu x = {};
    memcpy(&x, p, (size_t)count * 2);
    return x;
#endif
}

INLINE void store_pairs(char *p, vu x, int64_t count) {
#ifdef __AVX512BW__
    _mm512_mask_storeu_epi16(p, count >= 2 * LANES ? ~0u : (1u << count) - 1, (__m512i)x);
#else
    if (count >= 2 * LANES) *(words *)p = x;
    else memcpy(p, &x, (size_t)count * 2);
#endif
}

/* Keys [first, stop) among LANES keys from `group` on; whole: that is all of them. */
INLINE void turn_group(const Attention *a, const Scratch *s, int type, int many, int group, int first, int stop, int whole) {
    const int64_t size = element_size(type), dim = a->head_dim, chunk = TURNS_PAIRS(type) ? 2 * LANES : CHUNK(type);
    for (int64_t d = 0; d < s->width; d += chunk) {
        vf rows[LANES];
        for (int i = 0; i < LANES; i++) {
            const int j = group + i, there = whole || (j >= first && j < stop);
            const char *key = s->keys[j] + d * size;
            if (!there) rows[i] = splat(0.0f);
            else if (PAIRED(type) || TURNS_PAIRS(type)) rows[i] = (vf)load_pairs(key, dim - d);
            else rows[i] = dim - d >= LANES ? load(key, type) : load_part(key, type, dim - d);
            call_for(s->ahead[j] + d * size);
            if (many) call_for(s->ahead[j] + (a->v_cache - a->k_cache) + d * size);
        }
        transpose(rows);
        vf *out = (vf *)(s->turned + (PAIRED(type) ? d / 2 : d) * TILE + group);
        if (TURNS_PAIRS(type)) {
            for (int i = 0; i < LANES && 2 * i < s->width - d; i++) {
                out[2 * i * VECTORS] = (vf)((vu)rows[i] << 16);
                out[(2 * i + 1) * VECTORS] = (vf)((vu)rows[i] & 0xffff0000u);
            }
        } else
            for (int i = 0; i < LANES; i++) out[i * VECTORS] = rows[i];
    }
}

/* Keys [first, stop) of the tile on their side, zeros for the others of their vectors. */
INLINE void turn_keys(const Attention *a, const Scratch *s, int type, int many, int first, int stop) {
    for (int group = first / LANES * LANES; group < stop; group += LANES)
        if (group >= first && group + LANES <= stop) turn_group(a, s, type, many, group, first, stop, 1);
        else turn_group(a, s, type, many, group, first, stop, 0);
}

/* Values [first, stop) of the tile in float32; s->values then point there. */
INLINE void widen_values(const Attention *a, Scratch *s, int type, int first, int stop) {
    const int64_t size = element_size(type), dim = a->head_dim;
    for (int j = first; j < stop; j++) {
        float *out = s->spread + j * s->width;
        const char *value = s->values[j];
        for (int64_t d = 0; d < dim; d += LANES)
            *(vf *)(out + d) = dim - d >= LANES ? load(value + d * size, type) : load_part(value + d * size, type, dim - d);
        s->values[j] = (const char *)out;
    }
}

/* Values of the neighbouring keys j and j + 1, dimensions d to d + 2 * LANES - 1: even ones, then odd ones. A key beyond [first, stop) is 0. */
INLINE void pair_values(const Attention *a, const Scratch *s, int j, int64_t d, int first, int stop, vu out[2]) {
    vu even = {}, odd = {};
    if (j >= first) even = load_pairs(s->values[j] + 2 * d, a->head_dim - d);
    if (j + 1 < stop) odd = load_pairs(s->values[j + 1] + 2 * d, a->head_dim - d);
    out[0] = (even & 0xffff) | (odd << 16), out[1] = (even >> 16) | (odd & 0xffff0000u);
}

/* Values [first, stop) of the tile in pairs. */
INLINE void spread_pairs(const Attention *a, const Scratch *s, int first, int stop) {
    for (int j = first / 2 * 2; j < stop; j += 2) {
        const int whole = j >= first && j + 1 < stop;
        for (int64_t d = 0; d < s->width; d += 2 * LANES) {
            vu *out = (vu *)(s->spread + j / 2 * s->width + d);
            if (whole) pair_values(a, s, j, d, j, j + 2, out);
            else pair_values(a, s, j, d, first, stop, out);
        }
    }
}

/* weights[r][j] = q . key_j of some vectors of keys from number `from` on, for rows from `row` on; dimensions in rising order. */
INLINE void score_vectors(const Attention *a, const Scratch *s, int paired, int rows, int64_t row, int from) {
    const int64_t count = paired ? (a->head_dim + 1) / 2 : a->head_dim, step = paired ? s->width / 2 : s->width;
    vf sums[MAX_ROWS][4] = {0};
    const float *q = s->q + row * step;
    for (int64_t d = 0; d < count; d++) {
        vf k[4];
        for (int i = 0; i < WIDE(rows); i++) k[i] = *(const vf *)(s->turned + d * TILE + (from + i) * LANES);
        for (int r = 0; r < rows; r++) {
            if (paired) {
                uint32_t pair;
                memcpy(&pair, q + r * step + d, 4);
                for (int i = 0; i < WIDE(rows); i++) sums[r][i] = multiply_pairs(sums[r][i], pair, (vu)k[i]);
            } else ADD_PRODUCTS(sums[r], q[r * step + d], k, WIDE(rows));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < WIDE(rows); i++) *(vf *)(s->weights + r * TILE + (from + i) * LANES) = sums[r][i];
}

/* The same of all vectors with keys [first, stop). */
INLINE void score_rows(const Attention *a, const Scratch *s, int paired, int rows, int64_t row, int first, int stop) {
    for (int from = 0; from < VECTORS; from += WIDE(rows))
        if (first < (from + WIDE(rows)) * LANES && from * LANES < stop) score_vectors(a, s, paired, rows, row, from);
}

/* Scores to weights in place, for keys [first, stop) of the tile, which lie in vectors [from, to): an even number of them. */
INLINE void weigh_vectors(const Attention *a, const Scratch *s, int paired, int64_t row, float *weights, int first, int stop, int from, int to) {
    vf x[VECTORS], best = splat(-INFINITY), sum = splat(0.0f);
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int i = from; i < to; i++) {
        x[i] = ((const vf *)weights)[i];
        if (a->softcap > 0.0f) x[i] = tanh_lanes(x[i] * splat(a->scale / a->softcap)) * splat(a->softcap * LOG2_E);
        else x[i] *= splat(a->scale * LOG2_E);
        if (first > i * LANES || stop < (i + 1) * LANES)
            x[i] = choose((lane >= first - i * LANES) & (lane < stop - i * LANES), x[i], splat(-INFINITY));
        best = max_lanes(x[i], best);
    }
    const float before = s->largest[row], found = largest_lane(best), largest = found > before + SLACK ? found : before;
    for (int i = from; i < to; i += 2) {
        const vf even_x = x[i] - splat(largest), odd_x = x[i + 1] - splat(largest);
        if (paired) { /* the sum is of what is multiplied: rounded weights */
            vu pairs = pair_lanes(rough_exp2_lanes(even_x), rough_exp2_lanes(odd_x));
            ((vu *)weights)[i / 2] = pairs;
            sum = multiply_pairs(sum, 0x3f803f80u, pairs);
        } else {
            const vf even = exp2_lanes(even_x), odd = exp2_lanes(odd_x);
            ((vf *)weights)[i] = even, ((vf *)weights)[i + 1] = odd;
            sum += even, sum += odd;
        }
    }
    vf *total = (vf *)(s->total + row * LANES), *o = (vf *)(s->o + row * s->width);
    if (largest != before) {
        vf factor = exp2_lanes(splat(before - largest));
        for (int64_t d = 0; d < s->width / LANES; d++) o[d] *= factor;
        *total *= factor;
        s->largest[row] = largest;
    }
    *total += sum;
}

/* Scores to weights in place, for one row; its maximum, sum and output are brought up to date. One copy for all callers: how it is compiled
 * must not depend on them. */
#define WEIGH(NAME, PAIRS)                                                                                                               \
    static __attribute__((noinline)) void NAME(const Attention *a, const Scratch *s, int64_t row, float *weights, int first, int stop) { \
        if (first == 0 && stop == TILE) weigh_vectors(a, s, PAIRS, row, weights, 0, TILE, 0, VECTORS);                                   \
        else weigh_vectors(a, s, PAIRS, row, weights, first, stop, first / (2 * LANES) * 2, (stop + 2 * LANES - 1) / (2 * LANES) * 2);   \
    }
WEIGH(weigh_floats, 0)
#if MULTIPLIES_PAIRS
WEIGH(weigh_pairs, 1)
#endif

/* o_r += sum_j weights[r][j] value_j over `count` vectors of the head from vector c on; keys [first, stop) in rising order. */
INLINE void add_floats(const Attention *a, const Scratch *s, int type, int many, int rows, int64_t row, const float *weights, int first,
                       int stop, int64_t c, int count, int64_t part) {
    const int64_t size = element_size(type);
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) sums[r][i] = *(const vf *)(s->o + (row + r) * s->width + (c + i) * LANES);
    for (int j = first; j < stop; j++) {
        const char *value = s->values[j] + c * LANES * size;
        vf v[4];
        for (int i = 0; i < count; i++) {
            v[i] = part ? load_part(value, type, part) : load(value + i * LANES * size, type);
            if (!many) call_for(s->ahead[j] + (a->v_cache - a->k_cache) + (c + i) * LANES * size);
        }
        for (int r = 0; r < rows; r++) ADD_PRODUCTS(sums[r], weights[r * TILE + j], v, count);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) *(vf *)(s->o + (row + r) * s->width + (c + i) * LANES) = sums[r][i];
}

/* sums[r] += weights[r][j, j + 1] values of the keys j and j + 1, which have been paired, or are paired on the way. A key beyond
 * [first, stop) is not seen: its value is 0, as its weight is. */
INLINE void add_pair(const Attention *a, const Scratch *s, int many, int rows, const float *weights, int j, int first, int stop, int64_t c,
                     int count, vf sums[MAX_ROWS][4]) {
    vu v[4];
    for (int i = 0; i < count; i += 2) {
        if (many) {
            const uint32_t seen = (j < first ? 0 : 0xffff) | (j + 1 < stop ? 0xffff0000u : 0);
            const vu *pairs = (const vu *)(s->spread + j / 2 * s->width) + c + i;
            v[i] = pairs[0] & seen, v[i + 1] = pairs[1] & seen;
        } else {
            pair_values(a, s, j, (c + i) * LANES, first, stop, v + i);
            for (int k = j; k < j + 2; k++) call_for(s->ahead[k] + (a->v_cache - a->k_cache) + (c + i) * LANES * 2);
        }
    }
    for (int r = 0; r < rows; r++) {
        uint32_t pair;
        memcpy(&pair, weights + r * TILE + j / 2, 4);
        for (int i = 0; i < count; i++) sums[r][i] = multiply_pairs(sums[r][i], pair, v[i]);
    }
}

/* add_floats with pairs of keys; of the first and the last pair one key may be unseen. */
INLINE void add_pairs(const Attention *a, const Scratch *s, int many, int rows, int64_t row, const float *weights, int first, int stop,
                      int64_t c, int count) {
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) sums[r][i] = *(const vf *)(s->o + (row + r) * s->width + (c + i) * LANES);
    int j = first;
    if (j % 2) add_pair(a, s, many, rows, weights, j - 1, first, stop, c, count, sums), j++;
    for (; j + 2 <= stop; j += 2) add_pair(a, s, many, rows, weights, j, j, j + 2, c, count, sums);
    if (j < stop) add_pair(a, s, many, rows, weights, j, first, stop, c, count, sums);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i++) *(vf *)(s->o + (row + r) * s->width + (c + i) * LANES) = sums[r][i];
}

/* The same over the whole head. */
INLINE void add_all_pairs(const Attention *a, const Scratch *s, int many, int rows, int64_t row, const float *weights, int first, int stop) {
    int64_t c = 0;
    for (; c + WIDE(rows) <= s->width / LANES; c += WIDE(rows)) add_pairs(a, s, many, rows, row, weights, first, stop, c, WIDE(rows));
    if (c < s->width / LANES) add_pairs(a, s, many, rows, row, weights, first, stop, c, 2);
}
INLINE void add_all_floats(const Attention *a, const Scratch *s, int type, int many, int rows, int64_t row, const float *weights, int first,
                           int stop) {
    const int64_t part = a->head_dim % LANES, whole = a->head_dim / LANES;
    int64_t c = 0;
    for (; c + WIDE(rows) <= whole; c += WIDE(rows)) add_floats(a, s, type, many, rows, row, weights, first, stop, c, WIDE(rows), 0);
    for (; c < whole; c++) add_floats(a, s, type, many, rows, row, weights, first, stop, c, 1, 0);
    if (part) add_floats(a, s, type, many, rows, row, weights, first, stop, c, 1, part);
}

/* A function for every number of rows there is a copy of the loops for: NAME[rows]. */
typedef void (*Score)(const Attention *, const Scratch *, int64_t row, int first, int stop);
typedef void (*Add)(const Attention *, const Scratch *, int64_t row, const float *weights, int first, int stop);
#define SCORE(NAME, ROWS, ...)                                                                             \
    static void NAME##_##ROWS(const Attention *a, const Scratch *s, int64_t row, int first, int stop) {   \
        score_rows(a, s, __VA_ARGS__, ROWS, row, first, stop);                                             \
    }
#define ADD(NAME, ROWS, F, ...)                                                                                                  \
    static void NAME##_##ROWS(const Attention *a, const Scratch *s, int64_t row, const float *weights, int first, int stop) {   \
        F(a, s, __VA_ARGS__, ROWS, row, weights, first, stop);                                                                   \
    }
#define COPIES(TYPE, KIND, NAME, ...)                                                                               \
    KIND(NAME, 1, __VA_ARGS__) KIND(NAME, 2, __VA_ARGS__) KIND(NAME, 4, __VA_ARGS__) KIND(NAME, 6, __VA_ARGS__)     \
    static const TYPE NAME[] = {0, NAME##_1, NAME##_2, 0, NAME##_4, 0, NAME##_6};
COPIES(Score, SCORE, score_floats, 0)
COPIES(Add, ADD, add_floats_many, add_all_floats, F32, 1)
COPIES(Add, ADD, add_floats_few, add_all_floats, F32, 0)
#if MULTIPLIES_PAIRS
COPIES(Score, SCORE, score_pairs, 1)
COPIES(Add, ADD, add_pairs_many, add_all_pairs, 1)
COPIES(Add, ADD, add_pairs_few, add_all_pairs, 0)
#else
COPIES(Add, ADD, add_brains_few, add_all_floats, BF16, 0)
#endif

/* What a tile's loops are for a type; many: values were widened or paired before. */
typedef struct {
    const Score *score;
    const Add *add;
    void (*weigh)(const Attention *, const Scratch *, int64_t row, float *weights, int first, int stop);
    int step; /* keys that are multiplied together */
} Loops;

INLINE Loops choose_loops(int type, int many) {
#if MULTIPLIES_PAIRS
    if (type == BF16) return (Loops){score_pairs, many ? add_pairs_many : add_pairs_few, weigh_pairs, 2};
#else
    if (type == BF16 && !many) return (Loops){score_floats, add_brains_few, weigh_floats, 1};
#endif
    return (Loops){score_floats, many ? add_floats_many : add_floats_few, weigh_floats, 1};
}

/* Scores to outputs of rows of which row + r sees the keys [first[r], stop[r]) of the tile. What all see is added for all together. */
INLINE void attend_rows(const Attention *a, const Scratch *s, const Loops *f, int64_t row, const int *first, const int *stop, int rows) {
    int low = first[0], high = stop[0], least = first[0], most = stop[0];
    for (int r = 1; r < rows; r++) {
        low = first[r] > low ? first[r] : low, high = stop[r] < high ? stop[r] : high;
        least = first[r] < least ? first[r] : least, most = stop[r] > most ? stop[r] : most;
    }
    f->score[rows](a, s, row, least, most);
    for (int r = 0; r < rows; r++) f->weigh(a, s, row + r, s->weights + r * TILE, first[r], stop[r]);
    if (least != low || most != high) low = (low + f->step - 1) / f->step * f->step, high = high / f->step * f->step;
    const int together = low < high;
    for (int r = 0; r < rows && together; r++)
        if (first[r] < low) f->add[1](a, s, row + r, s->weights + r * TILE, first[r], low);
    if (together) f->add[rows](a, s, row, s->weights, low, high);
    for (int r = 0; r < rows; r++) {
        const int from = together ? high : first[r];
        if (from < stop[r]) f->add[1](a, s, row + r, s->weights + r * TILE, from, stop[r]);
    }
}
#endif
