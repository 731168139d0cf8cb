// Hands out aligned pieces of one workspace. Run on a null base it only adds up the size, so that the layout stands in
// one place for both.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "problem.h"

namespace fastrnn {

// How many threads, or sets of them, have something each, and which of them asks.
struct Copies {
  int number, mine;
};

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const p = base_ ? base_ + used_ : nullptr;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), room = round_up(bytes + kGap, kAlign);
    used_ += room;
    if (p) fence(p, bytes, room);
    return reinterpret_cast<T*>(p);
  }
  // Pages apart: a core that fetches ahead must not take away lines that another one is writing.
  template <class T>
  T* take(int64_t count, Copies copies) {
    if (count == 0) return nullptr;
    T* mine = nullptr;
    for (int i = 0; i < copies.number; ++i) {
      T* const copy = take<T>(count);
      if (copies.number > 1) used_ += kPage;
      if (i == copies.mine) mine = copy;
    }
    return mine;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 64, kPage = 4096;
  // AddressSanitizer is to see what strays from one piece into the next.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 64;
  static void fence(char* p, int64_t bytes, int64_t room) {
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
    ASAN_POISON_MEMORY_REGION(p + bytes, room - bytes);
  }
#else
  static constexpr int64_t kGap = 0;
  static void fence(char*, int64_t, int64_t) {}
#endif
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastrnn
