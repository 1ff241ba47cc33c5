/* What Python calls to compute: one linear, and a whole stack of decoder layers for the rows of a step.
 *
 * A stack's rows go through all layers together, in phases that end at a barrier; within a phase every thread takes pieces
 * of work until none is left. Activations between matmuls are float32, and int8 where they are multiplied. */
#include <string.h>

#include "qk.h"
#include "team.h"

/* Rows that go through the layers at once: more are passed in turns, so that the room they need is bounded. */
#define STEP_ROWS 256
/* Bytes of activations that stay in a core's cache while several blocks of a weight pass. */
#define NEAR_BYTES (128 * 1024)
/* Columns that are quantized as one piece of work. */
#define PIECE_COLUMNS 256

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t at_least_one(int64_t n) { return largest(n, 1); }

/* One matmul of quantized rows. All members call these with the same arguments; none waits. `room` is k floats. */

typedef struct {
    float *out;
    int64_t stride;
    uint16_t *narrow; /* bfloat16 results in place of `out` */
    int adds;         /* to what is there */
} target;

static void put(const qk_kernels *kernels, const target *to, int64_t row, int64_t first, int64_t count, const float *tile,
                const float *bias) {
    float values[QK_COLUMNS];
    for (int64_t c = 0; c < QK_COLUMNS; c++) values[c] = tile[c] + (bias != NULL && c < count ? bias[first + c] : 0.0f);
    if (to->narrow != NULL) {
        uint16_t narrow[QK_COLUMNS];
        kernels->to_bf16(values, QK_COLUMNS, narrow);
        memcpy(to->narrow + row * to->stride + first, narrow, sizeof(uint16_t) * (size_t)count);
        return;
    }
    float *out = to->out + row * to->stride + first;
    if (to->adds)
        for (int64_t c = 0; c < count; c++) out[c] += values[c];
    else
        memcpy(out, values, sizeof(float) * (size_t)count);
}

static void multiply_block(const qk_kernels *kernels, const qk_weight *w, int64_t block, const qk_rows *x, int64_t begin,
                           int64_t end, const target *to, float *room) {
    const int64_t first = block * QK_COLUMNS, count = w->n - first < QK_COLUMNS ? w->n - first : QK_COLUMNS;
    float tile[QK_TILE_ROWS * QK_COLUMNS];
    kernels->tables(w, block, room);
    for (int64_t row = begin; row < end; row += QK_TILE_ROWS) {
        const int64_t together = end - row < QK_TILE_ROWS ? end - row : QK_TILE_ROWS;
        kernels->tile(w, block, room, x, row, together, tile);
        for (int64_t r = 0; r < together; r++) put(kernels, to, row + r, first, count, tile + r * QK_COLUMNS, w->bias);
    }
}

/* Rows of a weight's activations that stay near while several blocks pass. */
static int64_t near_rows(const qk_weight *w) { return largest(NEAR_BYTES / w->k / QK_TILE_ROWS, 4) * QK_TILE_ROWS; }

static void multiply(qk_team *team, const qk_kernels *kernels, const qk_weight *w, const qk_rows *x, int64_t rows,
                     const target *to, float *room) {
    const int64_t blocks = qk_blocks(w), piece = at_least_one(blocks / (QK_PIECES * team->size));
    const int64_t near = near_rows(w);
    for (int64_t begin; (begin = qk_take(team, piece)) < blocks;) {
        const int64_t end = begin + piece < blocks ? begin + piece : blocks;
        for (int64_t row = 0; row < rows; row += near)
            for (int64_t block = begin; block < end; block++)
                multiply_block(kernels, w, block, x, row, row + near < rows ? row + near : rows, to, room);
    }
}

/* Columns [first, first + count) of a row whose numbers are `x`, as `x` stands in the layer's own order. */
static void quantize(const qk_kernels *kernels, const qk_rows *to, int64_t row, int64_t first, int64_t count,
                     const float *x) {
    kernels->quantize(x, count, to, row, first);
}

static void reorder(const float *x, const int32_t *order, int64_t k, float *out) {
    for (int64_t i = 0; i < k; i++) out[i] = order[i] < 0 ? 0.0f : x[order[i]];
}

/* One linear. */

typedef struct {
    const qk_kernels *kernels;
    const qk_weight *weight;
    const void *x;
    int64_t inputs, rows, x_stride;
    int32_t x_type;
    target to;
    qk_rows quantized;
    float *room; /* 2 * max(inputs, k) for each thread */
    int64_t room_stride;
} linear;

static void linear_member(qk_team *team, int member, void *argument) {
    const linear *l = argument;
    const qk_weight *w = l->weight;
    float *wide = l->room + member * l->room_stride, *ordered = wide + l->room_stride / 2;
    for (int64_t row; (row = qk_take(team, 1)) < l->rows;) {
        const float *x = (const float *)l->x + row * l->x_stride;
        if (l->x_type == QK_BF16) {
            l->kernels->from_bf16((const uint16_t *)l->x + row * l->x_stride, l->inputs, wide);
            x = wide;
        }
        if (w->order != NULL) {
            reorder(x, w->order, w->k, ordered);
            x = ordered;
        }
        quantize(l->kernels, &l->quantized, row, 0, w->k, x);
    }
    qk_wait(team);
    multiply(team, l->kernels, w, &l->quantized, l->rows, &l->to, wide);
}

static uint8_t *carve(uint8_t **room, int64_t bytes) {
    uint8_t *start = *room;
    *room += (bytes + 63) & ~(int64_t)63;
    return start;
}

static qk_rows carve_rows(uint8_t **room, int64_t rows, int64_t k) {
    qk_rows made = {0};
    made.k = k;
    made.fine = (int16_t *)carve(room, rows * k * 2);
    made.coarse = (int8_t *)made.fine;
    made.tables = (float *)carve(room, rows * k / QK_CHUNK * 8);
    return made;
}

static int64_t rows_bytes(int64_t rows, int64_t k) { return 2 * rows * k + rows * k / QK_CHUNK * 8 + 2 * 64; }

/* The same place for the inputs of another linear. */
static qk_rows rows_for(const qk_rows *rows, const qk_weight *next) {
    qk_rows made = *rows;
    made.k = next->k;
    made.is_fine = next->is_fine;
    return made;
}

/* Bytes of room that `qk_linear` needs. */
int64_t qk_linear_room(int64_t rows, int64_t inputs, int64_t k, int32_t threads) {
    const int64_t widest = inputs > k ? inputs : k;
    return rows_bytes(rows, k) + threads * 2 * widest * 4 + 64;
}

/* y [rows, n] = x [rows, inputs] W + bias. x and y are float32 or bfloat16, `y_type` and `x_type`. */
void qk_linear(const qk_weight *weight, const void *x, int64_t x_stride, int32_t x_type, int64_t rows, int64_t inputs,
               void *y, int64_t y_stride, int32_t y_type, uint8_t *room, int32_t level, int32_t threads) {
    const int64_t widest = inputs > weight->k ? inputs : weight->k;
    linear l = {0};
    l.kernels = qk_kernels_of(level);
    l.weight = weight;
    l.x = x, l.x_stride = x_stride, l.x_type = x_type;
    l.inputs = inputs, l.rows = rows;
    l.to.stride = y_stride;
    if (y_type == QK_BF16)
        l.to.narrow = y;
    else
        l.to.out = y;
    l.quantized = carve_rows(&room, rows, weight->k);
    l.quantized.is_fine = weight->is_fine;
    l.room = (float *)carve(&room, threads * 2 * widest * 4);
    l.room_stride = 2 * widest;
    qk_run(linear_member, &l, threads);
}

/* A stack of layers. */

typedef struct {
    qk_weight qkv, out, gate_up, down;
    const float *input_norm, *post_norm;
    const float *query_norm, *key_norm; /* [head_dim] or NULL */
    uint16_t *keys, *values;            /* this layer's part of the cache */
    int64_t window;                     /* 0 for none */
} qk_layer;

typedef struct {
    const qk_layer *layers;
    const float *final_norm;
    const float *cosines, *sines; /* [positions, head_dim / 2] */
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, block_size;
    float norm_eps, head_norm_eps;
} qk_stack;

