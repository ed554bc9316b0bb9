// What every instruction set implements: the inner loops, each on one thread.
//
// A table is chosen once, at run time. Files compiled for an instruction set see no C++ library
// header: an inline function of one, compiled with AVX-512 and then shared by the linker, would end
// the process on a machine without.

#ifndef SHARDMIX_KERNEL_TABLE_H
#define SHARDMIX_KERNEL_TABLE_H

#include <stdint.h>

#include "shardmix_native.h"

namespace shardmix {

constexpr int64_t kGroup = 32;       // columns that share a scale
constexpr int64_t kPanelRows = 16;   // rows that are interleaved
constexpr int64_t kChunk = 256;      // positions that one attention unit covers

// Tokens prepared for a matrix. For int4 and int8: quantised in groups, those of all tokens next to
// each other, so that a product finds them at constant distances; for bfloat16: as they are.
struct Activations {
    const float *values;         // [T, K]
    const int8_t *quants;        // [G, T, 32]
    const float *scales;         // [G, T]
    const float *scaled_sums;    // [G, T], scale times sum of the quants
    const int32_t *sums;         // [G, T], sum of the quants
    int64_t num_tokens;
};

// One token's part of these: its first group, and the distance to the next in tokens.
struct QuantizedToken {
    int8_t *quants;
    float *scales;
    float *scaled_sums;
    int32_t *sums;
    int64_t stride;
};

// Query heads that share a KV head, of one token, over at most kChunk positions.
struct AttentionUnit {
    const float *queries;      // [heads, D], times the scale
    int64_t num_heads;
    int64_t head_width;
    const void *keys;          // [capacity, D], position p at p % capacity
    const void *values;
    int64_t cache_dtype;
    int64_t capacity;
    int64_t first_position;
    int64_t end_position;
    const void *next_keys;     // that this thread reads afterwards; null: not known
    float *maxima;             // [heads]: of the scores
    float *sums;               // [heads]: of exp(score - maximum)
    float *outputs;            // [heads, D]: values weighed so
};

struct KernelTable {
    // out [T, N] of the rows in panels [first, end).
    // `next`: weights that this thread reads afterwards; null if that is not known.
    void (*multiply)(const shardmix_matrix &matrix, const Activations &activations,
                     int64_t first_panel, int64_t end_panel, float *out, const char *next);
    // Rows [first, end) as [rows, K]; `first_row` begins a panel.
    void (*dequantize)(const shardmix_matrix &matrix, int64_t first_row, int64_t end_row,
                       bool is_bfloat16, void *out);
    // A null weight counts as ones.
    void (*rms_norm)(const float *x, const float *weight, float epsilon, int64_t width, float *out);
    // Groups [first, end) of a row of so many columns, padded per block.
    void (*quantize)(const float *x, int64_t block, int64_t first_group, int64_t end_group,
                     const QuantizedToken &token);
    void (*gate)(const float *gate, const float *up, int64_t count, int64_t activation, float *out);
    void (*softcap)(float *values, int64_t count, float cap);
    void (*attend)(const AttentionUnit &unit);
    // The first index from `start` on whose value is not at most `limit`; `count` where there is none.
    int64_t (*find_above)(const float *values, int64_t start, int64_t count, float limit);
    // The largest of every 64 values; what is no number is left out, or counts as infinity.
    void (*find_maxima)(const float *values, int64_t num_blocks, float *maxima);
    // Sum of e ** (value / temperature - largest); no exponent is above 0.
    double (*sum_exponentials)(const float *values, int64_t count, double temperature,
                               double largest);
    // Sum of all words: reads memory as fast as it comes. A multiple of 64 bytes.
    uint32_t (*read)(const void *memory, int64_t num_bytes);
};

struct InstructionSet {
    const char *name;
    const KernelTable *table;  // null: not for this kind of machine
    bool (*can_run)();
};

extern const KernelTable *const kAvx512VnniTable;
extern const KernelTable *const kAvx2Table;
extern const KernelTable *const kNeonTable;
extern const KernelTable *const kPortableTable;

// The table in use.
const KernelTable &kernels();

}  // namespace shardmix

#endif
