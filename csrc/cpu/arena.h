// Hands out aligned pieces of one workspace. Run on a null base it only adds up the size, so that the layout stands in
// one place for both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace fastrnn {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 64;
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastrnn
