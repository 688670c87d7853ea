/* Attention of some pairs over one tile of bfloat16 keys in AMX's tiles, 16 pairs at once; a part of attention.c.
 *
 * Scores are keys times queries on their side, so that a vector holds one key's of all pairs: maxima and sums need no sums over lanes. The
 * weights are turned then, and outputs are weights times values in pairs, as attention_tile.h has them. Rows of a tile that are nobody's, or
 * another's, are computed and not kept. A key that a pair does not see weighs 0, which hides its value unless that is no finite number: then
 * every pair has the values it sees alone.
 */

/* What the pairs of an item have of a tile: the keys [first, stop) each. */
typedef struct {
    int32_t first[AMX_ROWS], stop[AMX_ROWS];
} Seen;

/* Of 16 pairs, the group-th that are taken together: scores on their side [TILE][AMX_ROWS], then weights in the same place; and behind those
 * weights [2][AMX_ROWS][AMX_PAIRS] pairs of keys. */
INLINE float *amx_scores(const Scratch *s, int group) { return s->weights + group * TILE * AMX_ROWS; }
INLINE float *amx_weights(const Scratch *s, int group) { return amx_scores(s, group) + TILE / 2 * AMX_ROWS; }
INLINE float *turned_queries(const Scratch *s) { return s->q + s->rows * s->width / 2; }

/* 16 rows of 16 lanes become columns. Steps in lanes. */
INLINE void amx_turn(const float *rows, int64_t step, float *out, int64_t out_step) {
    for (int i = 0; i < AMX_ROWS; i += LANES)
        for (int j = 0; j < AMX_PAIRS; j += LANES) {
            vf block[LANES];
            for (int k = 0; k < LANES; k++) block[k] = *(const vf *)(rows + (i + k) * step + j);
            transpose(block);
            for (int k = 0; k < LANES; k++) *(vf *)(out + (j + k) * out_step + i) = block[k];
        }
}

/* The queries of an item's first `count` pairs on their side: [width / 2][rows] pairs of dimensions. */
INLINE void turn_queries(const Scratch *s, int64_t count) {
    const int64_t words = s->width / 2;
    for (int64_t m = 0; m < count; m += AMX_ROWS)
        for (int64_t d = 0; d < words; d += AMX_PAIRS)
            amx_turn(s->q + m * words + d, words, turned_queries(s) + d * s->rows + m, s->rows);
}

/* Where 16 keys each begin, null where the tile has none of them, and the bytes between keys. They are read where they lie, or copied when
 * they are not in one block or the head is not whole tiles. */
INLINE int64_t amx_keys(const Attention *a, const Scratch *s, int first, int stop, const char *keys[TILE / AMX_ROWS]) {
    const int direct = a->block_size % AMX_ROWS == 0 && s->width == a->head_dim;
    const int64_t step = direct ? a->num_kv_heads * a->head_dim * 2 : s->width * 2;
    for (int i = 0; i < TILE / AMX_ROWS; i++) {
        const int begin = i * AMX_ROWS, from = first > begin ? first : begin, to = stop < begin + AMX_ROWS ? stop : begin + AMX_ROWS;
        keys[i] = from >= to ? 0 : direct ? s->keys[from] - (from - begin) * step : (const char *)s->turned + begin * step;
        for (int j = from; j < to && !direct; j++)
            for (int64_t d = 0; d < s->width; d += 2 * LANES)
                *(vu *)((char *)s->turned + j * step + 2 * d) = load_pairs(s->keys[j] + 2 * d, a->head_dim - d);
    }
    return step;
}

