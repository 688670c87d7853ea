/* Operations on one row each, as other kernels call them. Types: vector.h. */
#ifndef SHOAL_ROWS_H
#define SHOAL_ROWS_H

#include <stdint.h>

/* out may be x. offset is added to the weight. */
void rms_norm_row(int type, const void *x, const void *weight, void *out, int64_t size, float eps, float offset);
/* out may be x; bias may be null. */
void layer_norm_row(int type, const void *x, const void *weight, const void *bias, void *out, int64_t size, float eps);

/* RMSNorm, or where `layer` LayerNorm. weight: [size], or null where nothing normalises; bias: [size], or null; offset: added to the weight
 * (RMSNorm only). Mirrored by kernels/fused.py. */
typedef struct {
    const void *weight, *bias;
    int64_t size;
    float eps, offset;
    int32_t layer;
} Norm;

/* A row of n->size; out may be x. */
void normalise_row(const Norm *n, int type, const void *x, void *out);

/* num_heads heads, head_stride elements apart; cos_sin [rotary_dim]. */
void rope_row(int type, void *x, int64_t head_stride, const float *cos_sin, int64_t num_heads, int64_t rotary_dim);
/* x += y, rounded once. */
void add_row(int type, void *x, const void *y, int64_t size);
/* x *= factor, rounded once. */
void scale_row(int type, void *x, float factor, int64_t size);
/* kind: activation.c; x [size], or with gated [2 * size]; out [size]. */
void activation_row(int type, int kind, int gated, const void *x, void *out, int64_t size);
/* y [size] *= sigmoid(x . weight), both [inner]. */
void sigmoid_gate_row(int type, const void *x, const void *weight, int64_t inner, void *y, int64_t size);
/* Where the largest element is: the first among equals; the first that is not a number, when there is one. */
int64_t largest_of_row(int type, const void *x, int64_t size);
/* Likewise of cap tanh(x / cap) in float32, and its value. size > 0. */
int64_t largest_capped_of_row(int type, const void *x, int64_t size, float cap, float *value);

#endif
