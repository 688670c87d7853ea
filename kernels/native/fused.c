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

/* The structs are mirrored by kernels/fused.py. */
typedef struct {
    Norm norm, q_norm, k_norm; /* of the input; of every query and key head, or of all heads at once: their size says */
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

/* Routed experts in place of a feed-forward. shared: an expert of all tokens beside them, or null, its output times sigmoid(x . gate) where
 * there is a gate, [hidden]; normalize: moe_routing.c. */
typedef struct {
    Norm norm;
    Weight router;
    Experts experts;
    const FeedForward *shared;
    const void *gate;
    int32_t normalize;
} Mixture;

/* What happens to a branch, once the parts of all ranks are summed, on its way into the residual stream: biases are added, [hidden] each or
 * null; and it is normalised, or with `of_sum` the stream that it came to. */
typedef struct {
    const void *biases[2];
    Norm norm;
    int32_t of_sum;
} Ending;

/* A branch that is not in the residual stream yet, [rows, hidden]; null: there is none. */
typedef struct {
    void *rows;
    const Ending *ending;
} Branch;

/* What a step's rows are, for one cache group. */
typedef struct Step {
    const int32_t *block_table, *cu_seqlens_q, *seq_lens;
    const int64_t *slots;
    int64_t table_stride, num_rows, num_tokens, block_size;
} Step;

/* A row of a branch into the residual stream's. */
static void join_row(const Ending *e, int type, void *x, void *branch, int64_t width) {
    for (int i = 0; i < 2; i++)
        if (e->biases[i]) add_row(type, branch, e->biases[i], width);
    if (e->norm.weight && !e->of_sum) normalise_row(&e->norm, type, branch, branch);
    add_row(type, x, branch, width);
    if (e->norm.weight && e->of_sum) normalise_row(&e->norm, type, x, x);
}

/* The branch into x, where there is one; then rows of x normalised into out, shared by the team. Returns where the rows are. */
static const void *normalise(const Norm *n, int type, void *x, Branch branch, void *out, int64_t rows, int64_t width) {
    if (!n->weight && !branch.rows) return x;
    const int64_t step = width * element_size(type);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        if (branch.rows) join_row(branch.ending, type, (char *)x + t * step, (char *)branch.rows + t * step, width);
        if (n->weight) normalise_row(n, type, (char *)x + t * step, (char *)out + t * step);
    }
    return n->weight ? out : x;
}

/* One token's heads, together or one by one. */
INLINE void normalise_heads(const Norm *n, int type, char *heads, int64_t size) {
    for (int64_t i = 0; n->weight && i < size; i += n->size) {
        char *head = heads + i * element_size(type);
        normalise_row(n, type, head, head);
    }
}