typedef struct {
    const qk_kernels *kernels;
    const qk_stack *stack;
    const qk_sequence *sequences;
    int64_t num_sequences, rows, threads;
    float *residual;    /* [rows, hidden] */
    uint16_t *hidden;   /* [rows, hidden] */
    qk_rows x;          /* of any linear */
    qk_rows inner;      /* of down, where it is made together with gate and up */
    float *wide;        /* [rows, the widest result of a linear] */
    float *attended;    /* [rows, num_heads * head_dim] */
    float *room;        /* of each thread */
    int64_t room_stride, wide_stride;
} stack_step;

static int64_t qkv_columns(const qk_stack *s) { return (s->num_heads + 2 * s->num_kv_heads) * s->head_dim; }

static int64_t scratch_floats(const qk_stack *s) {
    return s->head_dim * (2 * QK_ITEM_ROWS + 2 * QK_TILE_KEYS) + QK_TILE_KEYS * QK_ITEM_ROWS;
}

static int64_t widest_input(const qk_stack *s) {
    int64_t widest = largest(largest(s->hidden, s->intermediate), s->num_heads * s->head_dim);
    for (int64_t i = 0; i < s->num_layers; i++) {
        const qk_layer *l = &s->layers[i];
        widest = largest(widest, largest(largest(l->qkv.k, l->out.k), largest(l->gate_up.k, l->down.k)));
    }
    return widest;
}

static int64_t thread_floats(const qk_stack *s) { return (largest(2 * widest_input(s), scratch_floats(s)) + 15) & ~15; }

static int64_t widest_result(const qk_stack *s) { return largest(qkv_columns(s), 2 * s->intermediate); }

/* Bytes of room that `qk_run_stack` needs for a step of any number of rows. */
int64_t qk_stack_room(const qk_stack *s, int64_t rows, int32_t threads) {
    if (rows > STEP_ROWS) rows = STEP_ROWS;
    const int64_t floats = rows * (widest_result(s) + s->num_heads * s->head_dim) + threads * thread_floats(s);
    return rows_bytes(rows, widest_input(s)) + rows_bytes(rows, s->intermediate) + 4 * floats + 4 * 64;
}

static void normalize_rows(qk_team *team, const stack_step *t, const float *norm, const qk_weight *next, float *room) {
    const int64_t hidden = t->stack->hidden;
    const qk_rows to = rows_for(&t->x, next);
    for (int64_t row; (row = qk_take(team, 1)) < t->rows;) {
        const float *x = room;
        t->kernels->rms_norm(t->residual + row * hidden, norm, hidden, t->stack->norm_eps, room);
        if (next->order != NULL) {
            reorder(room, next->order, next->k, room + t->room_stride / 2);
            x = room + t->room_stride / 2;
        }
        quantize(t->kernels, &to, row, 0, next->k, x);
    }
    qk_wait(team);
}

/* Rotate pairs (i, i + half) of a head; `scale` goes with it (Su et al. 2021). */
static void rotate(float *x, const float *cosine, const float *sine, int64_t half, float scale) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = (a * cosine[i] - b * sine[i]) * scale;
        x[i + half] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

/* Norm and rope of one head. */
static void turn_head(const stack_step *t, const float *norm, float *head, int64_t position, float scale, float *room) {
    const int64_t dim = t->stack->head_dim, half = dim / 2;
    if (norm != NULL) {
        t->kernels->rms_norm(head, norm, dim, t->stack->head_norm_eps, room);
        memcpy(head, room, sizeof(float) * (size_t)dim);
    }
    rotate(head, t->stack->cosines + position * half, t->stack->sines + position * half, half, scale);
}

/* One KV head of a row [q | k | v] and the queries that share it; key and value go to the cache. */
static void place_head(const stack_step *t, const qk_layer *layer, const qk_sequence *sequence, int64_t token,
                       int64_t kv_head, float *room) {
    const qk_stack *s = t->stack;
    const int64_t dim = s->head_dim, shared = s->num_heads / s->num_kv_heads, position = sequence->start + token;
    const int64_t slot = (int64_t)sequence->blocks[position / s->block_size] * s->block_size + position % s->block_size;
    const int64_t place = (slot * s->num_kv_heads + kv_head) * dim;
    const float scale = 1.0f / __builtin_sqrtf((float)dim);
    float *row = t->wide + (sequence->first_row + token) * t->wide_stride;
    float *key = row + (s->num_heads + kv_head) * dim;
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; h++)
        turn_head(t, layer->query_norm, row + h * dim, position, scale, room);
    turn_head(t, layer->key_norm, key, position, 1.0f, room);
    t->kernels->to_bf16(key, dim, layer->keys + place);
    t->kernels->to_bf16(key + s->num_kv_heads * dim, dim, layer->values + place);
}

