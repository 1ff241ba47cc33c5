/* The kernels for processors with AVX2, FMA and F16C: Intel's since 2013, AMD's since 2015. */
#include "qk.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define QK_TABLE qk_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define TILE_WIDTH 8

typedef float avx2_vf __attribute__((vector_size(32)));
typedef int32_t avx2_vi __attribute__((vector_size(32)));

INLINE avx2_vf fma8(avx2_vf a, avx2_vf b, avx2_vf c) { return (avx2_vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

INLINE avx2_vf load_f16(const uint8_t *p) { return (avx2_vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

INLINE avx2_vf load_u8(const uint8_t *p) {
    return (avx2_vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

INLINE avx2_vf fma_tile(avx2_vf a, avx2_vf b, avx2_vf c) { return fma8(a, b, c); }

INLINE avx2_vf splat_tile(float x) { return (avx2_vf)_mm256_set1_ps(x); }

/* Four bytes to all lanes. */
INLINE __m256i splat4(const void *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

/* 4-bit codes and int8: vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits. A nibble times 127,
 * twice, eight times over is 30480, so a chunk's sum fits, and is widened once. */
INLINE void dot_coarse(const uint8_t *codes, const int8_t *q, int64_t stride, int rows, int part, int parts,
                       avx2_vi dot[][2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i sums[QK_TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) sums[r][p] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int unit = 0; unit < 4; unit++)
        for (int p = 0; p < parts; p++) {
            const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + 64 * unit + 32 * (part + p)));
            const __m256i low = _mm256_and_si256(c, nibble), high = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble);
            for (int r = 0; r < rows; r++) {
                const int8_t *x = q + r * stride + 8 * unit;
                sums[r][p] = _mm256_add_epi16(sums[r][p], _mm256_maddubs_epi16(low, splat4(x)));
                sums[r][p] = _mm256_add_epi16(sums[r][p], _mm256_maddubs_epi16(high, splat4(x + 4)));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) dot[r][p] = (avx2_vi)_mm256_madd_epi16(sums[r][p], _mm256_set1_epi16(1));
}

/* Codes of either width and int16: vpmaddwd adds two products of 16 bits in 32. */
INLINE void dot_fine(const uint8_t *codes, const int16_t *q, int64_t stride, int rows, int part, int parts, int bits,
                     avx2_vi dot[][2]) {
    const __m256i mask = _mm256_set1_epi16(bits == 8 ? 255 : 15);
    __m256i sums[QK_TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) sums[r][p] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int unit = 0; unit < bits; unit++)
        for (int p = 0; p < parts; p++) {
            const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + 64 * unit + 32 * (part + p)));
            __m256i pairs[4];
            pairs[0] = _mm256_and_si256(c, mask);
            pairs[1] = bits == 8 ? _mm256_srli_epi16(c, 8) : _mm256_and_si256(_mm256_srli_epi16(c, 8), mask);
            pairs[2] = _mm256_and_si256(_mm256_srli_epi16(c, 4), mask);
            pairs[3] = _mm256_srli_epi16(c, 12);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < 16 / bits; i++) {
                    const __m256i x = splat4(q + r * stride + 32 / bits * unit + 2 * i);
                    sums[r][p] = _mm256_add_epi32(sums[r][p], _mm256_madd_epi16(pairs[i], x));
                }
        }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) dot[r][p] = (avx2_vi)sums[r][p];
}

#include "kernels.h"
#endif
