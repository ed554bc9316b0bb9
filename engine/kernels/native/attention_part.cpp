// The attention half of a layer: everything between two exchanges; and for prompts whose products are
// made elsewhere, what lies between these.

#include <cmath>

#include "step.h"

namespace shardmix {
namespace {

// Parts that one thread computes for a token and a KV head, before it is worth to share them out.
constexpr int64_t kPartsAlone = 2;

// What lies between the two products.
struct Heads {
    const shardmix_step &in;
    const shardmix_attention_share &share;
    StepMemory &memory;
    ThreadTeam &team;
    float *projected;  // [T, (H + 2 KV heads) D]; queries, keys and values are placed in it
    float *attended;   // [T, H D]
    int64_t num_tokens;
    int64_t max_parts;  // of any token
    bool is_split;      // parts of a token are computed apart, and then joined

    Heads(const shardmix_step &in, const shardmix_attention_share &share, StepMemory &memory,
          ThreadTeam &team, float *projected, float *attended)
        : in(in),
          share(share),
          memory(memory),
          team(team),
          projected(projected),
          attended(attended),
          num_tokens(in.num_tokens),
          max_parts(most_parts()),
          is_split(max_parts > kPartsAlone &&
                   num_tokens * share.num_kv_heads < 4 * team.num_threads()) {}

    void reserve() const {
        if (in.is_prompt) {
            int64_t each = block_memory(share.num_heads, share.head_width);
            memory.parts.reserve(team.num_threads() * each);
            return;
        }
        int64_t num_heads = num_tokens * share.num_heads;
        // Parts that are not split are joined by the thread that computes them.
        int64_t kept = is_split ? num_heads * max_parts : team.num_threads() * share.num_heads;
        memory.highest.reserve(num_heads);
        memory.totals.reserve(num_heads);
        memory.maxima.reserve(kept);
        memory.weights.reserve(kept);
        memory.parts.reserve(kept * share.head_width);
    }

    int64_t num_columns() const { return share.qkv->num_rows; }
    float *target(int64_t t) const { return attended + t * share.num_heads * share.head_width; }
    const Token &token(int64_t t) const { return memory.tokens.data()[t]; }

    int64_t first_visible(int64_t position) const {
        int64_t first = position - share.reach + 1;
        if (share.chunk) {
            int64_t start = position / share.chunk * share.chunk;
            if (start > first) first = start;
        }
        return first > 0 ? first : 0;
    }

    // Parts begin at absolute positions: how a token's sums are cut depends on nothing else.
    int64_t num_parts(int64_t position) const {
        return position / kChunk - first_visible(position) / kChunk + 1;
    }

    int64_t most_parts() const {
        int64_t most = 1;
        for (int64_t t = 0; t < num_tokens; ++t) {
            int64_t count = num_parts(token(t).position);
            if (count > most) most = count;
        }
        return most;
    }

    // Whether a token sees another one of the same step.
    bool has_runs() const { return in.num_segments < num_tokens; }

    // Three phases; `complete(t, kv_head)` once a KV head's query heads have attended.
    template <class Complete>
    void work(Phase *phases, Complete complete) const {
        int64_t kv_heads = share.num_kv_heads, units = num_tokens * kv_heads;
        bool is_placed_apart = is_split || has_runs();
        if (is_placed_apart)
            team.share_each(phases[0], units,
                            [&](int64_t n) { place(n / kv_heads, n % kv_heads); });
        if (is_split) {
            team.share_each(phases[1], units * max_parts, [&](int64_t n) {
                int64_t t = n / (kv_heads * max_parts), part = n % max_parts;
                if (part < num_parts(token(t).position))
                    attend(t, n / max_parts % kv_heads, part, t * max_parts + part);
            });
            team.share_each(phases[2], units, [&](int64_t n) {
                int64_t t = n / kv_heads, kv_head = n % kv_heads;
                for (int64_t part = 0; part < num_parts(token(t).position); ++part)
                    add_part(t, kv_head, part, t * max_parts + part);
                divide(t, kv_head);
                complete(t, kv_head);
            });
        } else {
            team.share_each(phases[1], units, [&](int64_t n) {
                int64_t t = n / kv_heads, kv_head = n % kv_heads;
                if (!is_placed_apart) place(t, kv_head);
                for (int64_t part = 0; part < num_parts(token(t).position); ++part) {
                    attend(t, kv_head, part, team.rank());
                    add_part(t, kv_head, part, team.rank());
                }
                divide(t, kv_head);
                complete(t, kv_head);
            });
        }
    }

