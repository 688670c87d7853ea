/* Vectors of float32 lanes and the element types tensors come in: what the CPU kernels are written with.
 *
 * GCC vector extensions, so the same source serves AVX-512 (16 lanes), AVX2, SSE and NEON (8 lanes). A row's arithmetic has one order
 * whatever is computed beside it: lanes are accumulated by chunk in rising order and summed by one fixed tree. Types: 0 float32, 1 bfloat16,
 * 2 float16.
 */
#ifndef SHOAL_VECTOR_H
#define SHOAL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* wide vectors stay inside this library: everything that takes them is inlined */
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline, unused))

/* Whether bfloat16 is multiplied in pairs, as it is: AVX512-BF16, or that arithmetic in float32 to test it elsewhere. */
#if defined(__AVX512BF16__) || defined(SHOAL_EMULATE_BF16_PAIRS) || defined(SHOAL_EMULATE_AMX)
#define MULTIPLIES_PAIRS 1
#else
#define MULTIPLIES_PAIRS 0
#endif

enum { F32 = 0, BF16 = 1, F16 = 2 };

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* A line is called for into the second-level cache: the way into the first one has room for few at a time, which what is read now needs. */
INLINE void call_for(const void *line) { __builtin_prefetch(line, 0, 2); }

INLINE int64_t element_size(int type) { return type == F32 ? 4 : 2; }

INLINE vf splat(float x) {
#if LANES == 16
    return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#else
    return (vf){x, x, x, x, x, x, x, x};
#endif
}

/* Lanes of a where mask is set, of b elsewhere. */
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vu choose_bits(vi mask, vu a, vu b) { return ((vu)mask & a) | (~(vu)mask & b); }