/* One token's heads: queries and keys normalised and rotated, keys and values put into the cache. */
static void place_token(const Mixer *m, int type, char *heads, const float *cos_sin, char *k_cache, char *v_cache, int64_t slot) {
    const int64_t head = m->head_dim * element_size(type), row = m->num_kv_heads * head;
    char *keys = heads + m->num_heads * head;
    normalise_heads(&m->q_norm, type, heads, m->num_heads * m->head_dim);
    normalise_heads(&m->k_norm, type, keys, m->num_kv_heads * m->head_dim);
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

/* Called by every thread of a team: out = the mixer of the norm of x, which the branch has come to (its rows may be out). next: 3 counters
 * at 0. No barrier at the end. */
static void mixer_team(const Mixer *m, const Step *s, const AttentionWork *work, void *x, Branch branch, const float *cos_sin,
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
static void feed_forward_team(const FeedForward *f, void *x, Branch branch, char *scratch, void *out, int64_t rows, int64_t *next) {
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
INLINE int64_t mixture_width(const Mixture *m) {
    const int64_t shared = m->shared ? m->router.inner + feed_forward_width(m->shared) : 0;
    return m->router.inner + m->router.columns + shared + experts_scratch(&m->experts, 1);
}
INLINE int64_t mixture_numbers(const Mixture *m, int64_t rows) { return 2 * rows * m->experts.top_k + experts_numbers(&m->experts, rows); }

/* Likewise; next: 3 counters; numbers: mixture_numbers, of any contents. */
static void mixture_team(const Mixture *m, void *x, Branch branch, char *scratch, void *out, int64_t rows, int64_t *next, int64_t *numbers) {
    const int type = m->router.type;
    const int64_t size = element_size(type), hidden = m->router.inner, count = m->router.columns, top_k = m->experts.top_k;
    char *logits = scratch + rows * hidden * size, *shared = logits + rows * count * size, *rest = shared;
    float *weights = (float *)(numbers + rows * top_k);
    const Rows in = {normalise(&m->norm, type, x, branch, scratch, rows, hidden), logits, hidden, count, rows};
    multiply(&m->router, &in, &next[0], omp_get_num_threads());
    if (m->shared) {
        feed_forward_team(m->shared, (void *)in.x, (Branch){0}, shared + rows * hidden * size, shared, rows, &next[1]);
        rest = shared + rows * (hidden + feed_forward_width(m->shared)) * size;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        route_row(type, logits + t * count * size, count, top_k, m->normalize, weights + t * top_k, numbers + t * top_k);
    experts_team(&m->experts, in.x, weights, numbers, rows, numbers + 2 * rows * top_k, rest, out);
    if (!m->shared) return;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        const int64_t at = t * hidden * size;
        if (m->gate) sigmoid_gate_row(type, (const char *)in.x + at, m->gate, hidden, shared + at, hidden);
        add_row(type, (char *)out + at, shared + at, hidden);
    }
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
            mixer_team(m, s, &work, x, (Branch){0}, cos_sin, k_cache, v_cache, scratch, attention, out, next);
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
        feed_forward_team(f, (char *)x + first * step, (Branch){0}, scratch, (char *)out + first * step, count, next + 2 * i);
    }
    free(next);
    return 0;
}

/* x [rows, hidden], out alike, contiguous, in blocks of `most` rows; scratch: `most` times mixture_width elements. Returns 0, or -1 without
 * memory. */
int shoal_fused_mixture(const Mixture *m, void *x, char *scratch, void *out, int64_t rows, int64_t most, int threads) {
    const int64_t blocks = (rows + most - 1) / most, step = m->router.inner * element_size(m->router.type);
    int64_t *numbers = calloc((size_t)(mixture_numbers(m, most) + 3 * blocks), sizeof *numbers), *next = numbers + mixture_numbers(m, most);
    if (!numbers) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t first = i * most, count = rows - first < most ? rows - first : most;
        mixture_team(m, (char *)x + first * step, (Branch){0}, scratch, (char *)out + first * step, count, next + 3 * i, numbers);
    }
    free(numbers);
    return 0;
}

/* A whole layer, mirrored by kernels/fused_layers.py: feed_forward or mixture is null. endings: of the mixer's branch and the other one's; parallel:
 * both branches read the same x and are one sum, whose ending is the second. step, rotation: its entries in what shoal_fused_layers is given;
 * rotation -1: none. */
typedef struct Layer {
    const Mixer *mixer;
    const FeedForward *feed_forward;
    const Mixture *mixture;
    void *k_cache, *v_cache;
    Ending endings[2];
    int64_t step, rotation;
    int32_t parallel;
} Layer;

enum { COUNTERS = 6 };

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

/* Called by every thread of a team: the half of a layer that is no mixer. next: 3 counters; numbers: of a mixture. */
static void second_team(const Layer *l, void *x, Branch branch, char *scratch, void *out, int64_t rows, int64_t *next, int64_t *numbers) {
    if (l->mixture) mixture_team(l->mixture, x, branch, scratch, out, rows, next, numbers);
    else feed_forward_team(l->feed_forward, x, branch, scratch, out, rows, next);
}

/* Likewise beside the mixer, whose part is in branch: branch is then the part of both. No barrier at the end. */
static void second_beside(const Layer *l, void *x, char *branch, char *scratch, int64_t rows, int64_t *next, int64_t *numbers) {
    const int type = l->mixer->out.type;
    const int64_t hidden = l->mixer->out.columns, step = hidden * element_size(type);
#pragma omp barrier
    second_team(l, x, (Branch){0}, scratch + rows * step, scratch, rows, next, numbers);
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < rows; t++) add_row(type, branch + t * step, scratch + t * step, hidden);
}

