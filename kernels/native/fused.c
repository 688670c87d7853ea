/* The two halves of a decoder layer, each as one team of threads: from the residual stream to the part of the sum that ranks reduce.
 *
 * The same operations as one by one, in the same order, with barriers where a call would have begun; called from kernels/fused.py.
 */
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "rows.h"
#include "vector.h"
#include "weight.h"

#ifndef _OPENMP
#define omp_get_num_threads() 1
#endif

/* The structs are mirrored by kernels/fused.py. weight: [size], or null where nothing normalises. */
typedef struct {
    const void *weight;
    int64_t size;
    float eps, offset;
} Norm;

typedef struct {
    Norm norm, q_norm, k_norm; /* of the input; of every query and key head */
    Weight qkv, out;
    const int32_t *q_to_kv;
    const float *sinks;
    int64_t num_heads, num_kv_heads, head_dim, rotary_dim, window;
    float scale, softcap;
} Mixer;

typedef struct {
    Norm norm;
    Weight up, down;
    int32_t kind, gated; /* activation.c */
} FeedForward;

/* What a step's rows are, for one cache group. */
typedef struct {
    const int32_t *block_table, *cu_seqlens_q, *seq_lens;
    const int64_t *slots;
    int64_t table_stride, num_rows, num_tokens, block_size;
} Step;

/* Rows of x normalised into out, shared by the team; where nothing normalises, x itself. Returns where the rows are. */
static const void *normalise(const Norm *n, int type, const void *x, void *out, int64_t rows) {
    if (!n->weight) return x;
    const int64_t step = n->size * element_size(type);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        rms_norm_row(type, (const char *)x + t * step, n->weight, (char *)out + t * step, n->size, n->eps, n->offset);
    return out;
}

/* One token's heads: queries and keys normalised and rotated, keys and values put into the cache. */
static void place_token(const Mixer *m, int type, char *heads, const float *cos_sin, char *k_cache, char *v_cache, int64_t slot) {
    const int64_t head = m->head_dim * element_size(type), row = m->num_kv_heads * head;
    char *keys = heads + m->num_heads * head;
    for (int64_t h = 0; m->q_norm.weight && h < m->num_heads; h++)
        rms_norm_row(type, heads + h * head, m->q_norm.weight, heads + h * head, m->head_dim, m->q_norm.eps, m->q_norm.offset);
    for (int64_t h = 0; m->k_norm.weight && h < m->num_kv_heads; h++)
        rms_norm_row(type, keys + h * head, m->k_norm.weight, keys + h * head, m->head_dim, m->k_norm.eps, m->k_norm.offset);
    if (cos_sin) rope_row(type, heads, m->head_dim, cos_sin, m->num_heads + m->num_kv_heads, m->rotary_dim);
    memcpy(k_cache + slot * row, keys, (size_t)row);
    memcpy(v_cache + slot * row, keys + row, (size_t)row);
}

/* x [num_tokens, hidden], out alike, contiguous; cos_sin [num_tokens, rotary_dim] or null; caches [blocks, block_size, num_kv_heads,
 * head_dim]; scratch: num_tokens times (hidden + (2 num_heads + 2 num_kv_heads) head_dim) elements. Returns 0, or -1 without memory. */
int shoal_fused_mixer(const Mixer *m, const Step *s, const void *x, const float *cos_sin, void *k_cache, void *v_cache, char *scratch,
                      void *out, int threads) {
    const int type = m->qkv.type;
    const int64_t size = element_size(type), hidden = m->qkv.inner, heads = m->num_heads + 2 * m->num_kv_heads, width = heads * m->head_dim;
    char *normed = scratch, *qkv = normed + s->num_tokens * hidden * size, *attended = qkv + s->num_tokens * width * size;
    const Attention a = {.q = qkv, .k_cache = k_cache, .v_cache = v_cache, .out = attended, .block_table = s->block_table,
                         .cu_seqlens_q = s->cu_seqlens_q, .seq_lens = s->seq_lens, .sinks = m->sinks, .q_stride = width,
                         .table_stride = s->table_stride, .num_heads = m->num_heads, .num_kv_heads = m->num_kv_heads,
                         .head_dim = m->head_dim, .block_size = s->block_size, .window = m->window, .scale = m->scale,
                         .softcap = m->softcap};
    AttentionWork work;
    int64_t next[3] = {0};
    int status = attention_begin(&work, &a, type, m->q_to_kv, s->num_rows);
    if (!status) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : status)
        {
            const int team = omp_get_num_threads();
            const Rows in = {normalise(&m->norm, type, x, normed, s->num_tokens), qkv, hidden, width, s->num_tokens};
            multiply(&m->qkv, &in, &next[0], team);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t t = 0; t < s->num_tokens; t++)
                place_token(m, type, qkv + t * width * size, cos_sin ? cos_sin + t * m->rotary_dim : 0, k_cache, v_cache, s->slots[t]);
            status |= attention_team(&work, &next[1]);
#pragma omp barrier
            const Rows up = {attended, out, m->num_heads * m->head_dim, hidden, s->num_tokens};
            multiply(&m->out, &up, &next[2], team);
        }
    }
    attention_end(&work);
    return status ? -1 : 0;
}

/* x [rows, hidden], out alike, contiguous; scratch: rows times (hidden + up.columns + down.inner) elements. */
void shoal_fused_feed_forward(const FeedForward *f, const void *x, char *scratch, void *out, int64_t rows, int threads) {
    const int type = f->up.type;
    const int64_t size = element_size(type), hidden = f->up.inner, wide = f->up.columns, inner = f->down.inner;
    char *normed = scratch, *up = normed + rows * hidden * size, *active = up + rows * wide * size;
    int64_t next[2] = {0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int team = omp_get_num_threads();
        const Rows in = {normalise(&f->norm, type, x, normed, rows), up, hidden, wide, rows};
        multiply(&f->up, &in, &next[0], team);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++)
            activation_row(type, f->kind, f->gated, up + t * wide * size, active + t * inner * size, inner);
        const Rows last = {active, out, inner, hidden, rows};
        multiply(&f->down, &last, &next[1], team);
    }
}
