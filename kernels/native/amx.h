/* AMX: eight tiles of 16 rows of 64 bytes, and products of tiles; or the same in loops, to test it elsewhere.
 *
 * Instructions are spelled out: GCC's own wrappers do not tell it what memory they read. A thread begins before its first tile and ends
 * after its last, so that nobody pays for saving them in between. The process must have asked for them (kernels/build.py).
 */
#ifndef SHOAL_AMX_H
#define SHOAL_AMX_H

#include "vector.h"

/* SHOAL_NO_AMX: the process may not use what the processor has. What is around the tiles comes in pairs. */
#if MULTIPLIES_PAIRS && ((defined(__AMX_TILE__) && defined(__AMX_BF16__) && !defined(SHOAL_NO_AMX)) || defined(SHOAL_EMULATE_AMX))
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#define AMX_ROWS 16
#define AMX_PAIRS 16 /* of bfloat16 in a row: 32 positions of a product at once */

#if HAS_AMX && !defined(SHOAL_EMULATE_AMX)

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} AmxShape;

INLINE void amx_begin(void) {
    static const AmxShape shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
INLINE void amx_end(void) { __asm__ volatile("tilerelease"); }

/* T, C, A, B: numbers of tiles, literally. step: bytes between rows. */
#define AMX_LOAD(T, FROM, STEP) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T : : "r"((const void *)(FROM)), "r"((int64_t)(STEP)) : "memory")
#define AMX_STORE(T, TO, STEP) __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" : : "r"((void *)(TO)), "r"((int64_t)(STEP)) : "memory")
#define AMX_ZERO(T) __asm__ volatile("tilezero %%tmm" #T : :)
/* C += A B^T: floats; A of pairs of bfloat16; B's row k holds pair k of all columns. */
#define AMX_MULTIPLY(C, A, B) __asm__ volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #C : :)

#elif HAS_AMX

static _Thread_local struct {
    uint32_t rows[AMX_ROWS][AMX_PAIRS];
} amx_tiles[8];

INLINE void amx_begin(void) { memset(amx_tiles, 0, sizeof amx_tiles); }
INLINE void amx_end(void) {}

INLINE void amx_load(int t, const char *from, int64_t step) {
    for (int i = 0; i < AMX_ROWS; i++) memcpy(amx_tiles[t].rows[i], from + i * step, 64);
}
INLINE void amx_store(int t, char *to, int64_t step) {
    for (int i = 0; i < AMX_ROWS; i++) memcpy(to + i * step, amx_tiles[t].rows[i], 64);
}
INLINE void amx_multiply(int c, int a, int b) {
    for (int i = 0; i < AMX_ROWS; i++)
        for (int j = 0; j < AMX_PAIRS; j++) {
            float sums[2] = {0}, sum;
            for (int k = 0; k < AMX_PAIRS; k++)
                for (int odd = 0; odd < 2; odd++) {
                    union { uint32_t bits; float value; } x, y;
                    x.bits = amx_tiles[a].rows[i][k], y.bits = amx_tiles[b].rows[k][j];
                    x.bits = odd ? x.bits & 0xffff0000u : x.bits << 16, y.bits = odd ? y.bits & 0xffff0000u : y.bits << 16;
                    sums[odd] = __builtin_fmaf(x.value, y.value, sums[odd]);
                }
            memcpy(&sum, &amx_tiles[c].rows[i][j], 4);
            sum += sums[0] + sums[1];
            memcpy(&amx_tiles[c].rows[i][j], &sum, 4);
        }
}
#define AMX_LOAD(T, FROM, STEP) amx_load(T, (const char *)(FROM), STEP)
#define AMX_STORE(T, TO, STEP) amx_store(T, (char *)(TO), STEP)
#define AMX_ZERO(T) memset(&amx_tiles[T], 0, sizeof amx_tiles[T])
#define AMX_MULTIPLY(C, A, B) amx_multiply(C, A, B)

#else

INLINE void amx_begin(void) {}
INLINE void amx_end(void) {}

#endif
#endif