/* Scores of the keys with `groups` times 16 pairs from `row` on; those of keys that are not there mean nothing. */
INLINE void amx_score(const Scratch *s, const char *const keys[TILE / AMX_ROWS], int64_t step, int64_t row, int groups) {
    for (int i = 0; i < TILE / AMX_ROWS; i++) {
        if (!keys[i]) continue;
        const float *q = turned_queries(s) + row;
        AMX_ZERO(0);
        AMX_ZERO(1);
        AMX_ZERO(2);
        AMX_ZERO(3);
        for (int64_t d = 0; d < s->width; d += 2 * AMX_PAIRS, q += AMX_PAIRS * s->rows) {
            AMX_LOAD(4, keys[i] + 2 * d, step);
            AMX_LOAD(5, q, 4 * s->rows);
            AMX_MULTIPLY(0, 4, 5);
            if (groups == 1) continue;
            AMX_LOAD(6, q + AMX_ROWS, 4 * s->rows);
            AMX_MULTIPLY(1, 4, 6);
            if (groups == 2) continue;
            AMX_LOAD(7, q + 2 * AMX_ROWS, 4 * s->rows);
            AMX_MULTIPLY(2, 4, 7);
            if (groups == 3) continue;
            AMX_LOAD(5, q + 3 * AMX_ROWS, 4 * s->rows);
            AMX_MULTIPLY(3, 4, 5);
        }
        AMX_STORE(0, amx_scores(s, 0) + i * AMX_ROWS * AMX_ROWS, 4 * AMX_ROWS);
        if (groups > 1) AMX_STORE(1, amx_scores(s, 1) + i * AMX_ROWS * AMX_ROWS, 4 * AMX_ROWS);
        if (groups > 2) AMX_STORE(2, amx_scores(s, 2) + i * AMX_ROWS * AMX_ROWS, 4 * AMX_ROWS);
        if (groups > 3) AMX_STORE(3, amx_scores(s, 3) + i * AMX_ROWS * AMX_ROWS, 4 * AMX_ROWS);
    }
}

/* Scores of keys [first, stop) capped, and scaled. One copy for all callers: how it is compiled must not depend on them. */
static __attribute__((noinline)) void cap_scores(const Attention *a, float *scores, int first, int stop) {
    vf *x = (vf *)scores;
    for (int64_t i = first * AMX_ROWS / LANES; i < stop * AMX_ROWS / LANES; i++)
        x[i] = tanh_lanes(x[i] * splat(a->scale / a->softcap)) * splat(a->softcap * LOG2_E);
}

/* One key's scores, scaled; minus infinity where a pair does not see it. */
INLINE vf amx_scaled(const float *scores, int key, float scale, int masked, vi from, vi to) {
    const vf x = *(const vf *)(scores + key * AMX_ROWS) * splat(scale);
    return masked ? choose((from <= key) & (to > key), x, splat(-INFINITY)) : x;
}

/* One key's weights, likewise 0. */
INLINE vf amx_weight(const float *scores, int key, float scale, vf largest, int masked, vi from, vi to) {
    const vf weight = rough_exp2_lanes(multiply_add(*(const vf *)(scores + key * AMX_ROWS), splat(scale), -largest));
    return masked ? choose((from <= key) & (to > key), weight, splat(0.0f)) : weight;
}

/* Scores of the keys [first, stop) to weights in pairs, in place: of the first `count` of LANES pairs from `row` on, which are column
 * `column` of the scores; their maxima, sums and outputs are brought up to date. masked: not all see all of the keys, as seen says. ahead: what
 * is called for, or null. */
INLINE void weigh_columns(const Attention *a, const Scratch *s, float *scores, int64_t row, int column, int count, int first, int stop,
                          int masked, const Seen *seen, const char *const *ahead) {
    const float scale = a->softcap > 0.0f ? 1.0f : a->scale * LOG2_E;
    const int64_t values = a->v_cache - a->k_cache;
    const vi from = *(const vi *)(seen->first + column), to = *(const vi *)(seen->stop + column);
    vf best = splat(-INFINITY), other = best, sum = splat(0.0f), odd = sum;
    for (int j = first; j < stop; j += 2) {
        best = max_lanes(amx_scaled(scores, j, scale, masked, from, to), best);
        other = max_lanes(amx_scaled(scores, j + 1, scale, masked, from, to), other);
    }
    best = max_lanes(best, other);
    const vf before = *(const vf_unaligned *)(s->largest + row), largest = choose(best > before + splat(SLACK), best, before);
    for (int j = first; j < stop; j += 4) { /* the sum is of what is multiplied: rounded weights */
        vu pairs[2] = {};
        for (int i = 0; i < 2 && j + 2 * i < stop; i++) {
            const int key = j + 2 * i;
            pairs[i] = lanes_to_pairs(amx_weight(scores, key, scale, largest, masked, from, to),
                                      amx_weight(scores, key + 1, scale, largest, masked, from, to));
            *(vu *)(scores + key / 2 * AMX_ROWS) = pairs[i];
            if (ahead)
                for (int64_t d = 0; d < s->width; d += 2 * AMX_PAIRS)
                    __builtin_prefetch(ahead[key] + values + 2 * d), __builtin_prefetch(ahead[key + 1] + values + 2 * d);
        }
        sum = multiply_pairs(sum, 0x3f803f80u, pairs[0]), odd = multiply_pairs(odd, 0x3f803f80u, pairs[1]);
    }
    const vi changed = largest != before;
    const vf factor = choose(changed, exp2_lanes(before - largest), splat(1.0f));
    store_some(s->total + row, F32, multiply_add(*(const vf_unaligned *)(s->total + row), factor, sum + odd), count);
    store_some(s->largest + row, F32, largest, count);
    for (int r = 0; r < count; r++)
        if (changed[r])
            for (int64_t d = 0; d < s->width; d += LANES) *(vf *)(s->o + (row + r) * s->width + d) *= splat(factor[r]);
}