    // The same for prompts, whose neighbours read the same positions; two phases.
    void work_blocks(Phase *phases) const {
        int64_t kv_heads = share.num_kv_heads;
        const Block *blocks = memory.blocks.data();
        team.share_each(phases[0], num_tokens * kv_heads,
                        [&](int64_t n) { place(n / kv_heads, n % kv_heads); });
        team.share_each(phases[1], memory.num_blocks * kv_heads,
                        [&](int64_t n) { attend_block(blocks[n / kv_heads], n % kv_heads); });
    }

    void attend_block(const Block &tokens, int64_t kv_head) const {
        int64_t width = share.head_width, head = share.first_heads[kv_head];
        const Token &first = token(tokens.first_token);
        int64_t first_visible[kBlockTokens];
        for (int64_t t = 0; t < tokens.num_tokens; ++t)
            first_visible[t] = this->first_visible(first.position + t);
        AttentionBlock block;
        block.queries = projected + tokens.first_token * num_columns() + head * width;
        block.query_stride = num_columns();
        block.num_tokens = tokens.num_tokens;
        block.num_heads = share.first_heads[kv_head + 1] - head;
        block.head_width = width;
        const shardmix_place &ring = first.segment->places[share.place];
        int64_t offset = kv_head * ring.capacity * width * value_bytes();
        block.keys = (const char *)ring.keys + offset;
        block.values = (const char *)ring.values + offset;
        block.cache_dtype = share.cache_dtype;
        block.capacity = ring.capacity;
        block.first_position = first.position;
        block.first_visible = first_visible;
        block.outputs = target(tokens.first_token) + head * width;
        block.output_stride = share.num_heads * width;
        block.memory = memory.parts.data() + team.rank() * block_memory(share.num_heads, width);
        kernels().attend_block(block);
    }

    // Bias, norm and rotation of a KV head and its query heads; its keys and values go into the cache.
    void place(int64_t t, int64_t kv_head) const {
        int64_t width = share.head_width, num_heads = share.num_heads;
        float *heads = projected + t * num_columns();
        int64_t first = share.first_heads[kv_head], end = share.first_heads[kv_head + 1];
        for (int64_t h = first; h < end; ++h) {
            float *query = with_bias(heads, h);
            rotate(query, t, share.q_norm);
            float scale = (float)share.scale;
            if (share.rope_layout == SHARDMIX_NO_ROPE && in.query_scale) scale *= in.query_scale[t];
            for (int64_t d = 0; d < width; ++d) query[d] *= scale;
        }
        float *key = with_bias(heads, num_heads + kv_head);
        float *value = with_bias(heads, num_heads + share.num_kv_heads + kv_head);
        rotate(key, t, share.k_norm);
        const shardmix_place &ring = token(t).segment->places[share.place];
        int64_t at = (kv_head * ring.capacity + token(t).position % ring.capacity) * width;
        int64_t offset = at * value_bytes();
        kernels().write_cached(key, width, share.cache_dtype, (char *)ring.keys + offset);
        kernels().write_cached(value, width, share.cache_dtype, (char *)ring.values + offset);
    }

    float *with_bias(float *heads, int64_t head) const {
        int64_t first = head * share.head_width;
        if (share.qkv_bias)
            for (int64_t d = 0; d < share.head_width; ++d) heads[first + d] += share.qkv_bias[first + d];
        return heads + first;
    }

    void rotate(float *head, int64_t t, const float *norm) const {
        int64_t width = share.head_width, half = width / 2;
        float epsilon = (float)share.norm_epsilon;
        if (norm) kernels().rms_norm(head, norm, epsilon, width, head);
        if (share.rope_layout == SHARDMIX_NO_ROPE) return;
        const float *c = in.cos[share.rope] + t * half, *s = in.sin[share.rope] + t * half;
        kernels().rotate(head, c, s, half, share.rope_layout == SHARDMIX_ADJACENT);
        if (share.has_l2_norm) kernels().rms_norm(head, nullptr, epsilon, width, head);
    }

