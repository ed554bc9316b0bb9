// Which instruction sets this machine has, and the one in use.

#include "kernel_table.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace shardmix {
namespace {

#if defined(__x86_64__)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}

// Register state that the system saves: a processor may have what its system does not know.
bool saves(unsigned states) {
    constexpr unsigned kOsxsave = 1u << 27;
    if (!(cpuid(1).c & kOsxsave)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & states) == states;
}

bool has_avx2() {
    constexpr unsigned kFma = 1u << 12, kF16c = 1u << 29, kAvx2 = 1u << 5, kYmmState = 0x6;
    unsigned basic = cpuid(1).c;
    return (basic & kFma) && (basic & kF16c) && (cpuid(7).b & kAvx2) && saves(kYmmState);
}

bool has_avx512vnni() {
    constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
    constexpr unsigned kVnni = 1u << 11, kZmmState = 0xe6;
    Registers extended = cpuid(7);
    constexpr unsigned kAll = kF | kDq | kBw | kVl;
    return has_avx2() && (extended.b & kAll) == kAll && (extended.c & kVnni) && saves(kZmmState);
}

#else

bool has_avx2() { return false; }
bool has_avx512vnni() { return false; }

#endif

bool has_neon_dot_product() {
#if defined(__aarch64__) && defined(__APPLE__)
    return true;  // Every Apple processor with this architecture that runs macOS.
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kDotProduct = 1ul << 20;
    return getauxval(AT_HWCAP) & kDotProduct;
#else
    return false;
#endif
}

bool always() { return true; }

// Best first; the last one runs everywhere.
const InstructionSet kSets[] = {
    {"avx512vnni", kAvx512VnniTable, has_avx512vnni},
    {"avx2", kAvx2Table, has_avx2},
    {"neon", kNeonTable, has_neon_dot_product},
    {"portable", kPortableTable, always},
};
constexpr int64_t kNumSets = sizeof kSets / sizeof kSets[0];

bool can_run(int64_t index) { return kSets[index].table && kSets[index].can_run(); }

int64_t best() {
    int64_t index = 0;
    while (!can_run(index)) ++index;
    return index;
}

std::atomic<int64_t> &selected() {
    static std::atomic<int64_t> index{best()};
    return index;
}

}  // namespace

const KernelTable &kernels() { return *kSets[selected()].table; }

}  // namespace shardmix

using namespace shardmix;

const char *shardmix_source_hash(void) { return SHARDMIX_SOURCE_HASH; }

const char *shardmix_instruction_set(int64_t index) {
    return index >= 0 && index < kNumSets ? kSets[index].name : nullptr;
}

int64_t shardmix_can_run(int64_t index) { return index >= 0 && index < kNumSets && can_run(index); }

int64_t shardmix_select(int64_t index) {
    if (!shardmix_can_run(index)) return SHARDMIX_BAD_ARGUMENT;
    selected() = index;
    return SHARDMIX_OK;
}

int64_t shardmix_selected(void) { return selected(); }