/* Scores to weights, of `rows` pairs from `row` on. */
static __attribute__((noinline)) void amx_weigh(const Attention *a, const Scratch *s, int group, int64_t row, int rows, int first, int stop,
                                                int whole, const Seen *seen, const char *const *ahead) {
    float *scores = amx_scores(s, group);
    first = first / 4 * 4, stop = (stop + 1) / 2 * 2; /* whose places in the sums are the same in every tile */
    if (a->softcap > 0.0f) cap_scores(a, scores, first, stop);
    for (int column = 0; column < rows; column += LANES) {
        const int count = rows - column < LANES ? rows - column : LANES;
        float *columns = scores + column;
        if (!whole) weigh_columns(a, s, columns, row + column, column, count, first, stop, 1, seen, ahead);
        else if (ahead) weigh_columns(a, s, columns, row + column, column, count, 0, TILE, 0, seen, ahead);
        else weigh_columns(a, s, columns, row + column, column, count, 0, TILE, 0, seen, 0);
    }
    vf *pairs = (vf *)scores;
    for (int i = 0; i < first / 2 * AMX_ROWS / LANES; i++) pairs[i] = splat(0.0f);
    for (int i = stop / 2 * AMX_ROWS / LANES; i < TILE / 2 * AMX_ROWS / LANES; i++) pairs[i] = splat(0.0f);
    for (int half = 0; half < TILE / 2 * AMX_ROWS; half += AMX_ROWS * AMX_PAIRS)
        amx_turn(scores + half, AMX_ROWS, amx_weights(s, group) + half, AMX_PAIRS);
}

/* Outputs of pairs row + from to row + to - 1, more by their weights times the values of keys [first, stop). Others' rows are multiplied
 * as well, and left where they are. */
INLINE void amx_add(const Scratch *s, int group, int64_t row, int from, int to, int first, int stop) {
    const int64_t half = AMX_PAIRS * s->width;
    float *o = s->o + row * s->width, *out = from == 0 && to == AMX_ROWS ? o : s->sums;
    AMX_LOAD(4, amx_weights(s, group), 4 * AMX_PAIRS);
    AMX_LOAD(5, amx_weights(s, group) + AMX_ROWS * AMX_PAIRS, 4 * AMX_PAIRS);
    for (int64_t d = 0; d < s->width; d += 2 * AMX_PAIRS) {
        AMX_LOAD(0, o + d, 4 * s->width);
        AMX_LOAD(1, o + d + AMX_PAIRS, 4 * s->width);
        if (first < TILE / 2) {
            AMX_LOAD(6, s->spread + d, 4 * s->width);
            AMX_MULTIPLY(0, 4, 6);
            AMX_LOAD(7, s->spread + d + AMX_PAIRS, 4 * s->width);
            AMX_MULTIPLY(1, 4, 7);
        }
        if (stop > TILE / 2) {
            AMX_LOAD(6, s->spread + half + d, 4 * s->width);
            AMX_MULTIPLY(0, 5, 6);
            AMX_LOAD(7, s->spread + half + d + AMX_PAIRS, 4 * s->width);
            AMX_MULTIPLY(1, 5, 7);
        }
        AMX_STORE(0, out + d, 4 * s->width);
        AMX_STORE(1, out + d + AMX_PAIRS, 4 * s->width);
    }
    if (out != o) memcpy(o + from * s->width, out + from * s->width, 4 * (size_t)((to - from) * s->width));
}