    // The query heads of one KV head over one part of the positions; `at` is where it is kept.
    void attend(int64_t t, int64_t kv_head, int64_t part, int64_t at) const {
        int64_t width = share.head_width, position = token(t).position;
        int64_t visible = first_visible(position);
        int64_t first = (visible / kChunk + part) * kChunk, end = first + kChunk;
        int64_t head = share.first_heads[kv_head], kept = at * share.num_heads + head;
        const shardmix_place &ring = token(t).segment->places[share.place];
        int64_t offset = kv_head * ring.capacity * width * value_bytes();
        AttentionUnit unit;
        unit.queries = projected + t * num_columns() + head * width;
        unit.num_heads = share.first_heads[kv_head + 1] - head;
        unit.head_width = width;
        unit.keys = (const char *)ring.keys + offset;
        unit.values = (const char *)ring.values + offset;
        unit.cache_dtype = share.cache_dtype;
        unit.capacity = ring.capacity;
        unit.first_position = first > visible ? first : visible;
        unit.end_position = end < position + 1 ? end : position + 1;
        unit.next_keys = keys_after(t, kv_head, part);
        unit.maxima = memory.maxima.data() + kept;
        unit.sums = memory.weights.data() + kept;
        unit.outputs = memory.parts.data() + kept * width;
        kernels().attend(unit);
    }

    // Where the keys of the unit begin that comes after this one; null if none does.
    const void *keys_after(int64_t t, int64_t kv_head, int64_t part) const {
        int64_t position = token(t).position;
        if (part + 1 < num_parts(position))
            return keys_at(t, kv_head, (first_visible(position) / kChunk + part + 1) * kChunk);
        if (++kv_head == share.num_kv_heads) kv_head = 0, ++t;
        return t < num_tokens ? keys_at(t, kv_head, first_visible(token(t).position)) : nullptr;
    }

    const void *keys_at(int64_t t, int64_t kv_head, int64_t position) const {
        const shardmix_place &ring = token(t).segment->places[share.place];
        int64_t index = kv_head * ring.capacity + position % ring.capacity;
        return (const char *)ring.keys + index * share.head_width * value_bytes();
    }

    int64_t value_bytes() const { return share.cache_dtype == SHARDMIX_FLOAT32 ? 4 : 2; }

    // Join a part to those before it: one softmax over all of them.
    void add_part(int64_t t, int64_t kv_head, int64_t part, int64_t at) const {
        int64_t width = share.head_width, num_heads = share.num_heads;
        for (int64_t h = share.first_heads[kv_head]; h < share.first_heads[kv_head + 1]; ++h) {
            int64_t kept = at * num_heads + h;
            const float *values = memory.parts.data() + kept * width;
            float maximum = memory.maxima.data()[kept];
            float weight = memory.weights.data()[kept];
            float *target = this->target(t) + h * width;
            float &highest = memory.highest.data()[t * num_heads + h];
            float &total = memory.totals.data()[t * num_heads + h];
            if (part == 0) {
                for (int64_t d = 0; d < width; ++d) target[d] = values[d];
                highest = maximum;
                total = weight;
                continue;
            }
            float above = maximum > highest ? maximum : highest;
            float before = std::exp(highest - above), now = std::exp(maximum - above);
            for (int64_t d = 0; d < width; ++d) target[d] = before * target[d] + now * values[d];
            highest = above;
            total = before * total + now * weight;
        }
    }

    // Once all parts of a KV head are there.
    void divide(int64_t t, int64_t kv_head) const {
        int64_t width = share.head_width;
        for (int64_t h = share.first_heads[kv_head]; h < share.first_heads[kv_head + 1]; ++h) {
            float *target = this->target(t) + h * width;
            float total = memory.totals.data()[t * share.num_heads + h];
            for (int64_t d = 0; d < width; ++d) target[d] /= total;
        }
    }
};

struct Attention {
    const Step &step;
    const shardmix_attention_share &share;
    int64_t row;
    PreparedTokens inputs;
    PreparedTokens attended;
    Heads heads;

    Attention(const Step &step, const shardmix_attention_share &share, int64_t row)
        : step(step),
          share(share),
          row(row),
          inputs(step.memory.inputs.view(*share.qkv, step.in.num_tokens)),
          attended(step.memory.middle.view(*share.output, step.in.num_tokens)),
          heads(step.in, share, step.memory, step.team, step.memory.projected.data(),
                attended.values(0)) {}

