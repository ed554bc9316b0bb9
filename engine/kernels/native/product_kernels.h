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

// Fetches memory at an even pace during all passes over a panel, after which `next` is read: a
// pass that had to fetch for itself would wait, and those after it would leave the memory idle.
// With hundreds of passes a share may be nothing; a panel then is soon fetched beside them.
template <class Isa>
struct Fetcher {
    const char *panel, *next;
    int64_t panel_bytes, num_passes, at;

    Fetcher(const char *panel, const char *next, int64_t panel_bytes, int64_t num_passes)
        : panel(panel), next(next), panel_bytes(panel_bytes), num_passes(num_passes),
          at(panel_bytes * (num_passes - 1) / num_passes + kBytesAhead) {}

    // While so many bytes of the panel are multiplied.
    inline void fetch(int64_t num_bytes) {
        int64_t share = num_passes == 1 ? num_bytes : num_bytes / num_passes;
        Isa::prefetch(at < panel_bytes ? panel + at : next + (at - panel_bytes), (size_t)share);
        at += share;
    }
};

template <class Isa, int TOKENS, int VECTORS>
struct Tile {
    typename Isa::Floats totals[TOKENS][VECTORS];

    void clear() {
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < VECTORS; ++v) totals[t][v] = Isa::splat(0.0f);
    }

    // To rows first_row.. of a matrix that has num_rows: the last panel may lack some.
    void store(const Products &out, int64_t num_rows, int64_t first_token, int64_t first_row) const {
        for (int t = 0; t < TOKENS; ++t) {
            float *row = place(out, first_token + t, first_row);
            for (int v = 0; v < VECTORS; ++v) {
                int64_t start = v * Isa::kLanes, left = num_rows - first_row - start;
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

    // The same, to what is there.
    void add(const Products &out, int64_t num_rows, int64_t first_token, int64_t first_row) {
        for (int t = 0; t < TOKENS; ++t) {
            const float *row = place(out, first_token + t, first_row);
            for (int v = 0; v < VECTORS; ++v) {
                int64_t start = v * Isa::kLanes, left = num_rows - first_row - start;
                float lanes[Isa::kLanes] = {};
                const float *before = left < Isa::kLanes ? lanes : row + start;
                if (0 < left && left < Isa::kLanes)
                    memcpy(lanes, row + start, (size_t)left * sizeof(float));
                totals[t][v] = Isa::add(Isa::load(before), totals[t][v]);
            }
        }
        store(out, num_rows, first_token, first_row);
    }

   private:
    static float *place(const Products &out, int64_t token, int64_t row) {
        return out.values + token * out.stride + row - out.first_row;
    }
};

// `GroupType`: Int4Group, or without minimums, which then are in the integer sums.
template <class Isa, class GroupType>
struct Int4Product {
    using Group = GroupType;
    static constexpr bool kHasMinimums = sizeof(Group) == sizeof(Int4Group);

    template <int TOKENS, int VECTORS>
    static inline void add_group(const Group &group, const Groups &x, int64_t lane,
                                 Tile<Isa, TOKENS, VECTORS> &tile) {
        for (int v = 0; v < VECTORS; ++v) {
            int64_t row = lane + v * Isa::kLanes;
            typename Isa::Ints dots[TOKENS];
            for (int t = 0; t < TOKENS; ++t)
                dots[t] = Isa::splat_int(kHasMinimums ? 0 : -8 * x.sums[t]);
            Isa::template add_nibbles<TOKENS>(group.quants[0][row], x.quants, dots);
            auto scales = Isa::load_float16(group.scales + row);
            for (int t = 0; t < TOKENS; ++t) {
                auto scale = Isa::multiply(scales, Isa::splat(x.scales[t]));
                auto &total = tile.totals[t][v];
                total = Isa::multiply_add(scale, Isa::to_floats(dots[t]), total);
            }
            if constexpr (kHasMinimums) {
                auto minimums = Isa::load_float16(group.minimums + row);
                for (int t = 0; t < TOKENS; ++t) {
                    auto &total = tile.totals[t][v];
                    total = Isa::multiply_add(minimums, Isa::splat(x.scaled_sums[t]), total);
                }
            }
        }
    }
};

template <class Isa>
struct Int8Product {
    using Group = Int8Group;

    template <int TOKENS, int VECTORS>
    static inline void add_group(const Group &group, const Groups &x, int64_t lane,
                                 Tile<Isa, TOKENS, VECTORS> &tile) {
        for (int v = 0; v < VECTORS; ++v) {
            int64_t row = lane + v * Isa::kLanes;
            typename Isa::Ints dots[TOKENS];
            Isa::template dot_bytes<TOKENS>(group.quants[0][row], x.quants, x.sums, dots);
            auto scales = Isa::load_float16(group.scales + row);
            for (int t = 0; t < TOKENS; ++t) {
                auto scale = Isa::multiply(scales, Isa::splat(x.scales[t]));
                tile.totals[t][v] =
                    Isa::multiply_add(scale, Isa::to_floats(dots[t]), tile.totals[t][v]);
            }
        }
    }
};

// The groups among [first, end) of a token that have a rest. Returns how many there are.
static inline int64_t find_rests(const uint8_t *has_rest, int64_t first, int64_t end, int64_t *found) {
    int64_t count = 0;
    for (int64_t g = first; g < end; g += kMarks) {
        uint64_t marks;
        memcpy(&marks, has_rest + g, sizeof marks);
        for (; marks; marks &= marks - 1) found[count++] = g + __builtin_ctzll(marks) / 8;
    }
    return count;
}

// A product by groups, by what `Product` does with one.
template <class Isa, class Product>
struct GroupedProduct {
    using Group = typename Product::Group;

    template <int TOKENS, int VECTORS>
    static inline void add(const shardmix_matrix &matrix, Fetcher<Isa> &fetcher,
                           const Activations &x, int64_t token, int64_t lane,
                           Tile<Isa, TOKENS, VECTORS> &tile) {
        const Group *groups = (const Group *)fetcher.panel;
        int64_t num_groups = matrix.num_groups;
        for (int64_t g = 0; g < num_groups; ++g) {
            fetcher.fetch(sizeof(Group));
            Product::add_group(groups[g], groups_at(x.groups, g * x.num_tokens + token), lane, tile);
        }
    }

    // The whole of a token that is alone: while its rests are added, memory is read on.
    template <int VECTORS>
    static inline void add_alone(const shardmix_matrix &matrix, Fetcher<Isa> &fetcher,
                                 const Activations &x, Tile<Isa, 1, VECTORS> &tile) {
        const Group *groups = (const Group *)fetcher.panel;
        int64_t num_groups = matrix.num_groups;
        Tile<Isa, 1, VECTORS> rests;
        rests.clear();
        for (int64_t g = 0; g < num_groups; ++g) {
            fetcher.fetch(sizeof(Group));
            Product::add_group(groups[g], groups_at(x.groups, g), 0, tile);
            if (x.has_rest[g]) Product::add_group(groups[g], groups_at(x.rests, g), 0, rests);
        }
        for (int v = 0; v < VECTORS; ++v)
            tile.totals[0][v] = Isa::add(tile.totals[0][v], rests.totals[0][v]);
    }

    // What the rests of groups add to the rows of panels; as `add_alone` does, all of them at once.
    static void add_rests(const shardmix_matrix &matrix, const Activations &x, int64_t first_panel,
                          int64_t end_panel, const Products &out) {
        constexpr int64_t kMost = 1024;  // groups that are looked at together
        int64_t num_groups = matrix.num_groups, found[kMost], count = 0;
        for (int64_t token = 0; token < x.num_tokens; ++token) {
            const uint8_t *has_rest = x.has_rest + token * padded_groups(num_groups);
            for (int64_t p = first_panel; p < end_panel; ++p) {
                const Group *groups = (const Group *)panel_at(matrix, p);
                Tile<Isa, 1, kPanelRows / Isa::kLanes> tile;
                tile.clear();
                bool is_any = false;
                for (int64_t first = 0; first < num_groups; first += kMost) {
                    int64_t end = first + kMost < num_groups ? first + kMost : num_groups;
                    if (p == first_panel || num_groups > kMost)
                        count = find_rests(has_rest, first, end, found);
                    for (int64_t i = 0; i < count; ++i) {
                        Groups rest = groups_at(x.rests, found[i] * x.num_tokens + token);
                        Product::add_group(groups[found[i]], rest, 0, tile);
                    }
                    is_any |= count > 0;
                }
                if (!is_any) break;
                tile.add(out, matrix.num_rows, token, p * kPanelRows);
            }
        }
    }
};

template <class Isa>
struct BFloat16Product {
    static void add_rests(const shardmix_matrix &, const Activations &, int64_t, int64_t,
                          const Products &) {}

    template <int VECTORS>
    static inline void add_alone(const shardmix_matrix &matrix, Fetcher<Isa> &fetcher,
                                 const Activations &x, Tile<Isa, 1, VECTORS> &tile) {
        add<1, VECTORS>(matrix, fetcher, x, 0, 0, tile);
    }

    // Sums of every second column: one chain of additions would wait for itself.
    static constexpr int kChains = 2;

    template <int TOKENS, int VECTORS>
    static inline void add(const shardmix_matrix &matrix, Fetcher<Isa> &fetcher,
                           const Activations &x, int64_t token, int64_t lane,
                           Tile<Isa, TOKENS, VECTORS> &tile) {
        const BFloat16Column *columns = (const BFloat16Column *)fetcher.panel;
        int64_t num_columns = matrix.num_columns;
        const float *values = x.values + token * num_columns;
        Tile<Isa, TOKENS, VECTORS> chains[kChains];
        for (int chain = 0; chain < kChains; ++chain) chains[chain].clear();
        int64_t whole = num_columns / kChains * kChains;
        for (int64_t k = 0; k < whole; k += kChains) {
            fetcher.fetch(kChains * sizeof(BFloat16Column));
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
static inline void multiply_tile(const shardmix_matrix &matrix, Fetcher<Isa> &fetcher,
                                 const Activations &x, int64_t token, int64_t first_row,
                                 const Products &out) {
    for (int64_t lane = 0; lane < kPanelRows; lane += VECTORS * Isa::kLanes) {
        Tile<Isa, TOKENS, VECTORS> tile;
        tile.clear();
        Product::template add<TOKENS, VECTORS>(matrix, fetcher, x, token, lane, tile);
        tile.store(out, matrix.num_rows, token, first_row + lane);
    }
}

// Panels that stay in a core's cache until the rests of all tokens are added.
constexpr int64_t kBatchBytes = 48 << 10;

// Passes over a panel of `vectors` by `multiply_panels`.
template <int TOKENS>
static inline int64_t passes(int64_t num_tokens, int64_t vectors) {
    int64_t left = num_tokens % TOKENS, pairs = TOKENS > 2 ? left / 2 : 0;
    return (num_tokens / TOKENS + pairs) * vectors + left - 2 * pairs;
}

// A panel stays in the cache while all tokens pass over it. `TOKENS` at a time fill the registers;
// one alone takes the panel's whole width, so that memory is read in order.
template <class Isa, class Product, int TOKENS>
static void multiply_panels(const shardmix_matrix &matrix, const Activations &x, int64_t first_panel,
                            int64_t end_panel, const Products &out, const char *after) {
    constexpr int kWhole = kPanelRows / Isa::kLanes;
    int64_t num_bytes = panel_bytes(matrix);
    int64_t batch = kBatchBytes / num_bytes, batch_start = first_panel;
    int64_t num_passes = passes<TOKENS>(x.num_tokens, kWhole);
    for (int64_t p = first_panel; p < end_panel; ++p) {
        const char *panel = panel_at(matrix, p);
        const char *next = p + 1 < end_panel || !after ? panel + num_bytes : after;
        Fetcher<Isa> fetcher(panel, next, num_bytes, num_passes);
        int64_t token = 0, row = p * kPanelRows;
        if (x.num_tokens == 1) {
            Tile<Isa, 1, kWhole> tile;
            tile.clear();
            Product::add_alone(matrix, fetcher, x, tile);
            tile.store(out, matrix.num_rows, 0, row);
            continue;
        }
        for (; token + TOKENS <= x.num_tokens; token += TOKENS)
            multiply_tile<Isa, Product, TOKENS, 1>(matrix, fetcher, x, token, row, out);
        for (; TOKENS > 2 && token + 2 <= x.num_tokens; token += 2)
            multiply_tile<Isa, Product, 2, 1>(matrix, fetcher, x, token, row, out);
        for (; token < x.num_tokens; ++token)
            multiply_tile<Isa, Product, 1, kWhole>(matrix, fetcher, x, token, row, out);
        if (p + 1 < end_panel && p + 1 < batch_start + batch) continue;
        Product::add_rests(matrix, x, batch_start, p + 1, out);
        batch_start = p + 1;
    }
}

template <class Isa>
static void multiply(const shardmix_matrix &matrix, const Activations &x, int64_t first_panel,
                     int64_t end_panel, const Products &out, const char *after) {
    auto by = [&](auto product) {
        multiply_panels<Isa, decltype(product), Isa::kTokens>(matrix, x, first_panel, end_panel, out,
                                                              after);
    };
    if (matrix.format == SHARDMIX_INT4)
        by(GroupedProduct<Isa, Int4Product<Isa, Int4Group>>{});
    else if (matrix.format == SHARDMIX_SYMMETRIC_INT4)
        by(GroupedProduct<Isa, Int4Product<Isa, SymmetricInt4Group>>{});
    else if (matrix.format == SHARDMIX_INT8)
        by(GroupedProduct<Isa, Int8Product<Isa>>{});
    else
        by(BFloat16Product<Isa>{});
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
