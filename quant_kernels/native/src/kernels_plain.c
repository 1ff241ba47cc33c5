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

/* dot[r][p][column] of the codes of one chunk of inputs, from `first` on, and the rows' bytes there. */
INLINE void dot_chunk(const uint8_t *codes, const int8_t *const *q, int64_t first, int rows, int part, int parts, int bits, int times,
                      plain_vi dot[][2]) {
    const int per_unit = 32 / bits;
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++)
            for (int column = 0; column < 8; column++) {
                int32_t total = 0;
                for (int i = 0; i < QK_CHUNK; i++) {
                    const uint8_t byte = codes[i / per_unit * 64 + (8 * (part + p) + column) * 4 + i % 4];
                    const int32_t code = bits == 8 ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
                    total += code * q[r][first + i];
                }
                dot[r][p][column] = total * times;
            }
}

#include "kernels.h"
