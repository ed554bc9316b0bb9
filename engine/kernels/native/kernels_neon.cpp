// 64-bit ARM with the dot product instructions: Apple M1, Raspberry Pi 5, Graviton 2 and later.

#include "kernel_table.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "all_kernels.h"

namespace shardmix {
namespace {

struct Neon {
    static constexpr int64_t kLanes = 4;
    static constexpr int kTokens = 4;
    using Floats = float32x4_t;
    using Ints = int32x4_t;

    static inline Floats splat(float x) { return vdupq_n_f32(x); }
    static inline Floats load(const float *from) { return vld1q_f32(from); }
    static inline void store(float *to, Floats x) { vst1q_f32(to, x); }
    static inline Floats load_float16(const uint16_t *from) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
    }
    static inline Floats load_bfloat16(const uint16_t *from) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16));
    }
    static inline void store_float16(uint16_t *to, Floats x) {
        vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x)));
    }
    static inline void store_bfloat16(uint16_t *to, Floats x) {
        float lanes[kLanes];
        vst1q_f32(lanes, x);
        for (int64_t i = 0; i < kLanes; ++i) to[i] = to_bfloat16(lanes[i]);
    }
    static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
    static inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
    static inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static inline Floats maximum(Floats a, Floats b) { return vmaxq_f32(a, b); }
    static inline Floats minimum(Floats a, Floats b) { return vminq_f32(a, b); }
    static inline Floats magnitude(Floats x) { return vabsq_f32(x); }
    static inline Floats round(Floats x) { return vrndnq_f32(x); }
    static inline Floats times_power_of_two(Floats x, Floats power) {
        int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(power), vdupq_n_s32(127));
        return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    }
    static inline float sum(Floats x) { return vaddvq_f32(x); }
    static inline float largest(Floats x) { return vmaxvq_f32(x); }
    static inline void store_sums(float *to, const Floats (&x)[4]) {
        for (int n = 0; n < 4; ++n) to[n] = sum(x[n]);
    }
    // Whether one is above, or is no number.
    static inline bool is_any_above(Floats x, Floats limit) {
        return vminvq_u32(vcleq_f32(x, limit)) == 0;
    }
    static inline void store_rounded(int8_t *to, Floats x) {
        int16x4_t halves = vqmovn_s32(vcvtnq_s32_f32(x));
        int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
        int32_t word = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
        memcpy(to, &word, sizeof word);
    }
    static inline Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
    static inline void prefetch(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i);
    }
    static inline void prefetch_outer(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    }

    static inline int8x16_t four_columns(const int8_t *from) {
        int32_t word;
        memcpy(&word, from, sizeof word);
        return vreinterpretq_s8_s32(vdupq_n_s32(word));
    }

    static inline Ints splat_int(int32_t x) { return vdupq_n_s32(x); }

    template <int TOKENS>
    static inline void add_nibbles(const uint8_t *rows, const int8_t *x, Ints (&dots)[TOKENS]) {
        for (int k = 0; k < 4; ++k) {
            uint8x16_t pairs = vld1q_u8(rows + k * 64);
            int8x16_t first = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15)));
            int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4));
            for (int t = 0; t < TOKENS; ++t) {
                const int8_t *values = x + t * kGroup + 4 * k;
                dots[t] = vdotq_s32(dots[t], first, four_columns(values));
                dots[t] = vdotq_s32(dots[t], second, four_columns(values + 16));
            }
        }
    }

    template <int TOKENS>
    static inline void dot_bytes(const int8_t *rows, const int8_t *x, const int32_t *,
                                 Ints (&dots)[TOKENS]) {
        for (int t = 0; t < TOKENS; ++t) dots[t] = vdupq_n_s32(0);
        for (int k = 0; k < 8; ++k) {
            int8x16_t weights = vld1q_s8(rows + k * 64);
            for (int t = 0; t < TOKENS; ++t)
                dots[t] = vdotq_s32(dots[t], weights, four_columns(x + t * kGroup + 4 * k));
        }
    }
};

constexpr KernelTable kTable = table_of<Neon>();

}  // namespace

const KernelTable *const kNeonTable = &kTable;

}  // namespace shardmix

#else

namespace shardmix {
const KernelTable *const kNeonTable = nullptr;
}

#endif
