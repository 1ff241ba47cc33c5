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

INLINE __m256i splat4(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

/* vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits. A nibble times 127, twice, eight times over is
 * 30480, so a chunk's sum fits, and is widened once. Bytes are taken as two nibbles, so that theirs fit too. */
INLINE void dot_chunk(const uint8_t *codes, const int8_t *const *q, int64_t first, int rows, int part, int parts, int bits, int times,
                      avx2_vi dot[][2]) {
    const __m256i nibble = _mm256_set1_epi8(15), factor = _mm256_set1_epi16((short)times);
    const __m256i high_factor = _mm256_set1_epi16((short)(16 * times));
    __m256i low[QK_TILE_ROWS][2], high[QK_TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) low[r][p] = high[r][p] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int unit = 0; unit < bits; unit++)
        for (int p = 0; p < parts; p++) {
            const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + 64 * unit + 32 * (part + p)));
            const __m256i lows = _mm256_and_si256(c, nibble);
            const __m256i highs = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble);
            for (int r = 0; r < rows; r++) {
                const int8_t *x = q[r] + first + (bits == 4 ? 8 : 4) * unit;
                if (bits == 4) {
                    low[r][p] = _mm256_add_epi16(low[r][p], _mm256_maddubs_epi16(lows, splat4(x)));
                    low[r][p] = _mm256_add_epi16(low[r][p], _mm256_maddubs_epi16(highs, splat4(x + 4)));
                } else {
                    const __m256i four = splat4(x);
                    low[r][p] = _mm256_add_epi16(low[r][p], _mm256_maddubs_epi16(lows, four));
                    high[r][p] = _mm256_add_epi16(high[r][p], _mm256_maddubs_epi16(highs, four));
                }
            }
        }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) {
            __m256i total = _mm256_madd_epi16(low[r][p], factor);
            if (bits == 8) total = _mm256_add_epi32(total, _mm256_madd_epi16(high[r][p], high_factor));
            dot[r][p] = (avx2_vi)total;
        }
}

#include "kernels.h"
#endif
