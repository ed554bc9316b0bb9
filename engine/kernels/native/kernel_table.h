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

// Groups of values as 8-bit numbers, those of all tokens next to each other, so that a product finds
// them at constant distances. Pointers may be to one of them.
struct Groups {
    int8_t *quants;      // [G, T, 32]
    float *scales;       // [G, T]
    float *scaled_sums;  // [G, T], scale times sum of the quants
    int32_t *sums;       // [G, T], sum of the quants
};

// No member function: it would have one body for all files that are compiled for different machines.
static inline Groups groups_at(const Groups &groups, int64_t n) {
    return {groups.quants + n * kGroup, groups.scales + n, groups.scaled_sums + n, groups.sums + n};
}

// Tokens prepared for a matrix. For int4 and int8: quantised; for bfloat16: as they are.
//
// A group of which one value is nearly all has 8 bits for that one, and next to none for the others:
// what rounding left of it is a group of its own.
struct Activations {
    float *values;      // [T, K]
    Groups groups;
    Groups rests;       // of the groups that have one
    uint8_t *has_rest;  // [T, padded_groups], 1 or 0
    int64_t num_tokens;
};

// Where products go: row r of token t to values[t * stride + r - first_row].
struct Products {
    float *values;
    int64_t stride;
    int64_t first_row;
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

constexpr int64_t kBlockTokens = 16;  // tokens that one attention block covers, at most
constexpr int64_t kTile = 32;         // positions that it looks at together

// Query heads that share a KV head, of tokens that follow each other, over all positions they see.
struct AttentionBlock {
    const float *queries;          // of the first token [heads, D], times the scale
    int64_t query_stride;          // values to those of the next token
    int64_t num_tokens;
    int64_t num_heads;
    int64_t head_width;
    const void *keys;              // as of an AttentionUnit
    const void *values;
    int64_t cache_dtype;
    int64_t capacity;
    int64_t first_position;        // of the first token
    const int64_t *first_visible;  // [tokens], ascending
    float *outputs;                // of the first token [heads, D]
    int64_t output_stride;
    float *memory;                 // block_memory of it
};

// Sums of whole vectors of columns are taken at a time.
static inline int64_t padded_width(int64_t head_width) { return (head_width + 15) / 16 * 16; }

// Values that a block needs besides its inputs and outputs.
static inline int64_t block_memory(int64_t num_heads, int64_t head_width) {
    int64_t width = padded_width(head_width);
    return kTile * width + num_heads * kBlockTokens * (2 * width + kTile + 2);
}

constexpr int64_t kMarks = 8;  // of `has_rest`, that are looked at together

static inline int64_t padded_groups(int64_t num_groups) {
    return (num_groups + kMarks - 1) / kMarks * kMarks;
}

struct KernelTable {
    // Of all tokens and the rows in panels [first, end).
    // `next`: weights that this thread reads afterwards; null if that is not known.
    void (*multiply)(const shardmix_matrix &matrix, const Activations &activations,
                     int64_t first_panel, int64_t end_panel, const Products &out, const char *next);
    // Rows [first, end) as [rows, K]; `first_row` begins a panel.
    void (*dequantize)(const shardmix_matrix &matrix, int64_t first_row, int64_t end_row,
                       bool is_bfloat16, void *out);
    // A null weight counts as ones.
    void (*rms_norm)(const float *x, const float *weight, float epsilon, int64_t width, float *out);
    // Groups [first, end) of a token's values, which are padded to whole groups block by block.
    // `values` are those from the first group's on.
    void (*quantize)(const Activations &activations, int64_t token, const shardmix_matrix &matrix,
                     int64_t first_group, int64_t end_group, const float *values);
    void (*gate)(const float *gate, const float *up, int64_t count, int64_t activation, float *out);
    void (*softcap)(float *values, int64_t count, float cap);
    // Turn pairs of a head by the angles [pairs] of its position: value i with value pairs + i, or
    // neighbours.
    void (*rotate)(float *head, const float *cos, const float *sin, int64_t num_pairs,
                   bool are_neighbours);
    // Values in a cache's dtype.
    void (*write_cached)(const float *values, int64_t count, int64_t cache_dtype, void *out);
    void (*attend)(const AttentionUnit &unit);
    void (*attend_block)(const AttentionBlock &block);
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
