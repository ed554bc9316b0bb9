// Compares every instruction set of a machine with the portable one, for machines where the Python
// tests cannot run. Prints a line for each difference; ends with 0 if there is none.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "shardmix_native.h"

namespace {

// Width, heads, KV heads, head width, MLP columns, vocabulary, tokens of a step: odd on purpose.
constexpr int64_t kWidth = 75, kHeads = 6, kKvHeads = 2, kHeadWidth = 20, kColumns = 43, kRows = 99;
// Columns of an MLP whose groups coincide with panels.
constexpr int64_t kEvenColumns = 64;
constexpr int64_t kTokens = 7, kCapacity = 64;
// Float32 sums differ in their order; int8 activations may round the other way, and a short cache.
constexpr double kExact = 2e-5, kRounded = 0.02;

uint32_t next_random() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float random_value() { return (float)(next_random() % 2001) / 1000.0f - 1.0f; }

struct Matrix {
    shardmix_matrix matrix;
    std::vector<char> panels;

    Matrix(int64_t format, int64_t rows, int64_t columns, int64_t block) {
        if (format == SHARDMIX_BFLOAT16) block = columns;
        int64_t groups = columns / block * ((block + 31) / 32);
        matrix = {format, rows, columns, block, groups, nullptr};
        panels.resize((size_t)shardmix_packed_bytes(&matrix));
        matrix.panels = panels.data();
        std::vector<uint8_t> quants((size_t)(rows * groups * 32));
        std::vector<uint16_t> values((size_t)(rows * columns)), scales((size_t)(rows * groups));
        for (uint8_t &quant : quants) quant = (uint8_t)next_random();
        for (uint16_t &scale : scales) scale = (uint16_t)(0x1c00 + next_random() % 0x400);
        for (uint16_t &value : values) {
            float weight = random_value() * 0.2f;
            std::memcpy(&value, (char *)&weight + 2, 2);
        }
        bool is_short = format == SHARDMIX_BFLOAT16;
        const void *source = is_short ? (const void *)values.data() : quants.data();
        if (shardmix_pack(&matrix, source, scales.data(), scales.data(), panels.data()))
            std::abort();
    }
};

struct Model {
    Matrix qkv, output, gate_up, down, even_gate_up, even_down, head;
    std::vector<float> norm, stream, projected, cos, sin;

