/* Weights from one layout to another, bit for bit: a record's words to the kernels' blocks, a GGUF file's rows to words.
 *
 * A strip of outputs is one piece of work: their words are neighbours in every row of a table. */
#include <string.h>

#include "qk.h"
#include "team.h"

/* A record's words to blocks. */

/* Blocks that are one piece of work, at most: a row's words for them lie side by side, each block is a stream of writes. */
#define PACKED_BLOCKS 8
/* Rows of words that are asked for before their turn: each lies on a page of its own, where no processor foresees it. */
#define ROWS_AHEAD 8
/* Pieces for each member at least, while there are blocks enough. */
#define PACKED_PIECES 4

typedef struct {
    const qk_weight *weight;
    uint8_t *out;
    const uint32_t *words;
    const uint8_t *scales, *zeros;
} packing;

static int64_t columns_of(const qk_weight *w, int64_t block) {
    const int64_t left = w->n - block * QK_COLUMNS;
    return left < QK_COLUMNS ? left : QK_COLUMNS;
}

static void copy_columns(const uint8_t *row, int64_t item, int64_t first, int64_t count, uint8_t *out) {
    memcpy(out, row + first * item, (size_t)(count * item));
    memset(out + count * item, 0, (size_t)((QK_COLUMNS - count) * item));
}

/* Four codes of 4 bits a byte apart, below those of the other half. */
static inline uint32_t spread_nibbles(uint32_t word) {
    uint32_t low = word & 0xffff, high = word >> 16;
    low = (low | low << 8) & 0x00ff00ff, high = (high | high << 8) & 0x00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f, high = (high | high << 4) & 0x0f0f0f0f;
    return low | high << 4;
}

/* A row's words of one block. Bytes are as they are on the little-endian machines that this is for. */
static void pack_unit(const uint32_t *row, int64_t count, int32_t bits, uint8_t *out) {
    uint32_t unit[QK_COLUMNS] = {0};
    memcpy(unit, row, sizeof(uint32_t) * (size_t)count);
    if (bits == 4)
        for (int64_t c = 0; c < QK_COLUMNS; c++) unit[c] = spread_nibbles(unit[c]);
    memcpy(out, unit, sizeof unit);
}

/* Ask for the words of blocks from `first` to `last` in a row, if there is one. */
static inline void prefetch_row(const packing *p, int64_t row, int64_t first, int64_t last) {
    const qk_weight *w = p->weight;
    if (row >= w->k * w->bits / 32) return;
    for (int64_t b = first; b < last; b++) __builtin_prefetch(p->words + row * w->n + b * QK_COLUMNS);
}

/* Group `g` of all blocks from `first` to `last`, row by row: rows of words are far apart in memory. */
static void pack_group(const packing *p, int64_t g, int64_t first, int64_t last) {
    const qk_weight *w = p->weight;
    const int64_t scale = qk_scale_bytes(w), zero = qk_zero_bytes(w), words = w->group * w->bits / 32;
    const int64_t block_bytes = (w->k / w->group) * qk_group_bytes(w);
    uint8_t *const out = p->out + first * block_bytes + g * qk_group_bytes(w);
    for (int64_t b = first; b < last; b++) {
        uint8_t *heads = out + (b - first) * block_bytes;
        copy_columns(p->scales + g * w->n * scale, scale, b * QK_COLUMNS, columns_of(w, b), heads);
        if (zero == 0) continue;
        heads += QK_COLUMNS * scale;
        copy_columns(p->zeros + g * w->n * zero, zero, b * QK_COLUMNS, columns_of(w, b), heads);
    }
    for (int64_t i = 0; i < words; i++) {
        const uint32_t *row = p->words + (g * words + i) * w->n;
        prefetch_row(p, g * words + i + ROWS_AHEAD, first, last);
        uint8_t *codes = out + QK_COLUMNS * (scale + zero) + i * 4 * QK_COLUMNS;
        for (int64_t b = first; b < last; b++, codes += block_bytes)
            pack_unit(row + b * QK_COLUMNS, columns_of(w, b), w->bits, codes);
    }
}

static void pack_member(qk_team *team, int member, void *argument) {
    const packing *p = argument;
    const int64_t blocks = qk_blocks(p->weight), groups = p->weight->k / p->weight->group;
    (void)member;
    const int64_t share = blocks / (PACKED_PIECES * team->size);
    const int64_t piece = share < 1 ? 1 : share < PACKED_BLOCKS ? share : PACKED_BLOCKS;
    for (int64_t first; (first = qk_take(team, piece)) < blocks;) {
        const int64_t end = first + piece < blocks ? first + piece : blocks;
        for (int64_t g = 0; g < groups; g++) pack_group(p, g, first, end);
    }
}

/* From words [k * bits / 32, n] of codes, and tables [k / group, n] in the types that `weight` names. */
void qk_pack(const qk_weight *weight, uint8_t *out, const uint32_t *words, const uint8_t *scales, const uint8_t *zeros,
             int32_t threads) {
    packing p = {weight, out, words, scales, zeros};
    qk_run(pack_member, &p, threads);
}

/* A GGUF file's rows to words. */

typedef struct {
    const uint8_t *blocks;
    int64_t rows, groups, block_bytes, columns;
    int32_t bits, head_halves;
    uint32_t *words;
    uint16_t *heads[2];
} unblocking;

/* The low nibbles of eight bytes, side by side. */
static uint32_t low_nibbles(uint64_t pairs) {
    pairs &= 0x0f0f0f0f0f0f0f0f;
    pairs = (pairs | pairs >> 4) & 0x00ff00ff00ff00ff;
    pairs = (pairs | pairs >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(pairs | pairs >> 16);
}

/* 32 codes of a row. Bytes are signed: flipping the top bit adds 128. Nibbles are inputs 0 to 15 below, 16 to 31 above. */
static void words_of(const uint8_t *codes, int32_t bits, uint32_t *words) {
    if (bits == 8) {
        memcpy(words, codes, QK_CHUNK);
        for (int i = 0; i < QK_CHUNK / 4; i++) words[i] ^= 0x80808080u;
        return;
    }
    for (int i = 0; i < 2; i++) {
        uint64_t pairs;
        memcpy(&pairs, codes + 8 * i, sizeof pairs);
        words[i] = low_nibbles(pairs);
        words[2 + i] = low_nibbles(pairs >> 4);
    }
}

static void unblock_strip(const unblocking *u, int64_t first) {
    const int64_t count = u->rows - first < QK_COLUMNS ? u->rows - first : QK_COLUMNS;
    const int64_t per_group = u->bits; /* words of 32 codes */
    uint32_t words[QK_COLUMNS][8] = {{0}};
    uint16_t heads[2][QK_COLUMNS];
    for (int64_t g = 0; g < u->groups; g++) {
        for (int64_t r = 0; r < count; r++) {
            const uint8_t *block = u->blocks + ((first + r) * u->groups + g) * u->block_bytes;
            for (int32_t h = 0; h < u->head_halves; h++) memcpy(&heads[h][r], block + 2 * h, 2);
            words_of(block + 2 * u->head_halves, u->bits, words[r]);
        }
        for (int32_t h = 0; h < u->head_halves; h++)
            memcpy(u->heads[h] + g * u->columns + first, heads[h], (size_t)count * 2);
        for (int64_t w = 0; w < per_group; w++) {
            uint32_t *out = u->words + (g * per_group + w) * u->columns + first;
            for (int64_t r = 0; r < count; r++) out[r] = words[r][w];
        }
    }
}

static void unblock_member(qk_team *team, int member, void *argument) {
    const unblocking *u = argument;
    (void)member;
    for (int64_t strip; (strip = qk_take(team, 1)) * QK_COLUMNS < u->rows;) unblock_strip(u, strip * QK_COLUMNS);
}

/* GGUF rows of blocks, each of a scale, a min if `mins` is not NULL, and 32 codes: to columns of words [k * bits / 32, ..]
 * and of tables [k / 32, ..], whose rows are `columns` apart. */
void qk_unblock(const uint8_t *blocks, int64_t rows, int64_t groups, int32_t bits, uint32_t *words, uint16_t *scales,
                uint16_t *mins, int64_t columns, int32_t threads) {
    const int32_t halves = mins == NULL ? 1 : 2;
    unblocking u = {blocks, rows, groups, 2 * halves + 4 * bits, columns, bits, halves, words, {scales, mins}};
    qk_run(unblock_member, &u, threads);
}
