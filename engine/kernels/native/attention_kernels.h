// Attention of the query heads that share a KV head over a run of cached positions, for any `Isa`.

#ifndef SHARDMIX_ATTENTION_KERNELS_H
#define SHARDMIX_ATTENTION_KERNELS_H

#include "element_kernels.h"
#include "short_floats.h"

namespace shardmix {

// Cached values of each dtype, as a vector and one by one.
template <class Isa>
struct CachedFloat32 {
    using Value = float;
    static inline typename Isa::Floats load(const float *from) { return Isa::load(from); }
    static inline float load_one(const float *from) { return *from; }
};

template <class Isa>
struct CachedFloat16 {
    using Value = uint16_t;
    static inline typename Isa::Floats load(const uint16_t *from) { return Isa::load_float16(from); }
    static inline float load_one(const uint16_t *from) { return from_float16(*from); }
};

template <class Isa>
struct CachedBFloat16 {
    using Value = uint16_t;
    static inline typename Isa::Floats load(const uint16_t *from) { return Isa::load_bfloat16(from); }
    static inline float load_one(const uint16_t *from) { return from_bfloat16(*from); }
};

template <class Isa>
static void rotate(float *head, const float *cos, const float *sin, int64_t num_pairs,
                   bool are_neighbours) {
    int64_t i = 0;
    for (; !are_neighbours && i + Isa::kLanes <= num_pairs; i += Isa::kLanes) {
        float *low = head + i, *high = low + num_pairs;
        auto first = Isa::load(low), second = Isa::load(high);
        auto c = Isa::load(cos + i), s = Isa::load(sin + i), back = Isa::multiply(s, Isa::splat(-1.0f));
        Isa::store(low, Isa::add(Isa::multiply(first, c), Isa::multiply(second, back)));
        Isa::store(high, Isa::add(Isa::multiply(second, c), Isa::multiply(first, s)));
    }
    for (; i < num_pairs; ++i) {
        float *low = are_neighbours ? head + 2 * i : head + i;
        float *high = are_neighbours ? low + 1 : low + num_pairs;
        float first = *low, second = *high;
        *low = first * cos[i] - second * sin[i];
        *high = second * cos[i] + first * sin[i];
    }
}

template <class Isa>
static void write_cached(const float *values, int64_t count, int64_t cache_dtype, void *out) {
    if (cache_dtype == SHARDMIX_FLOAT32) {
        memcpy(out, values, (size_t)count * sizeof(float));
        return;
    }
    bool is_float16 = cache_dtype == SHARDMIX_FLOAT16;
    uint16_t *to = (uint16_t *)out;
    int64_t d = 0;
    for (; d + Isa::kLanes <= count; d += Isa::kLanes) {
        if (is_float16)
            Isa::store_float16(to + d, Isa::load(values + d));
        else
            Isa::store_bfloat16(to + d, Isa::load(values + d));
    }
    for (; d < count; ++d) to[d] = is_float16 ? to_float16(values[d]) : to_bfloat16(values[d]);
}

// What counts as no score at all.
constexpr float kUnseen = -3.0e38f;

// Positions whose keys are fetched ahead.
constexpr int64_t kPositionsAhead = 16;

// Where position p of a unit lies in its ring.
static inline int64_t ring_index(const AttentionUnit &unit, int64_t start, int64_t p) {
    int64_t index = start + p;
    return index < unit.capacity ? index : index - unit.capacity;
}

// Scores of heads [head, head + HEADS) at positions [p, p + POSITIONS) as scores[h][p]. With several
// positions at once enough sums are under way that none waits for its last addition; each of them is
// the same as alone.
template <class Isa, class Cached, int HEADS, int POSITIONS>
static inline void score_positions(const AttentionUnit &unit, int64_t head, int64_t start, int64_t p,
                                   float (*scores)[kChunk]) {
    int64_t width = unit.head_width, d = 0;
    const float *queries = unit.queries + head * width;
    const typename Cached::Value *keys[POSITIONS];
    for (int n = 0; n < POSITIONS; ++n)
        keys[n] = (const typename Cached::Value *)unit.keys + ring_index(unit, start, p + n) * width;
    typename Isa::Floats totals[HEADS][POSITIONS];
    for (int h = 0; h < HEADS; ++h)
        for (int n = 0; n < POSITIONS; ++n) totals[h][n] = Isa::splat(0.0f);
    for (; d + Isa::kLanes <= width; d += Isa::kLanes) {
        for (int n = 0; n < POSITIONS; ++n) {
            auto part = Cached::load(keys[n] + d);
            for (int h = 0; h < HEADS; ++h)
                totals[h][n] =
                    Isa::multiply_add(part, Isa::load(queries + h * width + d), totals[h][n]);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        if constexpr (POSITIONS == 4) {
            Isa::store_sums(scores[h] + p, totals[h]);
        } else {
            for (int n = 0; n < POSITIONS; ++n) scores[h][p + n] = Isa::sum(totals[h][n]);
        }
    }
    // Apart: with a loop in the one above, compilers keep the sums in memory.
    if (d == width) return;
    for (int h = 0; h < HEADS; ++h)
        for (int n = 0; n < POSITIONS; ++n)
            for (int64_t tail = d; tail < width; ++tail)
                scores[h][p + n] += Cached::load_one(keys[n] + tail) * queries[h * width + tail];
}

// Scores of heads [head, head + HEADS) at all positions of the unit.
template <class Isa, class Cached, int HEADS>
static inline void score(const AttentionUnit &unit, int64_t head, float (*scores)[kChunk]) {
    int64_t count = unit.end_position - unit.first_position, p = 0;
    int64_t start = unit.first_position % unit.capacity;
    int64_t row_bytes = unit.head_width * (int64_t)sizeof(typename Cached::Value);
    for (; p + 4 <= count; p += 4) {
        // Keys come soon, values of these positions afterwards: memory works while this computes.
        // Both together are too much for a core's first cache.
        int64_t at = ring_index(unit, start, p) * row_bytes;
        Isa::prefetch_outer((const char *)unit.keys + at + kPositionsAhead * row_bytes, 4 * row_bytes);
        Isa::prefetch_outer((const char *)unit.values + at, 4 * row_bytes);
        score_positions<Isa, Cached, HEADS, 4>(unit, head, start, p, scores);
    }
    for (; p < count; ++p) score_positions<Isa, Cached, HEADS, 1>(unit, head, start, p, scores);
}

// Turn `count` scores into exp(score - maximum).
template <class Isa>
static inline void weigh(float *scores, int64_t count, float &maximum, float &sum) {
    // Padded with what weighs nothing, so that whole vectors do.
    for (int64_t p = count; p % Isa::kLanes; ++p) scores[p] = kUnseen;
    auto largest = Isa::load(scores);
    for (int64_t p = Isa::kLanes; p < count; p += Isa::kLanes)
        largest = Isa::maximum(largest, Isa::load(scores + p));
    maximum = Isa::largest(largest);
    auto shift = Isa::splat(-maximum), total = Isa::splat(0.0f);
    for (int64_t p = 0; p < count; p += Isa::kLanes)
        Isa::store(scores + p, exponential<Isa>(Isa::add(Isa::load(scores + p), shift)));
    for (int64_t p = count; p % Isa::kLanes; ++p) scores[p] = 0.0f;
    for (int64_t p = 0; p < count; p += Isa::kLanes) total = Isa::add(total, Isa::load(scores + p));
    sum = Isa::sum(total);
}

// Values of all positions, weighed, for VECTORS vectors of columns from `d` on.
template <class Isa, class Cached, int HEADS, int VECTORS>
static inline void blend(const AttentionUnit &unit, int64_t head, int64_t d,
                         float (*weights)[kChunk]) {
    int64_t width = unit.head_width, count = unit.end_position - unit.first_position;
    int64_t start = unit.first_position % unit.capacity;
    int64_t row_bytes = width * (int64_t)sizeof(typename Cached::Value);
    const char *next = head == 0 && d == 0 ? (const char *)unit.next_keys : nullptr;
    typename Isa::Floats totals[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v) totals[h][v] = Isa::splat(0.0f);
    for (int64_t p = 0; p < count; ++p) {
        if (next) Isa::prefetch_outer(next + p * row_bytes, row_bytes);
        auto value =
            (const typename Cached::Value *)unit.values + ring_index(unit, start, p) * width + d;
        for (int v = 0; v < VECTORS; ++v) {
            auto part = Cached::load(value + v * Isa::kLanes);
            for (int h = 0; h < HEADS; ++h)
                totals[h][v] =
                    Isa::multiply_add(part, Isa::splat(weights[h][p]), totals[h][v]);
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v)
            Isa::store(unit.outputs + (head + h) * width + d + v * Isa::kLanes, totals[h][v]);
}

template <class Isa, class Cached, int HEADS>
static inline void attend_heads(const AttentionUnit &unit, int64_t head) {
    float scores[HEADS][kChunk];
    int64_t width = unit.head_width, count = unit.end_position - unit.first_position;
    score<Isa, Cached, HEADS>(unit, head, scores);
    for (int h = 0; h < HEADS; ++h)
        weigh<Isa>(scores[h], count, unit.maxima[head + h], unit.sums[head + h]);
    // As many sums as there are registers for.
    constexpr int kVectors = HEADS <= 3 ? 4 : 2;
    int64_t d = 0;
    for (; d + kVectors * Isa::kLanes <= width; d += kVectors * Isa::kLanes)
        blend<Isa, Cached, HEADS, kVectors>(unit, head, d, scores);
    for (; d + Isa::kLanes <= width; d += Isa::kLanes)
        blend<Isa, Cached, HEADS, 1>(unit, head, d, scores);
    int64_t start = unit.first_position % unit.capacity;
    for (; d < width; ++d) {
        for (int h = 0; h < HEADS; ++h) {
            float total = 0.0f;
            for (int64_t p = 0; p < count; ++p) {
                auto value = (const typename Cached::Value *)unit.values +
                             ring_index(unit, start, p) * width + d;
                total += Cached::load_one(value) * scores[h][p];
            }
            unit.outputs[(head + h) * width + d] = total;
        }
    }
}

template <class Isa, class Cached>
static inline void attend_cached(const AttentionUnit &unit) {
    int64_t head = 0;
    // Four at a time, but not one alone at the end of five: two and three read less.
    for (; unit.num_heads - head > 5 || unit.num_heads - head == 4; head += 4)
        attend_heads<Isa, Cached, 4>(unit, head);
    if (unit.num_heads - head == 5) {
        attend_heads<Isa, Cached, 3>(unit, head);
        head += 3;
    }
    if (unit.num_heads - head == 3) attend_heads<Isa, Cached, 3>(unit, head);
    if (unit.num_heads - head == 2) attend_heads<Isa, Cached, 2>(unit, head);
    if (unit.num_heads - head == 1) attend_heads<Isa, Cached, 1>(unit, head);
}

template <class Isa>
static void attend(const AttentionUnit &unit) {
    if (unit.cache_dtype == SHARDMIX_FLOAT32)
        attend_cached<Isa, CachedFloat32<Isa>>(unit);
    else if (unit.cache_dtype == SHARDMIX_FLOAT16)
        attend_cached<Isa, CachedFloat16<Isa>>(unit);
    else
        attend_cached<Isa, CachedBFloat16<Isa>>(unit);
}

}  // namespace shardmix

#endif
