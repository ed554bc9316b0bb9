// The attention half of a layer for generated tokens: everything between two exchanges.

#include <cmath>

#include "scratch.h"
#include "short_floats.h"
#include "thread_team.h"

namespace shardmix {
namespace {

// Where a token's keys and values go, and what it sees.
struct Token {
    const shardmix_segment *segment;
    int64_t position;
    int64_t first_visible;
    int64_t first_chunk;  // index of the first of its chunks among those of all tokens
    int64_t num_chunks;
};

struct AttentionScratch {
    PreparedTokens inputs;
    PreparedTokens attended;
    Buffer<float> projected;
    Buffer<Token> tokens;
    Buffer<int64_t> chunk_tokens;  // [chunks of all tokens]: whose it is
    Buffer<float> maxima;          // [chunks, H]
    Buffer<float> sums;            // [chunks, H]
    Buffer<float> outputs;         // [chunks, H, D]
};

struct Call {
    const shardmix_attention_share &share;
    const float *x;
    int64_t num_tokens;
    const float *cos;
    const float *sin;
    const float *query_scale;
    float *out;
    AttentionScratch &scratch;
    ThreadTeam &team;
    int64_t num_chunks = 0;
    Phase to_norm{}, to_project{}, to_place{}, to_attend{}, to_join{}, to_output{}, to_add{};

    int64_t num_columns() const { return share.qkv->num_rows; }

    int64_t first_visible(int64_t position) const {
        int64_t first = position - share.reach + 1;
        if (share.chunk) {
            int64_t start = position / share.chunk * share.chunk;
            if (start > first) first = start;
        }
        return first > 0 ? first : 0;
    }

    // Chunks begin at absolute positions: how a token's sums are cut depends on nothing else.
    void lay_out(const shardmix_segment *segments, int64_t num_segments) {
        Token *tokens = scratch.tokens.reserve(num_tokens);
        int64_t n = 0;
        for (int64_t s = 0; s < num_segments; ++s)
            for (int64_t i = 0; i < segments[s].num_tokens; ++i, ++n) {
                int64_t position = segments[s].first_position + i, first = first_visible(position);
                int64_t count = position / kChunk - first / kChunk + 1;
                tokens[n] = {&segments[s], position, first, num_chunks, count};
                num_chunks += count;
            }
        int64_t *owners = scratch.chunk_tokens.reserve(num_chunks);
        for (n = 0; n < num_tokens; ++n)
            for (int64_t c = 0; c < tokens[n].num_chunks; ++c) owners[tokens[n].first_chunk + c] = n;
        scratch.inputs.reserve(*share.qkv, num_tokens);
        scratch.attended.reserve(*share.output, num_tokens);
        scratch.projected.reserve(num_tokens * num_columns());
        scratch.maxima.reserve(num_chunks * share.num_heads);
        scratch.sums.reserve(num_chunks * share.num_heads);
        scratch.outputs.reserve(num_chunks * share.num_heads * share.head_width);
    }

    void work() {
        team.share(to_norm, num_tokens, 1, [&](int64_t t, int64_t) {
            int64_t width = share.qkv->num_columns;
            kernels().rms_norm(x + t * width, share.norm, (float)share.norm_epsilon, width,
                               scratch.inputs.values(t));
            scratch.inputs.prepare(t);
        });
        multiply(to_project, *share.qkv, scratch.inputs, scratch.projected.data());
        team.share(to_place, num_tokens, 1, [&](int64_t t, int64_t) { place(t); });
        team.share(to_attend, num_chunks * share.num_kv_heads, 1, [&](int64_t n, int64_t) {
            attend(n / share.num_kv_heads, n % share.num_kv_heads);
        });
        team.share(to_join, num_tokens, 1, [&](int64_t t, int64_t) { join(t); });
        multiply(to_output, *share.output, scratch.attended, out);
        if (!share.output_bias) return;
        team.share(to_add, num_tokens, 1, [&](int64_t t, int64_t) {
            int64_t width = share.output->num_rows;
            for (int64_t i = 0; i < width; ++i) out[t * width + i] += share.output_bias[i];
        });
    }