static const qk_sequence *sequence_of(const stack_step *t, int64_t row) {
    int64_t low = 0, high = t->num_sequences - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (t->sequences[middle].first_row <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return &t->sequences[low];
}

static void place_rows(qk_team *team, const stack_step *t, const qk_layer *layer, float *room) {
    for (int64_t row; (row = qk_take(team, 1)) < t->rows;) {
        const qk_sequence *s = sequence_of(t, row);
        for (int64_t h = 0; h < t->stack->num_kv_heads; h++) place_head(t, layer, s, row - s->first_row, h, room);
    }
    qk_wait(team);
}

static qk_scratch scratch_in(const qk_stack *s, float *room) {
    qk_scratch made;
    made.query = room;
    made.out = made.query + s->head_dim * QK_ITEM_ROWS;
    made.keys = made.out + s->head_dim * QK_ITEM_ROWS;
    made.values = made.keys + s->head_dim * QK_TILE_KEYS;
    made.scores = made.values + s->head_dim * QK_TILE_KEYS;
    return made;
}

/* Whether an item's results are whole chunks of the next linear's input, which then needs no phase to quantize it. */
static int quantizes_items(const qk_stack *s, const qk_weight *next) {
    return next->order == NULL && s->num_heads / s->num_kv_heads * s->head_dim % QK_CHUNK == 0;
}

static void quantize_item(const stack_step *t, const qk_weight *next, int64_t row, int64_t count, int64_t kv_head) {
    const qk_stack *s = t->stack;
    const int64_t columns = s->num_heads / s->num_kv_heads * s->head_dim, first = kv_head * columns;
    const qk_rows to = rows_for(&t->x, next);
    for (int64_t end = row + count; row < end; row++)
        quantize(t->kernels, &to, row, first, columns, t->attended + row * s->num_heads * s->head_dim + first);
}

/* Items are neighbouring query tokens of a sequence and one KV head; each thread counts through all of them. Where every
 * sequence has one row (`is_decode`), an item reads no key that another one of this step makes, and so makes its own. */
static void attend_rows(qk_team *team, const stack_step *t, const qk_layer *layer, int is_decode, float *room) {
    const qk_stack *s = t->stack;
    const int is_whole = quantizes_items(s, &layer->out);
    const qk_cache cache = {layer->keys,     layer->values, s->block_size,  s->num_heads,
                            s->num_kv_heads, s->head_dim,   layer->window};
    const qk_scratch scratch = scratch_in(s, room);
    const int64_t tokens = at_least_one(QK_ITEM_ROWS / (s->num_heads / s->num_kv_heads));
    int64_t item = 0, mine = qk_take(team, 1);
    for (int64_t i = 0; i < t->num_sequences; i++) {
        const qk_sequence *sequence = &t->sequences[i];
        for (int64_t first = 0; first < sequence->num_rows; first += tokens, item += s->num_kv_heads)
            while (mine < item + s->num_kv_heads) {
                const int64_t left = sequence->num_rows - first, count = left < tokens ? left : tokens;
                if (is_decode) place_head(t, layer, sequence, 0, mine - item, room);
                t->kernels->attend(&cache, sequence, first, count, mine - item, t->wide, t->wide_stride, t->attended,
                                   s->num_heads * s->head_dim, &scratch);
                if (is_whole) quantize_item(t, &layer->out, sequence->first_row + first, count, mine - item);
                mine = qk_take(team, 1);
            }
    }
    qk_wait(team);
}

/* Rows [rows, columns] for a linear, quantized; with `up` it is silu(x) * up. A row is shared where its order allows it. */
static void quantize_rows(qk_team *team, const stack_step *t, const float *x, const float *up, int64_t stride,
                          int64_t columns, const qk_weight *next, float *room) {
    const int64_t piece = next->order == NULL ? PIECE_COLUMNS : columns;
    const int64_t pieces = (columns + piece - 1) / piece;
    const qk_rows to = rows_for(&t->x, next);
    for (int64_t i; (i = qk_take(team, 1)) < t->rows * pieces;) {
        const int64_t row = i / pieces, first = i % pieces * piece;
        const int64_t count = columns - first < piece ? columns - first : piece;
        const float *values = x + row * stride + first;
        if (up != NULL) {
            t->kernels->silu_mul(values, up + row * stride + first, count, room);
            values = room;
        }
        if (next->order != NULL) {
            reorder(values, next->order, next->k, room + t->room_stride / 2);
            quantize(t->kernels, &to, row, 0, next->k, room + t->room_stride / 2);
        } else
            quantize(t->kernels, &to, row, first, count, values);
    }
    qk_wait(team);
}

static void multiply_rows(qk_team *team, const stack_step *t, const qk_rows *inputs, const qk_weight *w, float *out,
                          int64_t stride, int adds, float *room) {
    const qk_rows x = rows_for(inputs, w);
    const target to = {out, stride, NULL, adds};
    multiply(team, t->kernels, w, &x, t->rows, &to, room);
    qk_wait(team);
}

/* Whether gate, up and their product can be made chunk by chunk of down's input. */
static int makes_chunks(const qk_stack *s, const qk_layer *layer) {
    return layer->down.order == NULL && s->intermediate % QK_CHUNK == 0;
}

/* Chunks [begin, end) of silu(gate) * up, quantized, for some rows. */
static void make_chunks(const stack_step *t, const qk_layer *layer, int64_t begin, int64_t end, int64_t row, int64_t stop,
                        float *room) {
    const qk_weight *w = &layer->gate_up;
    const int64_t inner = t->stack->intermediate, blocks = QK_CHUNK / QK_COLUMNS;
    const target to = {t->wide, t->wide_stride, NULL, 0};
    const qk_rows x = rows_for(&t->x, w), made = rows_for(&t->inner, &layer->down);
    for (int half = 0; half < 2; half++) {
        const int64_t first = half * inner / QK_COLUMNS;
        for (int64_t block = begin * blocks; block < end * blocks; block++)
            multiply_block(t->kernels, w, first + block, &x, row, stop, &to, room);
    }
    const int64_t column = begin * QK_CHUNK, count = (end - begin) * QK_CHUNK;
    for (; row < stop; row++) {
        const float *gate = t->wide + row * t->wide_stride + column;
        t->kernels->silu_mul(gate, gate + inner, count, room);
        quantize(t->kernels, &made, row, column, count, room);
    }
}

static void multiply_gated(qk_team *team, const stack_step *t, const qk_layer *layer, float *room) {
    const int64_t chunks = t->stack->intermediate / QK_CHUNK, piece = at_least_one(chunks / (QK_PIECES * team->size));
    const int64_t near = near_rows(&layer->gate_up);
    for (int64_t begin; (begin = qk_take(team, piece)) < chunks;) {
        const int64_t end = begin + piece < chunks ? begin + piece : chunks;
        for (int64_t row = 0; row < t->rows; row += near)
            make_chunks(t, layer, begin, end, row, row + near < t->rows ? row + near : t->rows, room);
    }
    qk_wait(team);
}

static void run_layer(qk_team *team, const stack_step *t, const qk_layer *layer, float *room) {
    const qk_stack *s = t->stack;
    const int64_t attended = s->num_heads * s->head_dim;
    const int is_decode = t->num_sequences == t->rows;
    normalize_rows(team, t, layer->input_norm, &layer->qkv, room);
    multiply_rows(team, t, &t->x, &layer->qkv, t->wide, t->wide_stride, 0, room);
    if (!is_decode) place_rows(team, t, layer, room);
    attend_rows(team, t, layer, is_decode, room);
    if (!quantizes_items(s, &layer->out))
        quantize_rows(team, t, t->attended, NULL, attended, attended, &layer->out, room);
    multiply_rows(team, t, &t->x, &layer->out, t->residual, s->hidden, 1, room);
    normalize_rows(team, t, layer->post_norm, &layer->gate_up, room);
    if (makes_chunks(s, layer)) {
        multiply_gated(team, t, layer, room);
        multiply_rows(team, t, &t->inner, &layer->down, t->residual, s->hidden, 1, room);
        return;
    }
    multiply_rows(team, t, &t->x, &layer->gate_up, t->wide, t->wide_stride, 0, room);
    quantize_rows(team, t, t->wide, t->wide + s->intermediate, t->wide_stride, s->intermediate, &layer->down, room);
    multiply_rows(team, t, &t->x, &layer->down, t->residual, s->hidden, 1, room);
}

static void stack_member(qk_team *team, int member, void *argument) {
    const stack_step *t = argument;
    const int64_t hidden = t->stack->hidden;
    float *room = t->room + member * t->room_stride;
    for (int64_t i = 0; i < t->stack->num_layers; i++) run_layer(team, t, &t->stack->layers[i], room);
    for (int64_t row; (row = qk_take(team, 1)) < t->rows;) {
        t->kernels->rms_norm(t->residual + row * hidden, t->stack->final_norm, hidden, t->stack->norm_eps, room);
        t->kernels->to_bf16(room, hidden, t->hidden + row * hidden);
    }
}

/* The part of the sequences that has rows [begin, begin + rows), counted from `begin` on; returns how many there are. */
static int64_t cut(const qk_sequence *all, int64_t count, int64_t begin, int64_t rows, qk_sequence *out) {
    int64_t made = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = largest(all[i].first_row, begin), end = all[i].first_row + all[i].num_rows;
        const int64_t stop = end < begin + rows ? end : begin + rows;
        if (first >= stop) continue;
        out[made] = all[i];
        out[made].start += first - all[i].first_row;
        out[made].first_row = first - begin;
        out[made].num_rows = stop - first;
        made++;
    }
    return made;
}

