/* What the files of this library share: weights, quantized rows, a step, and the table of kernels of one instruction set.
 *
 * All sizes are counts of elements, all strides too. Nothing here allocates memory that outlives a call. Python checks
 * every pointer, shape and stride before it calls (quant_kernels/native/binding.py); nothing is checked again here. */
#ifndef QK_H
#define QK_H

#include <stdint.h>

/* To be raised when what a field means, or a function takes, is another: Python refuses a library of another version. */
#define QK_VERSION 2

/* Instruction sets, in the order in which they are preferred. */
enum { QK_PLAIN = 0, QK_AVX2 = 1, QK_AVX512 = 2, QK_LEVELS = 3 };
/* Types of activations. */
enum { QK_F32 = 0, QK_BF16 = 1 };
/* Types of scales and mins. */
enum { QK_SCALE_F16 = 0, QK_SCALE_BF16 = 1, QK_SCALE_F32 = 2 };
/* How a weight is made of its code: (code - constant) * scale, (code - table) * scale, code * scale + min. */
enum { QK_ZERO_CONST = 0, QK_ZERO_TABLE = 1, QK_ZERO_MIN = 2 };

/* Inputs that share a scale of the activations, outputs of a block, and rows that are multiplied together. */
#define QK_CHUNK 32
#define QK_COLUMNS 16
#define QK_TILE_ROWS 4
/* Outputs and rows of a dense weight that are multiplied together. */
#define QK_DENSE_OUTPUTS 4
#define QK_DENSE_ROWS 3
/* Attention: keys of a tile, rows (query tokens times heads) of an item, and the largest head. */
#define QK_TILE_KEYS 32
#define QK_ITEM_ROWS 48
#define QK_MAX_HEAD 256

/* A weight of k inputs and n outputs. `data` is, for each block of 16 outputs and each group of inputs:
 *
 *     16 scales | 16 zeros (bytes; or mins, of the scales' type; or nothing) | codes
 *
 * Codes come in units of 64 bytes: four bytes for each of the 16 outputs. With 8 bits they are four neighbouring inputs;
 * with 4 bits the low nibbles are inputs 0 to 3 of eight, and the high nibbles inputs 4 to 7. */
typedef struct {
    const uint8_t *data;
    const float *bias;    /* [n] or NULL */
    const int32_t *order; /* [k] or NULL: row i is fed x[order[i]], or 0 where that is negative */
    int64_t k, n, group;
    int32_t bits, scale_kind, zero_kind, zero_const;
    int32_t is_fine; /* multiplied by fine rows, not coarse ones; always with 8 bits */
    int32_t unused;
} qk_weight;

/* Rows of integers: x[r][i] is about q[r][i] * scale. Coarse rows are int8. Fine ones are int16, and the middle two of
 * each four inputs have changed places: so pairs of them meet the even and the odd bytes of a unit of codes. */
typedef struct {
    int8_t *coarse;
    int16_t *fine; /* The same place. */
    float *tables; /* [rows][k / 32][2]: a chunk's scale, and the sum of its integers */
    int64_t k;
    int32_t is_fine;
} qk_rows;

/* Attention of rows over one layer of a paged cache of bfloat16 [blocks, block_size, num_kv_heads, head_dim]. */
typedef struct {
    const uint16_t *keys, *values;
    int64_t block_size, num_heads, num_kv_heads, head_dim;
    int64_t window; /* 0 for none */
} qk_cache;

/* Neighbouring rows of one sequence, and the blocks that hold it. */
typedef struct {
    int64_t first_row, num_rows;
    int64_t start; /* position of its first row */
    const int32_t *blocks;
} qk_sequence;

/* Room for one thread's attention item; see `qk_scratch_floats`. */
typedef struct {
    float *query, *keys, *values, *scores, *out;
} qk_scratch;

typedef struct {
    /* Columns [first, first + count) of a row of `to`, from as many numbers. */
    void (*quantize)(const float *x, int64_t count, const qk_rows *to, int64_t row, int64_t first);
    /* [k / group][2][16]: scales and mins of a block, for `tile`. */
    void (*tables)(const qk_weight *w, int64_t block, float *out);
    /* out[r][c] for rows `row` and up and the 16 outputs of a block, without bias. */
    void (*tile)(const qk_weight *w, int64_t block, const float *tables, const qk_rows *x, int64_t row, int64_t num_rows,
                 float *out);
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out);
    void (*silu_mul)(const float *gate, const float *up, int64_t n, float *out);
    /* Attention of query tokens [first, first + count) of a sequence over one KV head, for all its query heads. */
    void (*attend)(const qk_cache *c, const qk_sequence *s, int64_t first, int64_t count, int64_t kv_head,
                   const float *query, int64_t query_stride, float *out, int64_t out_stride, const qk_scratch *room);
    /* out[r][i] = x[r] w[i] for QK_DENSE_OUTPUTS rows of weights, bfloat16 [k], k a multiple of 8; `room` is as many floats
     * as they are numbers. */
    void (*dense)(const uint16_t *const *w, int64_t k, const float *x, int64_t num_rows, float *out, float *room);
    void (*to_bf16)(const float *x, int64_t n, uint16_t *out);
    void (*from_bf16)(const uint16_t *x, int64_t n, float *out);
} qk_kernels;

/* The kernels of a level that this processor has. */
const qk_kernels *qk_kernels_of(int level);

extern const qk_kernels qk_plain, qk_avx2, qk_avx512;

static inline int64_t qk_scale_bytes(const qk_weight *w) { return w->scale_kind == QK_SCALE_F32 ? 4 : 2; }

static inline int64_t qk_zero_bytes(const qk_weight *w) {
    return w->zero_kind == QK_ZERO_CONST ? 0 : w->zero_kind == QK_ZERO_TABLE ? 1 : qk_scale_bytes(w);
}

static inline int64_t qk_blocks(const qk_weight *w) { return (w->n + QK_COLUMNS - 1) / QK_COLUMNS; }

/* Bytes of one group of one block. */
static inline int64_t qk_group_bytes(const qk_weight *w) {
    return QK_COLUMNS * (qk_scale_bytes(w) + qk_zero_bytes(w) + w->group * w->bits / 8);
}

#endif
