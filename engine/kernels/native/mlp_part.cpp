// The MLP half of a layer: everything between two exchanges.

#include "step.h"

namespace shardmix {
namespace {

// Columns whose activation is computed where their products are: a group of two panels.
constexpr int64_t kUnitPanels = kGroup / kPanelRows;
// Groups whose activation a thread computes at a time, where it is computed afterwards.
constexpr int64_t kGroupsAtATime = 8;
// Products that a core's second cache keeps beside the activations that they are made from.
constexpr int64_t kPieceBytes = 256 << 10;

// Whether panels of the gate and of up, and groups of `down`, have the same columns.
bool is_aligned(const shardmix_mlp_share &share) { return share.down->block % kGroup == 0; }

// Groups whose products are gated together by the thread that made them, at most; and their memory.
int64_t groups_of_piece(const shardmix_mlp_share &share, int64_t num_tokens) {
    int64_t most = kPieceBytes / (2 * kGroup * num_tokens * (int64_t)sizeof(float));
    return std::min(std::max<int64_t>(most, 1), share.down->num_groups);
}
int64_t piece_size(int64_t num_groups, int64_t num_tokens) {
    return 2 * kGroup * num_groups * num_tokens;
}

struct MlpRow {
    const Step &step;
    const shardmix_mlp_share &share;
    PreparedTokens inputs;
    PreparedTokens gated;
    float *projected;

    MlpRow(const Step &step, const shardmix_mlp_share &share)
        : step(step),
          share(share),
          inputs(step.memory.inputs.view(*share.gate_up, step.in.num_tokens)),
          gated(step.memory.middle.view(*share.down, step.in.num_tokens)),
          projected(step.memory.projected.data()) {}

    void work(int64_t row, Phase *phases) const {
        int64_t num_tokens = step.in.num_tokens, num_groups = share.down->num_groups;
        ThreadTeam &team = step.team;
        share_tokens(team, phases[0], num_tokens, [&](int64_t t) {
            float *values = inputs.values_of(t, team.rank());
            kernels().rms_norm(step.enter(row, t), share.norm, (float)share.norm_epsilon, step.width,
                               values);
            inputs.prepare(t, values);
        });
        if (is_aligned(share)) {
            team.share(phases[1], num_groups, panels_at_a_time(num_groups, team.num_threads()),
                       [&](int64_t first, int64_t end, int64_t next) {
                           project_and_gate(first, end, next);
                       });
        } else {
            share_product(team, phases[1], *share.gate_up, inputs, projected,
                          first_weights(*share.down, team));
            int64_t pieces = (num_groups + kGroupsAtATime - 1) / kGroupsAtATime;
            team.share_each(phases[2], num_tokens * pieces, [&](int64_t n) {
                int64_t first = n % pieces * kGroupsAtATime, end = first + kGroupsAtATime;
                gate(n / pieces, first, end < num_groups ? end : num_groups);
            });
        }
        share_product(team, phases[3], *share.down, gated, step.sums(row),
                      step.first_weights(row + 1));
    }

    // Groups [first, end) of all tokens, as many at a time as stay in the cache until they are gated.
    void project_and_gate(int64_t first, int64_t end, int64_t next) const {
        const shardmix_matrix &gate_up = *share.gate_up;
        const char *after = next == ThreadTeam::kNothing ? first_weights(*share.down, step.team)
                                                         : panel_at(gate_up, next * kUnitPanels);
        int64_t num_tokens = step.in.num_tokens, most = groups_of_piece(share, num_tokens);
        float *piece = step.memory.pieces.data() + step.team.rank() * piece_size(most, num_tokens);
        int64_t up = share.down->num_columns;
        for (int64_t g = first; g < end; g += most) {
            int64_t stop = g + most < end ? g + most : end;
            int64_t column = g * kGroup, columns = (stop - g) * kGroup, stride = 2 * columns;
            multiply_panels(gate_up, inputs, g * kUnitPanels, stop * kUnitPanels,
                            Products{piece, stride, column},
                            panel_at(gate_up, (up + column) / kPanelRows));
            multiply_panels(gate_up, inputs, (up + column) / kPanelRows,
                            (up + column + columns) / kPanelRows,
                            Products{piece + columns, stride, up + column},
                            stop < end ? panel_at(gate_up, stop * kUnitPanels) : after);
            for (int64_t t = 0; t < num_tokens; ++t) {
                float *gates = piece + t * stride;
                float *values = gated.are_quantized() ? gates : gated.values(t) + column;
                kernels().gate(gates, gates + columns, columns, share.activation, values);
                gated.prepare(t, g, stop, values);
            }
        }
    }

    // Groups [first, end) of a token: activation of the gate, times up, made ready for `down`.
    void gate(int64_t t, int64_t first, int64_t end) const {
        const shardmix_matrix &down = *share.down;
        const float *gates = projected + t * share.gate_up->num_rows;
        int64_t start = first_column(first), count = first_column(end) - start;
        float *values = gated.values(t) + start;
        kernels().gate(gates + start, gates + down.num_columns + start, count, share.activation,
                       values);
        gated.prepare(t, first, end, values);
    }

    int64_t first_column(int64_t group) const {
        int64_t block = share.down->block, per_block = groups_of_block(block);
        return group / per_block * block + group % per_block * kGroup;
    }
};

}  // namespace

void reserve_mlp(const Step &step, const shardmix_mlp_share &share) {
    int64_t num_tokens = step.in.num_tokens, num_threads = step.team.num_threads();
    step.memory.inputs.reserve(*share.gate_up, num_tokens, num_threads);
    step.memory.middle.reserve(*share.down, num_tokens, num_threads);
    if (is_aligned(share))
        step.memory.pieces.reserve(num_threads *
                                   piece_size(groups_of_piece(share, num_tokens), num_tokens));
    else
        step.memory.projected.reserve(num_tokens * share.gate_up->num_rows);
}

void work_mlp(const Step &step, int64_t row, Phase *phases) {
    MlpRow(step, *step.rows[row].mlp).work(row, phases);
}

const char *first_weights(const shardmix_mlp_share &share, const ThreadTeam &team) {
    if (!is_aligned(share)) return first_weights(*share.gate_up, team);
    int64_t groups = share.down->num_groups;
    int64_t first = team.first_unit(groups, panels_at_a_time(groups, team.num_threads()));
    return panel_at(*share.gate_up, first * kUnitPanels);
}

bool is_consistent(const shardmix_mlp_share &share) {
    return is_valid(share.gate_up) && is_valid(share.down) && share.norm &&
           share.gate_up->num_rows == 2 * share.down->num_columns &&
           share.gate_up->num_columns == share.down->num_rows;
}

}  // namespace shardmix
