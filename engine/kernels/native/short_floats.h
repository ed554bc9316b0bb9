// float16 and bfloat16 as 16-bit patterns, for compilers and machines that know neither.

#ifndef SHARDMIX_SHORT_FLOATS_H
#define SHARDMIX_SHORT_FLOATS_H

#include <stdint.h>
#include <string.h>

namespace shardmix {

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bfloat16(uint16_t value) { return float_of((uint32_t)value << 16); }

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);  // stays a NaN
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

static inline float from_float16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t exponent = value >> 10 & 0x1f, fraction = value & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    float tiny = (float)fraction * 0x1p-24f;  // exact: zero or a denormal
    return sign ? -tiny : tiny;
}

static inline uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds past the largest
    if (rest < 0x38800000u) {
        // A denormal: adding 0.5 leaves its 10 bits, rounded by the adder, at the fraction's end.
        float shifted = float_of(rest) + 0.5f;
        return (uint16_t)(sign | (bits_of(shifted) - 0x3f000000u));
    }
    uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

}  // namespace shardmix

#endif
