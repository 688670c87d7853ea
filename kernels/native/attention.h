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

/* runs: row and first query of `run` queries; heads: by key/value head; most: query heads of one key/value head. */
typedef struct {
    Attention a;
    int32_t *heads, (*runs)[2];
    int64_t num_runs, run, most;
    int type;
} AttentionWork;

int attention_begin(AttentionWork *w, const Attention *a, int type, const int32_t *q_to_kv, int64_t num_rows);
int attention_team(const AttentionWork *w, int64_t *next);
void attention_end(AttentionWork *w);

#endif
