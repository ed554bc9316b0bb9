// What most choices need to know of a vocabulary's logits: the largest, and the sum of all.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "scratch.h"

namespace shardmix {
namespace {

struct Candidate {
    float value;
    int64_t index;
};

// Whether `a` comes before `b`: what is no number first, so that it is seen; then the larger one;
// of equal ones the first.
bool comes_before(const Candidate &a, const Candidate &b) {
    bool a_is_number = a.value == a.value, b_is_number = b.value == b.value;
    if (a_is_number != b_is_number) return b_is_number;
    if (a_is_number && a.value != b.value) return a.value > b.value;
    return a.index < b.index;
}

}  // namespace
}  // namespace shardmix

using namespace shardmix;

int64_t shardmix_largest(const float *values, int64_t count, int64_t num_wanted, int64_t *indices,
                         float *largest) {
    if (!values || !indices || !largest || num_wanted < 1 || num_wanted > count)
        return SHARDMIX_BAD_ARGUMENT;
    return status_of([&] {
        static thread_local Buffer<Candidate> buffer;
        Candidate *found = buffer.reserve(num_wanted), *end = found + num_wanted;
        for (int64_t i = 0; i < num_wanted; ++i) found[i] = {values[i], i};
        // The one that comes last is on top of the heap.
        std::make_heap(found, end, comes_before);
        int64_t i = num_wanted;
        for (;;) {
            // A later one that equals the last of those found comes after it.
            i = kernels().find_above(values, i, count, found->value);
            if (i == count) break;
            Candidate candidate{values[i], i};
            ++i;
            if (!comes_before(candidate, *found)) continue;
            std::pop_heap(found, end, comes_before);
            end[-1] = candidate;
            std::push_heap(found, end, comes_before);
        }
        std::sort_heap(found, end, comes_before);
        for (int64_t n = 0; n < num_wanted; ++n) {
            indices[n] = found[n].index;
            largest[n] = found[n].value;
        }
    });
}

double shardmix_log_sum_exp(const float *values, int64_t count, double temperature) {
    if (!values || count < 1 || !(temperature > 0.0)) return std::numeric_limits<double>::quiet_NaN();
    float maximum = values[0];
    for (int64_t i = 1; i < count; ++i) {
        i = kernels().find_above(values, i, count, maximum);
        if (i == count || maximum != maximum) break;
        maximum = values[i];
    }
    double highest = (double)maximum / temperature;
    // One that is no number, or infinite, is what the sum is.
    if (!std::isfinite(highest)) return highest;
    return highest + std::log(kernels().sum_exponentials(values, count, temperature, highest));
}
