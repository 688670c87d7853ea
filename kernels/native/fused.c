/* The two halves of a decoder layer, each as one team of threads: from the residual stream to the part of the sum that ranks reduce; and
 * whole layers, where nobody has to be asked in between.
 *
 * The same operations as one by one, in the same order, with barriers where a call would have begun; called from kernels/fused.py.
 */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "experts.h"
#include "fused.h"
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

/* Routed experts in place of a feed-forward. normalize: moe_routing.c. */
typedef struct {
    Norm norm;
    Weight router;
    Experts experts;
    int32_t normalize;
} Mixture;

/* What a step's rows are, for one cache group. */
typedef struct Step {
    const int32_t *block_table, *cu_seqlens_q, *seq_lens;
    const int64_t *slots;
    int64_t table_stride, num_rows, num_tokens, block_size;
} Step;

/* x + branch, in place, where there is a branch; then rows of x normalised into out, shared by the team. Returns where the rows are. */
static const void *normalise(const Norm *n, int type, void *x, const void *branch, void *out, int64_t rows, int64_t width) {
    if (!n->weight && !branch) return x;
    const int64_t step = width * element_size(type);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        if (branch) add_row(type, (char *)x + t * step, (const char *)branch + t * step, width);
        if (n->weight) rms_norm_row(type, (char *)x + t * step, n->weight, (char *)out + t * step, n->size, n->eps, n->offset);
    }
    return n->weight ? out : x;
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

/* Elements of scratch for a token. */
INLINE int64_t mixer_width(const Mixer *m) {
    return m->qkv.inner + (2 * m->num_heads + 2 * m->num_kv_heads) * m->head_dim;
}
INLINE int64_t feed_forward_width(const FeedForward *f) { return f->up.inner + f->up.columns + f->down.inner; }

/* Where attention finds what the mixer leaves in scratch. Returns 0, or -1 without memory. */
static int begin_mixer(AttentionWork *work, const Mixer *m, const Step *s, const void *k_cache, const void *v_cache, char *scratch,
                       int threads) {
    const int64_t size = element_size(m->qkv.type), width = (m->num_heads + 2 * m->num_kv_heads) * m->head_dim;
    char *qkv = scratch + s->num_tokens * m->qkv.inner * size;
    const Attention a = {.q = qkv, .k_cache = k_cache, .v_cache = v_cache, .out = qkv + s->num_tokens * width * size,
                         .block_table = s->block_table, .cu_seqlens_q = s->cu_seqlens_q, .seq_lens = s->seq_lens,
                         .sinks = m->sinks, .q_stride = width, .table_stride = s->table_stride, .num_heads = m->num_heads,
                         .num_kv_heads = m->num_kv_heads, .head_dim = m->head_dim, .block_size = s->block_size,
                         .window = m->window, .scale = m->scale, .softcap = m->softcap};
    return attention_begin(work, &a, m->qkv.type, m->q_to_kv, s->num_rows, threads);
}

/* Called by every thread of a team: out = the mixer of the norm of x (+ branch, which x then has; branch may be out). next: 3 counters at
 * 0. No barrier at the end. */
static void mixer_team(const Mixer *m, const Step *s, const AttentionWork *work, void *x, const void *branch, const float *cos_sin,
                       void *k_cache, void *v_cache, char *scratch, float *attention, void *out, int64_t *next) {
    const int type = m->qkv.type, team = omp_get_num_threads();
    const int64_t size = element_size(type), hidden = m->qkv.inner, width = work->a.q_stride;
    char *qkv = (char *)work->a.q;
    const Rows in = {normalise(&m->norm, type, x, branch, scratch, s->num_tokens, hidden), qkv, hidden, width, s->num_tokens};
    multiply(&m->qkv, &in, &next[0], team);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s->num_tokens; t++)
        place_token(m, type, qkv + t * width * size, cos_sin ? cos_sin + t * m->rotary_dim : 0, k_cache, v_cache, s->slots[t]);
    if (attention) attention_team(work, &next[1], attention);
#pragma omp barrier
    const Rows up = {work->a.out, out, m->num_heads * m->head_dim, hidden, s->num_tokens};
    multiply(&m->out, &up, &next[2], team);
}

