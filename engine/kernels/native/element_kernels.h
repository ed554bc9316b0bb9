// What happens to one token's values between two products, for any instruction set `Isa`.

#ifndef SHARDMIX_ELEMENT_KERNELS_H
#define SHARDMIX_ELEMENT_KERNELS_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "panels.h"

namespace shardmix {

// Below this a group counts as zero: its scale's inverse would overflow.
constexpr float kSmallestMagnitude = 1e-30f;

// e ** x within 2 ulp, for x up to 88, and what is no number stays none: x86 keeps the second factor
// of a minimum where one is not. The polynomial is Cephes' expf.
template <class Isa>
static inline typename Isa::Floats exponential(typename Isa::Floats x) {
    x = Isa::maximum(Isa::splat(-87.0f), Isa::minimum(Isa::splat(88.0f), x));
    auto power = Isa::round(Isa::multiply(x, Isa::splat(1.44269504f)));
    // ln 2 in two parts: the first is short, so its product is exact.
    x = Isa::multiply_add(power, Isa::splat(-0.693359375f), x);
    x = Isa::multiply_add(power, Isa::splat(2.12194440e-4f), x);
    auto p = Isa::splat(1.9875691500e-4f);
    p = Isa::multiply_add(p, x, Isa::splat(1.3981999507e-3f));
    p = Isa::multiply_add(p, x, Isa::splat(8.3334519073e-3f));
    p = Isa::multiply_add(p, x, Isa::splat(4.1665795894e-2f));
    p = Isa::multiply_add(p, x, Isa::splat(1.6666665459e-1f));
    p = Isa::multiply_add(p, x, Isa::splat(5.0000001201e-1f));
    p = Isa::multiply_add(Isa::multiply(p, x), x, Isa::add(x, Isa::splat(1.0f)));
    return Isa::times_power_of_two(p, power);
}

// 1 / (1 + e ** -x)
template <class Isa>
static inline typename Isa::Floats sigmoid(typename Isa::Floats x) {
    auto one = Isa::splat(1.0f);
    return Isa::divide(one, Isa::add(one, exponential<Isa>(Isa::multiply(x, Isa::splat(-1.0f)))));
}

// Apply `change(first, second)` to whole vectors, the last one padded with zeros.
template <class Isa, class Change>
static inline void change_all(const float *first, const float *second, int64_t count, float *out,
                              Change change) {
    int64_t i = 0;
    for (; i + Isa::kLanes <= count; i += Isa::kLanes)
        Isa::store(out + i, change(Isa::load(first + i), Isa::load(second + i)));
    if (i == count) return;
    float padded[2][Isa::kLanes] = {};
    memcpy(padded[0], first + i, (size_t)(count - i) * sizeof(float));
    memcpy(padded[1], second + i, (size_t)(count - i) * sizeof(float));
    Isa::store(padded[0], change(Isa::load(padded[0]), Isa::load(padded[1])));
    memcpy(out + i, padded[0], (size_t)(count - i) * sizeof(float));
}

template <class Isa>
static void rms_norm(const float *x, const float *weight, float epsilon, int64_t width, float *out) {
    auto squares = Isa::splat(0.0f);
    int64_t i = 0;
    for (; i + Isa::kLanes <= width; i += Isa::kLanes) {
        auto values = Isa::load(x + i);
        squares = Isa::multiply_add(values, values, squares);
    }
    float total = Isa::sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    auto scale = Isa::splat(1.0f / __builtin_sqrtf(total / (float)width + epsilon));
    if (weight)
        change_all<Isa>(x, weight, width, out, [scale](auto value, auto factor) {
            return Isa::multiply(Isa::multiply(value, scale), factor);
        });
    else
        change_all<Isa>(x, x, width, out,
                        [scale](auto value, auto) { return Isa::multiply(value, scale); });
}

// The sum of a group's squares, in parts of its scale, below which it has a rest: where one value has
// more than 25 of 32 parts of it. With SmolLM2 that is one group in fourteen, and products then are
// about as near to exact ones as those of bfloat16 activations.
constexpr float kUnevenSquares = 127.0f * 127.0f * 32.0f / 25.0f;
// Steps of a rest in one of its group: half a step of the group is 127 of them.
constexpr float kFinerSteps = 254.0f;

static inline void write_group(const Groups &group, float scale, int32_t sum) {
    *group.scales = scale;
    *group.scaled_sums = scale * (float)sum;
    *group.sums = sum;
}

// Of finite values: a maximum may forget a NaN.
template <class Isa>
static inline float largest_magnitude(const float *values) {
    auto largest = Isa::splat(0.0f);
    for (int64_t i = 0; i < kGroup; i += Isa::kLanes)
        largest = Isa::maximum(largest, Isa::magnitude(Isa::load(values + i)));
    return Isa::largest(largest);
}

// Returns the sum of its squares. Sums are taken in floats, where they are exact: bytes just written are
// slow to read.
template <class Isa>
static inline float quantize_group(const float *values, const Groups &group) {
    bool are_finite = true;
    for (int64_t i = 0; i < kGroup; i += Isa::kLanes)
        are_finite &= !Isa::is_any_above(Isa::magnitude(Isa::load(values + i)), Isa::splat(FLT_MAX));
    if (!are_finite) {  // They stay what they are, through every product.
        memset(group.quants, 0, kGroup);
        write_group(group, NAN, 0);
        return FLT_MAX;
    }
    float magnitude = largest_magnitude<Isa>(values);
    if (!(magnitude >= kSmallestMagnitude)) {
        memset(group.quants, 0, kGroup);
        write_group(group, 0.0f, 0);
        return FLT_MAX;
    }
    auto inverse = Isa::splat(127.0f / magnitude);
    auto sums = Isa::splat(0.0f), squares = Isa::splat(0.0f);
    for (int64_t i = 0; i < kGroup; i += Isa::kLanes) {
        auto rounded = Isa::round(Isa::multiply(Isa::load(values + i), inverse));
        Isa::store_rounded(group.quants + i, rounded);
        sums = Isa::add(sums, rounded);
        squares = Isa::multiply_add(rounded, rounded, squares);
    }
    write_group(group, magnitude / 127.0f, (int32_t)Isa::sum(sums));
    return Isa::sum(squares);
}

// What rounding left of a group, in finer steps.
template <class Isa>
static inline void quantize_rest(const float *values, float scale, const Groups &rest) {
    auto inverse = Isa::splat(127.0f / largest_magnitude<Isa>(values)), sums = Isa::splat(0.0f);
    for (int64_t i = 0; i < kGroup; i += Isa::kLanes) {
        auto exact = Isa::multiply(Isa::load(values + i), inverse);
        auto left = Isa::add(exact, Isa::multiply(Isa::round(exact), Isa::splat(-1.0f)));
        auto rounded = Isa::round(Isa::multiply(left, Isa::splat(kFinerSteps)));
        Isa::store_rounded(rest.quants + i, rounded);
        sums = Isa::add(sums, rounded);
    }
    write_group(rest, scale / kFinerSteps, (int32_t)Isa::sum(sums));
}

// Goes through the groups of a token's values, block by block.
template <class Isa>
struct GroupWalk {
    const float *values;
    int64_t block, offset;  // of columns, and where in its block the group begins