/* What layers share. steps, cos_sins: see Layer; ranks: null for one rank alone; branch [num_tokens, hidden]; scratch: num_tokens times the
 * most that a layer takes; failed: why the ranks cannot go on. */
typedef struct {
    const Step *const *steps;
    const float *const *cos_sins;
    const Ranks *ranks;
    char *x, *branch, *scratch;
    int64_t *numbers;
    int failed;
} Stream;

/* Called by every thread of a team: a layer of x, which a branch is on its way to: that of the layer before. Returns the layer's own, or none
 * when ranks cannot go on. */
static Branch layer_team(const Layer *l, Stream *r, Branch before, const AttentionWork *work, float *attention, int64_t *next) {
    const Step *s = r->steps[l->step];
    const float *cos_sin = l->rotation < 0 ? 0 : r->cos_sins[l->rotation];
    mixer_team(l->mixer, s, work, r->x, before, cos_sin, l->k_cache, l->v_cache, r->scratch, attention, r->branch, next);
    if (l->parallel) second_beside(l, r->x, r->branch, r->scratch, s->num_tokens, next + 3, r->numbers);
    else {
        const Branch mixed = {r->branch, &l->endings[0]};
        if (add_up_team(r->ranks, r->branch, &r->failed)) return (Branch){0};
        second_team(l, r->x, mixed, r->scratch, r->branch, s->num_tokens, next + 3, r->numbers);
    }
    return add_up_team(r->ranks, r->branch, &r->failed) ? (Branch){0} : (Branch){r->branch, &l->endings[1]};
}

/* Layers one after the other, of x and in place, in one team: x, branch [num_tokens, hidden], contiguous; the rest: see Stream. Returns 0,
 * -1 without memory, or why the ranks cannot go on. */
int shoal_fused_layers(const Layer *layers, int64_t num_layers, const Step *const *steps, const float *const *cos_sins, void *x, void *branch,
                       const Ranks *ranks, char *scratch, int threads) {
    AttentionWork *works = calloc((size_t)num_layers, sizeof *works);
    int64_t *next = calloc((size_t)num_layers * COUNTERS, sizeof *next), most = 0, most_numbers = 0;
    Stream stream = {steps, cos_sins, ranks, x, branch, scratch};
    int status = works && next ? 0 : -1;
    for (int64_t i = 0; i < num_layers && !status; i++) {
        const Layer *l = &layers[i];
        status = begin_mixer(&works[i], l->mixer, steps[l->step], l->k_cache, l->v_cache, scratch, threads);
        const int64_t bytes = attention_scratch_bytes(&works[i]);
        const int64_t count = l->mixture ? mixture_numbers(l->mixture, steps[l->step]->num_tokens) : 0;
        most = bytes > most ? bytes : most, most_numbers = count > most_numbers ? count : most_numbers;
    }
    stream.numbers = malloc((size_t)(most_numbers + 1) * sizeof *stream.numbers);
    status |= stream.numbers ? 0 : -1;
    if (!status) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : status)
        {
            float *attention = make_attention_scratch(most);
            Branch last = {0};
            for (int64_t i = 0; i < num_layers && !stream.failed; i++)
                last = layer_team(&layers[i], &stream, last, &works[i], attention, next + i * COUNTERS);
            normalise(&(Norm){0}, layers->mixer->qkv.type, x, last, 0, steps[layers->step]->num_tokens, layers->mixer->qkv.inner);
            status |= attention ? 0 : -1;
            free(attention);
        }
    }
    for (int64_t i = 0; works && i < num_layers; i++) attention_end(&works[i]);
    free(works), free(next), free(stream.numbers);
    return status ? -1 : stream.failed;
}
