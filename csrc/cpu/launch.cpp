#include "launch.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastrnn {
namespace {

// The pool's threads do not survive fork(), and libgomp would wait for them for ever.
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

bool launch_threads(const Plan& plan, TeamBody body, const void* context, const Team& team) {
  std::atomic<int> go{0};
  std::vector<std::thread> threads;
  const auto run = [&](int i) {
    while (go.load(std::memory_order_acquire) == 0) std::this_thread::yield();
    if (go.load(std::memory_order_acquire) > 0) body(context, plan, team, i);
  };
  bool complete = true;
  try {
    for (int i = 1; i < plan.threads; ++i) threads.emplace_back(run, i);
  } catch (const std::system_error&) {
    complete = false;
  }
  go.store(complete ? 1 : -1, std::memory_order_release);
  if (complete) body(context, plan, team, 0);
  for (std::thread& thread : threads) thread.join();
  return complete;
}

#if defined(_OPENMP)
bool launch_openmp(const Plan& plan, TeamBody body, const void* context, const Team& team) {
  bool complete = true;
#pragma omp parallel num_threads(plan.threads)
  {
    if (omp_get_num_threads() == plan.threads) {
      body(context, plan, team, omp_get_thread_num());
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  return complete;
}
#endif

}  // namespace

int available_cores() {
#if defined(_OPENMP)
  return omp_get_num_procs();
#else
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
}

bool launch(const Plan& plan, int pool, TeamBody body, const void* context) {
  static_cast<void>(at_fork);
  const int sets = plan.group_parts * plan.row_parts;
  const std::unique_ptr<Barrier[]> barriers(new Barrier[1 + sets]);
  const std::unique_ptr<std::atomic<int64_t>[]> tasks(new std::atomic<int64_t>[sets]());
  const Team team{barriers.get(), barriers.get() + 1, tasks.get()};
  if (plan.threads == 1) {
    body(context, plan, team, 0);
    return true;
  }
#if defined(_OPENMP)
  // A region of fewer threads than the last one had ends those that it lacks, and torch's next region makes them anew:
  // that takes milliseconds, where more threads than cores do it.
  if (plan.threads == pool && !forked.load()) return launch_openmp(plan, body, context, team);
#endif
  return launch_threads(plan, body, context, team);
}

}  // namespace fastrnn
