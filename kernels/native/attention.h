/* Paged attention as other kernels call it: prepared by one thread, computed by a team. */
#ifndef SHOAL_ATTENTION_H
#define SHOAL_ATTENTION_H

#include <stdint.h>

typedef struct {
    const char *q, *k_cache, *v_cache;
    char *out;
    const int32_t *block_table, *cu_seqlens_q, *seq_lens, *head_list, *head_start;
    const float *sinks;
    int64_t q_stride, table_stride, num_heads, num_kv_heads, head_dim, block_size, window;
    float scale, softcap;
} Attention;

/* Some queries with the query heads of the key/value heads [kv, kv + kvs): `queries` of one row from number `first` of the batch on, or one
 * each of `rows` rows from `row` on, whose first `tiles` tiles of keys are the same. */
typedef struct {
    int32_t row, rows, first, queries, tiles, kv, kvs;
} AttentionItem;

/* heads: by key/value head; pairs: the most (query, head) pairs of an item. */
typedef struct {
    Attention a;
    int32_t *heads;
    AttentionItem *items;
    int64_t num_items, pairs;
    int type;
} AttentionWork;

int attention_begin(AttentionWork *w, const Attention *a, int type, const int32_t *q_to_kv, int64_t num_rows, int threads);
/* Bytes a thread works in. */
int64_t attention_scratch_bytes(const AttentionWork *w);
/* What a thread works in, to be given to free; null without memory. */
float *make_attention_scratch(int64_t bytes);
/* Called by every thread of a team, each with its own scratch; next: a counter at 0, shared by the team. */
void attention_team(const AttentionWork *w, int64_t *next, float *scratch);
void attention_end(AttentionWork *w);

#endif
