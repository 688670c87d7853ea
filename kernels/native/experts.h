/* Routing and routed experts as other kernels call them. */
#ifndef SHOAL_EXPERTS_H
#define SHOAL_EXPERTS_H

#include <stdint.h>

#include "weight.h"

/* The experts of a layer that are held here: up, down of `count` from number `first` on. Mirrored by kernels/experts.py. */
typedef struct {
    const Weight *up, *down;
    int64_t first, count, top_k;
    int32_t kind; /* activation.c */
} Experts;

/* Numbers that a team shares for `tokens` tokens, and elements of scratch it works in. */
int64_t experts_numbers(const Experts *e, int64_t tokens);
int64_t experts_scratch(const Experts *e, int64_t tokens);

/* Called by every thread of a team: out [tokens, hidden] of x alike; weights, ids [tokens, top_k], ids different within a row; all of it
 * there before the call, and out after it. */
void experts_team(const Experts *e, const void *x, const float *weights, const int64_t *ids, int64_t tokens, int64_t *numbers, char *scratch,
                  void *out);

/* One token's experts: the softmax of its logits [count], the top_k largest, the lowest expert first among equals; with `normalize`
 * their weights sum to one. */
void route_row(int type, const void *logits, int64_t count, int64_t top_k, int normalize, float *weights, int64_t *ids);

#endif
