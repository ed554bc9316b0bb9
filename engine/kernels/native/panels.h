// How packed weights lie in memory: 16 rows interleaved, groups one after another, so that a
// product reads one unbroken stream.
//
// A panel is 16 rows; the last one is padded with zeros. Per group of 32 columns it has
//   int4:     4 x 64 bytes: word [k][row] has columns 4k..4k+3 in its low nibbles and 16+4k.. in its
//             high ones; then 16 float16 scales and 16 float16 minimums
//   symmetric int4: the same without minimums, which are -8 times the scales
//   int8:     8 x 64 bytes: word [k][row] has columns 4k..4k+3; then 16 float16 scales
//   bfloat16: per column (not group) 16 values
// Four columns a 32-bit word is what the integer dot products of all instruction sets take.

#ifndef SHARDMIX_PANELS_H
#define SHARDMIX_PANELS_H

#include <stdint.h>

#include "kernel_table.h"

namespace shardmix {

struct SymmetricInt4Group {
    uint8_t quants[4][kPanelRows][4];
    uint16_t scales[kPanelRows];
};

struct Int4Group : SymmetricInt4Group {
    uint16_t minimums[kPanelRows];
};

struct Int8Group {
    int8_t quants[8][kPanelRows][4];
    uint16_t scales[kPanelRows];
};

struct BFloat16Column {
    uint16_t values[kPanelRows];
};

static_assert(sizeof(SymmetricInt4Group) == 288, "a stream without gaps");
static_assert(sizeof(Int4Group) == 320, "a stream without gaps");
static_assert(sizeof(Int8Group) == 544, "a stream without gaps");

static inline int64_t num_panels(const shardmix_matrix &matrix) {
    return (matrix.num_rows + kPanelRows - 1) / kPanelRows;
}

static inline int64_t panel_bytes(const shardmix_matrix &matrix) {
    if (matrix.format == SHARDMIX_INT4) return matrix.num_groups * (int64_t)sizeof(Int4Group);
    if (matrix.format == SHARDMIX_SYMMETRIC_INT4)
        return matrix.num_groups * (int64_t)sizeof(SymmetricInt4Group);
    if (matrix.format == SHARDMIX_INT8) return matrix.num_groups * (int64_t)sizeof(Int8Group);
    return matrix.num_columns * (int64_t)sizeof(BFloat16Column);
}

static inline const char *panel_at(const shardmix_matrix &matrix, int64_t panel) {
    return (const char *)matrix.panels + panel * panel_bytes(matrix);
}

// Groups of a block of columns.
static inline int64_t groups_of_block(int64_t block) { return (block + kGroup - 1) / kGroup; }

// The group that a column lies in.
static inline int64_t group_at(const shardmix_matrix &matrix, int64_t column) {
    return column / matrix.block * groups_of_block(matrix.block) + column % matrix.block / kGroup;
}

// Whether every multiple of so many columns begins a group.
static inline bool begin_groups(const shardmix_matrix &matrix, int64_t columns) {
    if (columns % matrix.block == 0) return true;
    return matrix.block % kGroup == 0 && columns % kGroup == 0;
}

}  // namespace shardmix

#endif
