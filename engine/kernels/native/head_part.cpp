// The output head: final norm and logits.

#include "step.h"

namespace shardmix {

void reserve_head(TokenMemory &memory, const Head &head, int64_t num_threads) {
    memory.reserve(*head.share->matrix, head.num_tokens, num_threads);
}

void work_head(ThreadTeam &team, const TokenMemory &memory, const Head &head, Phase *phases) {
    const shardmix_head_share &share = *head.share;
    const shardmix_matrix &matrix = *share.matrix;
    int64_t num_tokens = head.num_tokens, panels = num_panels(matrix);
    PreparedTokens inputs = memory.view(matrix, num_tokens);
    share_tokens(team, phases[0], num_tokens, [&](int64_t n) {
        const float *row = head.stream + (head.tokens ? head.tokens[n] : n) * matrix.num_columns;
        float *values = inputs.values_of(n, team.rank());
        kernels().rms_norm(row, share.norm, (float)share.norm_epsilon, matrix.num_columns, values);
        inputs.prepare(n, values);
    });
    team.share(phases[1], panels, panels_at_a_time(panels, team.num_threads()),
               [&](int64_t first, int64_t end, int64_t next) {
                   multiply_panels(matrix, inputs, first, end, head.out,
                                   next == ThreadTeam::kNothing ? nullptr : panel_at(matrix, next));
                   if (share.softcap == 0.0) return;
                   int64_t row = first * kPanelRows, end_row = end * kPanelRows;
                   if (end_row > matrix.num_rows) end_row = matrix.num_rows;
                   for (int64_t n = 0; n < num_tokens; ++n)
                       kernels().softcap(head.out + n * matrix.num_rows + row, end_row - row,
                                         (float)share.softcap);
               });
}

bool is_consistent(const shardmix_head_share &share) {
    return is_valid(share.matrix) && share.norm;
}

}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_head_part(const shardmix_head_share *share, const float *x, int64_t num_tokens,
                           float *out) {
    if (!share || !x || !out || num_tokens < 1 || !is_consistent(*share))
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] {
        static thread_local TokenMemory kept;
        TokenMemory &memory = kept;  // The caller's: named directly it would be each thread's own.
        Head head{share, x, nullptr, num_tokens, out};
        ThreadTeam &team = ThreadTeam::of_process();
        auto held = team.hold();
        reserve_head(memory, head, team.num_threads());
        Phase phases[2];
        auto work = [&] { work_head(team, memory, head, phases); };
        run_on(team, work);
    });
}