    // The group's values; the last ones of a block padded with zeros in memory of the caller's.
    const float *padded(float *memory) const {
        int64_t left = block - offset;
        if (left >= kGroup) return values;
        memset(memory, 0, kGroup * sizeof(float));
        memcpy(memory, values, (size_t)left * sizeof(float));
        return memory;
    }
    void advance() {
        int64_t left = block - offset, count = left < kGroup ? left : kGroup;
        values += count, offset += count;
        if (offset == block) offset = 0;
    }
};

template <class Isa>
static void quantize(const Activations &activations, int64_t token, const shardmix_matrix &matrix,
                     int64_t first_group, int64_t end_group, const float *values) {
    int64_t stride = activations.num_tokens;
    float memory[kGroup];
    const Groups groups = activations.groups, rests = activations.rests;
    uint8_t *has_rest = activations.has_rest + token * padded_groups(matrix.num_groups);
    const GroupWalk<Isa> first{values, matrix.block,
                               first_group % groups_of_block(matrix.block) * kGroup};
    // Two passes: a branch that cannot be foreseen would hold up the groups after it.
    GroupWalk<Isa> walk = first;
    for (int64_t g = first_group; g < end_group; ++g, walk.advance()) {
        Groups group = groups_at(groups, g * stride + token);
        has_rest[g] = quantize_group<Isa>(walk.padded(memory), group) < kUnevenSquares;
    }
    walk = first;
    for (int64_t g = first_group; g < end_group; ++g, walk.advance()) {
        if (!has_rest[g]) continue;
        int64_t at = g * stride + token;
        quantize_rest<Isa>(walk.padded(memory), groups.scales[at], groups_at(rests, at));
    }
    if (end_group < matrix.num_groups) return;
    for (int64_t g = end_group; g % kMarks; ++g) has_rest[g] = 0;
}

template <class Isa>
static void gate(const float *gate, const float *up, int64_t count, int64_t activation, float *out) {
    if (activation == SHARDMIX_SILU) {
        change_all<Isa>(gate, up, count, out, [](auto x, auto factor) {
            return Isa::multiply(Isa::multiply(x, sigmoid<Isa>(x)), factor);
        });
        return;
    }
    // 0.5 (1 + tanh u) is sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
    change_all<Isa>(gate, up, count, out, [](auto x, auto factor) {
        auto cubic = Isa::multiply_add(Isa::multiply(x, x), Isa::splat(0.044715f), Isa::splat(1.0f));
        auto doubled = Isa::multiply(Isa::multiply(x, cubic), Isa::splat(1.5957691216f));
        return Isa::multiply(Isa::multiply(x, sigmoid<Isa>(doubled)), factor);
    });
}

template <class Isa>
static void softcap(float *values, int64_t count, float cap) {
    auto factor = Isa::splat(2.0f / cap), limit = Isa::splat(cap);
    // tanh y is 2 sigmoid(2 y) - 1.
    change_all<Isa>(values, values, count, values, [factor, limit](auto x, auto) {
        auto doubled = Isa::multiply(sigmoid<Isa>(Isa::multiply(x, factor)), Isa::splat(2.0f));
        return Isa::multiply(Isa::add(doubled, Isa::splat(-1.0f)), limit);
    });
}

template <class Isa>
static int64_t find_above(const float *values, int64_t start, int64_t count, float limit) {
    constexpr int64_t kVectors = 4, kStep = kVectors * Isa::kLanes;
    int64_t i = start;
    auto bound = Isa::splat(limit);
    for (; i + kStep <= count; i += kStep) {
        bool is_found = false;
        for (int64_t v = 0; v < kVectors; ++v)
            is_found |= Isa::is_any_above(Isa::load(values + i + v * Isa::kLanes), bound);
        if (is_found) break;
    }
    while (i < count && values[i] <= limit) ++i;
    return i;
}

template <class Isa>
static void find_maxima(const float *values, int64_t num_blocks, float *maxima) {
    constexpr int64_t kBlock = 64;
    for (int64_t block = 0; block < num_blocks; ++block, values += kBlock) {
        auto largest = Isa::splat(-INFINITY);
        for (int64_t i = 0; i < kBlock; i += Isa::kLanes)
            largest = Isa::maximum(Isa::load(values + i), largest);
        // x86 keeps the second where the first is no number, others do not.
        float found = Isa::largest(largest);
        maxima[block] = found == found ? found : INFINITY;
    }
}

// e ** x within 2 ulp, for x at most 0; written so that a compiler makes vectors of it.
static inline double exponential_of(double x) {
    constexpr double kLog2E = 1.4426950408889634, kLn2High = 0x1.62e42fefap-1,
                     kLn2Low = 0x1.cf79abc9e3b3ap-40;
    // Added and taken away, it rounds to an integer, which is then in the low bits of the sum.
    constexpr double kRounder = 0x1.8p52;
    // At least -700, where the result has not left the normal numbers. Taken as an integer, without
    // a comparison: no compiler makes vectors of one with what might be no number.
    constexpr int64_t kMost = 0x4085e00000000000;  // the bits of 700
    int64_t magnitude;
    memcpy(&magnitude, &x, sizeof magnitude);
    magnitude = (magnitude & INT64_MAX) - kMost;
    magnitude = kMost + (magnitude & (magnitude >> 63));
    memcpy(&x, &magnitude, sizeof x);
    x = -x;
    double sum = x * kLog2E + kRounder, power = sum - kRounder;
    double r = (x - power * kLn2High) - power * kLn2Low;
    // Taylor's series: |r| is at most ln 2 / 2.
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    bits = (bits + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static double sum_exponentials(const float *values, int64_t count, double temperature,
                               double largest) {
    constexpr int64_t kLanes = 64;
    double totals[kLanes] = {}, parts[kLanes];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane)
            parts[lane] = exponential_of((double)values[i + lane] / temperature - largest);
        for (int64_t lane = 0; lane < kLanes; ++lane) totals[lane] += parts[lane];
    }
    for (; i < count; ++i) totals[0] += exponential_of((double)values[i] / temperature - largest);
    double total = 0.0;
    for (double part : totals) total += part;
    return total;
}

template <class Isa>
static uint32_t read_all(const void *memory, int64_t num_bytes) {
    const uint32_t *words = (const uint32_t *)memory;
    uint32_t totals[16] = {};
    for (int64_t i = 0; i < num_bytes / 4; i += 16) {
        Isa::prefetch((const char *)(words + i) + 2048, 64);
        for (int64_t j = 0; j < 16; ++j) totals[j] += words[i + j];
    }
    uint32_t total = 0;
    for (uint32_t part : totals) total += part;
    return total;
}

}  // namespace shardmix

#endif
