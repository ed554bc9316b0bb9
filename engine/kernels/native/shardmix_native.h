// The C interface of the native kernels, as `engine/kernels/native_library.py` mirrors it.
//
// In: pointers to contiguous memory of the caller, whose sizes the caller has checked. Out: float32
// results in the caller's memory. Nothing here knows Python or Torch, keeps a pointer after a call,
// or throws: functions return a `shardmix_status`.
//
// Letters: T new tokens, N rows, K columns, G groups of 32 columns, H query heads, D head width.

#ifndef SHARDMIX_NATIVE_H
#define SHARDMIX_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define SHARDMIX_EXPORT __declspec(dllexport)
#else
#define SHARDMIX_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum shardmix_status {
    SHARDMIX_OK = 0,
    SHARDMIX_BAD_ARGUMENT = 1,
    SHARDMIX_OUT_OF_MEMORY = 2,
};

enum shardmix_format {
    SHARDMIX_INT4 = 0,
    SHARDMIX_INT8 = 1,
    SHARDMIX_BFLOAT16 = 2,
    SHARDMIX_SYMMETRIC_INT4 = 3,  // int4 whose minimum is -8 times its scale
};
enum shardmix_float { SHARDMIX_FLOAT32 = 0, SHARDMIX_FLOAT16 = 1, SHARDMIX_BF16 = 2 };
enum shardmix_activation { SHARDMIX_SILU = 0, SHARDMIX_GELU_TANH = 1 };
enum shardmix_rope_layout { SHARDMIX_NO_ROPE = 0, SHARDMIX_HALF = 1, SHARDMIX_ADJACENT = 2 };

// Every field is 8 bytes wide, so that no compiler pads and no mirror can be off by an alignment.

// A packed matrix; `block` columns are padded together to whole groups of 32.
typedef struct {
    int64_t format;
    int64_t num_rows;
    int64_t num_columns;
    int64_t block;
    int64_t num_groups;
    const void *panels;
} shardmix_matrix;

// A device's heads of one layer.
typedef struct {
    const shardmix_matrix *qkv;
    const shardmix_matrix *output;
    const float *norm;
    const float *qkv_bias;       // null: none
    const float *output_bias;    // null: none
    const float *q_norm;         // float32 [D]; null: heads are not normalised with a weight
    const float *k_norm;
    const int64_t *first_heads;  // [num_kv_heads + 1]: KV head k serves heads [first[k], first[k + 1])
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_width;
    int64_t place;               // of its layer among the places of a slot
    int64_t rope;                // which of the step's tables
    int64_t rope_layout;
    int64_t has_l2_norm;         // normalise rotated heads without a weight
    int64_t reach;               // positions that a query sees, its own included
    int64_t chunk;               // and only in the same chunk of so many positions; 0: no chunks
    int64_t cache_dtype;
    double norm_epsilon;
    double scale;                // factor of q . k
} shardmix_attention_share;

// The ring that keys and values [num_kv_heads, capacity, D] of a slot and a layer are in.
typedef struct {
    void *keys;
    void *values;
    int64_t capacity;
} shardmix_place;

// New tokens of one slot.
typedef struct {
    const shardmix_place *places;
    int64_t num_places;
    int64_t first_position;
    int64_t num_tokens;
} shardmix_segment;

// New tokens of all slots; those of a segment follow those of the one before.
typedef struct {
    const shardmix_segment *segments;
    int64_t num_segments;
    int64_t num_tokens;
    const float *const *cos;   // [num_ropes], each [T, D / 2]
    const float *const *sin;
    int64_t num_ropes;
    const float *query_scale;  // [T], of layers without RoPE; null: none
    int64_t is_prompt;         // tokens that follow each other attend together
} shardmix_step;

typedef struct {
    const shardmix_matrix *gate_up;  // the gate's rows, then as many of up
    const shardmix_matrix *down;
    const float *norm;
    int64_t activation;
    double norm_epsilon;
} shardmix_mlp_share;

// A row of a plan: one of the two halves of a layer; the other is null.
typedef struct {
    const shardmix_attention_share *attention;
    const shardmix_mlp_share *mlp;
    const float *post_norm;  // of the row's sum, before it is added to the stream; null: none
    double norm_epsilon;
} shardmix_row;

typedef struct {
    const shardmix_matrix *matrix;
    const float *norm;
    double norm_epsilon;
    double softcap;  // 0: none
} shardmix_head_share;

// Hash of the sources that this library was built from.
SHARDMIX_EXPORT const char *shardmix_source_hash(void);

// Instruction sets, best first: name of the n-th, null past the last; whether this machine runs it.
SHARDMIX_EXPORT const char *shardmix_instruction_set(int64_t index);
SHARDMIX_EXPORT int64_t shardmix_can_run(int64_t index);
// Use the n-th from now on; the best that can run until then.
SHARDMIX_EXPORT int64_t shardmix_select(int64_t index);
SHARDMIX_EXPORT int64_t shardmix_selected(void);

// Compute with so many threads, the caller included. Returns how many there are.
SHARDMIX_EXPORT int64_t shardmix_set_num_threads(int64_t num_threads);

// Bytes that a packed matrix takes.
SHARDMIX_EXPORT int64_t shardmix_packed_bytes(const shardmix_matrix *matrix);
// Interleave rows. `quants`: uint8 [N, G, 16], int8 [N, G, 32], or bfloat16 [N, K].
// `scales`, `minimums`: float16 [N, G]; null where the format has none.
SHARDMIX_EXPORT int64_t shardmix_pack(const shardmix_matrix *matrix, const void *quants,
                                      const uint16_t *scales, const uint16_t *minimums,
                                      void *panels);
// Rows [first_row, end_row) as [rows, K]; first_row is a multiple of 16.
SHARDMIX_EXPORT int64_t shardmix_dequantize(const shardmix_matrix *matrix, int64_t first_row,
                                            int64_t end_row, int64_t is_bfloat16, void *out);
// out [T, N] = x [T, K] @ W.T
SHARDMIX_EXPORT int64_t shardmix_multiply(const shardmix_matrix *matrix, const float *x,
                                          int64_t num_tokens, float *out);

// The stream [T, width] after all rows. If `is_partial`, with one row: what this share of it adds to
// the stream. Keys and values of the tokens are written. `out` is not `x`. If `head` is not null, its
// logits [num_head_tokens, rows] of these tokens of `out`, too; not with a partial sum.
SHARDMIX_EXPORT int64_t shardmix_rows(const shardmix_row *rows, int64_t num_rows,
                                      const shardmix_step *step, int64_t width, const float *x,
                                      int64_t is_partial, float *out,
                                      const shardmix_head_share *head, const int64_t *head_tokens,
                                      int64_t num_head_tokens, float *logits);
// What lies between the two products of an attention half: biases, norms, rotations, the new keys and
// values into the cache, attention. `projected` [T, rows of qkv] is changed; `attended` is [T, H D].
// For prompts.
SHARDMIX_EXPORT int64_t shardmix_attend(const shardmix_attention_share *share,
                                        const shardmix_step *step, float *projected,
                                        float *attended);
// Logits [T, rows] of the stream x [T, width].
SHARDMIX_EXPORT int64_t shardmix_head_part(const shardmix_head_share *share, const float *x,
                                           int64_t num_tokens, float *out);

// The largest of `count` values and where they are, descending; of equal ones the first comes first,
// and before all what is no number. 1 <= num_wanted <= count.
SHARDMIX_EXPORT int64_t shardmix_largest(const float *values, int64_t count, int64_t num_wanted,
                                         int64_t *indices, float *largest);
// log(sum of e ** (value / temperature)), as exact as doubles are; temperature > 0.
SHARDMIX_EXPORT double shardmix_log_sum_exp(const float *values, int64_t count, double temperature);

// Bytes per second at which all threads together read memory once; 0 where there is none left.
SHARDMIX_EXPORT double shardmix_measure_read_bandwidth(int64_t num_bytes, int64_t num_passes);

#ifdef __cplusplus
}
#endif

#endif