    // Whether no group of the output matrix has columns of two heads.
    bool has_whole_groups() const { return begin_groups(*share.output, share.head_width); }

    void work(Phase *phases) const {
        ThreadTeam &team = step.team;
        share_tokens(team, phases[0], heads.num_tokens, [&](int64_t t) {
            float *values = inputs.values_of(t, team.rank());
            kernels().rms_norm(step.enter(row, t), share.norm, (float)share.norm_epsilon, step.width,
                               values);
            inputs.prepare(t, values);
        });
        share_product(team, phases[1], *share.qkv, inputs, heads.projected,
                      first_weights(*share.output, team));
        bool are_prepared = !step.in.is_prompt && has_whole_groups();
        if (step.in.is_prompt)
            heads.work_blocks(phases + 2);
        else
            heads.work(phases + 2, [&](int64_t t, int64_t kv_head) {
                if (!are_prepared) return;
                int64_t first = share.first_heads[kv_head] * share.head_width;
                int64_t end = share.first_heads[kv_head + 1] * share.head_width;
                attended.prepare(t, group_at(*share.output, first), group_at(*share.output, end),
                                 attended.values(t) + first);
            });
        if (!are_prepared)
            share_tokens(team, phases[5], heads.num_tokens,
                         [&](int64_t t) { attended.prepare(t, attended.values(t)); });
        share_product(team, phases[6], *share.output, attended, step.sums(row),
                      step.first_weights(row + 1));
    }
};

}  // namespace

void reserve_attention(const Step &step, const shardmix_attention_share &share) {
    StepMemory &memory = step.memory;
    int64_t num_tokens = step.in.num_tokens;
    memory.inputs.reserve(*share.qkv, num_tokens, step.team.num_threads());
    memory.middle.reserve(*share.output, num_tokens, step.team.num_threads());
    memory.projected.reserve(num_tokens * share.qkv->num_rows);
    Attention(step, share, 0).heads.reserve();
}

void work_attention(const Step &step, int64_t row, Phase *phases) {
    Attention(step, *step.rows[row].attention, row).work(phases);
}

bool is_consistent(const shardmix_attention_share &share, const shardmix_step &step) {
    if (!is_valid(share.qkv) || !is_valid(share.output) || !share.norm || !share.first_heads)
        return false;
    int64_t num_heads = share.num_heads, num_kv = share.num_kv_heads, width = share.head_width;
    if (num_heads < 1 || num_kv < 1 || width < 1 || share.reach < 1 || share.chunk < 0) return false;
    if (share.qkv->num_rows != (num_heads + 2 * num_kv) * width) return false;
    if (share.output->num_columns != num_heads * width) return false;
    if (share.output->num_rows != share.qkv->num_columns) return false;
    if (share.rope_layout != SHARDMIX_NO_ROPE) {
        if (share.rope < 0 || share.rope >= step.num_ropes || width % 2) return false;
        if (!step.cos[share.rope] || !step.sin[share.rope]) return false;
    }
    if (share.first_heads[0] != 0 || share.first_heads[num_kv] != num_heads) return false;
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const shardmix_segment &segment = step.segments[s];
        if (share.place < 0 || share.place >= segment.num_places) return false;
        const shardmix_place &ring = segment.places[share.place];
        if (!ring.keys || !ring.values || ring.capacity < 1) return false;
        // What the first new token sees must not be overwritten by the last.
        int64_t end = segment.first_position + segment.num_tokens;
        int64_t needed = share.reach - 1 + segment.num_tokens;
        if (ring.capacity < (end < needed ? end : needed)) return false;
    }
    return true;
}

}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_attend(const shardmix_attention_share *share, const shardmix_step *step,
                        float *projected, float *attended) {
    if (!share || !step || !projected || !attended) return SHARDMIX_BAD_ARGUMENT;
    if (!step->is_prompt || !is_valid_step(*step) || !is_consistent(*share, *step))
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] {
        static thread_local StepMemory memory;
        ThreadTeam &team = ThreadTeam::of_process();
        auto held = team.hold();
        memory.lay_out(*step);
        Heads heads(*step, *share, memory, team, projected, attended);
        heads.reserve();
        Phase phases[2];
        auto work = [&] { heads.work_blocks(phases); };
        run_on(team, work);
    });
}
