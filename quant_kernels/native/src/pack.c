/* Weights from one layout to another, bit for bit: a record's words to the kernels' blocks, a GGUF file's rows to words.
 *
 * A strip of 16 outputs is one piece of work: its words are neighbours in every row of a table that is written. */
#include <string.h>

#include "qk.h"
#include "team.h"

/* A record's words to blocks. */

typedef struct {
    const qk_weight *weight;
    uint8_t *out;
    const uint32_t *words;
    const uint8_t *scales, *zeros;
} packing;

static void copy_columns(const uint8_t *row, int64_t item, int64_t first, int64_t count, uint8_t *out) {
    memcpy(out, row + first * item, (size_t)(count * item));
    memset(out + count * item, 0, (size_t)((QK_COLUMNS - count) * item));
}

static void pack_block(const packing *p, int64_t block) {
    const qk_weight *w = p->weight;
    const int64_t first = block * QK_COLUMNS, count = w->n - first < QK_COLUMNS ? w->n - first : QK_COLUMNS;
    const int64_t scale = qk_scale_bytes(w), zero = qk_zero_bytes(w), words = w->group * w->bits / 32;
    uint8_t *out = p->out + block * (w->k / w->group) * qk_group_bytes(w);
    for (int64_t g = 0; g < w->k / w->group; g++) {
        copy_columns(p->scales + g * w->n * scale, scale, first, count, out);
        out += QK_COLUMNS * scale;
        if (zero != 0) copy_columns(p->zeros + g * w->n * zero, zero, first, count, out);
        out += QK_COLUMNS * zero;
        for (int64_t i = 0; i < words; i++, out += 4 * QK_COLUMNS) {
            const uint32_t *row = p->words + (g * words + i) * w->n + first;
            uint32_t unit[QK_COLUMNS] = {0};
            memcpy(unit, row, sizeof(uint32_t) * (size_t)count);
            for (int64_t c = 0; c < QK_COLUMNS && w->bits == 4; c++) {
                uint32_t low = unit[c] & 0xffff, high = unit[c] >> 16;
                low = (low | low << 8) & 0x00ff00ff, high = (high | high << 8) & 0x00ff00ff;
                low = (low | low << 4) & 0x0f0f0f0f, high = (high | high << 4) & 0x0f0f0f0f;
                unit[c] = low | high << 4;
            }
            memcpy(out, unit, sizeof unit); /* Bytes as they are on the little-endian machines that this is for. */
        }
    }
}

static void pack_member(qk_team *team, int member, void *argument) {
    const packing *p = argument;
    const int64_t blocks = qk_blocks(p->weight);
    (void)member;
    for (int64_t b; (b = qk_take(team, 1)) < blocks;) pack_block(p, b);
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
