/* Whole layers for what goes around them (whole_step.c). The structs of a layer are in fused.c. */
#ifndef SHOAL_FUSED_H
#define SHOAL_FUSED_H

#include <stdint.h>

#include "shm.h"

typedef struct Layer Layer;
typedef struct Step Step;

/* The tensor ranks that hold a part of every layer each, and what they say before they add up the step's rows, [num_tokens, hidden].
 * Mirrored by kernels/native_ranks.py. */
typedef struct {
    shoal_group *group;
    shoal_header *sum;
} Ranks;

/* Add up the ranks' rows, where there are other ranks (not null). Returns SHOAL_OK or why not. */
int add_up(const Ranks *ranks, void *rows);

int shoal_fused_layers(const Layer *layers, int64_t num_layers, const Step *const *steps, const float *const *cos_sins, void *x, void *branch,
                       const Ranks *ranks, char *scratch, int threads);

#endif
