// Products of packed matrices, for any instruction set `Isa`; included by kernels_<isa>.cpp only.
//
// The arithmetic of one output is the same whatever tile it is computed in: a token's result must
// depend neither on its company nor on the number of threads.

#ifndef SHARDMIX_PRODUCT_KERNELS_H
#define SHARDMIX_PRODUCT_KERNELS_H

#include <string.h>

#include "dequantize_rows.h"
#include "panels.h"
#include "short_floats.h"

namespace shardmix {

// What is fetched ahead: a core's own prefetcher stops at the border of a page, and knows nothing of
// what comes after a stretch.
constexpr int64_t kBytesAhead = 2560;

// What is to be fetched at group g of a panel, after which `next` is read.
template <class Group>
static inline const char *ahead_of(const Group *groups, int64_t g, int64_t num_groups,
                                   const char *next) {
    int64_t ahead = g + kBytesAhead / (int64_t)sizeof(Group), past = ahead - num_groups;
    return past < 0 ? (const char *)(groups + ahead) : next + past * (int64_t)sizeof(Group);
}

template <class Isa, int TOKENS, int VECTORS>
struct Tile {
    typename Isa::Floats totals[TOKENS][VECTORS];

    void clear() {
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < VECTORS; ++v) totals[t][v] = Isa::splat(0.0f);
    }

    // Rows first_row.. of the matrix, of which the last panel may lack some.
    void store(float *out, int64_t num_rows, int64_t first_token, int64_t first_row) const {
        for (int t = 0; t < TOKENS; ++t) {
            float *row = out + (first_token + t) * num_rows;
            for (int v = 0; v < VECTORS; ++v) {
                int64_t start = first_row + v * Isa::kLanes, left = num_rows - start;
                if (left >= Isa::kLanes) {
                    Isa::store(row + start, totals[t][v]);
                } else if (left > 0) {
                    float lanes[Isa::kLanes];
                    Isa::store(lanes, totals[t][v]);
                    memcpy(row + start, lanes, (size_t)left * sizeof(float));
                }
            }
        }
    }
};

// `Group`: Int4Group, or without minimums, which then are in the integer sums.
template <class Isa, class Group>
struct Int4Product {
    static constexpr bool kHasMinimums = sizeof(Group) == sizeof(Int4Group);

    template <int TOKENS, int VECTORS>
    static inline void add(const shardmix_matrix &matrix, const char *panel, const char *next,
                           const Activations &x, int64_t token, int64_t lane,
                           Tile<Isa, TOKENS, VECTORS> &tile) {
        const Group *groups = (const Group *)panel;
        int64_t num_groups = matrix.num_groups;
        for (int64_t g = 0; g < num_groups; ++g) {
            const Group &group = groups[g];
            Isa::prefetch(ahead_of(groups, g, num_groups, next), sizeof(Group));
            int64_t at = g * x.num_tokens + token;
            const int8_t *quants = x.quants + at * kGroup;
            const float *scales_T = x.scales + at;
            const float *scaled_sums_T = x.scaled_sums + at;
            const int32_t *sums_T = x.sums + at;
            for (int v = 0; v < VECTORS; ++v) {
                int64_t row = lane + v * Isa::kLanes;
                typename Isa::Ints dots[TOKENS];
                for (int t = 0; t < TOKENS; ++t)
                    dots[t] = Isa::splat_int(kHasMinimums ? 0 : -8 * sums_T[t]);
                Isa::template add_nibbles<TOKENS>(group.quants[0][row], quants, dots);
                auto scales = Isa::load_float16(group.scales + row);
                for (int t = 0; t < TOKENS; ++t) {
                    auto scale = Isa::multiply(scales, Isa::splat(scales_T[t]));
                    auto &total = tile.totals[t][v];
                    total = Isa::multiply_add(scale, Isa::to_floats(dots[t]), total);
                }
                if constexpr (kHasMinimums) {
                    auto minimums = Isa::load_float16(group.minimums + row);
                    for (int t = 0; t < TOKENS; ++t) {
                        auto &total = tile.totals[t][v];
                        total = Isa::multiply_add(minimums, Isa::splat(scaled_sums_T[t]), total);
                    }
                }
            }
        }
    }
};