/* Likewise; next: 2 counters. */
static void feed_forward_team(const FeedForward *f, void *x, const void *branch, char *scratch, void *out, int64_t rows, int64_t *next) {
    const int type = f->up.type, team = omp_get_num_threads();
    const int64_t size = element_size(type), hidden = f->up.inner, wide = f->up.columns, inner = f->down.inner;
    char *up = scratch + rows * hidden * size, *active = up + rows * wide * size;
    const Rows in = {normalise(&f->norm, type, x, branch, scratch, rows, hidden), up, hidden, wide, rows};
    multiply(&f->up, &in, &next[0], team);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        activation_row(type, f->kind, f->gated, up + t * wide * size, active + t * inner * size, inner);
    const Rows last = {active, out, inner, hidden, rows};
    multiply(&f->down, &last, &next[1], team);
}

/* Elements of scratch for a token, and numbers for `rows` of them: the experts' and the routing itself. */
INLINE int64_t mixture_width(const Mixture *m) { return m->router.inner + m->router.columns + experts_scratch(&m->experts, 1); }
INLINE int64_t mixture_numbers(const Mixture *m, int64_t rows) { return 2 * rows * m->experts.top_k + experts_numbers(&m->experts, rows); }

/* Likewise; next: a counter at 0; numbers: mixture_numbers, of any contents. */
static void mixture_team(const Mixture *m, void *x, const void *branch, char *scratch, void *out, int64_t rows, int64_t *next, int64_t *numbers) {
    const int type = m->router.type;
    const int64_t size = element_size(type), hidden = m->router.inner, count = m->router.columns, top_k = m->experts.top_k;
    char *logits = scratch + rows * hidden * size;
    float *weights = (float *)(numbers + rows * top_k);
    const Rows in = {normalise(&m->norm, type, x, branch, scratch, rows, hidden), logits, hidden, count, rows};
    multiply(&m->router, &in, next, omp_get_num_threads());
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        route_row(type, logits + t * count * size, count, top_k, m->normalize, weights + t * top_k, numbers + t * top_k);
    experts_team(&m->experts, in.x, weights, numbers, rows, numbers + 2 * rows * top_k, logits + rows * count * size, out);
}

/* x [num_tokens, hidden], out alike, contiguous; cos_sin [num_tokens, rotary_dim] or null; caches [blocks, block_size, num_kv_heads,
 * head_dim]; scratch: num_tokens times mixer_width elements. Returns 0, or -1 without memory. */
int shoal_fused_mixer(const Mixer *m, const Step *s, void *x, const float *cos_sin, void *k_cache, void *v_cache, char *scratch, void *out,
                      int threads) {
    AttentionWork work;
    int64_t next[3] = {0};
    int status = begin_mixer(&work, m, s, k_cache, v_cache, scratch, threads);
    if (!status) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : status)
        {
            float *attention = make_attention_scratch(attention_scratch_bytes(&work));
            mixer_team(m, s, &work, x, 0, cos_sin, k_cache, v_cache, scratch, attention, out, next);
            status |= attention ? 0 : -1;
            free(attention);
        }
    }
    attention_end(&work);
    return status ? -1 : 0;
}

/* x [rows, hidden], out alike, contiguous, in blocks of `most` rows; scratch: `most` times feed_forward_width elements. Nobody waits between
 * blocks: what a thread still reads of one is written in the next only after a barrier. Returns 0, or -1 without memory. */
int shoal_fused_feed_forward(const FeedForward *f, void *x, char *scratch, void *out, int64_t rows, int64_t most, int threads) {
    const int64_t blocks = (rows + most - 1) / most, step = f->up.inner * element_size(f->up.type);
    int64_t *next = calloc((size_t)(2 * blocks + 1), sizeof *next);
    if (!next) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t first = i * most, count = rows - first < most ? rows - first : most;
        feed_forward_team(f, (char *)x + first * step, 0, scratch, (char *)out + first * step, count, next + 2 * i);
    }
    free(next);
    return 0;
}

/* x [rows, hidden], out alike, contiguous, in blocks of `most` rows; scratch: `most` times mixture_width elements. Returns 0, or -1 without
 * memory. */
