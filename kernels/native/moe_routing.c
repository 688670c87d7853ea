/* Routing of tokens to experts: softmax over all of them in float32, then the largest. Called from kernels/moe_routing.py and fused.c. */
#include "experts.h"
#include "vector.h"

void route_row(int type, const void *logits, int64_t count, int64_t top_k, int normalize, float *weights, int64_t *ids) {
    const int64_t size = element_size(type), padded = (count + LANES - 1) / LANES * LANES;
    vf vectors[padded / LANES], largest = splat(-INFINITY), total = splat(0.0f);
    float *p = (float *)vectors;
    for (int64_t i = 0; i < padded; i += LANES) {
        const char *from = (const char *)logits + i * size;
        vectors[i / LANES] = count - i < LANES ? load_part(from, type, count - i) : load(from, type);
    }
    for (int64_t i = count; i < padded; i++) p[i] = -INFINITY;
    for (int64_t i = 0; i < padded / LANES; i++) largest = max_lanes(vectors[i], largest);
    const vf most = splat(largest_lane(largest));
    for (int64_t i = 0; i < padded / LANES; i++) total += vectors[i] = exp_lanes(vectors[i] - most);
    const vf sum = splat(sum_lanes(total));
    for (int64_t i = 0; i < padded / LANES; i++) vectors[i] = vectors[i] / sum;
    float chosen = 0.0f;
    for (int64_t k = 0; k < top_k; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; i++) /* -1: taken; whatever is no number is taken in its turn */
            if (p[i] != -1.0f && (best < 0 || p[i] > p[best])) best = i;
        ids[k] = best, weights[k] = p[best];
        chosen += p[best], p[best] = -1.0f;
    }
    for (int64_t k = 0; k < top_k && normalize; k++) weights[k] /= chosen;
}

/* logits [tokens, count], rows `stride` elements apart; weights, ids [tokens, top_k]. */
void shoal_moe_routing(int type, const void *logits, int64_t stride, int64_t tokens, int64_t count, int64_t top_k, int normalize,
                       float *weights, int64_t *ids) {
#pragma omp parallel for schedule(static) if (tokens > 1 && tokens * count > 16384)
    for (int64_t t = 0; t < tokens; t++)
        route_row(type, (const char *)logits + t * stride * element_size(type), count, top_k, normalize, weights + t * top_k, ids + t * top_k);
}