INLINE vf max_lanes(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* a b + c, fused wherever the processor can. Spelled out where several copies of a loop must agree to the bit: some compilers' tuning fuses
 * in one and not in the next. */
INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

/* SUMS[i] += X B[i], fused; X: a number in memory, COUNT: a constant. With AVX2 the instructions are spelled out, two sums to an x: where 12
 * sums, 2 vectors and x fill the registers, compilers keep a sum in memory instead, and every addition to that one waits for a store. */
#if LANES == 8 && defined(__AVX2__) && defined(__FMA__)
INLINE void add_products(vf *sums, const float *x, const vf *b, int count) {
    for (vf all; count > 1; sums += 2, b += 2, count -= 2)
        __asm__("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
                : "+x"(sums[0]), "+x"(sums[1]), "=&x"(all)
                : "m"(*x), "x"(b[0]), "x"(b[1]));
    if (count) sums[0] = multiply_add(splat(*x), b[0], sums[0]);
}
#define ADD_PRODUCTS(SUMS, X, B, COUNT) add_products(SUMS, &(X), B, COUNT)
#else
#define ADD_PRODUCTS(SUMS, X, B, COUNT)                                                         \
    do {                                                                                        \
        vf all = splat(X);                                                                      \
        for (int i = 0; i < (COUNT); i++) (SUMS)[i] = multiply_add(all, (B)[i], (SUMS)[i]);    \
    } while (0)
#endif

/* sums + a.even b.even + a.odd b.odd of every lane's pair of bfloat16. */
INLINE vf multiply_pairs(vf sums, uint32_t a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    union { uint32_t u; float f; } even = {a << 16}, odd = {a & 0xffff0000u};
    sums = multiply_add(splat(odd.f), (vf)(b & 0xffff0000u), sums);
    return multiply_add(splat(even.f), (vf)(b << 16), sums);
#endif
}

INLINE vf half_to_float(vh h) {
#if LANES == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    vu w = __builtin_convertvector(h, vu), magnitude = (w & 0x7fff) << 13;
    vf value = (vf)magnitude * splat(0x1p112f);
    vu special = (vu)(magnitude >= (vu){} + (0x7c00u << 13)) & 0x7f800000u;
    return (vf)((vu)value | special | ((w & 0x8000) << 16));
#endif
}

INLINE vh float_to_half(vf x) {
#if LANES == 8 && defined(__F16C__)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    vu bits = (vu)x, sign = bits & 0x80000000u, a = bits ^ sign;
    vu magic = (vu){} + (126u << 23);
    vu tiny = (vu)((vf)a + (vf)magic) - magic;                      /* subnormal halves: the adder rounds */
    vu normal = (a + ((a >> 13) & 1) + 0xfff - (112u << 23)) >> 13; /* round to nearest even */
    vu special = choose_bits((vi)(a > (vu){} + 0x7f800000u), (vu){} + 0x7e00u, (vu){} + 0x7c00u);
    vu result = choose_bits((vi)(a < (vu){} + (113u << 23)), tiny, normal);
    result = choose_bits((vi)(a >= (vu){} + (143u << 23)), special, result);
    return __builtin_convertvector(result | (sign >> 16), vh);
#endif
}

INLINE vf brain_to_float(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

/* To the nearest, ties to even. */
INLINE vh float_to_brain(vf x) {
#if defined(__AVX512BF16__) && LANES == 16
    return (vh)_mm512_cvtneps_pbh((__m512)x); /* of numbers below the least normal one 0 */
#else
    vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (bits >> 16) | 0x40;
    return __builtin_convertvector(choose_bits((vi)(x != x), nan, rounded), vh);
#endif
}

/* Neighbouring lanes of a, then of b, rounded to pairs of bfloat16: the even ones in the lower halves. */
INLINE vu pair_lanes(vf a, vf b) {
#if defined(__AVX512BF16__)
    return (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    vh halves[2] = {float_to_brain(a), float_to_brain(b)};
    vu pairs;
    memcpy(&pairs, halves, sizeof pairs);
    return pairs;
#endif
}

/* The lanes of two vectors rounded to pairs of bfloat16: a's in the lower halves. */
INLINE vu lanes_to_pairs(vf a, vf b) {
#if defined(__AVX512BF16__)
    const __m512i order = (__m512i)(vu){0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                           0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    return (vu)_mm512_permutexvar_epi16(order, (__m512i)pair_lanes(a, b));
#else
    return __builtin_convertvector(float_to_brain(a), vu) | __builtin_convertvector(float_to_brain(b), vu) << 16;
#endif
}

/* LANES elements at p, which need not be aligned. */
INLINE vf load(const void *p, int type) {
    if (type == F32) return *(const vf_unaligned *)p;
    vh h = *(const vh_unaligned *)p;
    return type == BF16 ? brain_to_float(h) : half_to_float(h);
}

INLINE void store(void *p, int type, vf x) {
    if (type == F32) *(vf_unaligned *)p = x;
    else *(vh_unaligned *)p = type == BF16 ? float_to_brain(x) : float_to_half(x);
}

/* The first n < LANES elements at p, zeros after them; nothing beyond is read. */
INLINE vf load_part(const void *p, int type, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 there = (__mmask16)((1u << n) - 1);
    if (type == F32) return (vf)_mm512_maskz_loadu_ps(there, p);
    vh h = (vh)_mm256_maskz_loadu_epi16(there, p);
    return type == BF16 ? brain_to_float(h) : half_to_float(h);
#else
    char buffer[4 * LANES] __attribute__((aligned(64))) = {0};
    memcpy(buffer, p, (size_t)(n * element_size(type)));
    return load(buffer, type);
#endif
}

INLINE void store_part(void *p, int type, vf x, int64_t n) {
    char buffer[4 * LANES] __attribute__((aligned(64)));
    store(buffer, type, x);
    memcpy(p, buffer, (size_t)(n * element_size(type)));
}

/* LANES elements at p, or the n > 0 there are. */
INLINE vf load_some(const void *p, int type, int64_t n) { return n >= LANES ? load(p, type) : load_part(p, type, n); }

INLINE void store_some(void *p, int type, vf x, int64_t n) {
    if (n >= LANES) store(p, type, x);
    else store_part(p, type, x, n);
}

/* Lanes 8 to 15, and lanes 4 to 7, brought to the front. */
#if LANES == 16
#define UPPER(x) SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15)
#define SECOND_FOUR(x) SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7)
#else
#define SECOND_FOUR(x) SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7)
#endif

/* Sum and maximum of the lanes, by halves. */
INLINE float sum_lanes(vf x) {
#if LANES == 16
    x += UPPER(x);
#endif
    x += SECOND_FOUR(x);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

INLINE float largest_lane(vf x) {
#if LANES == 16
    x = max_lanes(x, UPPER(x));
#endif
    x = max_lanes(x, SECOND_FOUR(x));
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

/* e^x within 2 units in the last place; 0 below -87.3, infinity above 88.7. Range reduction by ln 2, polynomial of Cephes' expf. */
INLINE vf exp_lanes(vf x) {
    vf clipped = choose(x > splat(88.7f), splat(88.7f), x);
    vf shifted = clipped * splat(1.44269504088896341f) + splat(12582912.0f);
    vf n = shifted - splat(12582912.0f);
    vf r = clipped - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    vi half = ((vi)shifted - 0x4b400000) >> 1, rest = ((vi)shifted - 0x4b400000) - half; /* two factors: 2^128 is no float */
    vf result = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    result = choose(x < splat(-87.3f), splat(0.0f), result);
    return choose(x > splat(88.72f), splat(INFINITY), result);
}

/* 2^x of x up to 127 within 1 unit in the last place; numbers below the least normal one may be 0. Minimax polynomial on [-1/2, 1/2]. */
INLINE vf exp2_lanes(vf x) {
    x = max_lanes(splat(-150.0f), x);
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf shifted = x + splat(12582912.0f), n = shifted - splat(12582912.0f);
#endif
    vf r = x - n, p = multiply_add(splat(1.535336196e-4f), r, splat(1.339887502e-3f));
    p = multiply_add(p, r, splat(9.618436918e-3f));
    p = multiply_add(p, r, splat(5.550332367e-2f));
    p = multiply_add(p, r, splat(2.402264774e-1f));
    p = multiply_add(p, r, splat(6.931471825e-1f));
    p = multiply_add(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return choose(x < splat(-126.0f), splat(0.0f), p * (vf)(((vi)shifted - 0x4b400000 + 127) << 23));
#endif
}

/* 2^x of x up to 127 within 2^-18 of itself, for what is rounded to bfloat16. Minimax polynomial on [0, 1]. */
INLINE vf rough_exp2_lanes(vf x) {
#if defined(__AVX512DQ__)
    const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x less its floor; of minus infinity 0 */
    vf p = multiply_add(splat(1.3534167916e-2f), r, splat(5.2011460610e-2f));
    p = multiply_add(p, r, splat(2.4144275689e-1f));
    p = multiply_add(p, r, splat(6.9300383447e-1f));
    return (vf)_mm512_scalef_ps((__m512)multiply_add(p, r, splat(1.0000025934f)), (__m512)x);
#else
    return exp2_lanes(x);
#endif
}

/* x / (1 + e^-x) within 2^-13 of itself above -87, for what is rounded to bfloat16; 0 below -88.7, as the exponential is infinite there. */
INLINE vf rough_silu_lanes(vf x) {
#if defined(__AVX512DQ__)
    return x * (vf)_mm512_rcp14_ps((__m512)(splat(1.0f) + rough_exp2_lanes(x * splat(-1.44269504088896341f))));
#else
    return x / (splat(1.0f) + exp_lanes(-x));
#endif
}

/* tanh x: a polynomial (Cephes' tanhf) up to 0.625, the exponential beyond. */
INLINE vf tanh_lanes(vf x) {
    vf magnitude = (vf)((vu)x & 0x7fffffffu), z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + splat(2.06390887954e-2f);
    p = p * z + splat(-5.37397155531e-2f);
    p = p * z + splat(1.33314422036e-1f);
    p = p * z + splat(-3.33332819422e-1f);
    p = p * z * x + x;
    vf large = splat(1.0f) - splat(2.0f) / (exp_lanes(magnitude + magnitude) + splat(1.0f));
    large = (vf)((vu)large | ((vu)x & 0x80000000u));
    return choose(magnitude < splat(0.625f), p, large);
}

/* erf x: a rational function of x within [-4, 4], beyond which it is 1 or -1 in float32. */
INLINE vf erf_lanes(vf x) {
    x = choose(x > splat(4.0f), splat(4.0f), choose(x < splat(-4.0f), splat(-4.0f), x));
    vf z = x * x, p = splat(-2.72614225801306e-10f), q = splat(-1.45660718464996e-05f);
    p = p * z + splat(2.77068142495902e-08f);
    p = p * z + splat(-2.10102402082508e-06f);
    p = p * z + splat(-5.69250639462346e-05f);
    p = p * z + splat(-7.34990630326855e-04f);
    p = p * z + splat(-2.95459980854025e-03f);
    p = p * z + splat(-1.60960333262415e-02f);
    q = q * z + splat(-2.13374055278905e-04f);
    q = q * z + splat(-1.68282697438203e-03f);
    q = q * z + splat(-7.37332916720468e-03f);
    q = q * z + splat(-1.42647390514189e-02f);
    return x * p / q;
}

/* Rows become columns: within four lanes first, then fours of lanes change places. */
INLINE void transpose(vf rows[LANES]) {
    vf fours[LANES];
#if LANES == 16
    for (int i = 0; i < LANES; i += 4) {
        vf a = SHUFFLE(rows[i], rows[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        vf b = SHUFFLE(rows[i], rows[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        vf c = SHUFFLE(rows[i + 2], rows[i + 3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        vf d = SHUFFLE(rows[i + 2], rows[i + 3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        fours[i] = SHUFFLE(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        fours[i + 1] = SHUFFLE(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        fours[i + 2] = SHUFFLE(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        fours[i + 3] = SHUFFLE(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 4; i++) {
        vf a = SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        vf b = SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        vf c = SHUFFLE(fours[i + 8], fours[i + 12], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        vf d = SHUFFLE(fours[i + 8], fours[i + 12], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        rows[i] = SHUFFLE(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        rows[i + 4] = SHUFFLE(b, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        rows[i + 8] = SHUFFLE(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        rows[i + 12] = SHUFFLE(b, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#else
    for (int i = 0; i < LANES; i += 4) {
        vf a = SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13), b = SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
        vf c = SHUFFLE(rows[i + 2], rows[i + 3], 0, 8, 1, 9, 4, 12, 5, 13), d = SHUFFLE(rows[i + 2], rows[i + 3], 2, 10, 3, 11, 6, 14, 7, 15);
        fours[i] = SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13), fours[i + 1] = SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
        fours[i + 2] = SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13), fours[i + 3] = SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[i + 4] = SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#endif
}

#endif