int shoal_fused_mixture(const Mixture *m, void *x, char *scratch, void *out, int64_t rows, int64_t most, int threads) {
    const int64_t blocks = (rows + most - 1) / most, step = m->router.inner * element_size(m->router.type);
    int64_t *numbers = calloc((size_t)(mixture_numbers(m, most) + blocks), sizeof *numbers), *next = numbers + mixture_numbers(m, most);
    if (!numbers) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t first = i * most, count = rows - first < most ? rows - first : most;
        mixture_team(m, (char *)x + first * step, 0, scratch, (char *)out + first * step, count, next + i, numbers);
    }
    free(numbers);
    return 0;
}

/* A whole layer, mirrored by kernels/fused_layers.py: feed_forward or mixture is null. step, rotation: its entries in what shoal_fused_layers is
 * given; rotation -1: none. */
typedef struct Layer {
    const Mixer *mixer;
    const FeedForward *feed_forward;
    const Mixture *mixture;
    void *k_cache, *v_cache;
    int64_t step, rotation;
} Layer;

enum { COUNTERS = 5 };

int add_up(const Ranks *ranks, void *rows) {
#ifdef __linux__
    return ranks ? shoal_shm_all_reduce(ranks->group, ranks->sum, rows) : SHOAL_OK;
#else
    return SHOAL_OK; /* only Linux has such groups */
#endif
}

/* Called by every thread of a team after the last it wrote to branch: the sum of all ranks' parts. Returns SHOAL_OK or why not, kept in
 * failed for all of them. */
static int add_up_team(const Ranks *ranks, void *branch, int *failed) {
#pragma omp barrier
    if (ranks) {
#pragma omp single
        *failed = add_up(ranks, branch);
    }
    return *failed;
}

/* Layers one after the other, each of x + branch, in one team: x is left as the sum that the last feed-forward saw, branch as what it gave,
 * of all ranks together. x, branch [num_tokens, hidden], contiguous, branch used only if has_branch; steps, cos_sins: see Layer; ranks: null
 * for one rank alone; scratch: num_tokens times the most that one of the halves takes. Returns 0, -1 without memory, or why the ranks cannot
 * go on. */
int shoal_fused_layers(const Layer *layers, int64_t num_layers, const Step *const *steps, const float *const *cos_sins, void *x, void *branch,
                       int has_branch, const Ranks *ranks, char *scratch, int threads) {
    AttentionWork *works = calloc((size_t)num_layers, sizeof *works);
    int64_t *next = calloc((size_t)num_layers * COUNTERS, sizeof *next), most = 0, most_numbers = 0;
    int status = works && next ? 0 : -1, failed = 0;
    for (int64_t i = 0; i < num_layers && !status; i++) {
        const Layer *l = &layers[i];
        status = begin_mixer(&works[i], l->mixer, steps[l->step], l->k_cache, l->v_cache, scratch, threads);
        const int64_t bytes = attention_scratch_bytes(&works[i]);
        const int64_t count = l->mixture ? mixture_numbers(l->mixture, steps[l->step]->num_tokens) : 0;
        most = bytes > most ? bytes : most, most_numbers = count > most_numbers ? count : most_numbers;
    }
    int64_t *numbers = malloc((size_t)(most_numbers + 1) * sizeof *numbers);
    status |= numbers ? 0 : -1;
    if (!status) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : status)
        {
            float *attention = make_attention_scratch(most);
            for (int64_t i = 0; i < num_layers; i++) {
                const Layer *l = &layers[i];
                const Step *s = steps[l->step];
                mixer_team(l->mixer, s, &works[i], x, i || has_branch ? branch : 0, l->rotation < 0 ? 0 : cos_sins[l->rotation], l->k_cache,
                           l->v_cache, scratch, attention, branch, next + i * COUNTERS);
                if (add_up_team(ranks, branch, &failed)) break;
                if (l->mixture) mixture_team(l->mixture, x, branch, scratch, branch, s->num_tokens, next + i * COUNTERS + 3, numbers);
                else feed_forward_team(l->feed_forward, x, branch, scratch, branch, s->num_tokens, next + i * COUNTERS + 3);
                if (add_up_team(ranks, branch, &failed)) break;
            }
            status |= attention ? 0 : -1;
            free(attention);
        }
    }
    for (int64_t i = 0; works && i < num_layers; i++) attention_end(&works[i]);
    free(works), free(next), free(numbers);
    return status ? -1 : failed;
}
