/* The kernels, for one instruction set: the file that includes this defines QK_TABLE, QK_TARGET (a function attribute),
 * TILE_WIDTH, dot_coarse, dot_fine, load_f16, load_u8, fma8, fma_tile and splat_tile first.
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
typedef int16_t vs __attribute__((vector_size(16)));

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

/* Of each four numbers the middle two change places: see `qk_rows`. */
INLINE vi turn8(vi v) { return (vi){v[0], v[2], v[1], v[3], v[4], v[6], v[5], v[7]}; }

/* Symmetric int8 with a scale per 32 numbers, as llama.cpp's Q8_0: the largest becomes 127. With `is_fine` a second int8
 * holds what the first one's rounding left, in units of 1 / 254, and the two are one number of 15 bits and a sign. */
INLINE void quantize_to(const float *x, int64_t count, const qk_rows *to, int64_t at, int is_fine) {
    const vf magic = splat8(12582912.0f); /* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even. */
    float *tables = to->tables + at / QK_CHUNK * 2;
    for (const float *end = x + count; x < end; x += QK_CHUNK, at += QK_CHUNK, tables += 2) {
        vf most = splat8(0.0f);
        vi bad = most != most;
        for (int i = 0; i < 4; i++) {
            vf v = load8(x + 8 * i);
            most = max8(most, max8(v, -v));
            bad |= v != v;
        }
        float largest = largest_of(most);
        vi total = {0};
        for (int i = 0; i < 8; i++)
            if (bad[i]) largest = __builtin_nanf("");
        /* Too small to have an inverse: nothing is left of it. NaN and infinity make the scale so, and all results. */
        float inverse = largest > 1e-30f && largest < __builtin_inff() ? 127.0f / largest : 0.0f;
        for (int i = 0; i < 4; i++) {
            vf v = load8(x + 8 * i);
            v = inverse > 0.0f ? v * inverse : splat8(0.0f);
            vi whole = (vi)(v + magic) - (vi)magic;
            if (is_fine) {
                vi rest = (vi)((v - __builtin_convertvector(whole, vf)) * 254.0f + magic) - (vi)magic;
                whole = whole * 254 + rest;
                vs words = __builtin_convertvector(turn8(whole), vs);
                memcpy(to->fine + at + 8 * i, &words, sizeof words);
            } else {
                vb bytes = __builtin_convertvector(whole, vb);
                memcpy(to->coarse + at + 8 * i, &bytes, sizeof bytes);
            }
            total += whole;
        }
        int32_t all = 0;
        for (int i = 0; i < 8; i++) all += total[i];
        tables[0] = is_fine ? largest / 127.0f * (1.0f / 254.0f) : largest / 127.0f;
        tables[1] = (float)all;
    }
}

