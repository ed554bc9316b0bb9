// What the rows of one call share: the step's tokens, the stream that each row changes, and the
// memory between their phases.
//
// Every thread of the team walks through the same phases in the same order. What a phase writes is
// complete before the next one begins, so one piece of memory serves all rows in turn.

#ifndef SHARDMIX_STEP_H
#define SHARDMIX_STEP_H

#include "scratch.h"
#include "thread_team.h"

namespace shardmix {

struct Token {
    const shardmix_segment *segment;
    int64_t position;
};

// Tokens of one segment that follow each other, at most kBlockTokens.
struct Block {
    int64_t first_token;
    int64_t num_tokens;
};

// Grows, and is kept for the next call of the same thread.
struct StepMemory {
    TokenMemory inputs;        // of a row's first matrix
    TokenMemory middle;        // of its second
    Buffer<float> projected;   // [T, rows of the first matrix]
    Buffer<float> pieces;      // [threads, T, ...]: of it, that one thread goes on with itself
    Buffer<float> sums;        // [T, width]: what a row adds to the stream
    Buffer<Token> tokens;
    Buffer<Block> blocks;      // of prompts
    int64_t num_blocks = 0;
    Buffer<float> maxima;      // [parts or threads, H]: see AttentionUnit
    Buffer<float> weights;     // [parts or threads, H]
    Buffer<float> parts;       // [parts or threads, H, D]; for prompts [threads, block_memory]
    Buffer<float> highest;     // [T, H]: of the maxima of the parts that are joined
    Buffer<float> totals;      // [T, H]: of their weights
    Buffer<Phase> phases;

    // Fill in the tokens of a step and, of a prompt, its blocks. Throws std::bad_alloc.
    void lay_out(const shardmix_step &step);
};

struct Step {
    const shardmix_step &in;
    const shardmix_row *rows;
    int64_t num_rows;
    int64_t width;
    const float *x;     // [T, width] at the entry of the first row
    float *out;         // [T, width]: the stream, or the last row's part of the sum
    bool is_partial;    // the latter
    StepMemory &memory;
    ThreadTeam &team;
    const shardmix_matrix *head;  // what is read after the rows; null: not known

    // Where the products of a row's last matrix go.
    float *sums(int64_t row) const {
        return is_partial && row + 1 == num_rows ? out : memory.sums.data();
    }

    // Weights that this thread reads first for a row, or behind the last one; null: not known.
    const char *first_weights(int64_t row) const;

    // Add what the row before gives, if there is one: the stream of token t at the entry of `row`.
    const float *enter(int64_t row, int64_t t) const;
};

// Tokens of a stream, and where their logits go.
struct Head {
    const shardmix_head_share *share;  // null: nobody asks
    const float *stream;               // [T, width]
    const int64_t *tokens;             // [num_tokens] of the stream; null: all
    int64_t num_tokens;
    float *out;                        // [num_tokens, rows]
};

// Memory that the head needs, and its work on every thread of the team; two phases of its own.
void reserve_head(TokenMemory &memory, const Head &head, int64_t num_threads);
void work_head(ThreadTeam &team, const TokenMemory &memory, const Head &head, Phase *phases);

// Phases of a row, at most.
constexpr int64_t kRowPhases = 8;

// Memory that one row needs for a step.
void reserve_attention(const Step &step, const shardmix_attention_share &share);
void reserve_mlp(const Step &step, const shardmix_mlp_share &share);

// One row, on every thread of the team; `phases` are kRowPhases of its own.
void work_attention(const Step &step, int64_t row, Phase *phases);
void work_mlp(const Step &step, int64_t row, Phase *phases);

// As `Step::first_weights`.
const char *first_weights(const shardmix_mlp_share &share, const ThreadTeam &team);

bool is_valid_step(const shardmix_step &step);
bool is_consistent(const shardmix_attention_share &share, const shardmix_step &step);
bool is_consistent(const shardmix_mlp_share &share);
bool is_consistent(const shardmix_head_share &share);

// Panels [first, end) of a product, of every token; this thread reads `next` afterwards.
static inline void multiply_panels(const shardmix_matrix &matrix, const PreparedTokens &tokens,
                                   int64_t first, int64_t end, const Products &out,
                                   const char *next) {
    kernels().multiply(matrix, tokens.view(), first, end, out, next);
}
// The same, to [T, rows of the matrix].
static inline void multiply_panels(const shardmix_matrix &matrix, const PreparedTokens &tokens,
                                   int64_t first, int64_t end, float *out, const char *next) {
    multiply_panels(matrix, tokens, first, end, Products{out, matrix.num_rows, 0}, next);
}

// Each token once, and of many about as many as a line of the cache holds by one thread: what is
// prepared of neighbours lies side by side.
template <class Unit>
static inline void share_tokens(ThreadTeam &team, Phase &phase, int64_t num_tokens, Unit unit) {
    constexpr int64_t kLineTokens = 64 / sizeof(float);
    team.share(phase, num_tokens, num_tokens < 2 * kLineTokens ? 1 : kLineTokens,
               [&](int64_t first, int64_t end, int64_t) {
                   for (int64_t t = first; t < end; ++t) unit(t);
               });
}

// A product whose panels the threads share; each reads `after` when there are none left.
static inline void share_product(ThreadTeam &team, Phase &phase, const shardmix_matrix &matrix,
                                 const PreparedTokens &tokens, float *out, const char *after) {
    team.share(phase, num_panels(matrix), panels_at_a_time(num_panels(matrix), team.num_threads()),
               [&](int64_t first, int64_t end, int64_t next) {
                   multiply_panels(matrix, tokens, first, end, out,
                                   next == ThreadTeam::kNothing ? after : panel_at(matrix, next));
               });
}

// What this thread reads first in `share_product`.
static inline const char *first_weights(const shardmix_matrix &matrix, const ThreadTeam &team) {
    int64_t panels = num_panels(matrix);
    return panel_at(matrix, team.first_unit(panels, panels_at_a_time(panels, team.num_threads())));
}

}  // namespace shardmix

#endif
