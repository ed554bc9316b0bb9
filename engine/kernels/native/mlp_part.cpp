// The MLP half of a layer, and the output head, for generated tokens.

#include <cstring>

#include "scratch.h"
#include "thread_team.h"

namespace shardmix {
namespace {

struct MlpScratch {
    PreparedTokens inputs;
    PreparedTokens gated;
    Buffer<float> gate_up;
};

// Groups whose activation a thread computes at a time.
constexpr int64_t kGroupsAtATime = 8;

void prepare_input(const PreparedTokens &tokens, const float *x, const float *norm, double epsilon,
                   int64_t width, int64_t token) {
    const float *row = x + token * width;
    if (norm)
        kernels().rms_norm(row, norm, (float)epsilon, width, tokens.values(token));
    else
        std::memcpy(tokens.values(token), row, (size_t)width * sizeof(float));
    tokens.prepare(token);
}

// Groups [first, end) of a token: activation of the gate, times up, made ready for `down`.
void gate_groups(const shardmix_mlp_share &share, MlpScratch &scratch, int64_t token, int64_t first,
                 int64_t end) {
    const shardmix_matrix &down = *share.down;
    int64_t per_block = groups_of_block(down.block);
    const float *gate = scratch.gate_up.data() + token * share.gate_up->num_rows;
    for (int64_t g = first; g < end; ++g) {
        int64_t offset = g % per_block * kGroup, left = down.block - offset;
        int64_t column = g / per_block * down.block + offset;
        kernels().gate(gate + column, gate + down.num_columns + column,
                       left < kGroup ? left : kGroup, share.activation,
                       scratch.gated.values(token) + column);
    }
    scratch.gated.prepare(token, first, end);
}

void compute_mlp(const shardmix_mlp_share &share, const float *x, int64_t num_tokens, float *out) {
    static thread_local MlpScratch kept;
    MlpScratch &scratch = kept;
    const shardmix_matrix &gate_up = *share.gate_up, &down = *share.down;
    scratch.inputs.reserve(gate_up, num_tokens);
    scratch.gated.reserve(down, num_tokens);
    scratch.gate_up.reserve(num_tokens * gate_up.num_rows);
    ThreadTeam &team = ThreadTeam::of_process();
    Phase to_prepare, to_project, to_gate, to_output;
    int64_t pieces = (down.num_groups + kGroupsAtATime - 1) / kGroupsAtATime;
    auto work = [&] {
        team.share(to_prepare, num_tokens, 1, [&](int64_t t, int64_t) {
            prepare_input(scratch.inputs, x, share.norm, share.norm_epsilon, gate_up.num_columns, t);
        });
        team.share(to_project, num_panels(gate_up), panels_at_a_time(gate_up, team.num_threads()),
                   [&](int64_t first, int64_t end) {
                       kernels().multiply(gate_up, scratch.inputs.view(), first, end,
                                          scratch.gate_up.data());
                   });
        team.share(to_gate, num_tokens * pieces, 1, [&](int64_t n, int64_t) {
            int64_t first = n % pieces * kGroupsAtATime, end = first + kGroupsAtATime;
            gate_groups(share, scratch, n / pieces, first,
                        end < down.num_groups ? end : down.num_groups);
        });
        team.share(to_output, num_panels(down), panels_at_a_time(down, team.num_threads()),
                   [&](int64_t first, int64_t end) {
                       kernels().multiply(down, scratch.gated.view(), first, end, out);
                   });
    };
    run_on(team, work);
}

void compute_head(const shardmix_head_share &share, const float *x, int64_t num_tokens, float *out) {
    static thread_local PreparedTokens kept;
    PreparedTokens &inputs = kept;
    const shardmix_matrix &matrix = *share.matrix;
    inputs.reserve(matrix, num_tokens);
    ThreadTeam &team = ThreadTeam::of_process();
    Phase to_prepare, to_multiply;
    auto work = [&] {
        team.share(to_prepare, num_tokens, 1, [&](int64_t t, int64_t) {
            prepare_input(inputs, x, share.norm, share.norm_epsilon, matrix.num_columns, t);
        });
        team.share(
            to_multiply, num_panels(matrix), panels_at_a_time(matrix, team.num_threads()),
            [&](int64_t first, int64_t end) {
                kernels().multiply(matrix, inputs.view(), first, end, out);
                if (share.softcap == 0.0) return;
                int64_t row = first * kPanelRows, end_row = end * kPanelRows;
                if (end_row > matrix.num_rows) end_row = matrix.num_rows;
                for (int64_t t = 0; t < num_tokens; ++t)
                    kernels().softcap(out + t * matrix.num_rows + row, end_row - row,
                                      (float)share.softcap);
            });
    };
    run_on(team, work);
}

}  // namespace
}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_mlp_part(const shardmix_mlp_share *share, const float *x, int64_t num_tokens,
                          float *out) {
    if (!share || !x || !out || num_tokens < 1) return SHARDMIX_BAD_ARGUMENT;
    if (!is_valid(share->gate_up) || !is_valid(share->down)) return SHARDMIX_BAD_ARGUMENT;
    bool fits = share->gate_up->num_rows == 2 * share->down->num_columns &&
                share->gate_up->num_columns == share->down->num_rows;
    if (!fits) return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] { compute_mlp(*share, x, num_tokens, out); });
}

int64_t shardmix_head_part(const shardmix_head_share *share, const float *x, int64_t num_tokens,
                           float *out) {
    if (!share || !x || !out || num_tokens < 1 || !is_valid(share->matrix) || !share->norm)
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] { compute_head(*share, x, num_tokens, out); });
}
