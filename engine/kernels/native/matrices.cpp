// Packed matrices on their own: packing, unpacking, one product; and how fast memory is read.

#include <chrono>
#include <cstring>

#include "short_floats.h"
#include "step.h"

namespace shardmix {

bool is_valid(const shardmix_matrix *matrix) {
    if (!matrix || !matrix->panels || matrix->num_rows < 1 || matrix->block < 1) return false;
    if (matrix->num_columns < 1 || matrix->num_columns % matrix->block) return false;
    if (matrix->format < SHARDMIX_INT4 || matrix->format > SHARDMIX_SYMMETRIC_INT4) return false;
    int64_t blocks = matrix->num_columns / matrix->block;
    return matrix->num_groups == blocks * groups_of_block(matrix->block);
}

namespace {

struct Source {
    const uint8_t *quants;
    const uint16_t *scales;
    const uint16_t *minimums;
};

// Bytes of a row that are interleaved as 32-bit words; what lies past the last row stays zero.
template <class Group>
void interleave(Group &group, const Source &source, int64_t index, int64_t row) {
    constexpr int64_t kBytes = sizeof group.quants / kPanelRows;
    const uint8_t *from = source.quants + index * kBytes;
    for (int64_t k = 0; k < kBytes / 4; ++k) std::memcpy(group.quants[k][row], from + 4 * k, 4);
    group.scales[row] = source.scales[index];
}

void pack_panel(const shardmix_matrix &matrix, const Source &source, int64_t panel, char *out) {
    std::memset(out, 0, (size_t)panel_bytes(matrix));
    int64_t first = panel * kPanelRows, left = matrix.num_rows - first;
    int64_t rows = left < kPanelRows ? left : kPanelRows;
    for (int64_t row = 0; row < rows; ++row) {
        if (matrix.format == SHARDMIX_BFLOAT16) {
            const uint16_t *values = (const uint16_t *)source.quants;
            for (int64_t k = 0; k < matrix.num_columns; ++k)
                ((BFloat16Column *)out)[k].values[row] =
                    values[(first + row) * matrix.num_columns + k];
            continue;
        }
        for (int64_t g = 0; g < matrix.num_groups; ++g) {
            int64_t index = (first + row) * matrix.num_groups + g;
            if (matrix.format == SHARDMIX_INT4) {
                interleave(((Int4Group *)out)[g], source, index, row);
                ((Int4Group *)out)[g].minimums[row] = source.minimums[index];
            } else if (matrix.format == SHARDMIX_SYMMETRIC_INT4) {
                interleave(((SymmetricInt4Group *)out)[g], source, index, row);
            } else {
                interleave(((Int8Group *)out)[g], source, index, row);
            }
        }
    }
}

}  // namespace
}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_packed_bytes(const shardmix_matrix *matrix) {
    return num_panels(*matrix) * panel_bytes(*matrix);
}

int64_t shardmix_set_num_threads(int64_t num_threads) {
    return ThreadTeam::of_process().resize(num_threads < 1 ? 1 : num_threads);
}

int64_t shardmix_pack(const shardmix_matrix *matrix, const void *quants, const uint16_t *scales,
                      const uint16_t *minimums, void *panels) {
    shardmix_matrix target = *matrix;
    target.panels = panels;
    bool has_scales = scales && (minimums || target.format != SHARDMIX_INT4);
    if (!is_valid(&target) || !quants || (!has_scales && target.format != SHARDMIX_BFLOAT16))
        return SHARDMIX_BAD_ARGUMENT;
    Source source{(const uint8_t *)quants, scales, minimums};
    ThreadTeam &team = ThreadTeam::of_process();
    Phase phase;
    auto work = [&] {
        team.share(phase, num_panels(target), 8, [&](int64_t first, int64_t end, int64_t) {
            for (int64_t p = first; p < end; ++p)
                pack_panel(target, source, p, (char *)panels + p * panel_bytes(target));
        });
    };
    run_on(team, work);
    return SHARDMIX_OK;
}

int64_t shardmix_dequantize(const shardmix_matrix *matrix, int64_t first_row, int64_t end_row,
                            int64_t is_bfloat16, void *out) {
    if (!is_valid(matrix) || !out || first_row < 0 || first_row % kPanelRows ||
        first_row >= end_row || end_row > matrix->num_rows)
        return SHARDMIX_BAD_ARGUMENT;
    int64_t row_bytes = matrix->num_columns * (is_bfloat16 ? 2 : 4);
    ThreadTeam &team = ThreadTeam::of_process();
    Phase phase;
    auto work = [&] {
        team.share(phase, end_row - first_row, kPanelRows, [&](int64_t first, int64_t end, int64_t) {
            kernels().dequantize(*matrix, first_row + first, first_row + end, is_bfloat16 != 0,
                                 (char *)out + first * row_bytes);
        });
    };
    run_on(team, work);
    return SHARDMIX_OK;
}

int64_t shardmix_multiply(const shardmix_matrix *matrix, const float *x, int64_t num_tokens,
                          float *out) {
    if (!is_valid(matrix) || !x || !out || num_tokens < 1) return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] {
        static thread_local TokenMemory memory;
        ThreadTeam &team = ThreadTeam::of_process();
        auto held = team.hold();
        memory.reserve(*matrix, num_tokens, team.num_threads());
        PreparedTokens tokens = memory.view(*matrix, num_tokens);
        Phase to_prepare, to_multiply;
        auto work = [&] {
            share_tokens(team, to_prepare, num_tokens, [&](int64_t token) {
                const float *values = x + token * matrix->num_columns;
                if (!tokens.are_quantized())
                    std::memcpy(tokens.values(token), values,
                                (size_t)matrix->num_columns * sizeof(float));
                tokens.prepare(token, values);
            });
            share_product(team, to_multiply, *matrix, tokens, out, nullptr);
        };
        run_on(team, work);
    });
}

double shardmix_measure_read_bandwidth(int64_t num_bytes, int64_t num_passes) {
    constexpr int64_t kPiece = 1 << 20;
    num_bytes = num_bytes / kPiece * kPiece;
    if (num_bytes < kPiece || num_passes < 1) return 0.0;
    char *memory = (char *)std::malloc((size_t)num_bytes);
    if (!memory) return 0.0;
    std::memset(memory, 1, (size_t)num_bytes);
    std::atomic<uint32_t> total{0};
    double best = 0.0;
    ThreadTeam &team = ThreadTeam::of_process();
    for (int64_t pass = 0; pass < num_passes; ++pass) {
        Phase phase;
        auto work = [&] {
            team.share(phase, num_bytes, kPiece, [&](int64_t first, int64_t end, int64_t) {
                total += kernels().read(memory + first, end - first);
            });
        };
        auto start = std::chrono::steady_clock::now();
        run_on(team, work);
        std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        double rate = (double)num_bytes / elapsed.count();
        if (rate > best) best = rate;
    }
    std::free(memory);
    // The sums are used, or the compiler would read nothing: every byte is 1.
    uint32_t expected = (uint32_t)(num_bytes / 4) * 0x01010101u * (uint32_t)num_passes;
    return total == expected ? best : 0.0;
}
