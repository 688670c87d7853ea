/* Standard Gumbel noise of tokens from Philox4x32-10 (kernels/philox.py says what is counted). Called from there.
 *
 * With u = (bits + 1/2) / 2^32 the noise is -log(-log u). In float32 that needs 1 - u, not u, where u is near 1: from bits >= 2^31 on
 * -log u is computed as -log1p(-(1 - u)). One function turns bits into noise for whole ranges and for chosen tokens, so both have the same bits.
 */
#include "vector.h"

#define QUADS 8 /* counters computed at once */
#define CHUNK 4096

typedef uint64_t wide __attribute__((vector_size(8 * QUADS)));

/* log x of positive normal numbers, within 2 units in the last place: Cephes' logf. */
INLINE vf log_lanes(vf x) {
    vi exponent = (((vi)x - 0x3f3504f3) >> 23); /* of x / sqrt(1/2), so that the rest is in [sqrt(1/2), sqrt 2) */
    vf m = (vf)((vi)x - (exponent << 23)) - splat(1.0f), n = __builtin_convertvector(exponent, vf), z = m * m;
    vf p = splat(7.0376836292e-2f);
    p = p * m + splat(-1.1514610310e-1f);
    p = p * m + splat(1.1676998740e-1f);
    p = p * m + splat(-1.2420140846e-1f);
    p = p * m + splat(1.4249322787e-1f);
    p = p * m + splat(-1.6668057665e-1f);
    p = p * m + splat(2.0000714765e-1f);
    p = p * m + splat(-2.4999993993e-1f);
    p = p * m + splat(3.3333331174e-1f);
    p = p * m * z + n * splat(-2.12194440e-4f) - splat(0.5f) * z;
    return m + p + n * splat(0.693359375f);
}

/* bits [count] to noise; both have room for whole vectors. */
static __attribute__((noinline)) void to_gumbel(const uint32_t *bits, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        vu b;
        memcpy(&b, bits + i, sizeof b);
        vi high = (vi)b < 0; /* u >= 1/2 */
        vf small = __builtin_convertvector(choose_bits(high, ~b, b), vf) * splat(0x1p-32f) + splat(0x1p-33f); /* u, or 1 - u */
        vf one_less = splat(1.0f) - small, log = log_lanes(choose(high, one_less, small));
        vf step = splat(1.0f) - one_less; /* 1 - u as log has seen it */
        vf corrected = choose(step == splat(0.0f), small, -log * small / step);
        *(vf_unaligned *)(out + i) = -log_lanes(choose(high, corrected, -log));
    }
}

/* The four numbers of every counter (quad, position, sample, purpose), in this order: out [QUADS][4]. */
INLINE void philox(wide quad, uint64_t seed, uint64_t position, uint64_t sample, uint64_t purpose, uint32_t *out) {
    const uint64_t mask = 0xffffffffu;
    wide c0 = quad, c1 = (wide){} + (position & mask), c2 = (wide){} + (sample & mask), c3 = (wide){} + purpose;
    uint64_t k0 = seed & mask, k1 = seed >> 32;
    for (int round = 0; round < 10; round++) {
        wide p0 = c0 * 0xD2511F53u, p1 = c2 * 0xCD9E8D57u;
        c0 = (p1 >> 32) ^ c1 ^ k0, c1 = p1 & mask;
        c2 = (p0 >> 32) ^ c3 ^ k1, c3 = p0 & mask;
        k0 = (k0 + 0x9E3779B9u) & mask, k1 = (k1 + 0xBB67AE85u) & mask;
    }
    for (int i = 0; i < QUADS; i++) {
        out[4 * i] = (uint32_t)c0[i], out[4 * i + 1] = (uint32_t)c1[i];
        out[4 * i + 2] = (uint32_t)c2[i], out[4 * i + 3] = (uint32_t)c3[i];
    }
}

/* Noise of `count` <= CHUNK tokens from `first` on, or of ids[0..count-1]. */
static void chunk(const int64_t *ids, int64_t first, int64_t count, uint64_t seed, uint64_t position, uint64_t sample, uint64_t purpose,
                  float *out) {
    uint32_t bits[CHUNK + 8 * QUADS];
    float noise[CHUNK + 8 * QUADS];
    wide quad = {0};
    int64_t skipped = 0;
    if (ids) {
        for (int64_t i = 0; i < count; i += QUADS) {
            uint32_t four[4 * QUADS];
            for (int64_t j = 0; j < QUADS; j++) quad[j] = (uint64_t)ids[i + j < count ? i + j : i] >> 2;
            philox(quad, seed, position, sample, purpose, four);
            for (int64_t j = 0; j < QUADS && i + j < count; j++) bits[i + j] = four[4 * j + (ids[i + j] & 3)];
        }
        for (int64_t i = count; i % LANES; i++) bits[i] = 1;
    } else {
        skipped = first % 4;
        for (int64_t i = 0; i < count + skipped; i += 4 * QUADS) {
            for (int64_t j = 0; j < QUADS; j++) quad[j] = (uint64_t)((first + i) / 4 + j);
            philox(quad, seed, position, sample, purpose, bits + i);
        }
    }
    to_gumbel(bits, noise, count + skipped);
    memcpy(out, noise + skipped, sizeof(float) * (size_t)count);
}

/* Of every row: tokens [start, start + count), or where ids are given those of ids [rows, count]. seeds, positions, samples: [rows]; out
 * [rows, count]. */
void shoal_gumbel(const int64_t *seeds, const int64_t *positions, const int64_t *samples, int64_t rows, const int64_t *ids, int64_t start,
                  int64_t count, int64_t purpose, float *out, int threads) {
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * chunks > 1)
    for (int64_t i = 0; i < rows * chunks; i++) {
        const int64_t row = i / chunks, from = i % chunks * CHUNK, some = count - from < CHUNK ? count - from : CHUNK;
        chunk(ids ? ids + row * count + from : 0, start + from, some, (uint64_t)seeds[row], (uint64_t)positions[row], (uint64_t)samples[row],
              (uint64_t)purpose, out + row * count + from);
    }
}
