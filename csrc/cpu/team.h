// Threads working on one layer call, and the barrier between two of its steps.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "arena.h"
#include "problem.h"

namespace fastrnn {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Counts arrivals up for ever, so nothing is reset and no thread can lap another. Spins briefly, since a partner is
// normally nanoseconds away, then yields: a busy neighbour on the core must cost its share of time and no more.
class alignas(64) Barrier {
 public:
  void wait(int parties) {
    if (parties == 1) return;
    const uint64_t ticket = arrivals_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t target = (ticket / parties + 1) * parties;
    for (int spins = 0; arrivals_.load(std::memory_order_acquire) < target; ++spins) {
      if (spins < kHotSpins) continue;
      spins < kSpins ? cpu_relax() : static_cast<void>(sched_yield());
    }
  }

 private:
  // A pause takes some 140 cycles on recent Intel cores, as long as a whole hand-over.
  static constexpr int kHotSpins = 200, kSpins = 2000;
  std::atomic<uint64_t> arrivals_{0};
};

// What the threads of one call share: a barrier for everyone; of each set of threads that shares rows and splits units
// a barrier, and a counter of tasks taken.
struct Team {
  Barrier* everyone;
  Barrier* units;
  std::atomic<int64_t>* tasks;

  int64_t next_task(int queue) const { return tasks[queue].fetch_add(1, std::memory_order_relaxed); }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

constexpr Range split(int64_t n, int parts, int part) { return {n * part / parts, n * (part + 1) / parts}; }

// Panels are visited up in one step and down in the next: weights a little too large for a cache then still find most
// of themselves in it.
struct Sweep {
  int64_t first, end, stride;
  Sweep(Range panels, int64_t step)
      : first(step & 1 ? panels.end - 1 : panels.begin),
        end(step & 1 ? panels.begin - 1 : panels.end),
        stride(step & 1 ? -1 : 1) {}
};

// One thread's part of a plan. Groups are dealt out to parts of the threads, and then a group's rows and units to the
// members of a part, of which some may be too many to scan. Rows of a dense batch are cut into runs, so that no two
// threads write to the same lines; those of a packed one are dealt out in turn (row_part, row_part + row_parts, ...),
// which stays balanced when rows sorted by length fall silent.
struct Share {
  int thread, threads;
  int G, part, parts, member, members;
  Range groups;  // of my part
  bool scans, own_panels;
  int row_part, row_parts, unit_part, unit_parts;
  bool interleaved;
  int64_t first_row, row_step;
  Barrier* units;

  static Share of(const Plan& plan, const Team& team, const LayerArgs& args, int thread) {
    Share s{};
    s.thread = thread;
    s.threads = plan.threads;
    s.G = args.G;
    s.parts = plan.group_parts;
    s.members = plan.threads / plan.group_parts;
    s.part = thread / s.members;
    s.member = thread % s.members;
    s.groups = s.groups_of(s.part);
    s.scans = s.member < plan.row_parts * plan.unit_parts;
    s.own_panels = plan.own_panels;
    s.row_parts = plan.row_parts;
    s.unit_parts = plan.unit_parts;
    s.row_part = s.member / plan.unit_parts;
    s.unit_part = s.member % plan.unit_parts;
    s.interleaved = args.seq.batch_sizes != nullptr;
    s.first_row = s.interleaved ? s.row_part : split(args.seq.B, plan.row_parts, s.row_part).begin;
    s.row_step = s.interleaved ? plan.row_parts : 1;
    s.units = team.units + s.part * plan.row_parts + s.row_part;
    return s;
  }

  Range groups_of(int of_part) const { return split(G, parts, of_part); }
  // What I do of the preparation of something that belongs to one of my groups, or to everyone.
  Range packs(int64_t count) const { return split(count, members, member); }
  Range packs_of_all(int64_t count) const { return split(count, threads, thread); }
  // What I pack of `count` panels of weights: a part of those that all multiply by, or those that I multiply by.
  Range packs_of_weights(int64_t count) const {
    if (!own_panels) return packs(count);
    return scans ? panels(count) : Range{0, 0};
  }
  Copies of_threads() const { return {threads, thread}; }
  Copies of_row_parts() const { return {row_parts, row_part}; }
  Copies of_weights() const { return own_panels ? of_row_parts() : Copies{1, 0}; }
  // How many of the first n rows are mine, n being B or 0 of a dense batch; the j-th of them is row(j).
  int64_t count(int64_t n) const {
    if (!interleaved) return split(n, row_parts, row_part).size();
    return n <= row_part ? 0 : ceil_div(n - row_part, row_parts);
  }
  int64_t row(int64_t j) const { return first_row + j * row_step; }
  // My part of `count` panels, and the units in it: the last part has all the padding.
  Range panels(int64_t count) const { return split(count, unit_parts, unit_part); }
  Range units_of(int64_t count, int64_t panel_width, int64_t padded) const {
    const Range mine = panels(count);
    return {mine.begin * panel_width, mine.end == count ? padded : mine.end * panel_width};
  }
  void sync() const { units->wait(unit_parts); }
};

}  // namespace fastrnn
