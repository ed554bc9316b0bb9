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

// Pieces of one phase of the work: who is free takes the next one.
class Phase {
   public:
    bool is_done(int64_t total) const { return num_done_.load(std::memory_order_acquire) >= total; }

   private:
    friend class ThreadTeam;
    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> num_done_{0};
};

class ThreadTeam {
   public:
    // The team of this process; a forked child gets a new one, as it has no helpers.
    static ThreadTeam &of_process();

    // Start or end helpers. Returns the number of threads there are, the caller included.
    int64_t resize(int64_t num_threads);

    // Run `work(context)`, a sequence of phases, and return when it is done; one caller a time.
    // Helpers run it too, from its beginning. One that the system does not let run in time is not
    // waited for: on a busy computer the others would stand still with it.
    void run(void (*work)(void *), void *context);

    // In `work`: call `piece(first, end)` for pieces of [0, total) until none is left, and return
    // when all of them are done, whoever did them. Pieces begin at multiples of `size`. They are long
    // at first, because memory is read best in one stretch, and get shorter, so that all end together.
    template <class Piece>
    void share(Phase &phase, int64_t total, int64_t size, Piece piece) {
        int64_t parts = 2 * num_threads() * size, first = phase.next_.load(std::memory_order_relaxed);
        while (first < total) {
            int64_t count = (total - first) / parts * size;
            if (count < size) count = size;
            if (count > total - first) count = total - first;
            int64_t end = first + count;
            if (!phase.next_.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
            piece(first, end);
            if (phase.num_done_.fetch_add(count) + count == total && !helpers_.empty())
                meeting_.advance();
            first = phase.next_.load(std::memory_order_relaxed);
        }
        if (!phase.is_done(total)) wait_for(phase, total);
    }

    // The same with `unit(n)` for each n in [0, total).
    template <class Unit>
    void share_each(Phase &phase, int64_t total, Unit unit) {
        share(phase, total, 1, [&](int64_t first, int64_t end) {
            for (int64_t n = first; n < end; ++n) unit(n);
        });
    }

    int64_t num_threads() const { return (int64_t)helpers_.size() + 1; }

   private:
    void help(uint32_t turn);
    void set_size(int64_t num_threads);
    bool join_in(uint32_t turn);
    void leave();
    void wait_for(const Phase &phase, int64_t total);

    std::mutex callers_;
    std::vector<std::thread> helpers_;
    bool may_spin_ = true;
    bool is_ending_ = false;
    void (*work_)(void *) = nullptr;
    void *context_ = nullptr;
    Turnstile start_;
    Turnstile meeting_;
    // Of the work in progress: its turn, whether helpers may still join in, and how many have.
    std::atomic<uint64_t> progress_{0};
};

}  // namespace shardmix

#endif
