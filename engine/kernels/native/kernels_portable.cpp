// Plain C++ for every machine: what the compiler makes of loops over eight lanes.

#include <math.h>

#include "all_kernels.h"
#include "kernel_table.h"

namespace shardmix {
namespace {

struct Portable {
    static constexpr int64_t kLanes = 8;
    static constexpr int kTokens = 4;
    struct Floats {
        float lane[kLanes];
    };
    struct Ints {
        int32_t lane[kLanes];
    };

    template <class Function>
    static inline Floats each(Function function) {
        Floats result;
        for (int64_t i = 0; i < kLanes; ++i) result.lane[i] = function(i);
        return result;
    }

    static inline Floats splat(float x) {
        return each([=](int64_t) { return x; });
    }
    static inline Floats load(const float *from) {
        return each([=](int64_t i) { return from[i]; });
    }
    static inline void store(float *to, const Floats &x) { memcpy(to, x.lane, sizeof x.lane); }
    static inline Floats load_float16(const uint16_t *from) {
        return each([=](int64_t i) { return from_float16(from[i]); });
    }
    static inline Floats load_bfloat16(const uint16_t *from) {
        return each([=](int64_t i) { return from_bfloat16(from[i]); });
    }
    static inline void store_float16(uint16_t *to, const Floats &x) {
        for (int64_t i = 0; i < kLanes; ++i) to[i] = to_float16(x.lane[i]);
    }
    static inline void store_bfloat16(uint16_t *to, const Floats &x) {
        for (int64_t i = 0; i < kLanes; ++i) to[i] = to_bfloat16(x.lane[i]);
    }
    static inline Floats add(const Floats &a, const Floats &b) {
        return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
    }
    static inline Floats multiply(const Floats &a, const Floats &b) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
    }
    static inline Floats divide(const Floats &a, const Floats &b) {
        return each([&](int64_t i) { return a.lane[i] / b.lane[i]; });
    }
    static inline Floats multiply_add(const Floats &a, const Floats &b, const Floats &c) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static inline Floats maximum(const Floats &a, const Floats &b) {
        return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static inline Floats minimum(const Floats &a, const Floats &b) {
        return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static inline Floats magnitude(const Floats &x) {
        return each([&](int64_t i) { return fabsf(x.lane[i]); });
    }
    static inline Floats round(const Floats &x) {
        return each([&](int64_t i) { return rintf(x.lane[i]); });
    }
    static inline Floats times_power_of_two(const Floats &x, const Floats &power) {
        return each([&](int64_t i) {
            float exponent = power.lane[i] == power.lane[i] ? power.lane[i] : 0.0f;
            return x.lane[i] * float_of((uint32_t)((int32_t)exponent + 127) << 23);
        });
    }
    static inline float sum(const Floats &x) {
        float total = 0.0f;
        for (float value : x.lane) total += value;
        return total;
    }
    static inline float largest(const Floats &x) {
        float found = x.lane[0];
        for (float value : x.lane) found = value > found ? value : found;
        return found;
    }
    static inline void store_sums(float *to, const Floats (&x)[4]) {
        for (int n = 0; n < 4; ++n) to[n] = sum(x[n]);
    }
    // Whether one is above, or is no number.
    static inline bool is_any_above(const Floats &x, const Floats &limit) {
        for (int64_t i = 0; i < kLanes; ++i)
            if (!(x.lane[i] <= limit.lane[i])) return true;
        return false;
    }
    static inline void store_rounded(int8_t *to, const Floats &x) {
        // A NaN has no integer: like the other instruction sets, give it the least.
        for (int64_t i = 0; i < kLanes; ++i)
            to[i] = x.lane[i] == x.lane[i] ? (int8_t)rintf(x.lane[i]) : (int8_t)-128;
    }
    static inline Floats to_floats(const Ints &x) {
        return each([&](int64_t i) { return (float)x.lane[i]; });
    }
    static inline void prefetch(const char *, size_t) {}
    static inline void prefetch_outer(const char *, size_t) {}

    static inline Ints splat_int(int32_t x) {
        Ints all;
        for (int32_t &lane : all.lane) lane = x;
        return all;
    }

    template <int TOKENS>
    static inline void add_nibbles(const uint8_t *rows, const int8_t *x, Ints (&dots)[TOKENS]) {
        for (int t = 0; t < TOKENS; ++t) {
            const int8_t *values = x + t * kGroup;
            for (int64_t i = 0; i < kLanes; ++i) {
                int32_t total = 0;
                for (int k = 0; k < 4; ++k)
                    for (int j = 0; j < 4; ++j) {
                        int32_t pair = rows[k * 64 + i * 4 + j];
                        total += (pair & 15) * values[4 * k + j];
                        total += (pair >> 4) * values[16 + 4 * k + j];
                    }
                dots[t].lane[i] += total;
            }
        }
    }

    template <int TOKENS>
    static inline void dot_bytes(const int8_t *rows, const int8_t *x, const int32_t *,
                                 Ints (&dots)[TOKENS]) {
        for (int t = 0; t < TOKENS; ++t) {
            const int8_t *values = x + t * kGroup;
            for (int64_t i = 0; i < kLanes; ++i) {
                int32_t total = 0;
                for (int k = 0; k < 8; ++k)
                    for (int j = 0; j < 4; ++j)
                        total += (int32_t)rows[k * 64 + i * 4 + j] * values[4 * k + j];
                dots[t].lane[i] = total;
            }
        }
    }
};

constexpr KernelTable kTable = table_of<Portable>();

}  // namespace

const KernelTable *const kPortableTable = &kTable;

}  // namespace shardmix
