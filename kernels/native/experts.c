/* The routed experts of a layer for some tokens: sorted by expert, three products' worth of work for one team, summed by token.
 *
 * Experts of a phase follow each other without a barrier: a thread that finds no more work in one goes on to the next. A token's experts are
 * summed in rising order, in float32, rounded once. Called from kernels/experts.py.
 */
#include "experts.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "rows.h"
#include "vector.h"

#ifndef _OPENMP
#define omp_get_num_threads() 1
#endif

/* Of one call, in the team's numbers. pairs: (token, choice) as token * top_k + choice, by expert; start: where an expert's pairs begin; place: of a pair in that
 * order, -1 where its expert is elsewhere; next: the counters of both phases. */
typedef struct {
    int64_t *pairs, *place, *start, *next;
} Order;

/* Experts first to first + count of ids [tokens, top_k], by rising expert and token. */
static void sort_pairs(const Order *o, const int64_t *ids, int64_t num_pairs, int64_t first, int64_t count) {
    memset(o->start, 0, sizeof(int64_t) * (size_t)(count + 2));
    for (int64_t i = 0; i < num_pairs; i++)
        if (ids[i] >= first && ids[i] < first + count) o->start[ids[i] - first + 2]++;
    for (int64_t e = 2; e <= count + 1; e++) o->start[e] += o->start[e - 1];
    for (int64_t i = 0; i < num_pairs; i++) { /* start[e + 1] moves from where e begins to where it ends */
        o->place[i] = -1;
        if (ids[i] < first || ids[i] >= first + count) continue;
        const int64_t to = o->start[ids[i] - first + 1]++;
        o->pairs[to] = i, o->place[i] = to;
    }
}

/* out [size] = the token's experts' rows of y, weighted; ids, weights and place: its top_k entries. */
INLINE void sum_experts(int type, const int64_t *ids, const float *weights, const int64_t *place, int64_t top_k, const char *y, char *out,
                        int64_t size) {
    const int64_t step = element_size(type);
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = size - d < LANES ? size - d : LANES;
        vf sum = splat(0.0f);
        int64_t before = -1;
        for (int64_t k = 0; k < top_k; k++) { /* the next higher expert each time */
            int64_t next = -1;
            for (int64_t j = 0; j < top_k; j++)
                if (ids[j] > before && (next < 0 || ids[j] < ids[next])) next = j;
            if (next < 0) break;
            before = ids[next];
            if (place[next] < 0) continue;
            const char *row = y + (place[next] * size + d) * step;
            sum = multiply_add(splat(weights[next]), n == LANES ? load(row, type) : load_part(row, type, n), sum);
        }
        if (n == LANES) store(out + d * step, type, sum);
        else store_part(out + d * step, type, sum, n);
    }
}

static Order order_in(int64_t *numbers, int64_t pairs, int64_t count) {
    return (Order){numbers, numbers + pairs, numbers + 2 * pairs, numbers + 2 * pairs + count + 2};
}

int64_t experts_numbers(const Experts *e, int64_t tokens) { return 2 * tokens * e->top_k + 3 * e->count + 2; }

int64_t experts_scratch(const Experts *e, int64_t tokens) {
    return tokens * e->top_k * (2 * e->up->inner + 3 * e->down->inner);
}

void experts_team(const Experts *e, const void *x, const float *weights, const int64_t *ids, int64_t tokens, int64_t *numbers, char *scratch,
                  void *out) {
    const int type = e->up->type, team = omp_get_num_threads();
    const int64_t size = element_size(type), hidden = e->up->inner, inner = e->down->inner, top_k = e->top_k;
    const Order o = order_in(numbers, tokens * top_k, e->count);
#pragma omp single
    {
        memset(o.next, 0, sizeof(int64_t) * (size_t)(2 * e->count));
        sort_pairs(&o, ids, tokens * top_k, e->first, e->count);
    }
    const int64_t held = o.start[e->count];
    char *rows = scratch, *wide = rows + held * hidden * size, *active = wide + held * 2 * inner * size, *y = active + held * inner * size;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < held; i++)
        memcpy(rows + i * hidden * size, (const char *)x + o.pairs[i] / top_k * hidden * size, (size_t)(hidden * size));
    for (int64_t i = 0; i < e->count; i++) {
        const int64_t from = o.start[i], n = o.start[i + 1] - from;
        const Rows p = {rows + from * hidden * size, wide + from * 2 * inner * size, hidden, 2 * inner, n};
        if (n) multiply(e->up + i, &p, o.next + i, team);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < held; i++)
        activation_row(type, e->kind, 1, wide + i * 2 * inner * size, active + i * inner * size, inner);
    for (int64_t i = 0; i < e->count; i++) {
        const int64_t from = o.start[i], n = o.start[i + 1] - from;
        const Rows p = {active + from * inner * size, y + from * hidden * size, inner, hidden, n};
        if (n) multiply(e->down + i, &p, o.next + e->count + i, team);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t * top_k;
        char *to = (char *)out + t * hidden * size;
        if (type == F32) sum_experts(F32, ids + at, weights + at, o.place + at, top_k, y, to, hidden);
        else if (type == BF16) sum_experts(BF16, ids + at, weights + at, o.place + at, top_k, y, to, hidden);
        else sum_experts(F16, ids + at, weights + at, o.place + at, top_k, y, to, hidden);
    }
}

/* See experts_team; scratch: tokens * top_k times (2 hidden + 3 inner) elements. Returns 0, or -1 without memory. */
int shoal_experts(const Experts *e, const void *x, const float *weights, const int64_t *ids, int64_t tokens, char *scratch, void *out,
                  int threads) {
    int64_t *numbers = malloc(sizeof(int64_t) * (size_t)experts_numbers(e, tokens));
    if (!numbers) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    experts_team(e, x, weights, ids, tokens, numbers, scratch, out);
    free(numbers);
    return 0;
}
