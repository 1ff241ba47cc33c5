/* The kernels for processors with AVX-512 and its dot products of bytes (VNNI): Intel's servers since 2019, AMD's Zen 4. */
#include "qk.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define QK_TABLE qk_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define TILE_WIDTH 16

typedef float avx512_vf __attribute__((vector_size(32)));
typedef float avx512_tf __attribute__((vector_size(64)));
typedef int32_t avx512_ti __attribute__((vector_size(64)));

INLINE avx512_vf fma8(avx512_vf a, avx512_vf b, avx512_vf c) {
    return (avx512_vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

INLINE avx512_tf load_f16(const uint8_t *p) {
    return (avx512_tf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE avx512_tf load_u8(const uint8_t *p) {
    return (avx512_tf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

INLINE avx512_tf fma_tile(avx512_tf a, avx512_tf b, avx512_tf c) {
    return (avx512_tf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

INLINE avx512_tf splat_tile(float x) { return (avx512_tf)_mm512_set1_ps(x); }

/* Four bytes to all lanes. */
INLINE __m512i splat4(const void *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

/* 4-bit codes and int8: vpdpbusd adds four products of an unsigned and a signed byte to 32 bits. */
INLINE void dot_coarse(const uint8_t *codes, const int8_t *q, int64_t stride, int rows, int part, int parts,
                       avx512_ti dot[][1]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i even[QK_TILE_ROWS], odd[QK_TILE_ROWS];
    (void)part, (void)parts; /* A vector is a whole block. */
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int unit = 0; unit < 4; unit++) {
        const __m512i c = _mm512_loadu_si512(codes + 64 * unit);
        const __m512i low = _mm512_and_si512(c, nibble), high = _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble);
        for (int r = 0; r < rows; r++) {
            const int8_t *x = q + r * stride + 8 * unit;
            even[r] = _mm512_dpbusd_epi32(even[r], low, splat4(x));
            odd[r] = _mm512_dpbusd_epi32(odd[r], high, splat4(x + 4));
        }
    }
    for (int r = 0; r < rows; r++) dot[r][0] = (avx512_ti)_mm512_add_epi32(even[r], odd[r]);
}

/* Codes of either width and int16: vpdpwssd adds two products of 16 bits to 32. */
INLINE void dot_fine(const uint8_t *codes, const int16_t *q, int64_t stride, int rows, int part, int parts, int bits,
                     avx512_ti dot[][1]) {
    const __m512i mask = _mm512_set1_epi16(bits == 8 ? 255 : 15);
    __m512i even[QK_TILE_ROWS], odd[QK_TILE_ROWS];
    (void)part, (void)parts;
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int unit = 0; unit < bits; unit++) {
        const __m512i c = _mm512_loadu_si512(codes + 64 * unit);
        __m512i pairs[4];
        pairs[0] = _mm512_and_si512(c, mask);
        pairs[1] = bits == 8 ? _mm512_srli_epi16(c, 8) : _mm512_and_si512(_mm512_srli_epi16(c, 8), mask);
        pairs[2] = _mm512_and_si512(_mm512_srli_epi16(c, 4), mask);
        pairs[3] = _mm512_srli_epi16(c, 12);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 16 / bits; i += 2) {
                const int16_t *x = q + r * stride + 32 / bits * unit + 2 * i;
                even[r] = _mm512_dpwssd_epi32(even[r], pairs[i], splat4(x));
                odd[r] = _mm512_dpwssd_epi32(odd[r], pairs[i + 1], splat4(x + 2));
            }
    }
    for (int r = 0; r < rows; r++) dot[r][0] = (avx512_ti)_mm512_add_epi32(even[r], odd[r]);
}

#include "kernels.h"
#endif