template <class Isa>
struct Int8Product {
    template <int TOKENS, int VECTORS>
    static inline void add(const shardmix_matrix &matrix, const char *panel, const char *next,
                           const Activations &x, int64_t token, int64_t lane,
                           Tile<Isa, TOKENS, VECTORS> &tile) {
        const Int8Group *groups = (const Int8Group *)panel;
        int64_t num_groups = matrix.num_groups;
        for (int64_t g = 0; g < num_groups; ++g) {
            const Int8Group &group = groups[g];
            Isa::prefetch(ahead_of(groups, g, num_groups, next), sizeof(Int8Group));
            int64_t at = g * x.num_tokens + token;
            const int8_t *quants = x.quants + at * kGroup;
            const float *scales_T = x.scales + at;
            const int32_t *sums_T = x.sums + at;
            for (int v = 0; v < VECTORS; ++v) {
                int64_t row = lane + v * Isa::kLanes;
                typename Isa::Ints dots[TOKENS];
                Isa::template dot_bytes<TOKENS>(group.quants[0][row], quants, sums_T, dots);
                auto scales = Isa::load_float16(group.scales + row);
                for (int t = 0; t < TOKENS; ++t) {
                    auto scale = Isa::multiply(scales, Isa::splat(scales_T[t]));
                    tile.totals[t][v] =
                        Isa::multiply_add(scale, Isa::to_floats(dots[t]), tile.totals[t][v]);
                }
            }
        }
    }
};

template <class Isa>
struct BFloat16Product {
    // Sums of every second column: one chain of additions would wait for itself.
    static constexpr int kChains = 2;

    template <int TOKENS, int VECTORS>
    static inline void add(const shardmix_matrix &matrix, const char *panel, const char *next,
                           const Activations &x, int64_t token, int64_t lane,
                           Tile<Isa, TOKENS, VECTORS> &tile) {
        const BFloat16Column *columns = (const BFloat16Column *)panel;
        int64_t num_columns = matrix.num_columns;
        const float *values = x.values + token * num_columns;
        Tile<Isa, TOKENS, VECTORS> chains[kChains];
        for (int chain = 0; chain < kChains; ++chain) chains[chain].clear();
        int64_t whole = num_columns / kChains * kChains;
        for (int64_t k = 0; k < whole; k += kChains) {
            Isa::prefetch(ahead_of(columns, k, num_columns, next), kChains * sizeof(BFloat16Column));
            for (int chain = 0; chain < kChains; ++chain)
                add_column(columns[k + chain], values + k + chain, num_columns, lane, chains[chain]);
        }
        for (int64_t k = whole; k < num_columns; ++k)
            add_column(columns[k], values + k, num_columns, lane, chains[k - whole]);
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < VECTORS; ++v)
                tile.totals[t][v] = Isa::add(chains[0].totals[t][v], chains[1].totals[t][v]);
    }

    template <int TOKENS, int VECTORS>
    static inline void add_column(const BFloat16Column &column, const float *values, int64_t stride,
                                  int64_t lane, Tile<Isa, TOKENS, VECTORS> &tile) {
        for (int v = 0; v < VECTORS; ++v) {
            auto weights = Isa::load_bfloat16(column.values + lane + v * Isa::kLanes);
            for (int t = 0; t < TOKENS; ++t)
                tile.totals[t][v] = Isa::multiply_add(weights, Isa::splat(values[t * stride]),
                                                      tile.totals[t][v]);
        }
    }
};

template <class Isa, class Product, int TOKENS, int VECTORS>
static inline void multiply_tile(const shardmix_matrix &matrix, const char *panel, const char *next,
                                 const Activations &x, int64_t token, int64_t first_row, float *out) {
    for (int64_t lane = 0; lane < kPanelRows; lane += VECTORS * Isa::kLanes) {
        Tile<Isa, TOKENS, VECTORS> tile;
        tile.clear();
        Product::template add<TOKENS, VECTORS>(matrix, panel, next, x, token, lane, tile);
        tile.store(out, matrix.num_rows, token, first_row + lane);
    }
}

// A panel stays in the cache while all tokens pass over it. `TOKENS` at a time fill the registers;
// one alone takes the panel's whole width, so that memory is read in order.
template <class Isa, class Product, int TOKENS>
static void multiply_panels(const shardmix_matrix &matrix, const Activations &x, int64_t first_panel,
                            int64_t end_panel, float *out, const char *after) {
    constexpr int kWhole = kPanelRows / Isa::kLanes;
    for (int64_t p = first_panel; p < end_panel; ++p) {
        const char *panel = panel_at(matrix, p);
        const char *next = p + 1 < end_panel || !after ? panel + panel_bytes(matrix) : after;
        int64_t token = 0, row = p * kPanelRows;
        for (; token + TOKENS <= x.num_tokens; token += TOKENS)
            multiply_tile<Isa, Product, TOKENS, 1>(matrix, panel, next, x, token, row, out);
        for (; TOKENS > 2 && token + 2 <= x.num_tokens; token += 2)
            multiply_tile<Isa, Product, 2, 1>(matrix, panel, next, x, token, row, out);
        for (; token < x.num_tokens; ++token)
            multiply_tile<Isa, Product, 1, kWhole>(matrix, panel, next, x, token, row, out);
    }
}

