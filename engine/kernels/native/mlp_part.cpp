// The MLP half of a layer: everything between two exchanges.

#include "step.h"

namespace shardmix {
namespace {

// Columns whose activation is computed where their products are: a group of two panels.
constexpr int64_t kUnitPanels = kGroup / kPanelRows;
// Groups whose activation a thread computes at a time, where it is computed afterwards.
constexpr int64_t kGroupsAtATime = 8;

// Whether panels of the gate and of up, and groups of `down`, have the same columns.
bool is_aligned(const shardmix_mlp_share &share) { return share.down->block % kGroup == 0; }

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
            kernels().rms_norm(step.enter(row, t), share.norm, (float)share.norm_epsilon, step.width,
                               inputs.values(t));
            inputs.prepare(t);
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

    void project_and_gate(int64_t first, int64_t end, int64_t next) const {
        const shardmix_matrix &gate_up = *share.gate_up;
        int64_t up = share.down->num_columns / kPanelRows;
        int64_t first_panel = first * kUnitPanels, end_panel = end * kUnitPanels;
        multiply_panels(gate_up, inputs, first_panel, end_panel, projected,
                        panel_at(gate_up, up + first_panel));
        multiply_panels(gate_up, inputs, up + first_panel, up + end_panel, projected,
                        next == ThreadTeam::kNothing ? first_weights(*share.down, step.team)
                                                     : panel_at(gate_up, next * kUnitPanels));
        for (int64_t t = 0; t < step.in.num_tokens; ++t) gate(t, first, end);
    }

    // Groups [first, end) of a token: activation of the gate, times up, made ready for `down`.
    void gate(int64_t t, int64_t first, int64_t end) const {
        const shardmix_matrix &down = *share.down;
        int64_t per_block = groups_of_block(down.block);
        const float *gates = projected + t * share.gate_up->num_rows;
        for (int64_t g = first; g < end; ++g) {
            int64_t offset = g % per_block * kGroup, left = down.block - offset;
            int64_t column = g / per_block * down.block + offset;
            kernels().gate(gates + column, gates + down.num_columns + column,
                           left < kGroup ? left : kGroup, share.activation,
                           gated.values(t) + column);
        }
        gated.prepare(t, first, end);
    }
};

}  // namespace

void reserve_mlp(const Step &step, const shardmix_mlp_share &share) {
    step.memory.inputs.reserve(*share.gate_up, step.in.num_tokens);
    step.memory.middle.reserve(*share.down, step.in.num_tokens);
    step.memory.projected.reserve(step.in.num_tokens * share.gate_up->num_rows);
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
