/* The kernels in plain C: what they mean, for tests, for the check of the others at load, and for other processors. */
#include "qk.h"

#define QK_TABLE qk_plain
#define TARGET
#define INLINE static inline __attribute__((always_inline))
#define TILE_WIDTH 8

#include <string.h>

typedef float plain_vf __attribute__((vector_size(32)));
typedef int32_t plain_vi __attribute__((vector_size(32)));

INLINE plain_vf fma8(plain_vf a, plain_vf b, plain_vf c) { return a * b + c; }

static float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE plain_vf load_f16(const uint8_t *p) {
    plain_vf v;
    for (int i = 0; i < 8; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, sizeof h);
        v[i] = half_to_float(h);
    }
    return v;
}

INLINE plain_vf load_u8(const uint8_t *p) {
    plain_vf v;
    for (int i = 0; i < 8; i++) v[i] = (float)p[i];
    return v;
}

/* Rounded once, as the other sets do it. */
INLINE plain_vf fma_tile(plain_vf a, plain_vf b, plain_vf c) {
    plain_vf v;
    for (int i = 0; i < 8; i++) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return v;
}

INLINE plain_vf splat_tile(float x) { return (plain_vf){x, x, x, x, x, x, x, x}; }

/* The code of input i of a chunk and a column of a block. */
INLINE int32_t code_of(const uint8_t *codes, int bits, int i, int column) {
    const int per_unit = 32 / bits;
    const uint8_t byte = codes[i / per_unit * 64 + column * 4 + i % 4];
    return bits == 8 ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
}

INLINE void dot_coarse(const uint8_t *codes, const int8_t *q, int64_t stride, int rows, int part, int parts,
                       plain_vi dot[][2]) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++)
            for (int column = 0; column < 8; column++) {
                int32_t total = 0;
                for (int i = 0; i < QK_CHUNK; i++)
                    total += code_of(codes, 4, i, 8 * (part + p) + column) * q[r * stride + i];
                dot[r][p][column] = total;
            }
}

INLINE void dot_fine(const uint8_t *codes, const int16_t *q, int64_t stride, int rows, int part, int parts, int bits,
                     plain_vi dot[][2]) {
    static const int8_t places[4] = {0, 2, 1, 3};
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++)
            for (int column = 0; column < 8; column++) {
                int32_t total = 0;
                for (int i = 0; i < QK_CHUNK; i++)
                    total += code_of(codes, bits, i, 8 * (part + p) + column) * q[r * stride + i / 4 * 4 + places[i % 4]];
                dot[r][p][column] = total;
            }
}

#include "kernels.h"
