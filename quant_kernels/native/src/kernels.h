/* The kernels, for one instruction set: the file that includes this defines QK_TABLE, QK_TARGET (a function attribute),
 * TILE_WIDTH, dot_chunk, load_f16, load_u8 and fma8 first.
 *
 * Vectors are GCC's and clang's own, so one text serves all sets. Invariant: what a row gets depends on that row alone,
 * not on its neighbours or on the number of threads; matmuls and quantization give the same bits on every set, since
 * integer sums are exact and the compiler may not contract products and sums (-ffp-contract=off). */
#include <string.h>

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef int8_t vb __attribute__((vector_size(8)));

INLINE vf load8(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store8(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf splat8(float x) { return (vf){x, x, x, x, x, x, x, x}; }

INLINE vf max8(vf a, vf b) {
    vi greater = a > b;
    return (vf)(((vi)a & greater) | ((vi)b & ~greater));
}

INLINE float sum_of(vf v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

INLINE float largest_of(vf v) {
    float m = v[0];
    for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
    return m;
}

INLINE vf widen8(const uint16_t *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

/* To the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE vh narrow8(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), vh);
}

/* e^x to 2 units of the last place (a polynomial of degree 6 around the nearest multiple of ln 2); 0 below -87. */
INLINE vf exp8(vf x) {
    vi low = x < splat8(-87.0f);
    x = max8(splat8(-87.0f), x); /* In this order NaN stays. */
    x = -max8(splat8(-88.0f), -x);
    vf shifted = x * 1.44269504f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = fma8(r, splat8(1.0f / 720.0f), splat8(1.0f / 120.0f));
    p = fma8(r, p, splat8(1.0f / 24.0f));
    p = fma8(r, p, splat8(1.0f / 6.0f));
    p = fma8(r, p, splat8(0.5f));
    p = fma8(r, p, splat8(1.0f));
    p = fma8(r, p, splat8(1.0f));
    vi power = ((vi)shifted - 0x4b400000 + 127) << 23;
    return (vf)((vi)(p * (vf)power) & ~low);
}

/* Symmetric int8 with a scale per 32 numbers, as llama.cpp's Q8_0: the largest becomes 127. */
TARGET static void quantize(const float *x, int64_t count, const qk_rows *to, int64_t row, int64_t first) {
    const vf magic = splat8(12582912.0f); /* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even. */
    int8_t *q = to->q + row * to->k + first, *low = to->low + row * to->k + first;
    int64_t chunk = (row * to->k + first) / QK_CHUNK;
    for (const float *end = x + count; x < end; chunk++, x += QK_CHUNK, q += QK_CHUNK, low += QK_CHUNK) {
        vf most = splat8(0.0f);
        vi bad = most != most;
        for (int i = 0; i < 4; i++) {
            vf v = load8(x + 8 * i);
            most = max8(most, max8(v, -v));
            bad |= v != v;
        }
        float largest = largest_of(most);
        vi total = {0}, low_total = {0};
        for (int i = 0; i < 8; i++)
            if (bad[i]) largest = __builtin_nanf("");
        /* Too small to have an inverse: nothing is left of it. NaN and infinity make the scale so, and all results. */
        float inverse = largest > 1e-30f && largest < 3e38f ? 127.0f / largest : 0.0f;
        for (int i = 0; i < 4; i++) {
            vf v = load8(x + 8 * i);
            v = inverse > 0.0f ? v * inverse : splat8(0.0f);
            vi whole = (vi)(v + magic) - (vi)magic;
            vi rest = (vi)((v - __builtin_convertvector(whole, vf)) * 254.0f + magic) - (vi)magic;
            total += whole;
            low_total += rest;
            vb bytes = __builtin_convertvector(whole, vb), low_bytes = __builtin_convertvector(rest, vb);
            memcpy(q + 8 * i, &bytes, sizeof bytes);
            memcpy(low + 8 * i, &low_bytes, sizeof low_bytes);
        }
        int32_t all = 0, low_all = 0;
        for (int i = 0; i < 8; i++) all += total[i], low_all += low_total[i];
        to->scale[chunk] = largest / 127.0f;
        to->sum[chunk] = (float)all;
        to->low_sum[chunk] = (float)low_all;
    }
}

typedef float tf __attribute__((vector_size(TILE_WIDTH * 4)));
typedef int32_t ti __attribute__((vector_size(TILE_WIDTH * 4)));
typedef uint32_t tu __attribute__((vector_size(TILE_WIDTH * 4)));
typedef uint16_t th __attribute__((vector_size(TILE_WIDTH * 2)));

INLINE tf load_numbers(const uint8_t *p, int kind, int part) {
    tf v;
    if (kind == QK_SCALE_F16) return load_f16(p + 2 * TILE_WIDTH * part);
    if (kind == QK_SCALE_BF16) {
        th h;
        memcpy(&h, p + 2 * TILE_WIDTH * part, sizeof h);
        return (tf)(__builtin_convertvector(h, tu) << 16);
    }
    memcpy(&v, p + 4 * TILE_WIDTH * part, sizeof v);
    return v;
}

/* The tables of a block as float32: for each group 16 scales and 16 mins, whatever kind of zero point there is. */
INLINE void tables_of(const qk_weight *w, const uint8_t *data, int scale_kind, int zero_kind, float *out) {
    const int64_t group_bytes = qk_group_bytes(w), groups = w->k / w->group;
    const int64_t scale_bytes = QK_COLUMNS * qk_scale_bytes(w);
    const tf constant = (tf){0} - (float)w->zero_const;
    for (int64_t g = 0; g < groups; g++, data += group_bytes, out += 2 * QK_COLUMNS)
        for (int part = 0; part < 16 / TILE_WIDTH; part++) {
            const uint8_t *zeros = data + scale_bytes;
            const tf scale = load_numbers(data, scale_kind, part);
            tf min = constant * scale;
            if (zero_kind == QK_ZERO_TABLE) min = -load_u8(zeros + TILE_WIDTH * part) * scale;
            if (zero_kind == QK_ZERO_MIN) min = load_numbers(zeros, scale_kind, part);
            memcpy(out + TILE_WIDTH * part, &scale, sizeof scale);
            memcpy(out + QK_COLUMNS + TILE_WIDTH * part, &min, sizeof min);
        }
}

/* With the kind of zero point as a constant. */
INLINE void tables_with(const qk_weight *w, const uint8_t *data, int scale_kind, float *out) {
    switch (w->zero_kind) {
        case QK_ZERO_CONST: tables_of(w, data, scale_kind, QK_ZERO_CONST, out); return;
        case QK_ZERO_TABLE: tables_of(w, data, scale_kind, QK_ZERO_TABLE, out); return;
        default: tables_of(w, data, scale_kind, QK_ZERO_MIN, out);
    }
}

TARGET static void tables(const qk_weight *w, int64_t block, float *out) {
    const uint8_t *data = w->data + block * (w->k / w->group) * qk_group_bytes(w);
    switch (w->scale_kind) {
        case QK_SCALE_F16: tables_with(w, data, QK_SCALE_F16, out); return;
        case QK_SCALE_BF16: tables_with(w, data, QK_SCALE_BF16, out); return;
        default: tables_with(w, data, QK_SCALE_F32, out);
    }
}

INLINE tf load_tile(const float *p) {
    tf v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* `parts` vectors of outputs from `part` on, of a block; rows, parts and bits are constants of the caller. */
INLINE void tile_of(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row, int rows,
                    int part, int parts, int bits, float *out) {
    const int64_t table_bytes = QK_COLUMNS * (qk_scale_bytes(w) + qk_zero_bytes(w));
    const int planes = w->planes;
    const int64_t chunks = x->k / QK_CHUNK, chunks_per_group = w->group / QK_CHUNK;
    const int8_t *q[QK_TILE_ROWS], *low[QK_TILE_ROWS];
    const float *scale[QK_TILE_ROWS], *sum[QK_TILE_ROWS], *low_sum[QK_TILE_ROWS];
    tf acc[QK_TILE_ROWS][16 / TILE_WIDTH];
    for (int r = 0; r < rows; r++) {
        q[r] = x->q + (row + r) * x->k;
        low[r] = x->low + (row + r) * x->k;
        scale[r] = x->scale + (row + r) * chunks;
        sum[r] = x->sum + (row + r) * chunks;
        low_sum[r] = x->low_sum + (row + r) * chunks;
        for (int p = 0; p < parts; p++) acc[r][p] = (tf){0};
    }
    for (int64_t first = 0; first < chunks; first += chunks_per_group, table += 2 * QK_COLUMNS) {
        codes += table_bytes;
        for (int64_t c = first; c < first + chunks_per_group; c++) {
            ti dot[QK_TILE_ROWS][16 / TILE_WIDTH];
            float scales[QK_TILE_ROWS], sums[QK_TILE_ROWS];
            dot_chunk(codes, q, c * QK_CHUNK, rows, part, parts, bits, planes == 2 ? 254 : 1, dot);
            for (int r = 0; r < rows; r++) scales[r] = scale[r][c], sums[r] = sum[r][c];
            if (planes == 2) {
                ti rest[QK_TILE_ROWS][16 / TILE_WIDTH];
                dot_chunk(codes, low, c * QK_CHUNK, rows, part, parts, bits, 1, rest);
                for (int r = 0; r < rows; r++) {
                    for (int p = 0; p < parts; p++) dot[r][p] += rest[r][p];
                    scales[r] *= 1.0f / 254.0f;
                    sums[r] = sums[r] * 254.0f + low_sum[r][c];
                }
            }
            codes += QK_COLUMNS * QK_CHUNK * bits / 8;
            for (int p = 0; p < parts; p++) {
                const tf ws = load_tile(table + TILE_WIDTH * (part + p));
                const tf min = load_tile(table + QK_COLUMNS + TILE_WIDTH * (part + p));
                for (int r = 0; r < rows; r++)
                    acc[r][p] += (__builtin_convertvector(dot[r][p], tf) * ws + sums[r] * min) * scales[r];
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++)
            memcpy(out + r * QK_COLUMNS + (part + p) * TILE_WIDTH, &acc[r][p], sizeof(tf));
}

/* One row takes all vectors of a block together, to keep the units busy; more rows one after the other, for registers. */
INLINE void tile_rows(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row, int rows,
                      int bits, float *out) {
    if (rows == 1) {
        tile_of(w, codes, table, x, row, 1, 0, 16 / TILE_WIDTH, bits, out);
        return;
    }
    for (int part = 0; part < 16 / TILE_WIDTH; part++) tile_of(w, codes, table, x, row, rows, part, 1, bits, out);
}

INLINE void tile_bits(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row,
                      int64_t rows, int bits, float *out) {
    switch (rows) {
        case 1: tile_rows(w, codes, table, x, row, 1, bits, out); return;
        case 2: tile_rows(w, codes, table, x, row, 2, bits, out); return;
        case 3: tile_rows(w, codes, table, x, row, 3, bits, out); return;
        default: tile_rows(w, codes, table, x, row, 4, bits, out);
    }
}

TARGET static void tile(const qk_weight *w, int64_t block, const float *table, const qk_rows *x, int64_t row, int64_t rows,
                        float *out) {
    const uint8_t *data = w->data + block * (w->k / w->group) * qk_group_bytes(w);
    if (w->bits == 4)
        tile_bits(w, data, table, x, row, rows, 4, out);
    else
        tile_bits(w, data, table, x, row, rows, 8, out);
}

TARGET static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    vf squares = splat8(0.0f);
    for (int64_t i = 0; i < n; i += 8) squares += load8(x + i) * load8(x + i);
    float inverse = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += 8) store8(out + i, load8(x + i) * inverse * load8(weight + i));
}

TARGET static void silu_mul(const float *gate, const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 8) {
        vf x = load8(gate + i);
        store8(out + i, x / (1.0f + exp8(-x)) * load8(up + i));
    }
}

TARGET static void to_bf16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i += 8) {
        vh h = narrow8(load8(x + i));
        memcpy(out + i, &h, sizeof h);
    }
}

TARGET static void from_bf16(const uint16_t *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 8) store8(out + i, widen8(x + i));
}

/* products[a][b] += sum over i of left[a][i] * right[i][b .. b + 8), for `count` rows of `left` and `wide` vectors;
 * `add` false: they start at zero. Everything in attention is this: left are numbers, right are vectors over rows. */
INLINE void multiply(const float *left, int64_t left_row, int64_t left_item, const float *right, int64_t right_stride,
                     int64_t items, float *products, int64_t stride, int count, int wide, int add) {
    vf acc[8][2];
    for (int a = 0; a < count; a++)
        for (int b = 0; b < wide; b++) acc[a][b] = add ? load8(products + a * stride + 8 * b) : splat8(0.0f);
    for (int64_t i = 0; i < items; i++) {
        vf r[2];
        for (int b = 0; b < wide; b++) r[b] = load8(right + i * right_stride + 8 * b);
        for (int a = 0; a < count; a++) {
            vf l = splat8(left[a * left_row + i * left_item]);
            for (int b = 0; b < wide; b++) acc[a][b] = fma8(l, r[b], acc[a][b]);
        }
    }
    for (int a = 0; a < count; a++)
        for (int b = 0; b < wide; b++) store8(products + a * stride + 8 * b, acc[a][b]);
}

/* The same for any multiple of 8 rows of `left` and of columns of `right`. */
INLINE void multiply_all(const float *left, int64_t left_row, int64_t left_item, int64_t count, const float *right,
                         int64_t columns, int64_t items, float *products, int add) {
    int64_t b = 0;
    for (; b + 16 <= columns; b += 16)
        for (int64_t a = 0; a < count; a += 4)
            multiply(left + a * left_row, left_row, left_item, right + b, columns, items, products + a * columns + b,
                     columns, 4, 2, add);
    for (; b < columns; b += 8)
        for (int64_t a = 0; a < count; a += 8)
            multiply(left + a * left_row, left_row, left_item, right + b, columns, items, products + a * columns + b,
                     columns, 8, 1, add);
}

/* Attention with rows along vectors: scores [keys, rows], results [head_dim, rows]; the softmax runs along (Milakov and
 * Gimelshein 2018). Tiles of keys start at multiples of their size, so a row's result does not depend on its chunk. */
TARGET static void attend(const qk_cache *c, const qk_sequence *s, int64_t first, int64_t count, int64_t kv_head,
                          const float *query, int64_t query_stride, float *out, int64_t out_stride,
                          const qk_scratch *room) {
    const int64_t dim = c->head_dim, heads = c->num_heads / c->num_kv_heads;
    const int64_t rows = count * heads, wide = (rows + 7) & ~(int64_t)7;
    const int64_t position = s->start + first, stop = position + count;
    int32_t last[QK_ITEM_ROWS];
    float most[QK_ITEM_ROWS], total[QK_ITEM_ROWS];
    for (int64_t r = 0; r < wide; r++) {
        const int64_t t = r / heads, h = r % heads;
        last[r] = r < rows ? (int32_t)(position + t) : -1;
        most[r] = -__builtin_inff();
        total[r] = 0.0f;
        for (int64_t i = 0; i < dim; i++)
            room->query[i * wide + r] =
                r < rows ? query[(s->first_row + first + t) * query_stride + (kv_head * heads + h) * dim + i] : 0.0f;
    }
    memset(room->out, 0, sizeof(float) * (size_t)(dim * wide));
    int64_t lowest = c->window > 0 && position >= c->window ? position - c->window + 1 : 0;
    for (int64_t key = lowest / QK_TILE_KEYS * QK_TILE_KEYS; key < stop; key += QK_TILE_KEYS) {
        const int64_t num_keys = stop - key < QK_TILE_KEYS ? stop - key : QK_TILE_KEYS;
        const int64_t padded = (num_keys + 7) & ~(int64_t)7;
        for (int64_t t = 0; t < padded; t++) {
            float *k = room->keys + t * dim, *v = room->values + t * dim;
            if (t >= num_keys) {
                memset(k, 0, sizeof(float) * (size_t)dim);
                memset(v, 0, sizeof(float) * (size_t)dim);
                continue;
            }
            const int64_t p = key + t;
            if (p < lowest) { /* Its block may be another sequence's by now. */
                memset(k, 0, sizeof(float) * (size_t)dim);
                memset(v, 0, sizeof(float) * (size_t)dim);
                continue;
            }
            const int64_t slot = (int64_t)s->blocks[p / c->block_size] * c->block_size + p % c->block_size;
            const int64_t offset = (slot * c->num_kv_heads + kv_head) * dim;
            for (int64_t i = 0; i < dim; i += 8) {
                store8(k + i, widen8(c->keys + offset + i));
                store8(v + i, widen8(c->values + offset + i));
            }
        }
        multiply_all(room->keys, dim, 1, padded, room->query, wide, dim, room->scores, 0);
        for (int64_t r = 0; r < wide; r += 8) {
            vi end;
            memcpy(&end, last + r, sizeof end);
            vi begin = c->window > 0 ? end - (int32_t)(c->window - 1) : (vi){0};
            vf before = load8(most + r), now = before;
            for (int64_t t = 0; t < num_keys; t++) {
                const int32_t at = (int32_t)(key + t);
                vi seen = (end >= at) & (begin <= at);
                float *place = room->scores + t * wide + r;
                vf score = (vf)(((vi)load8(place) & seen) | ((vi)splat8(-__builtin_inff()) & ~seen));
                store8(place, score);
                now = max8(score, now);
            }
            /* A row that has seen no key yet keeps its zeros: there is nothing to scale. */
            vi none = now == splat8(-__builtin_inff());
            vf base = (vf)((vi)now & ~none);
            vf factor = exp8(before - base), sum = load8(total + r) * factor;
            for (int64_t t = 0; t < padded; t++) {
                float *place = room->scores + t * wide + r;
                vf weight = t < num_keys ? exp8(load8(place) - base) : splat8(0.0f);
                store8(place, weight);
                sum += weight;
            }
            store8(most + r, now);
            store8(total + r, sum);
            vi same = factor == splat8(1.0f);
            int changed = 0;
            for (int i = 0; i < 8; i++) changed |= !same[i];
            for (int64_t i = 0; changed && i < dim; i++)
                store8(room->out + i * wide + r, load8(room->out + i * wide + r) * factor);
        }
        multiply_all(room->values, 1, dim, dim, room->scores, wide, padded, room->out, 1);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t t = r / heads, h = r % heads;
        float *place = out + (s->first_row + first + t) * out_stride + (kv_head * heads + h) * dim;
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < dim; i++) place[i] = room->out[i * wide + r] * inverse;
    }
}

const qk_kernels QK_TABLE = {quantize, tables, tile, rms_norm, silu_mul, attend, to_bf16, from_bf16};