TARGET static void quantize(const float *x, int64_t count, const qk_rows *to, int64_t row, int64_t first) {
    if (to->is_fine)
        quantize_to(x, count, to, row * to->k + first, 1);
    else
        quantize_to(x, count, to, row * to->k + first, 0);
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

/* `parts` vectors of outputs from `part` on, of a block; rows, parts, bits and is_fine are constants of the caller. */
INLINE void tile_of(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row, int rows,
                    int part, int parts, int bits, int is_fine, float *out) {
    const int64_t table_bytes = QK_COLUMNS * (qk_scale_bytes(w) + qk_zero_bytes(w)), groups = w->k / w->group;
    const int64_t code_bytes = QK_COLUMNS * QK_CHUNK * bits / 8, chunks = w->group / QK_CHUNK;
    const int64_t ahead = row == 0 && part == 0 ? groups * qk_group_bytes(w) : 0, stride = w->k / QK_CHUNK * 2;
    const int8_t *coarse = x->coarse + row * w->k;
    const int16_t *fine = x->fine + row * w->k;
    const float *tables = x->tables + row * stride;
    tf acc[QK_TILE_ROWS][16 / TILE_WIDTH];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) acc[r][p] = (tf){0};
    for (int64_t g = 0; g < groups; g++, table += 2 * QK_COLUMNS) {
        /* The first rows that meet a block ask for the next one, which the processor's own guesses come late for. */
        if (ahead != 0)
            for (int64_t i = 0; i < table_bytes; i += 64) __builtin_prefetch(codes + ahead + i);
        codes += table_bytes;
        for (int64_t c = 0; c < chunks; c++, codes += code_bytes, tables += 2, coarse += QK_CHUNK, fine += QK_CHUNK) {
            ti dot[QK_TILE_ROWS][16 / TILE_WIDTH];
            if (ahead != 0)
                for (int64_t i = 0; i < code_bytes; i += 64) __builtin_prefetch(codes + ahead + i);
            if (is_fine)
                dot_fine(codes, fine, w->k, rows, part, parts, bits, dot);
            else
                dot_coarse(codes, coarse, w->k, rows, part, parts, dot);
            for (int p = 0; p < parts; p++) {
                const tf scale = load_tile(table + TILE_WIDTH * (part + p));
                const tf min = load_tile(table + QK_COLUMNS + TILE_WIDTH * (part + p));
                for (int r = 0; r < rows; r++) {
                    const tf of_row = splat_tile(tables[r * stride]), sum = splat_tile(tables[r * stride + 1]);
                    const tf product = __builtin_convertvector(dot[r][p], tf) * scale;
                    acc[r][p] = fma_tile(fma_tile(sum, min, product), of_row, acc[r][p]);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++)
            memcpy(out + r * QK_COLUMNS + (part + p) * TILE_WIDTH, &acc[r][p], sizeof(tf));
}

/* All vectors of a block together, so that each number of a row is loaded once; but one after the other where a vector's
 * codes alone take the registers. */
INLINE void tile_rows(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row, int rows,
                      int bits, int is_fine, float *out) {
    if (rows == 1 || bits == 8 || !is_fine) {
        tile_of(w, codes, table, x, row, rows, 0, 16 / TILE_WIDTH, bits, is_fine, out);
        return;
    }
    for (int part = 0; part < 16 / TILE_WIDTH; part++)
        tile_of(w, codes, table, x, row, rows, part, 1, bits, is_fine, out);
}

INLINE void tile_kind(const qk_weight *w, const uint8_t *codes, const float *table, const qk_rows *x, int64_t row,
                      int64_t rows, int bits, int is_fine, float *out) {
    switch (rows) {
        case 1: tile_rows(w, codes, table, x, row, 1, bits, is_fine, out); return;
        case 2: tile_rows(w, codes, table, x, row, 2, bits, is_fine, out); return;
        case 3: tile_rows(w, codes, table, x, row, 3, bits, is_fine, out); return;
        default: tile_rows(w, codes, table, x, row, 4, bits, is_fine, out);
    }
}

TARGET static void tile(const qk_weight *w, int64_t block, const float *table, const qk_rows *x, int64_t row, int64_t rows,
                        float *out) {
    const uint8_t *data = w->data + block * (w->k / w->group) * qk_group_bytes(w);
    if (w->bits == 8)
        tile_kind(w, data, table, x, row, rows, 8, 1, out);
    else if (w->is_fine)
        tile_kind(w, data, table, x, row, rows, 4, 1, out);
    else
        tile_kind(w, data, table, x, row, rows, 4, 0, out);
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
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store8(out + i, widen8(x + i));
    for (; i < n; i++) {
        const uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
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

/* The weights are bfloat16, or float32 where `is_wide`; either way the same numbers in the same order. */
INLINE void dense_tile(const void *const *w, int64_t k, const float *x, int rows, int is_wide, float *out) {
    vf acc[QK_DENSE_ROWS][QK_DENSE_OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < QK_DENSE_OUTPUTS; o++) acc[r][o] = splat8(0.0f);
    for (int64_t i = 0; i < k; i += 8) {
        vf of_row[QK_DENSE_ROWS];
        for (int r = 0; r < rows; r++) of_row[r] = load8(x + r * k + i);
        for (int o = 0; o < QK_DENSE_OUTPUTS; o++) {
            const vf weights = is_wide ? load8((const float *)w[o] + i) : widen8((const uint16_t *)w[o] + i);
            for (int r = 0; r < rows; r++) acc[r][o] = fma8(weights, of_row[r], acc[r][o]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < QK_DENSE_OUTPUTS; o++) out[r * QK_DENSE_OUTPUTS + o] = sum_of(acc[r][o]);
}

INLINE void dense_rows(const void *const *w, int64_t k, const float *x, int64_t rows, int is_wide, float *out) {
    switch (rows) {
        case 1: dense_tile(w, k, x, 1, is_wide, out); return;
        case 2: dense_tile(w, k, x, 2, is_wide, out); return;
        default: dense_tile(w, k, x, 3, is_wide, out);
    }
}

TARGET static void dense(const uint16_t *const *w, int64_t k, const float *x, int64_t num_rows, float *out, float *room) {
    const void *weights[QK_DENSE_OUTPUTS];
    const int is_wide = num_rows > QK_DENSE_ROWS;
    for (int o = 0; o < QK_DENSE_OUTPUTS; o++) {
        weights[o] = is_wide ? (const void *)(room + o * k) : (const void *)w[o];
        for (int64_t i = 0; is_wide && i < k; i += 8) store8(room + o * k + i, widen8(w[o] + i));
    }
    for (int64_t row = 0; row < num_rows; row += QK_DENSE_ROWS) {
        const int64_t rows = num_rows - row < QK_DENSE_ROWS ? num_rows - row : QK_DENSE_ROWS;
        if (is_wide)
            dense_rows(weights, k, x + row * k, rows, 1, out + row * QK_DENSE_OUTPUTS);
        else
            dense_rows(weights, k, x + row * k, rows, 0, out + row * QK_DENSE_OUTPUTS);
    }
}

const qk_kernels QK_TABLE = {quantize, tables, tile, rms_norm, silu_mul, attend, dense, to_bf16, from_bf16};
