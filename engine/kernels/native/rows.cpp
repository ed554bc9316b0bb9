// Rows of a stage one after another: one call for as many as follow each other on one device.

#include "step.h"

namespace shardmix {

const float *Step::enter(int64_t row, int64_t t) const {
    const float *before = (row > 1 ? out : x) + t * width;
    if (row == 0) return before;
    const shardmix_row &last = rows[row - 1];
    float *sum = memory.sums.data() + t * width, *after = out + t * width;
    if (last.attention && last.attention->output_bias)
        for (int64_t i = 0; i < width; ++i) sum[i] += last.attention->output_bias[i];
    if (last.post_norm)
        kernels().rms_norm(sum, last.post_norm, (float)last.norm_epsilon, width, sum);
    for (int64_t i = 0; i < width; ++i) after[i] = before[i] + sum[i];
    return after;
}

const char *Step::first_weights(int64_t row) const {
    if (row >= num_rows) return head ? shardmix::first_weights(*head, team) : nullptr;
    const shardmix_attention_share *attention = rows[row].attention;
    return attention ? shardmix::first_weights(*attention->qkv, team)
                     : shardmix::first_weights(*rows[row].mlp, team);
}

bool is_valid_step(const shardmix_step &step) {
    if (!step.segments || step.num_segments < 1) return false;
    int64_t total = 0;
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const shardmix_segment &segment = step.segments[s];
        if (segment.num_tokens < 1 || segment.first_position < 0) return false;
        total += segment.num_tokens;
    }
    return total == step.num_tokens;
}

void StepMemory::lay_out(const shardmix_step &step) {
    tokens.reserve(step.num_tokens);
    if (step.is_prompt) blocks.reserve(step.num_tokens / kBlockTokens + step.num_segments);
    num_blocks = 0;
    for (int64_t s = 0, n = 0; s < step.num_segments; ++s) {
        int64_t count = step.segments[s].num_tokens;
        // Blocks begin where their segments do.
        for (int64_t i = 0; i < count && step.is_prompt; i += kBlockTokens)
            blocks.data()[num_blocks++] = {n + i, i + kBlockTokens < count ? kBlockTokens : count - i};
        for (int64_t i = 0; i < count; ++i, ++n)
            tokens.data()[n] = {&step.segments[s], step.segments[s].first_position + i};
    }
}

namespace {

bool is_valid_row(const shardmix_row &row, const shardmix_step &step, int64_t width) {
    if (!row.attention == !row.mlp) return false;
    if (row.attention)
        return is_consistent(*row.attention, step) && row.attention->output->num_rows == width;
    return is_consistent(*row.mlp) && row.mlp->down->num_rows == width;
}

void finish(const Step &step, Phase &phase) {
    const shardmix_row &last = step.rows[step.num_rows - 1];
    const float *bias = last.attention ? last.attention->output_bias : nullptr;
    if (step.is_partial && !bias) return;
    step.team.share_each(phase, step.in.num_tokens, [&](int64_t t) {
        if (!step.is_partial)
            step.enter(step.num_rows, t);
        else
            for (int64_t i = 0; i < step.width; ++i) step.out[t * step.width + i] += bias[i];
    });
}

void compute(const Step &step, const Head &head) {
    StepMemory &memory = step.memory;
    auto held = step.team.hold();
    memory.lay_out(step.in);
    memory.sums.reserve(step.in.num_tokens * step.width);
    for (int64_t row = 0; row < step.num_rows; ++row) {
        if (step.rows[row].attention)
            reserve_attention(step, *step.rows[row].attention);
        else
            reserve_mlp(step, *step.rows[row].mlp);
    }
    if (head.share) reserve_head(memory.inputs, head, step.team.num_threads());
    // One to finish the rows, two for the head.
    int64_t num_phases = step.num_rows * kRowPhases + 3;
    Phase *phases = memory.phases.reserve(num_phases);
    for (int64_t i = 0; i < num_phases; ++i) new (phases + i) Phase;
    auto work = [&] {
        for (int64_t row = 0; row < step.num_rows; ++row) {
            if (step.rows[row].attention)
                work_attention(step, row, phases + row * kRowPhases);
            else
                work_mlp(step, row, phases + row * kRowPhases);
        }
        finish(step, phases[num_phases - 3]);
        if (head.share) work_head(step.team, memory.inputs, head, phases + num_phases - 2);
    };
    run_on(step.team, work);
}

}  // namespace
}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_rows(const shardmix_row *rows, int64_t num_rows, const shardmix_step *step,
                      int64_t width, const float *x, int64_t is_partial, float *out,
                      const shardmix_head_share *head, const int64_t *head_tokens,
                      int64_t num_head_tokens, float *logits) {
    if (!rows || !step || !x || !out || x == out || num_rows < 1 || width < 1)
        return SHARDMIX_BAD_ARGUMENT;
    if ((is_partial && (num_rows > 1 || head)) || !is_valid_step(*step)) return SHARDMIX_BAD_ARGUMENT;
    for (int64_t row = 0; row < num_rows; ++row)
        if (!is_valid_row(rows[row], *step, width)) return SHARDMIX_BAD_ARGUMENT;
    if (head) {
        if (!is_consistent(*head) || head->matrix->num_columns != width || !head_tokens || !logits)
            return SHARDMIX_BAD_ARGUMENT;
        if (num_head_tokens < 1) return SHARDMIX_BAD_ARGUMENT;
        for (int64_t n = 0; n < num_head_tokens; ++n)
            if (head_tokens[n] < 0 || head_tokens[n] >= step->num_tokens) return SHARDMIX_BAD_ARGUMENT;
    }
    return status_of([&] {
        static thread_local StepMemory memory;
        compute({*step, rows, num_rows, width, x, out, is_partial != 0, memory,
                 ThreadTeam::of_process(), head ? head->matrix : nullptr},
                {head, out, head_tokens, num_head_tokens, logits});
    });
}
