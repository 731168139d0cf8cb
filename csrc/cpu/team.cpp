#include "team.h"

namespace fastrnn {
namespace {

// Some 50 to 100 microseconds, about what it costs to sleep and to be woken: a pause takes some 65 cycles on Zen 3, and
// 140 on recent Intel cores.
constexpr int kPauses = 1800;
// Where the last wait was longer than that, threads share their cores, and every pause is another thread's time.
constexpr int kFewPauses = 100;

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
  const int pauses = impatient_.load(std::memory_order_relaxed) ? kFewPauses : kPauses;
  for (int i = 0; i < pauses; ++i) {
    cpu_relax();
    if (!complete()) continue;
    impatient_.store(false, std::memory_order_relaxed);
    return;
  }
  impatient_.store(true, std::memory_order_relaxed);
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
