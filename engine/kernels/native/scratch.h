// Memory between the phases of a call: grows, and is kept for the next call of the same thread.

#ifndef SHARDMIX_SCRATCH_H
#define SHARDMIX_SCRATCH_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "panels.h"

namespace shardmix {

template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(memory_); }

    // At least `count` values, of which nothing is known. Throws std::bad_alloc.
    T *reserve(int64_t count) {
        if (count > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = std::malloc((size_t)count * sizeof(T) + kLine);
            if (!memory_) throw std::bad_alloc();
            data_ = (T *)(((uintptr_t)memory_ + kLine - 1) / kLine * kLine);
            size_ = count;
        }
        return data_;
    }
    T *data() const { return data_; }

   private:
    // Vectors of 64 bytes then lie in one line of a cache each.
    static constexpr size_t kLine = 64;

    void *memory_ = nullptr;
    T *data_ = nullptr;
    int64_t size_ = 0;
};

// Tokens that are made ready for a matrix, in memory of a `TokenMemory`.
class PreparedTokens {
   public:
    PreparedTokens(const shardmix_matrix &matrix, const Activations &activations)
        : matrix_(matrix), activations_(activations) {}

    // Whether a token's values are no longer needed once it is ready.
    bool are_quantized() const { return matrix_.format != SHARDMIX_BFLOAT16; }

    // Memory for a token's values, until every thread is done with them.
    float *values(int64_t token) const {
        return activations_.values + token * matrix_.num_columns;
    }

    // The same until this thread, of this rank, has made the token ready. Where it can be the
    // thread's own it is: lines of memory that another core wrote last are slow to get.
    float *values_of(int64_t token, int64_t rank) const {
        return values(are_quantized() ? rank : token);
    }

    // Make groups [first, end) of a token ready, from their values on.
    void prepare(int64_t token, int64_t first_group, int64_t end_group, const float *values) const {
        if (!are_quantized()) return;
        kernels().quantize(activations_, token, matrix_, first_group, end_group, values);
    }
    void prepare(int64_t token, const float *values) const {
        prepare(token, 0, matrix_.num_groups, values);
    }

    const Activations &view() const { return activations_; }

   private:
    const shardmix_matrix &matrix_;
    Activations activations_;
};

class GroupMemory {
   public:
    // Room for so many groups. Throws std::bad_alloc.
    void reserve(int64_t count) {
        quants_.reserve(count * kGroup);
        scales_.reserve(count);
        scaled_sums_.reserve(count);
        sums_.reserve(count);
    }
    Groups view() const {
        return {quants_.data(), scales_.data(), scaled_sums_.data(), sums_.data()};
    }

   private:
    Buffer<int8_t> quants_;
    Buffer<float> scales_;
    Buffer<float> scaled_sums_;
    Buffer<int32_t> sums_;
};

class TokenMemory {
   public:
    // Room for tokens of a matrix that so many threads make ready. Throws std::bad_alloc.
    void reserve(const shardmix_matrix &matrix, int64_t num_tokens, int64_t num_threads) {
        values_.reserve(std::max(num_tokens, num_threads) * matrix.num_columns);
        groups_.reserve(num_tokens * matrix.num_groups);
        rests_.reserve(num_tokens * matrix.num_groups);
        has_rest_.reserve(num_tokens * padded_groups(matrix.num_groups));
    }

    // Tokens of a matrix that there is room for; what was here for another one is gone.
    PreparedTokens view(const shardmix_matrix &matrix, int64_t num_tokens) const {
        return {matrix,
                {values_.data(), groups_.view(), rests_.view(), has_rest_.data(), num_tokens}};
    }

   private:
    Buffer<float> values_;
    GroupMemory groups_;
    GroupMemory rests_;
    Buffer<uint8_t> has_rest_;
};

// Panels that a thread takes at a time, at least: few enough that all end together.
static inline int64_t panels_at_a_time(int64_t num_panels, int64_t num_threads) {
    int64_t share = num_panels / (num_threads * 16);
    return share < 1 ? 1 : share;
}

// Run a lambda on every thread of a team.
template <class Team, class Work>
static void run_on(Team &team, Work &work) {
    team.run([](void *context) { (*(Work *)context)(); }, &work);
}

// What a C function answers: nothing may be thrown over that border.
template <class Work>
static int64_t status_of(Work work) {
    try {
        work();
        return SHARDMIX_OK;
    } catch (const std::bad_alloc &) {
        return SHARDMIX_OUT_OF_MEMORY;
    }
}

bool is_valid(const shardmix_matrix *matrix);

}  // namespace shardmix

#endif
