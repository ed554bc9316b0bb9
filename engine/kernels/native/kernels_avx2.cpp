// AVX2 with FMA and F16C: every x86 processor since 2013 but the smallest.

#include "kernel_table.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "all_kernels.h"

namespace shardmix {
namespace {

struct Avx2 {
    static constexpr int64_t kLanes = 8;
    static constexpr int kTokens = 4;
    using Floats = __m256;
    using Ints = __m256i;

    static inline Floats splat(float x) { return _mm256_set1_ps(x); }
    static inline Floats load(const float *from) { return _mm256_loadu_ps(from); }
    static inline void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
    static inline Floats load_float16(const uint16_t *from) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
    }
    static inline Floats load_bfloat16(const uint16_t *from) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline void store_float16(uint16_t *to, Floats x) {
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    // As `to_bfloat16`.
    static inline void store_bfloat16(uint16_t *to, Floats x) {
        __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
        __m256i last = _mm256_and_si256(high, _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
        __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, is_nan);
        _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(words),
                                                         _mm256_extracti128_si256(words, 1)));
    }
    static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static inline Floats multiply_add(Floats a, Floats b, Floats c) {
        return _mm256_fmadd_ps(a, b, c);
    }
    static inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static inline Floats magnitude(Floats x) { return _mm256_andnot_ps(splat(-0.0f), x); }
    static inline Floats round(Floats x) {
        return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static inline Floats times_power_of_two(Floats x, Floats power) {
        __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
        return multiply(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
    static inline float sum(Floats x) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static inline float largest(Floats x) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    // Four sums, each in the order of `sum`.
    static inline void store_sums(float *to, const Floats (&x)[4]) {
        __m128 halves[4];
        for (int n = 0; n < 4; ++n)
            halves[n] = _mm_add_ps(_mm256_castps256_ps128(x[n]), _mm256_extractf128_ps(x[n], 1));
        _MM_TRANSPOSE4_PS(halves[0], halves[1], halves[2], halves[3]);
        __m128 even = _mm_add_ps(halves[0], halves[2]), odd = _mm_add_ps(halves[1], halves[3]);
        _mm_storeu_ps(to, _mm_add_ps(even, odd));
    }
    // Whether one is above, or is no number.
    static inline bool is_any_above(Floats x, Floats limit) {
        return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLE_UQ)) != 0;
    }
    static inline void store_rounded(int8_t *to, Floats x) {
        __m256i words = _mm256_cvtps_epi32(x);
        __m128i halves =
            _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(halves, halves));
    }
    static inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
    static inline void prefetch(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
    }
    static inline void prefetch_outer(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
    }

    static inline __m256i four_columns(const int8_t *from) {
        int32_t word;
        memcpy(&word, from, sizeof word);
        return _mm256_set1_epi32(word);
    }

    static inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }

    // `rows`: word [k][row] of a group, the first of eight rows.
    template <int TOKENS>
    static inline void add_nibbles(const uint8_t *rows, const int8_t *x, Ints (&dots)[TOKENS]) {
        const __m256i low = _mm256_set1_epi8(15);
        __m256i weights[8];
        for (int k = 0; k < 4; ++k) {
            __m256i pairs = _mm256_loadu_si256((const __m256i *)(rows + k * 64));
            weights[k] = _mm256_and_si256(pairs, low);
            weights[k + 4] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
        }
        for (int t = 0; t < TOKENS; ++t) {
            // Eight products of at most 2 * 15 * 127 fit into 16 bits.
            __m256i total = _mm256_maddubs_epi16(weights[0], four_columns(x + t * kGroup));
            for (int k = 1; k < 8; ++k)
                total = _mm256_add_epi16(
                    total, _mm256_maddubs_epi16(weights[k], four_columns(x + t * kGroup + 4 * k)));
            dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(total, _mm256_set1_epi16(1)));
        }
    }

    template <int TOKENS>
    static inline void dot_bytes(const int8_t *rows, const int8_t *x, const int32_t *,
                                 Ints (&dots)[TOKENS]) {
        for (int t = 0; t < TOKENS; ++t) dots[t] = _mm256_setzero_si256();
        for (int k = 0; k < 8; ++k) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(rows + k * 64));
            // One factor must be unsigned: the sign goes over to the other, which is never -128.
            __m256i magnitudes = _mm256_abs_epi8(weights);
            for (int t = 0; t < TOKENS; ++t) {
                __m256i values = _mm256_sign_epi8(four_columns(x + t * kGroup + 4 * k), weights);
                __m256i pairs = _mm256_maddubs_epi16(magnitudes, values);
                dots[t] =
                    _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    }
};

constexpr KernelTable kTable = table_of<Avx2>();

}  // namespace

const KernelTable *const kAvx2Table = &kTable;

}  // namespace shardmix

#else

namespace shardmix {
const KernelTable *const kAvx2Table = nullptr;
}

#endif
