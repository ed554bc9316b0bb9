// Attention of tokens that follow each other over cached positions, for any instruction set `Isa`.
//
// Vectors lie across tokens, so that no sum is ever taken within one. A token's additions have the
// same order in every block that it may be in: positions are taken in tiles that begin at absolute
// positions, and what a token does not see weighs nothing, as long as it is finite.

#ifndef SHARDMIX_PROMPT_KERNELS_H
#define SHARDMIX_PROMPT_KERNELS_H

#include "attention_kernels.h"

namespace shardmix {

// Parts of a block's memory. Data alone: a member function would have one body for all files that are
// compiled for different machines.
struct BlockMemory {
    int64_t width;   // of a head, padded
    float *tile;     // [kTile, width]: keys, then values
    float *queries;  // [heads, width, kBlockTokens]
    float *outputs;  // [heads, width, kBlockTokens]
    float *weights;  // [heads, kTile, kBlockTokens]
    float *maxima;   // [heads, kBlockTokens]
    float *sums;     // [heads, kBlockTokens]
};

static inline BlockMemory memory_of(const AttentionBlock &block) {
    BlockMemory memory;
    memory.width = padded_width(block.head_width);
    int64_t per_head = memory.width * kBlockTokens;
    memory.tile = block.memory;
    memory.queries = memory.tile + kTile * memory.width;
    memory.outputs = memory.queries + block.num_heads * per_head;
    memory.weights = memory.outputs + block.num_heads * per_head;
    memory.maxima = memory.weights + block.num_heads * kTile * kBlockTokens;
    memory.sums = memory.maxima + block.num_heads * kBlockTokens;
    return memory;
}

template <class Isa>
struct Prompt {
    static constexpr int kVectors = (int)(kBlockTokens / Isa::kLanes);
    // As many sums at once as there are registers for.
    static constexpr int kPositions = kVectors < 8 ? 8 / kVectors : 1;
    static constexpr int kColumns = Isa::kLanes == 16 ? 16 : 4;
    using Floats = typename Isa::Floats;

    static void begin(const AttentionBlock &block, const BlockMemory &memory) {
        int64_t per_head = memory.width * kBlockTokens;
        memset(memory.queries, 0, (size_t)(block.num_heads * per_head) * sizeof(float));
        memset(memory.outputs, 0, (size_t)(block.num_heads * per_head) * sizeof(float));
        for (int64_t h = 0; h < block.num_heads; ++h)
            for (int64_t t = 0; t < block.num_tokens; ++t) {
                const float *query = block.queries + t * block.query_stride + h * block.head_width;
                for (int64_t d = 0; d < block.head_width; ++d)
                    memory.queries[h * per_head + d * kBlockTokens + t] = query[d];
            }
        for (int64_t n = 0; n < block.num_heads * kBlockTokens; ++n) {
            memory.maxima[n] = kUnseen;
            memory.sums[n] = 0.0f;
        }
    }

    // Rows of the cache as float32, with zeros up to the padded width and to whole steps.
    template <class Cached>
    static void widen(const AttentionBlock &block, const BlockMemory &memory, const void *cached,
                      int64_t first, int64_t count) {
        int64_t width = block.head_width, start = first % block.capacity;
        for (int64_t p = 0; p < count; ++p) {
            int64_t index = start + p < block.capacity ? start + p : start + p - block.capacity;
            auto row = (const typename Cached::Value *)cached + index * width;
            float *out = memory.tile + p * memory.width;
            int64_t d = 0;
            for (; d + Isa::kLanes <= width; d += Isa::kLanes)
                Isa::store(out + d, Cached::load(row + d));
            for (; d < width; ++d) out[d] = Cached::load_one(row + d);
            for (; d < memory.width; ++d) out[d] = 0.0f;
        }
        int64_t padding = (kTile - count) * memory.width;
        memset(memory.tile + count * memory.width, 0, (size_t)padding * sizeof(float));
    }

