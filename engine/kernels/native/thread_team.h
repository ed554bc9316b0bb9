// Threads that compute together: the caller and its helpers, started once per process.
//
// A helper that waits spins for at most 50 us, then sleeps, so that an idle process uses no time
// and does not fight with torch's own threads. Waits have no deadline: what they wait for is a
// thread of this process in the middle of arithmetic.

#ifndef SHARDMIX_THREAD_TEAM_H
#define SHARDMIX_THREAD_TEAM_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace shardmix {

// A number that only grows; waiting for that spins first and then sleeps.
class Turnstile {
   public:
    uint32_t turn() const { return turn_.load(std::memory_order_acquire); }
    void wait_past(uint32_t turn, bool may_spin);
    void advance();

   private:
    std::atomic<uint32_t> turn_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable advanced_;
};

// Units [first, end) of a phase.
struct Stretch {
    int64_t first = 0;
    int64_t end = 0;
    bool is_empty() const { return first >= end; }
};

// One phase of the work, and what of it was taken.
class Phase {
   public:
    bool is_done(int64_t total) const { return num_done_.load(std::memory_order_acquire) >= total; }

   private:
    friend class ThreadTeam;
    std::atomic<uint64_t> firsts_{0};  // Bit n: the first stretch of thread n was taken.
    std::atomic<int64_t> next_{0};     // Of what lies behind the first stretches.
    std::atomic<int64_t> num_done_{0};
};

class ThreadTeam {
   public:
    // The team of this process; a forked child gets a new one, as it has no helpers.
    static ThreadTeam &of_process();

    // Start or end helpers. Returns the number of threads there are, the caller included.
    int64_t resize(int64_t num_threads);

    // Nobody else runs work or changes the number of threads meanwhile: for memory of each of them.
    std::unique_lock<std::recursive_mutex> hold() {
        return std::unique_lock<std::recursive_mutex>(callers_);
    }

    // Run `work(context)`, a sequence of phases, and return when it is done; one caller a time.
    // Helpers run it too, from its beginning. One that the system does not let run in time is not
    // waited for: on a busy computer the others would stand still with it.
    void run(void (*work)(void *), void *context);

    // In `work`: call `piece(first, end, next)` for pieces of [0, total) until none is left, and
    // return when all of them are done, whoever did them. Pieces begin at multiples of `size`; `next`
    // is where this thread's next one does, or kNothing. Each thread has a long first piece of its
    // own, because memory is read best in one stretch that is known beforehand; then pieces get
    // shorter, so that all end together. The first piece of a thread that does not come is left for
    // the others.
    template <class Piece>
    void share(Phase &phase, int64_t total, int64_t size, Piece piece) {
        // Of the last pieces nobody takes two: others would have nothing to do.
        share_out(phase, total, size, num_threads() * size, piece);
    }

    // Where this thread's first piece of such a phase begins.
    int64_t first_unit(int64_t total, int64_t size) const {
        return first_stretch(total, size, rank()).first;
    }

    // The same with `unit(n)` for each n in [0, total).
    template <class Unit>
    void share_each(Phase &phase, int64_t total, Unit unit) {
        share_out(phase, total, 1, total, [&](int64_t first, int64_t end, int64_t) {
            for (int64_t n = first; n < end; ++n) unit(n);
        });
    }

    int64_t num_threads() const { return (int64_t)helpers_.size() + 1; }

    // Of this thread in its team: the caller's is 0.
    static int64_t rank();

    static constexpr int64_t kNothing = -1;

   private:
    // Of what an even share would be, the part that a thread has to itself.
    static constexpr int64_t kFirstPercent = 50;
    static constexpr int64_t kMostFirsts = 64;

    int64_t units_each(int64_t total, int64_t size) const {
        int64_t threads = num_threads();
        if (threads == 1) return total;
        return threads > kMostFirsts ? 0 : total * kFirstPercent / (100 * threads) / size * size;
    }
    Stretch first_stretch(int64_t total, int64_t size, int64_t rank) const {
        int64_t each = rank < num_threads() ? units_each(total, size) : 0;
        return {rank * each, rank * each + each};
    }
    Stretch take_first(Phase &phase, int64_t total, int64_t size, int64_t rank) const {
        Stretch own = first_stretch(total, size, rank);
        if (own.is_empty()) return {};
        uint64_t bit = 1ull << rank;
        bool is_taken = phase.firsts_.load(std::memory_order_relaxed) & bit ||
                        phase.firsts_.fetch_or(bit, std::memory_order_relaxed) & bit;
        return is_taken ? Stretch{} : own;
    }
    // The next piece, if there is one and more than `left` units have not been taken.
    Stretch take_next(Phase &phase, int64_t total, int64_t size, int64_t left = 0) const {
        int64_t start = num_threads() * units_each(total, size), rest = total - start;
        int64_t parts = 2 * num_threads() * size, first = phase.next_.load(std::memory_order_relaxed);
        while (rest - first > left) {
            int64_t count = (rest - first) / parts * size;
            if (count < size) count = size;
            if (count > rest - first) count = rest - first;
            if (phase.next_.compare_exchange_weak(first, first + count, std::memory_order_relaxed))
                return {start + first, start + first + count};
        }
        return {};
    }
    Stretch take_left(Phase &phase, int64_t total, int64_t size) const {
        for (int64_t other = 0; other < num_threads(); ++other) {
            Stretch left = take_first(phase, total, size, other);
            if (!left.is_empty()) return left;
        }
        return {};
    }

    // As `share`; a next piece is taken beforehand while more than `left` units have not been taken.
    template <class Piece>
    void share_out(Phase &phase, int64_t total, int64_t size, int64_t left, Piece piece) {
        Stretch now = take_first(phase, total, size, rank());
        for (;;) {
            if (now.is_empty()) now = take_next(phase, total, size);
            if (now.is_empty()) now = take_left(phase, total, size);
            if (now.is_empty()) break;
            Stretch next = take_next(phase, total, size, left);
            piece(now.first, now.end, next.is_empty() ? kNothing : next.first);
            int64_t count = now.end - now.first;
            if (phase.num_done_.fetch_add(count) + count == total && !helpers_.empty())
                meeting_.advance();
            now = next;
        }
        if (!phase.is_done(total)) wait_for(phase, total);
    }

    void help(uint32_t turn, int64_t rank);
    void set_size(int64_t num_threads);
    bool join_in(uint32_t turn);
    void leave();
    void wait_for(const Phase &phase, int64_t total);

    std::recursive_mutex callers_;
    std::vector<std::thread> helpers_;
    bool may_spin_ = true;
    std::atomic<bool> is_ending_{false};
    void (*work_)(void *) = nullptr;
    void *context_ = nullptr;
    Turnstile start_;
    Turnstile meeting_;
    // Of the work in progress: its turn, whether helpers may still join in, and how many have.
    std::atomic<uint64_t> progress_{0};
};

}  // namespace shardmix

#endif