/* Run all layers; writes the cache.
 *
 * residual: float32 [rows, hidden], the embedded tokens; it is changed. hidden: bfloat16 [rows, hidden], the result.
 * sequences: whose rows follow each other from 0 to `rows`; none reads keys that another one of the step makes. */
void qk_run_stack(const qk_stack *stack, const qk_sequence *sequences, int64_t num_sequences, int64_t rows, float *residual,
                  uint16_t *hidden, uint8_t *room, int32_t level, int32_t threads) {
    qk_sequence pieces[STEP_ROWS];
    stack_step t = {0};
    const int64_t most = rows < STEP_ROWS ? rows : STEP_ROWS;
    t.kernels = qk_kernels_of(level);
    t.stack = stack;
    t.sequences = pieces;
    t.wide_stride = widest_result(stack);
    t.room_stride = thread_floats(stack);
    t.x = carve_rows(&room, most, widest_input(stack));
    t.inner = carve_rows(&room, most, stack->intermediate);
    t.wide = (float *)carve(&room, most * t.wide_stride * 4);
    t.attended = (float *)carve(&room, most * stack->num_heads * stack->head_dim * 4);
    t.room = (float *)carve(&room, threads * t.room_stride * 4);
    for (int64_t begin = 0; begin < rows; begin += STEP_ROWS) {
        t.rows = rows - begin < STEP_ROWS ? rows - begin : STEP_ROWS;
        t.num_sequences = cut(sequences, num_sequences, begin, t.rows, pieces);
        t.residual = residual + begin * stack->hidden;
        t.hidden = hidden + begin * stack->hidden;
        qk_run(stack_member, &t, threads);
    }
}

/* Single kernels, for tests and for the check at load. */

/* Sizes of the records that Python fills in, and the version of what they mean. */
void qk_sizes(int64_t *out) {
    out[0] = sizeof(qk_weight), out[1] = sizeof(qk_layer), out[2] = sizeof(qk_stack), out[3] = sizeof(qk_sequence);
    out[4] = QK_VERSION;
}

void qk_quantize(const float *x, int64_t k, void *q, int32_t is_fine, float *tables, int32_t level) {
    const qk_rows to = {q, q, tables, k, is_fine};
    qk_kernels_of(level)->quantize(x, k, &to, 0, 0);
}

void qk_silu_mul(const float *gate, const float *up, int64_t n, float *out, int32_t level) {
    qk_kernels_of(level)->silu_mul(gate, up, n, out);
}

void qk_rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out, int32_t level) {
    qk_kernels_of(level)->rms_norm(x, weight, n, eps, out);
}
