#include "thread_team.h"

#include <chrono>
#include <system_error>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace shardmix {
namespace {

constexpr std::chrono::microseconds kSpinTime{50};
constexpr int kPausesPerLook = 16;

// Parts of the word that counts the helpers of the work in progress; its turn is in the upper half.
constexpr uint64_t kOpen = 1ull << 31;
constexpr uint64_t kHelpers = kOpen - 1;

void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

std::atomic<ThreadTeam *> current_team{nullptr};
thread_local int64_t rank_here = 0;

// Signals belong to the threads that Python knows.
class SignalsBlocked {
   public:
#if !defined(_WIN32)
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

   private:
    sigset_t before_;
#endif
};

}  // namespace

void Turnstile::wait_past(uint32_t turn, bool may_spin) {
    if (may_spin) {
        auto end = std::chrono::steady_clock::now() + kSpinTime;
        do {
            for (int i = 0; i < kPausesPerLook; ++i) {
                if (turn_.load(std::memory_order_acquire) != turn) return;
                pause_briefly();
            }
        } while (std::chrono::steady_clock::now() < end);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    // Counted before the last look, as `advance` looks for sleepers after its change: one of the
    // two sees the other.
    sleepers_.fetch_add(1);
    while (turn_.load() == turn) advanced_.wait(lock);
    sleepers_.fetch_sub(1);
}

void Turnstile::advance() {
    turn_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    advanced_.notify_all();
}

ThreadTeam &ThreadTeam::of_process() {
    ThreadTeam *team = current_team.load();
    if (team) return *team;
#if !defined(_WIN32)
    static const int is_registered = pthread_atfork(nullptr, nullptr, [] { current_team = nullptr; });
    (void)is_registered;
#endif
    // Never destroyed: helpers may sleep in it while the process ends.
    ThreadTeam *made = new ThreadTeam;
    if (current_team.compare_exchange_strong(team, made)) return *made;
    delete made;
    return *team;
}

int64_t ThreadTeam::resize(int64_t num_threads) {
    std::lock_guard<std::recursive_mutex> lock(callers_);
    if (num_threads != this->num_threads()) set_size(num_threads);
    return this->num_threads();
}

void ThreadTeam::set_size(int64_t num_threads) {
    is_ending_ = true;
    start_.advance();
    for (std::thread &helper : helpers_) helper.join();
    helpers_.clear();
    is_ending_ = false;
    // With more threads than cores, a spinning one only keeps another from its work.
    may_spin_ = num_threads <= (int64_t)std::thread::hardware_concurrency();
    SignalsBlocked blocked;
    uint32_t turn = start_.turn();
    try {
        while (this->num_threads() < num_threads) {
            int64_t rank = this->num_threads();
            helpers_.emplace_back([this, turn, rank] { help(turn, rank); });
        }
    } catch (const std::system_error &) {
        // The system gives no more threads: compute with those there are.
    }
}

int64_t ThreadTeam::rank() { return rank_here; }

void ThreadTeam::help(uint32_t turn, int64_t rank) {
    rank_here = rank;
    for (;;) {
        start_.wait_past(turn, may_spin_);
        // The turn first: were it read after the look at the end, a helper that comes late to the
        // last work could take the end's turn for that one's, and wait for another for ever.
        turn = start_.turn();
        if (is_ending_) return;
        if (!join_in(turn)) continue;
        work_(context_);
        leave();
    }
}

bool ThreadTeam::join_in(uint32_t turn) {
    uint64_t seen = progress_.load();
    while (seen >> 32 == turn && (seen & kOpen))
        if (progress_.compare_exchange_weak(seen, seen + 1)) return true;
    return false;
}

void ThreadTeam::leave() {
    uint64_t left = progress_.fetch_sub(1) - 1;
    // The caller waits for the last one: what the work is about lives on its stack.
    if (!(left & kOpen) && !(left & kHelpers)) meeting_.advance();
}

void ThreadTeam::wait_for(const Phase &phase, int64_t total) {
    for (;;) {
        uint32_t turn = meeting_.turn();
        if (phase.is_done(total)) return;
        meeting_.wait_past(turn, may_spin_);
    }
}

void ThreadTeam::run(void (*work)(void *), void *context) {
    std::lock_guard<std::recursive_mutex> lock(callers_);
    if (helpers_.empty()) return work(context);
    work_ = work;
    context_ = context;
    progress_.store((uint64_t)(start_.turn() + 1) << 32 | kOpen);
    start_.advance();
    work(context);
    progress_.fetch_and(~kOpen);
    for (;;) {
        uint32_t turn = meeting_.turn();
        if (!(progress_.load() & kHelpers)) return;
        meeting_.wait_past(turn, may_spin_);
    }
}

}  // namespace shardmix