template <class Isa>
static void multiply(const shardmix_matrix &matrix, const Activations &x, int64_t first_panel,
                     int64_t end_panel, float *out, const char *after) {
    if (matrix.format == SHARDMIX_INT4)
        multiply_panels<Isa, Int4Product<Isa, Int4Group>, Isa::kTokens>(matrix, x, first_panel,
                                                                        end_panel, out, after);
    else if (matrix.format == SHARDMIX_SYMMETRIC_INT4)
        multiply_panels<Isa, Int4Product<Isa, SymmetricInt4Group>, Isa::kTokens>(
            matrix, x, first_panel, end_panel, out, after);
    else if (matrix.format == SHARDMIX_INT8)
        multiply_panels<Isa, Int8Product<Isa>, Isa::kTokens>(matrix, x, first_panel, end_panel, out,
                                                             after);
    else
        multiply_panels<Isa, BFloat16Product<Isa>, Isa::kTokens>(matrix, x, first_panel, end_panel,
                                                                 out, after);
}

#ifdef __AVX512F__
// As `to_bfloat16`. Not by the instruction for it, which takes denormals for zeros.
static inline __m256i to_bfloat16s(__m512 values) {
    __m512i bits = _mm512_castps_si512(values), high = _mm512_srli_epi32(bits, 16);
    __m512i last = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, quiet);
    return _mm512_cvtepi32_epi16(rounded);
}
#endif

static inline void write_float(float *out, float value) { *out = value; }
static inline void write_float(uint16_t *out, float value) { *out = to_bfloat16(value); }

static inline void write_floats(float *out, const float *values, int64_t count) {
    memcpy(out, values, (size_t)count * sizeof(float));
}
static inline void write_floats(uint16_t *out, const float *values, int64_t count) {
    int64_t j = 0;
#ifdef __AVX512F__
    for (; j + 16 <= count; j += 16)
        _mm256_storeu_si256((__m256i *)(out + j), to_bfloat16s(_mm512_loadu_ps(values + j)));
#endif
    for (; j < count; ++j) out[j] = to_bfloat16(values[j]);
}

// Rows of a panel, into rows of `columns` values.
template <class Group, class T>
static inline void dequantize_panel(const shardmix_matrix &matrix, const char *panel, int64_t rows,
                                    T *out) {
    const Group *groups = (const Group *)panel;
    int64_t per_block = groups_of_block(matrix.block);
    for (int64_t g = 0; g < matrix.num_groups; ++g) {
        int64_t offset = g % per_block * kGroup, left = matrix.block - offset;
        int64_t count = left < kGroup ? left : kGroup;
        T *corner = out + g / per_block * matrix.block + offset;
        GroupFactors factors = factors_of(groups[g]);
        for (int64_t row = 0; row < rows; ++row) {
            float values[kGroup];
            dequantize_row(groups[g], factors.scales[row], factors.minimums[row], row, values);
            write_floats(corner + row * matrix.num_columns, values, count);
        }
    }
}

template <class T>
static void dequantize_rows(const shardmix_matrix &matrix, int64_t first_row, int64_t end_row,
                            T *out) {
    int64_t columns = matrix.num_columns;
    for (int64_t start = first_row; start < end_row; start += kPanelRows) {
        const char *panel = panel_at(matrix, start / kPanelRows);
        int64_t rows = end_row - start < kPanelRows ? end_row - start : kPanelRows;
        T *target = out + (start - first_row) * columns;
        if (matrix.format == SHARDMIX_INT4)
            dequantize_panel<Int4Group>(matrix, panel, rows, target);
        else if (matrix.format == SHARDMIX_SYMMETRIC_INT4)
            dequantize_panel<SymmetricInt4Group>(matrix, panel, rows, target);
        else if (matrix.format == SHARDMIX_INT8)
            dequantize_panel<Int8Group>(matrix, panel, rows, target);
        else
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t k = 0; k < columns; ++k)
                    write_float(target + row * columns + k,
                                from_bfloat16(((const BFloat16Column *)panel)[k].values[row]));
    }
}

static void dequantize(const shardmix_matrix &matrix, int64_t first_row, int64_t end_row,
                       bool is_bfloat16, void *out) {
    if (is_bfloat16)
        dequantize_rows(matrix, first_row, end_row, (uint16_t *)out);
    else
        dequantize_rows(matrix, first_row, end_row, (float *)out);
}

}  // namespace shardmix

#endif
