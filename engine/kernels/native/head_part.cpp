// The output head: final norm and logits.

#include "step.h"

namespace shardmix {
namespace {

void compute_head(const shardmix_head_share &share, const float *x, int64_t num_tokens, float *out) {
    static thread_local TokenMemory memory;
    const shardmix_matrix &matrix = *share.matrix;
    memory.reserve(matrix, num_tokens);
    PreparedTokens inputs = memory.view(matrix, num_tokens);
    ThreadTeam &team = ThreadTeam::of_process();
    Phase to_prepare, to_multiply;
    auto work = [&] {
        team.share(to_prepare, num_tokens, 1, [&](int64_t t, int64_t) {
            kernels().rms_norm(x + t * matrix.num_columns, share.norm, (float)share.norm_epsilon,
                               matrix.num_columns, inputs.values(t));
            inputs.prepare(t);
        });
        int64_t panels = num_panels(matrix);
        team.share(to_multiply, panels, panels_at_a_time(panels, team.num_threads()),
                   [&](int64_t first, int64_t end) {
                       multiply_panels(matrix, inputs, first, end, out);
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

int64_t shardmix_head_part(const shardmix_head_share *share, const float *x, int64_t num_tokens,
                           float *out) {
    if (!share || !x || !out || num_tokens < 1 || !is_valid(share->matrix) || !share->norm)
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] { compute_head(*share, x, num_tokens, out); });
}