    explicit Model(int64_t format)
        : qkv(format, (kHeads + 2 * kKvHeads) * kHeadWidth, kWidth, kWidth),
          output(format, kWidth, kHeads * kHeadWidth, kHeadWidth),
          gate_up(format, 2 * kColumns, kWidth, kWidth),
          down(format, kWidth, kColumns, kColumns),
          even_gate_up(format, 2 * kEvenColumns, kWidth, kWidth),
          even_down(format, kWidth, kEvenColumns, kEvenColumns),
          head(format, kRows, kWidth, kWidth),
          norm(kWidth, 1.1f),
          stream(kTokens * kWidth),
          projected(kTokens * (kHeads + 2 * kKvHeads) * kHeadWidth) {
        for (float &value : stream) value = random_value();
        for (float &value : projected) value = random_value();
        for (int64_t i = 0; i < kTokens * kHeadWidth / 2; ++i) {
            cos.push_back(std::cos(0.1f * (float)i));
            sin.push_back(std::sin(0.1f * (float)i));
        }
    }
};

constexpr size_t kParts = 6;
using Results = std::vector<std::vector<float>>;

// Two steps of attention and another MLP, the MLP whose tokens are also computed alone, the head, and
// after the two steps a prompt's attention, alone and in its rows.
Results compute(const Model &model, int64_t variant) {
    int64_t first_heads[] = {0, 3, 6};
    shardmix_attention_share attention{};
    attention.qkv = &model.qkv.matrix;
    attention.output = &model.output.matrix;
    attention.norm = model.norm.data();
    attention.first_heads = first_heads;
    attention.num_heads = kHeads;
    attention.num_kv_heads = kKvHeads;
    attention.head_width = kHeadWidth;
    attention.rope_layout = variant % 2 ? SHARDMIX_ADJACENT : SHARDMIX_HALF;
    attention.has_l2_norm = variant == 2;
    attention.reach = 10;
    attention.cache_dtype = variant;
    attention.norm_epsilon = 1e-5;
    attention.scale = 0.3;
    shardmix_mlp_share mlp{&model.gate_up.matrix, &model.down.matrix, model.norm.data(),
                           variant % 2, 1e-5};
    shardmix_head_share head{&model.head.matrix, model.norm.data(), 1e-5, 5.0};
    shardmix_mlp_share even{&model.even_gate_up.matrix, &model.even_down.matrix, model.norm.data(),
                            variant % 2, 1e-5};
    shardmix_row layer[] = {{&attention, nullptr, model.norm.data(), 1e-5},
                            {nullptr, &even, nullptr, 1e-5}};
    shardmix_row single{nullptr, &mlp, nullptr, 1e-5};
    std::vector<char> keys(kKvHeads * kCapacity * kHeadWidth * 4), values(keys.size());
    shardmix_place place{keys.data(), values.data(), kCapacity};
    const float *cos = model.cos.data(), *sin = model.sin.data();
    const float *stream = model.stream.data();
    Results results(kParts, std::vector<float>(kTokens * kWidth));
    results[3].resize(kTokens * kRows);
    results[4].resize(kTokens * kHeads * kHeadWidth);
    int64_t failed = 0;
    shardmix_segment segment{&place, 1, 0, kTokens};
    shardmix_step step{&segment, 1, kTokens, &cos, &sin, 1, nullptr, 0};
    for (size_t n = 0; n < 2; ++n, segment.first_position += kTokens)
        failed |= shardmix_rows(layer, 2, &step, kWidth, stream, 0, results[n].data(), nullptr, nullptr, 0,
                                nullptr);
    failed |= shardmix_rows(&single, 1, &step, kWidth, stream, 1, results[2].data(), nullptr, nullptr, 0,
                            nullptr);
    failed |= shardmix_head_part(&head, stream, kTokens, results[3].data());
    std::vector<float> projected = model.projected;
    step.is_prompt = 1;
    failed |= shardmix_attend(&attention, &step, projected.data(), results[4].data());
    failed |= shardmix_rows(layer, 2, &step, kWidth, stream, 0, results[5].data(), nullptr, nullptr, 0,
                            nullptr);
    step.is_prompt = 0;
    std::vector<float> alone(kWidth);
    step.num_tokens = segment.num_tokens = 1;
    for (int64_t t = 0; t < kTokens; ++t) {
        failed |= shardmix_rows(&single, 1, &step, kWidth, stream + t * kWidth, 1, alone.data(),
                                nullptr, nullptr, 0, nullptr);
        failed |= std::memcmp(alone.data(), &results[2][(size_t)(t * kWidth)], kWidth * 4) != 0;
    }
    if (failed) results.clear();
    return results;
}

double largest_difference(const std::vector<float> &found, const std::vector<float> &expected) {
    double largest = 0.0, difference = 0.0;
    for (size_t i = 0; i < found.size(); ++i) {
        if (!std::isfinite(found[i])) return INFINITY;
        largest = std::fmax(largest, std::fabs(expected[i]));
        difference = std::fmax(difference, std::fabs(found[i] - expected[i]));
    }
    return difference / largest;
}

int64_t compare(int64_t set, int64_t portable, int64_t format, int64_t threads) {
    shardmix_set_num_threads(threads);
    Model model(format);
    int64_t num_wrong = 0;
    for (int64_t variant = 0; variant < 3; ++variant) {
        shardmix_select(portable);
        Results expected = compute(model, variant);
        shardmix_select(set);
        Results found = compute(model, variant);
        if (found.size() != kParts || expected.size() != kParts) {
            std::printf("refused, or changed by company: format %d\n", (int)format);
            return num_wrong + 1;
        }
        bool is_exact = format == SHARDMIX_BFLOAT16 && variant == SHARDMIX_FLOAT32;
        for (size_t part = 0; part < kParts; ++part) {
            double difference = largest_difference(found[part], expected[part]);
            if (difference <= (is_exact ? kExact : kRounded)) continue;
            std::printf("%s, format %d, variant %d, part %d: %g\n", shardmix_instruction_set(set),
                        (int)format, (int)variant, (int)part, difference);
            ++num_wrong;
        }
    }
    return num_wrong;
}

}  // namespace

int main() {
    int64_t portable = 0, num_wrong = 0;
    while (shardmix_instruction_set(portable + 1)) ++portable;
    for (int64_t set = 0; set < portable; ++set) {
        if (!shardmix_can_run(set)) continue;
        for (int64_t format = 0; format <= SHARDMIX_SYMMETRIC_INT4; ++format)
            for (int64_t threads = 1; threads <= 3; ++threads)
                num_wrong += compare(set, portable, format, threads);
        std::printf("compared %s\n", shardmix_instruction_set(set));
    }
    return num_wrong ? 1 : 0;
}
