/* Attention of some pairs over one tile of bfloat16 keys in AMX's tiles, 16 pairs at once; a part of attention.c.
 *
 * Scores are queries times keys on their side, outputs are weights times values in pairs, as attention_tile.h has them. The outputs over a
 * tile of keys are summed from zero, then added to those before, so that rows of a tile that are nobody's, or another's, do no harm. A key
 * that a pair does not see weighs 0, which hides its value unless that is no finite number: then every pair has the values it sees alone.
 */

/* Scores to weights in place, for one row; 0 for keys it does not see. One copy for all callers, as in attention_tile.h. */
static __attribute__((noinline)) void weigh_all_pairs(const Attention *a, const Scratch *s, int64_t row, float *weights, int first, int stop) {
    if (first == 0 && stop == TILE) weigh_vectors(a, s, 1, row, weights, 0, TILE, 0, VECTORS);
    else weigh_vectors(a, s, 1, row, weights, first, stop, 0, VECTORS);
}

/* Scores of 16 pairs from `row` on with all keys of the tile; those of keys that are not there mean nothing. */
INLINE void amx_score(const Scratch *s, int64_t row) {
    const float *q = s->q + row * s->width / 2, *keys = s->turned;
    AMX_ZERO(0);
    AMX_ZERO(1);
    AMX_ZERO(2);
    AMX_ZERO(3);
    for (int64_t d = 0; d < s->width; d += 2 * AMX_PAIRS, q += AMX_PAIRS, keys += AMX_PAIRS * TILE) {
        AMX_LOAD(4, q, 2 * s->width);
        AMX_LOAD(5, keys, 4 * TILE);
        AMX_MULTIPLY(0, 4, 5);
        AMX_LOAD(6, keys + AMX_PAIRS, 4 * TILE);
        AMX_MULTIPLY(1, 4, 6);
        AMX_LOAD(7, keys + 2 * AMX_PAIRS, 4 * TILE);
        AMX_MULTIPLY(2, 4, 7);
        AMX_LOAD(5, keys + 3 * AMX_PAIRS, 4 * TILE);
        AMX_MULTIPLY(3, 4, 5);
    }
    AMX_STORE(0, s->weights, 4 * TILE);
    AMX_STORE(1, s->weights + AMX_PAIRS, 4 * TILE);
    AMX_STORE(2, s->weights + 2 * AMX_PAIRS, 4 * TILE);
    AMX_STORE(3, s->weights + 3 * AMX_PAIRS, 4 * TILE);
}

/* Outputs of pairs row + from to row + to - 1, more by their weights times the values of keys [first, stop). */
INLINE void amx_add(const Scratch *s, int64_t row, int from, int to, int first, int stop) {
    const int64_t half = AMX_PAIRS * s->width;
    AMX_LOAD(4, s->weights, 4 * TILE);
    AMX_LOAD(5, s->weights + AMX_PAIRS, 4 * TILE);
    for (int64_t d = 0; d < s->width; d += AMX_PAIRS) {
        AMX_ZERO(0);
        if (first < TILE / 2) {
            AMX_LOAD(6, s->spread + d, 4 * s->width);
            AMX_MULTIPLY(0, 4, 6);
        }
        if (stop > TILE / 2) {
            AMX_LOAD(7, s->spread + half + d, 4 * s->width);
            AMX_MULTIPLY(0, 5, 7);
        }
        AMX_STORE(0, s->sums + d, 4 * s->width);
    }
    vf *o = (vf *)(s->o + row * s->width);
    const vf *sums = (const vf *)s->sums;
    for (int64_t i = from * s->width / LANES; i < to * s->width / LANES; i++) o[i] += sums[i];
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

/* attend_pairs: `count` pairs from `pair` on. */
INLINE void amx_attend(const Attention *a, Scratch *s, const Tile *t, int64_t pair, int64_t count) {
    turn_keys(a, s, BF16, 1, t->first, t->stop);
    amx_spread(a, s, t->first, t->stop);
    for (int64_t m = pair, end = pair + count; m < end; m += AMX_ROWS) {
        const int rows = end - m < AMX_ROWS ? (int)(end - m) : AMX_ROWS;
        int first[AMX_ROWS], stop[AMX_ROWS], alike = 1;
        amx_score(s, m);
        for (int r = 0; r < rows; r++) {
            float *weights = s->weights + r * TILE;
            const int64_t position = s->pairs[m + r].position, from = oldest_key(a, position) - t->base, to = position + 1 - t->base;
            first[r] = from > 0 ? (int)(from < TILE ? from : TILE) : 0, stop[r] = to < 0 ? 0 : to < TILE ? (int)to : TILE;
            alike &= first[r] <= t->first && stop[r] >= t->stop;
            if (first[r] < stop[r]) weigh_all_pairs(a, s, m + r, weights, first[r], stop[r]);
            else memset(weights, 0, TILE * sizeof(uint16_t)); /* this one sees none of the tile */
        }
        if (alike || amx_finite(s, t->first, t->stop)) {
            amx_add(s, m, 0, rows, t->first, t->stop);
            continue;
        }
        for (int r = 0; r < rows; r++) {
            if (first[r] >= stop[r]) continue;
            amx_spread(a, s, first[r] > t->first ? first[r] : t->first, stop[r] < t->stop ? stop[r] : t->stop);
            amx_add(s, m, r, r + 1, first[r], stop[r]);
        }
        amx_spread(a, s, t->first, t->stop);
    }
}
