/* Whole layers for what goes around them (whole_step.c). The structs are in fused.c. */
#ifndef SHOAL_FUSED_H
#define SHOAL_FUSED_H

#include <stdint.h>

typedef struct Layer Layer;
typedef struct Step Step;

int shoal_fused_layers(const Layer *layers, int64_t num_layers, const Step *const *steps, const float *const *cos_sins, void *x, void *branch,
                       int has_branch, char *scratch, int threads);

#endif
