// Patience: how a thread waits for what comes within 100 us or so, and is looked for again and again.
//
// First it spins, as waking a thread up takes 50 us in a virtual machine; then it naps between two looks. Naps, and not
// yields: the scheduler gives a thread that wakes up an idle processor, but leaves one that yields beside the busy
// thread that it shares a processor with, for a tick of 4 ms each time (measured: a link stood still while a session
// was built).
#pragma once

#include <sys/prctl.h>
#include <time.h>

#include <chrono>

namespace glake {

inline void pause_processor() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Patience {
 public:
  // For threads of ours: naps are as short as they are said to be.
  static void sharpen_naps() noexcept { (void)prctl(PR_SET_TIMERSLACK, 1000UL); }  // nanoseconds

  void wait() noexcept {
    if (Clock::now() - start_ < spins) {
      for (int i = 0; i < pauses; ++i) pause_processor();
      return;
    }
    const timespec nap{0, 20'000};
    (void)nanosleep(&nap, nullptr);
  }
  [[nodiscard]] bool is_over(std::chrono::microseconds limit) const noexcept { return Clock::now() - start_ >= limit; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds spins{40};
  static constexpr int pauses = 16;

  Clock::time_point start_ = Clock::now();
};

}  // namespace glake
