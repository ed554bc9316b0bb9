// One row of a packed group as float32, for who wants it so: torch's products of prompts, embeddings.
//
// In: a group of a panel. Out: its 32 values in one row, exact but for one rounding of the minimum's
// addition; every version gives the same bits. Compilers make no vectors of so short loops over
// bytes, hence the versions.

#ifndef SHARDMIX_DEQUANTIZE_ROWS_H
#define SHARDMIX_DEQUANTIZE_ROWS_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "panels.h"
#include "short_floats.h"

namespace shardmix {

#if defined(__AVX2__) && defined(__F16C__)

static inline void from_float16s(const uint16_t *from, float *to) {
    for (int64_t n = 0; n < kPanelRows; n += 8)
        _mm256_storeu_ps(to + n, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + n))));
}

static inline __m128i words_of(const void *first, const void *second, const void *third,
                               const void *fourth) {
    int32_t words[4];
    memcpy(words, first, 4);
    memcpy(words + 1, second, 4);
    memcpy(words + 2, third, 4);
    memcpy(words + 3, fourth, 4);
    return _mm_set_epi32(words[3], words[2], words[1], words[0]);
}

static inline void write_scaled(float *out, __m256i quants, __m256 scale, __m256 minimum) {
    __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(quants), scale);
    _mm256_storeu_ps(out, _mm256_add_ps(product, minimum));
}

static inline void dequantize_row(const SymmetricInt4Group &group, float scale_of_row,
                                  float minimum_of_row, int64_t row, float values[kGroup]) {
    const auto &quants = group.quants;
    __m128i pairs = words_of(quants[0][row], quants[1][row], quants[2][row], quants[3][row]);
    __m128i mask = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
    __m256 scale = _mm256_set1_ps(scale_of_row), minimum = _mm256_set1_ps(minimum_of_row);
    write_scaled(values, _mm256_cvtepu8_epi32(low), scale, minimum);
    write_scaled(values + 8, _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)), scale, minimum);
    write_scaled(values + 16, _mm256_cvtepu8_epi32(high), scale, minimum);
    write_scaled(values + 24, _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)), scale, minimum);
}

static inline void dequantize_row(const Int8Group &group, float scale_of_row, float, int64_t row,
                                  float values[kGroup]) {
    const auto &quants = group.quants;
    __m256 scale = _mm256_set1_ps(scale_of_row);
    for (int64_t k = 0; k < 8; k += 4) {
        __m128i half = words_of(quants[k][row], quants[k + 1][row], quants[k + 2][row],
                                quants[k + 3][row]);
        __m256i first = _mm256_cvtepi8_epi32(half);
        __m256i second = _mm256_cvtepi8_epi32(_mm_srli_si128(half, 8));
        _mm256_storeu_ps(values + 4 * k, _mm256_mul_ps(_mm256_cvtepi32_ps(first), scale));
        _mm256_storeu_ps(values + 4 * k + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(second), scale));
    }
}

#else

static inline void from_float16s(const uint16_t *from, float *to) {
    for (int64_t n = 0; n < kPanelRows; ++n) to[n] = from_float16(from[n]);
}

static inline void dequantize_row(const SymmetricInt4Group &group, float scale, float minimum,
                                  int64_t row, float values[kGroup]) {
    uint8_t pairs[kGroup / 2];
    for (int64_t k = 0; k < 4; ++k) memcpy(pairs + 4 * k, group.quants[k][row], 4);
    for (int64_t j = 0; j < kGroup / 2; ++j) values[j] = scale * (float)(pairs[j] & 15) + minimum;
    for (int64_t j = 0; j < kGroup / 2; ++j)
        values[j + kGroup / 2] = scale * (float)(pairs[j] >> 4) + minimum;
}

static inline void dequantize_row(const Int8Group &group, float scale, float, int64_t row,
                                  float values[kGroup]) {
    int8_t quants[kGroup];
    for (int64_t k = 0; k < 8; ++k) memcpy(quants + 4 * k, group.quants[k][row], 4);
    for (int64_t j = 0; j < kGroup; ++j) values[j] = scale * (float)quants[j];
}

#endif

// What all rows of a group are multiplied by. Data alone: a member function would have one body for
// all files that are compiled for different machines.
struct GroupFactors {
    float scales[kPanelRows], minimums[kPanelRows];
};

static inline GroupFactors factors_of(const Int4Group &group) {
    GroupFactors factors;
    from_float16s(group.scales, factors.scales);
    from_float16s(group.minimums, factors.minimums);
    return factors;
}

static inline GroupFactors factors_of(const SymmetricInt4Group &group) {
    GroupFactors factors;
    from_float16s(group.scales, factors.scales);
    for (int64_t n = 0; n < kPanelRows; ++n) factors.minimums[n] = -8.0f * factors.scales[n];
    return factors;
}

static inline GroupFactors factors_of(const Int8Group &group) {
    GroupFactors factors = {};
    from_float16s(group.scales, factors.scales);
    return factors;
}

}  // namespace shardmix

#endif
