#include "team.h"

#include <sched.h>

namespace fastrnn {
namespace {

// A pause takes some 65 cycles on Zen 3, and 140 on recent Intel cores: 15 to 25 microseconds together.
constexpr int kPauses = 500;
// On a core that nobody else wants, a yield returns at once, and so many take several times as long as to be woken
// does: a thread that has just been woken is waited for, or else the two would put each other to sleep at every step.
constexpr int kYields = 200;

void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait_long(uint64_t target) {
  const auto complete = [&] { return arrivals_.load() >= target; };
  for (int i = 0; i < kPauses + kYields; ++i) {
    i < kPauses ? cpu_relax() : static_cast<void>(sched_yield());
    if (complete()) return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  all_arrived_.wait(lock, complete);
  --sleepers_;
}

void Barrier::wake() {
  // While the mutex is held, no thread is between its look at the counter and its sleep.
  std::unique_lock<std::mutex> lock(mutex_);
  lock.unlock();
  all_arrived_.notify_all();
}

}  // namespace fastrnn
