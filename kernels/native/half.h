/* bfloat16 and float16 <-> float32, rounding to nearest even. Scalar; the compiler vectorises loops over them. */
#ifndef SHOAL_HALF_H
#define SHOAL_HALF_H

#include <stdint.h>
#include <string.h>

static inline float shoal_bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t shoal_float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float shoal_bf16_to_f32(uint16_t h) { return shoal_bits_to_float((uint32_t)h << 16); }

static inline uint16_t shoal_f32_to_bf16(float x) {
    uint32_t bits = shoal_float_to_bits(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

#if defined(__FLT16_MAX__)
static inline float shoal_f16_to_f32(uint16_t h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
}

static inline uint16_t shoal_f32_to_f16(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
#else
static inline float shoal_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 0x1f, fraction = h & 0x3ff;
    if (exponent == 31) return shoal_bits_to_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return shoal_bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
    float tiny = (float)fraction * 0x1p-24f;
    return sign ? -tiny : tiny;
}

static inline uint16_t shoal_f32_to_f16(float x) {
    uint32_t bits = shoal_float_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more rounds to infinity */
    if (size >= 0x38800000) { /* normal: 2^-14 and more */
        uint32_t shifted = size - 0x38000000;
        return (uint16_t)(sign | (shifted + 0xfff + (shifted >> 13 & 1)) >> 13);
    }
    /* subnormal: adding 0.5 moves the 2^-24 unit to the last place of the float, which rounds it to nearest even */
    return (uint16_t)(sign | (shoal_float_to_bits(shoal_bits_to_float(size) + 0.5f) - 0x3f000000));
}
#endif

#endif
