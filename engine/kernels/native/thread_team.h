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

class ThreadTeam {
   public:
    // The team of this process; a forked child gets a new one, as it has no helpers.
    static ThreadTeam &of_process();

    // Start or end helpers. Returns the number of threads there are, the caller included.
    int64_t resize(int64_t num_threads);

    // Run `work(context)` on every thread at once and return when all are done; one caller a time.
    void run(void (*work)(void *), void *context);

    // In `work`: wait for all threads to come here.
    void barrier();

    int64_t num_threads() const { return (int64_t)helpers_.size() + 1; }

   private:
    void help(uint32_t turn);
    void set_size(int64_t num_threads);

    std::mutex callers_;
    std::vector<std::thread> helpers_;
    bool may_spin_ = true;
    bool is_ending_ = false;
    void (*work_)(void *) = nullptr;
    void *context_ = nullptr;
    Turnstile start_;
    Turnstile meeting_;
    std::atomic<int64_t> num_arrived_{0};
};

// Work of one phase, handed out in pieces to whichever thread is free.
class WorkQueue {
   public:
    // Call `work(first, end)` for pieces of [0, total) until none is left.
    template <class Work>
    void share(int64_t total, int64_t piece, Work work) {
        for (;;) {
            int64_t first = next_.fetch_add(piece, std::memory_order_relaxed);
            if (first >= total) return;
            work(first, first + piece < total ? first + piece : total);
        }
    }

   private:
    std::atomic<int64_t> next_{0};
};

}  // namespace shardmix

#endif
