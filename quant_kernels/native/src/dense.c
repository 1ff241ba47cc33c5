/* Dense linears: weights in bfloat16 as they are, sums in float32.
 *
 * For processors without arithmetic in bfloat16, where torch falls back to loops. */
#include <stddef.h>

#include "qk.h"
#include "team.h"

/* Bytes of activations that stay in a core's cache while several rows of weights pass. */
#define NEAR_BYTES (256 * 1024)

typedef struct {
    const qk_kernels *kernels;
    const uint16_t *weight; /* [n, k] */
    const float *bias;      /* [n] or NULL */
    const float *x;         /* [rows, k] */
    float *y;               /* [rows, n] */
    int64_t rows, k, n, near;
    uint8_t *room;
} product;

static int64_t near_rows(int64_t k) {
    const int64_t rows = NEAR_BYTES / 4 / k / QK_DENSE_ROWS * QK_DENSE_ROWS;
    return rows > 4 * QK_DENSE_ROWS ? rows : 4 * QK_DENSE_ROWS;
}

static int64_t member_bytes(int64_t k) { return 4 * QK_DENSE_OUTPUTS * (k + near_rows(k)); }

/* Bytes of room that `qk_dense` needs. */
int64_t qk_dense_room(int64_t k, int32_t threads) { return threads * member_bytes(k); }

static void multiply_outputs(const product *p, int64_t first, int64_t row, int64_t rows, float *room) {
    const uint16_t *w[QK_DENSE_OUTPUTS];
    float *found = room + QK_DENSE_OUTPUTS * p->k;
    for (int64_t o = 0; o < QK_DENSE_OUTPUTS; o++) /* The last ones may be there twice; what they give is dropped. */
        w[o] = p->weight + (first + o < p->n ? first + o : p->n - 1) * p->k;
    p->kernels->dense(w, p->k, p->x + row * p->k, rows, found, room);
    const int64_t count = p->n - first < QK_DENSE_OUTPUTS ? p->n - first : QK_DENSE_OUTPUTS;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < count; o++)
            p->y[(row + r) * p->n + first + o] =
                found[r * QK_DENSE_OUTPUTS + o] + (p->bias == NULL ? 0.0f : p->bias[first + o]);
}

static void dense_member(qk_team *team, int member, void *argument) {
    const product *p = argument;
    float *room = (float *)(p->room + member * member_bytes(p->k));
    const int64_t blocks = (p->n + QK_DENSE_OUTPUTS - 1) / QK_DENSE_OUTPUTS, share = blocks / (QK_PIECES * team->size);
    const int64_t piece = share > 1 ? share : 1;
    for (int64_t begin; (begin = qk_take(team, piece)) < blocks;) {
        const int64_t end = begin + piece < blocks ? begin + piece : blocks;
        for (int64_t row = 0; row < p->rows; row += p->near)
            for (int64_t block = begin; block < end; block++)
                multiply_outputs(p, block * QK_DENSE_OUTPUTS, row, row + p->near < p->rows ? p->near : p->rows - row, room);
    }
}

/* y [rows, n] = x [rows, k] W^T + bias, W bfloat16 [n, k], the rest float32; k is a multiple of 8, rows and n are not 0. */
void qk_dense(const uint16_t *weight, const float *bias, const float *x, int64_t rows, int64_t k, int64_t n, float *y,
              uint8_t *room, int32_t level, int32_t threads) {
    product p = {qk_kernels_of(level), weight, bias, x, y, rows, k, n, near_rows(k), room};
    qk_run(dense_member, &p, threads);
}