    void multiply(Phase &phase, const shardmix_matrix &matrix, const PreparedTokens &tokens,
                  float *products) {
        team.share(phase, num_panels(matrix), panels_at_a_time(matrix, team.num_threads()),
                   [&](int64_t first, int64_t end) {
                       kernels().multiply(matrix, tokens.view(), first, end, products);
                   });
    }

    // Bias, norm and rotation of a token's heads; its keys and values go into the cache.
    void place(int64_t t) {
        int64_t width = share.head_width;
        float *heads = scratch.projected.data() + t * num_columns();
        if (share.qkv_bias)
            for (int64_t i = 0; i < num_columns(); ++i) heads[i] += share.qkv_bias[i];
        for (int64_t h = 0; h < share.num_heads; ++h) {
            float *query = heads + h * width;
            rotate(query, t, share.q_norm);
            float scale = (float)share.scale * (query_scale ? query_scale[t] : 1.0f);
            for (int64_t d = 0; d < width; ++d) query[d] *= scale;
        }
        const Token &token = scratch.tokens.data()[t];
        const shardmix_segment &segment = *token.segment;
        float *keys = heads + share.num_heads * width, *values = keys + share.num_kv_heads * width;
        for (int64_t k = 0; k < share.num_kv_heads; ++k) {
            rotate(keys + k * width, t, share.k_norm);
            int64_t at = (k * segment.capacity + token.position % segment.capacity) * width;
            keep(keys + k * width, segment.keys, at);
            keep(values + k * width, segment.values, at);
        }
    }

    void rotate(float *head, int64_t t, const float *norm) const {
        int64_t width = share.head_width, half = width / 2;
        float epsilon = (float)share.norm_epsilon;
        if (norm) kernels().rms_norm(head, norm, epsilon, width, head);
        if (share.rope_layout == SHARDMIX_NO_ROPE) return;
        const float *c = cos + t * half, *s = sin + t * half;
        bool is_half = share.rope_layout == SHARDMIX_HALF;
        for (int64_t i = 0; i < half; ++i) {
            float *a = is_half ? head + i : head + 2 * i, *b = is_half ? a + half : a + 1;
            float first = *a, second = *b;
            *a = first * c[i] - second * s[i];
            *b = second * c[i] + first * s[i];
        }
        if (share.has_l2_norm) kernels().rms_norm(head, nullptr, epsilon, width, head);
    }

    void keep(const float *values, void *cache, int64_t at) const {
        for (int64_t d = 0; d < share.head_width; ++d) {
            if (share.cache_dtype == SHARDMIX_FLOAT32)
                ((float *)cache)[at + d] = values[d];
            else if (share.cache_dtype == SHARDMIX_FLOAT16)
                ((uint16_t *)cache)[at + d] = to_float16(values[d]);
            else
                ((uint16_t *)cache)[at + d] = to_bfloat16(values[d]);
        }
    }

    // The query heads of one KV head over one chunk of positions.
    void attend(int64_t chunk, int64_t kv_head) {
        int64_t t = scratch.chunk_tokens.data()[chunk], width = share.head_width;
        const Token &token = scratch.tokens.data()[t];
        int64_t number = token.first_visible / kChunk + chunk - token.first_chunk;
        int64_t first = number * kChunk, end = first + kChunk;
        int64_t head = share.first_heads[kv_head], row = chunk * share.num_heads + head;
        int64_t value_bytes = share.cache_dtype == SHARDMIX_FLOAT32 ? 4 : 2;
        int64_t offset = kv_head * token.segment->capacity * width * value_bytes;
        AttentionUnit unit;
        unit.queries = scratch.projected.data() + t * num_columns() + head * width;
        unit.num_heads = share.first_heads[kv_head + 1] - head;
        unit.head_width = width;
        unit.keys = (const char *)token.segment->keys + offset;
        unit.values = (const char *)token.segment->values + offset;
        unit.cache_dtype = share.cache_dtype;
        unit.capacity = token.segment->capacity;
        unit.first_position = first > token.first_visible ? first : token.first_visible;
        unit.end_position = end < token.position + 1 ? end : token.position + 1;
        unit.maxima = scratch.maxima.data() + row;
        unit.sums = scratch.sums.data() + row;
        unit.outputs = scratch.outputs.data() + row * width;
        kernels().attend(unit);
    }

