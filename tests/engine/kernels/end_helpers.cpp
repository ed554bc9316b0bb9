// Ends the helpers of a thread team right after work that they may have missed, so often: argument 1.

#include <cstdio>
#include <cstdlib>

#include "thread_team.h"

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    shardmix::ThreadTeam &team = shardmix::ThreadTeam::of_process();
    long times = std::atol(argv[1]);
    for (long n = 0; n < times; ++n) {
        team.resize(8);
        for (long work = 0; work <= n % 3; ++work) team.run([](void *) {}, nullptr);
        team.resize(1);
    }
    std::puts("ended");
}
