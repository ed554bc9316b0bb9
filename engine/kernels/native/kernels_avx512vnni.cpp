// AVX-512 with VNNI: one instruction multiplies and adds 64 pairs of bytes.

#include "kernel_table.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "all_kernels.h"

namespace shardmix {
namespace {

struct Avx512Vnni {
    static constexpr int64_t kLanes = 16;
    static constexpr int kTokens = 8;
    using Floats = __m512;
    using Ints = __m512i;

    static inline Floats splat(float x) { return _mm512_set1_ps(x); }
    static inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
    static inline void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
    static inline Floats load_float16(const uint16_t *from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
    }
    static inline Floats load_bfloat16(const uint16_t *from) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline void store_float16(uint16_t *to, Floats x) {
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static inline void store_bfloat16(uint16_t *to, Floats x) {
        _mm256_storeu_si256((__m256i *)to, to_bfloat16s(x));
    }
    static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static inline Floats multiply_add(Floats a, Floats b, Floats c) {
        return _mm512_fmadd_ps(a, b, c);
    }
    static inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
    static inline Floats round(Floats x) { return _mm512_roundscale_ps(x, 8); }
    static inline Floats times_power_of_two(Floats x, Floats power) {
        return _mm512_scalef_ps(x, power);
    }
    // Lanes 0 and 2 of each quarter, 1 and 3, both; then the quarters 0 and 2, 1 and 3, both.
    static inline float sum(Floats x) {
        x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
        x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
        return _mm_cvtss_f32(sum_of_quarters(x));
    }
    static inline __m128 sum_of_quarters(Floats x) {
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    static inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
    // Four sums, each in the order of `sum`.
    static inline void store_sums(float *to, const Floats (&x)[4]) {
        __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        __m512 last = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        __m512 even = _mm512_shuffle_ps(first, last, 0x44), odd = _mm512_shuffle_ps(first, last, 0xee);
        _mm_storeu_ps(to, sum_of_quarters(_mm512_add_ps(even, odd)));
    }
    // Whether one is above, or is no number.
    static inline bool is_any_above(Floats x, Floats limit) {
        return _mm512_cmp_ps_mask(x, limit, _CMP_NLE_UQ) != 0;
    }
    static inline void store_rounded(int8_t *to, Floats x) {
        _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    static inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
    static inline void prefetch(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
    }
    static inline void prefetch_outer(const char *from, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
    }

    static inline __m512i four_columns(const int8_t *from) {
        int32_t word;
        memcpy(&word, from, sizeof word);
        return _mm512_set1_epi32(word);
    }

    static inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }

    template <int TOKENS>
    static inline void add_nibbles(const uint8_t *rows, const int8_t *x, Ints (&dots)[TOKENS]) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int k = 0; k < 4; ++k) {
            __m512i pairs = _mm512_loadu_si512(rows + k * 64);
            __m512i first = _mm512_and_si512(pairs, low);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
            for (int t = 0; t < TOKENS; ++t) {
                const int8_t *values = x + t * kGroup + 4 * k;
                dots[t] = _mm512_dpbusd_epi32(dots[t], first, four_columns(values));
                dots[t] = _mm512_dpbusd_epi32(dots[t], second, four_columns(values + 16));
            }
        }
    }

    template <int TOKENS>
    static inline void dot_bytes(const int8_t *rows, const int8_t *x, const int32_t *sums,
                                 Ints (&dots)[TOKENS]) {
        // One factor must be unsigned: weights plus 128, less 128 times the sum of the values.
        const __m512i flip = _mm512_set1_epi8((char)0x80);
        for (int t = 0; t < TOKENS; ++t) dots[t] = _mm512_set1_epi32(-128 * sums[t]);
        for (int k = 0; k < 8; ++k) {
            __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(rows + k * 64), flip);
            for (int t = 0; t < TOKENS; ++t)
                dots[t] =
                    _mm512_dpbusd_epi32(dots[t], weights, four_columns(x + t * kGroup + 4 * k));
        }
    }
};

constexpr KernelTable kTable = table_of<Avx512Vnni>();

}  // namespace

const KernelTable *const kAvx512VnniTable = &kTable;

}  // namespace shardmix

#else

namespace shardmix {
const KernelTable *const kAvx512VnniTable = nullptr;
}

#endif