    // One softmax out of those of a token's chunks.
    void join(int64_t t) {
        const Token &token = scratch.tokens.data()[t];
        int64_t width = share.head_width, num_heads = share.num_heads;
        float *attended = scratch.attended.values(t);
        for (int64_t h = 0; h < num_heads; ++h) {
            int64_t first = token.first_chunk * num_heads + h;
            float maximum = scratch.maxima.data()[first], sum = 0.0f;
            for (int64_t c = 1; c < token.num_chunks; ++c) {
                float other = scratch.maxima.data()[first + c * num_heads];
                if (other > maximum) maximum = other;
            }
            float *target = attended + h * width;
            for (int64_t d = 0; d < width; ++d) target[d] = 0.0f;
            for (int64_t c = 0; c < token.num_chunks; ++c) {
                int64_t row = first + c * num_heads;
                float weight = std::exp(scratch.maxima.data()[row] - maximum);
                const float *part = scratch.outputs.data() + row * width;
                sum += weight * scratch.sums.data()[row];
                for (int64_t d = 0; d < width; ++d) target[d] += weight * part[d];
            }
            for (int64_t d = 0; d < width; ++d) target[d] /= sum;
        }
        scratch.attended.prepare(t);
    }
};

bool is_consistent(const shardmix_attention_share &share, const shardmix_segment *segments,
                   int64_t num_segments, int64_t num_tokens, bool has_angles) {
    if (!is_valid(share.qkv) || !is_valid(share.output) || !share.norm || !share.first_heads)
        return false;
    int64_t num_heads = share.num_heads, num_kv = share.num_kv_heads, width = share.head_width;
    if (num_heads < 1 || num_kv < 1 || width < 1 || share.reach < 1 || share.chunk < 0) return false;
    if (share.qkv->num_rows != (num_heads + 2 * num_kv) * width) return false;
    if (share.output->num_columns != num_heads * width) return false;
    if (share.output->num_rows != share.qkv->num_columns) return false;
    if (share.rope_layout != SHARDMIX_NO_ROPE && (!has_angles || width % 2)) return false;
    if (share.first_heads[0] != 0 || share.first_heads[num_kv] != num_heads) return false;
    int64_t total = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        const shardmix_segment &segment = segments[s];
        if (!segment.keys || !segment.values || segment.num_tokens < 1) return false;
        if (segment.first_position < 0 || segment.capacity < 1) return false;
        // What the first new token sees must not be overwritten by the last.
        int64_t end = segment.first_position + segment.num_tokens;
        int64_t needed = share.reach - 1 + segment.num_tokens;
        if (segment.capacity < (end < needed ? end : needed)) return false;
        total += segment.num_tokens;
    }
    return total == num_tokens;
}

}  // namespace
}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_attention_part(const shardmix_attention_share *share,
                                const shardmix_segment *segments, int64_t num_segments,
                                const float *x, int64_t num_tokens, const float *cos,
                                const float *sin, const float *query_scale, float *out) {
    if (!share || !segments || !x || !out || num_segments < 1) return SHARDMIX_BAD_ARGUMENT;
    if (!is_consistent(*share, segments, num_segments, num_tokens, cos && sin))
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] {
        static thread_local AttentionScratch scratch;
        ThreadTeam &team = ThreadTeam::of_process();
        Call call{*share, x, num_tokens, cos, sin, query_scale, out, scratch, team};
        call.lay_out(segments, num_segments);
        auto work = [&] { call.work(); };
        run_on(team, work);
    });
}
