// What most choices need to know of a vocabulary's logits: the largest, and the sum of all.

#include <algorithm>
#include <cmath>
#include <functional>
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

// At least `num_wanted` values are not at most this: so many blocks have one. No number: all are.
float lower_bound(const float *values, int64_t count, int64_t num_wanted) {
    constexpr int64_t kBlock = 64;
    int64_t num_blocks = count / kBlock;
    // With few blocks more than are wanted, the bound would be no better than none.
    if (num_blocks < 2 * num_wanted) return std::numeric_limits<float>::quiet_NaN();
    static thread_local Buffer<float> buffer;
    float *maxima = buffer.reserve(num_blocks);
    kernels().find_maxima(values, num_blocks, maxima);
    std::nth_element(maxima, maxima + num_wanted - 1, maxima + num_blocks, std::greater<float>());
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (maxima[num_wanted - 1] == -kInfinity) return std::numeric_limits<float>::quiet_NaN();
    // Equals of the last one are wanted, too.
    return std::nextafter(maxima[num_wanted - 1], -kInfinity);
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
        Candidate *found = buffer.reserve(count);
        float limit = lower_bound(values, count, num_wanted);
        int64_t num_found = 0;
        for (int64_t i = 0; (i = kernels().find_above(values, i, count, limit)) < count; ++i)
            found[num_found++] = {values[i], i};
        std::partial_sort(found, found + num_wanted, found + num_found, comes_before);
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