/* Zeros for the values of keys that are not there, in the halves of the tile that are multiplied. */
INLINE void amx_clear(const Scratch *s, int first, int stop) {
    const int from = first < TILE / 2 ? 0 : TILE / 2, to = stop > TILE / 2 ? TILE : TILE / 2;
    for (int j = from; j < to; j += 2)
        if (j + 1 < first || j >= stop) memset(s->spread + j / 2 * s->width, 0, 4 * (size_t)s->width);
}

/* Values of keys [first, stop), and zeros around them. */
INLINE void amx_spread(const Attention *a, const Scratch *s, int first, int stop) {
    spread_pairs(a, s, first, stop);
    amx_clear(s, first, stop);
}

/* Whether all those values are finite. */
INLINE int amx_finite(const Scratch *s, int first, int stop) {
    vi other = {};
    for (int j = first / 2; j < (stop + 1) / 2; j++)
        for (int64_t d = 0; d < s->width; d += LANES) {
            const vu pairs = *(const vu *)(s->spread + j * s->width + d);
            other |= ((pairs & 0x7f80) == 0x7f80) | ((pairs & 0x7f800000u) == 0x7f800000u);
        }
    for (int i = 0; i < LANES; i++)
        if (other[i]) return 0;
    return 1;
}

/* 16 pairs from `row` on, `rows` of which are there: the keys that each sees of a tile. Returns whether all see all of the tile's. */
INLINE int amx_seen(const Attention *a, const Scratch *s, const Tile *t, int64_t row, int rows, Seen *seen) {
    int alike = 1;
    *seen = (Seen){0};
    for (int r = 0; r < rows; r++) {
        const int64_t position = s->pairs[row + r].position, from = oldest_key(a, position) - t->base, to = position + 1 - t->base;
        seen->first[r] = from > 0 ? (int)(from < TILE ? from : TILE) : 0, seen->stop[r] = to < 0 ? 0 : to < TILE ? (int)to : TILE;
        alike &= seen->first[r] <= t->first && seen->stop[r] >= t->stop;
    }
    return alike;
}

/* attend_pairs: `count` pairs from `pair` on, up to AMX_GROUPS times 16 together, so that what one step leaves in memory is there by the next. */
INLINE void amx_attend(const Attention *a, Scratch *s, const Tile *t, int64_t pair, int64_t count) {
    const char *keys[TILE / AMX_ROWS];
    const int64_t step = amx_keys(a, s, t->first, t->stop, keys);
    Seen seen[AMX_GROUPS] __attribute__((aligned(64)));
    amx_spread(a, s, t->first, t->stop);
    for (int64_t m = pair, end = pair + count; m < end; m += AMX_GROUPS * AMX_ROWS) {
        const int all = end - m < AMX_GROUPS * AMX_ROWS ? (int)(end - m) : AMX_GROUPS * AMX_ROWS, groups = (all + AMX_ROWS - 1) / AMX_ROWS;
        int alike[AMX_GROUPS];
        amx_score(s, keys, step, m, groups);
#define ROWS_OF(G) (all - G * AMX_ROWS < AMX_ROWS ? all - G * AMX_ROWS : AMX_ROWS)
        for (int g = 0; g < groups; g++) {
            alike[g] = amx_seen(a, s, t, m + g * AMX_ROWS, ROWS_OF(g), seen + g);
            const int whole = alike[g] && t->first == 0 && t->stop == TILE;
            amx_weigh(a, s, g, m + g * AMX_ROWS, ROWS_OF(g), t->first, t->stop, whole, seen + g, m == pair && g == 0 ? s->ahead : 0);
        }
        for (int g = 0; g < groups; g++) {
            if (alike[g] || amx_finite(s, t->first, t->stop)) {
                amx_add(s, g, m + g * AMX_ROWS, 0, ROWS_OF(g), t->first, t->stop);
                continue;
            }
            for (int r = 0; r < ROWS_OF(g); r++) {
                const int first = seen[g].first[r], stop = seen[g].stop[r];
                if (first >= stop) continue;
                amx_spread(a, s, first > t->first ? first : t->first, stop < t->stop ? stop : t->stop);
                amx_add(s, g, m + g * AMX_ROWS, r, r + 1, first, stop);
            }
            amx_spread(a, s, t->first, t->stop);
        }
    }
}