    static void score(const BlockMemory &memory, int64_t head, int64_t count) {
        const float *queries = memory.queries + head * memory.width * kBlockTokens;
        float *scores = memory.weights + head * kTile * kBlockTokens;
        for (int64_t p = 0; p < count; p += kPositions) {
            const float *keys = memory.tile + p * memory.width;
            Floats totals[kPositions][kVectors];
            for (int n = 0; n < kPositions; ++n)
                for (int v = 0; v < kVectors; ++v) totals[n][v] = Isa::splat(0.0f);
            for (int64_t d = 0; d < memory.width; ++d) {
                Floats query[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    query[v] = Isa::load(queries + d * kBlockTokens + v * Isa::kLanes);
                for (int n = 0; n < kPositions; ++n) {
                    Floats key = Isa::splat(keys[n * memory.width + d]);
                    for (int v = 0; v < kVectors; ++v)
                        totals[n][v] = Isa::multiply_add(key, query[v], totals[n][v]);
                }
            }
            for (int n = 0; n < kPositions; ++n)
                for (int v = 0; v < kVectors; ++v)
                    Isa::store(scores + (p + n) * kBlockTokens + v * Isa::kLanes, totals[n][v]);
        }
    }

    // Positions [first, end) of a tile, in whole steps of `padded`, whose last ones are none.
    struct Run {
        int64_t first;
        int64_t end;
        int64_t padded;
        bool is_whole;  // nothing is padded, and every token sees all of it
    };

    // Write `value` where a token does not see a position.
    static void hide(const AttentionBlock &block, float *scores, const Run &run, float value) {
        for (int64_t p = run.first; p < run.first + run.padded; ++p, scores += kBlockTokens)
            for (int64_t t = 0; t < kBlockTokens; ++t) {
                bool is_seen = t < block.num_tokens && p < run.end && p >= block.first_visible[t] &&
                               p <= block.first_position + t;
                if (!is_seen) scores[t] = value;
            }
    }

    // Scores become exp(score - maximum); what was summed before is brought to the new maximum.
    static void weigh(const AttentionBlock &block, const BlockMemory &memory, int64_t head,
                      const Run &run) {
        float *weights = memory.weights + head * kTile * kBlockTokens;
        int64_t count = run.padded;
        if (!run.is_whole) hide(block, weights, run, kUnseen);
        for (int v = 0; v < kVectors; ++v) {
            int64_t lanes = v * Isa::kLanes, at = head * kBlockTokens + lanes;
            Floats before = Isa::load(memory.maxima + at), largest = before;
            for (int64_t p = 0; p < count; ++p)
                largest = Isa::maximum(largest, Isa::load(weights + p * kBlockTokens + lanes));
            Isa::store(memory.maxima + at, largest);
            Floats shift = Isa::multiply(largest, Isa::splat(-1.0f));
            for (int64_t p = 0; p < count; ++p) {
                float *score = weights + p * kBlockTokens + lanes;
                Isa::store(score, exponential<Isa>(Isa::add(Isa::load(score), shift)));
            }
            Floats scale = exponential<Isa>(Isa::add(before, shift));
            Isa::store(memory.sums + at, Isa::multiply(Isa::load(memory.sums + at), scale));
            float *outputs = memory.outputs + head * memory.width * kBlockTokens + lanes;
            for (int64_t d = 0; d < memory.width; ++d) {
                float *output = outputs + d * kBlockTokens;
                Isa::store(output, Isa::multiply(Isa::load(output), scale));
            }
        }
        if (!run.is_whole) hide(block, weights, run, 0.0f);
        for (int v = 0; v < kVectors; ++v) {
            float *sums = memory.sums + head * kBlockTokens + v * Isa::kLanes;
            Floats total = Isa::load(sums);
            for (int64_t p = 0; p < count; ++p)
                total = Isa::add(total, Isa::load(weights + p * kBlockTokens + v * Isa::kLanes));
            Isa::store(sums, total);
        }
    }

    // Add the tile's values, weighed.
    static void blend(const BlockMemory &memory, int64_t head, int64_t count) {
        const float *weights = memory.weights + head * kTile * kBlockTokens;
        for (int64_t d = 0; d < memory.width; d += kColumns) {
            float *outputs = memory.outputs + (head * memory.width + d) * kBlockTokens;
            Floats totals[kColumns][kVectors];
            for (int n = 0; n < kColumns; ++n)
                for (int v = 0; v < kVectors; ++v)
                    totals[n][v] = Isa::load(outputs + n * kBlockTokens + v * Isa::kLanes);
            for (int64_t p = 0; p < count; ++p) {
                const float *values = memory.tile + p * memory.width + d;
                Floats weight[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    weight[v] = Isa::load(weights + p * kBlockTokens + v * Isa::kLanes);
                for (int n = 0; n < kColumns; ++n) {
                    Floats value = Isa::splat(values[n]);
                    for (int v = 0; v < kVectors; ++v)
                        totals[n][v] = Isa::multiply_add(value, weight[v], totals[n][v]);
                }
            }
            for (int n = 0; n < kColumns; ++n)
                for (int v = 0; v < kVectors; ++v)
                    Isa::store(outputs + n * kBlockTokens + v * Isa::kLanes, totals[n][v]);
        }
    }

    static void end(const AttentionBlock &block, const BlockMemory &memory) {
        for (int64_t h = 0; h < block.num_heads; ++h)
            for (int64_t t = 0; t < block.num_tokens; ++t) {
                const float *found = memory.outputs + h * memory.width * kBlockTokens + t;
                float *out = block.outputs + t * block.output_stride + h * block.head_width;
                float total = memory.sums[h * kBlockTokens + t];
                for (int64_t d = 0; d < block.head_width; ++d) out[d] = found[d * kBlockTokens] / total;
            }
    }

    template <class Cached>
    static void attend(const AttentionBlock &block) {
        BlockMemory memory = memory_of(block);
        begin(block, memory);
        int64_t last = block.num_tokens - 1, end_position = block.first_position + block.num_tokens;
        int64_t least = block.first_visible[0], most = block.first_visible[last];
        for (int64_t first = least / kTile * kTile; first < end_position; first += kTile) {
            Run run;
            run.first = first > least ? first : least;
            run.end = first + kTile < end_position ? first + kTile : end_position;
            int64_t count = run.end - run.first;
            run.padded = (count + kPositions - 1) / kPositions * kPositions;
            run.is_whole = run.padded == count && block.num_tokens == kBlockTokens &&
                           run.first >= most && run.end <= block.first_position + 1;
            widen<Cached>(block, memory, block.keys, run.first, count);
            for (int64_t h = 0; h < block.num_heads; ++h) {
                score(memory, h, run.padded);
                weigh(block, memory, h, run);
            }
            widen<Cached>(block, memory, block.values, run.first, count);
            for (int64_t h = 0; h < block.num_heads; ++h) blend(memory, h, count);
        }
        end(block, memory);
    }
};

template <class Isa>
static void attend_block(const AttentionBlock &block) {
    if (block.cache_dtype == SHARDMIX_FLOAT32)
        Prompt<Isa>::template attend<CachedFloat32<Isa>>(block);
    else if (block.cache_dtype == SHARDMIX_FLOAT16)
        Prompt<Isa>::template attend<CachedFloat16<Isa>>(block);
    else
        Prompt<Isa>::template attend<CachedBFloat16<Isa>>(block);
}

}  // namespace shardmix

#endif
