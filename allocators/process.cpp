#include "process.hpp"

#include <pthread.h>

#include <atomic>

namespace glake {
namespace {

std::atomic<std::uint64_t> generation{0};

void count_fork() { generation.fetch_add(1, std::memory_order_relaxed); }

// Failure (ENOMEM at start-up) would leave forks undetected, nothing else.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, count_fork);

}  // namespace

std::uint64_t ProcessMark::current() noexcept { return generation.load(std::memory_order_relaxed); }

}  // namespace glake
