/* Scatter new keys and values into the paged cache. */
#include <stdint.h>
#include <string.h>

/* keys, values: num_tokens rows of `bytes` bytes, stride bytes apart; caches: rows of `bytes` bytes; token t goes to row slots[t]. */
void shoal_kv_write(const char *keys, int64_t key_stride, const char *values, int64_t value_stride, char *k_cache, char *v_cache,
                    const int64_t *slots, int64_t num_tokens, int64_t bytes) {
#pragma omp parallel for schedule(static) if (num_tokens > 1 && num_tokens * bytes > 262144)
    for (int64_t t = 0; t < num_tokens; t++) {
        memcpy(k_cache + slots[t] * bytes, keys + t * key_stride, (size_t)bytes);
        memcpy(v_cache + slots[t] * bytes, values + t * value_stride, (size_t)bytes);
    }
}
