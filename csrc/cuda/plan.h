// Which blocks do what: a pure function of the sizes and the device's limits, so that equal calls give equal bits.
#pragma once

#include <array>
#include <string>
#include <variant>

#include "kernels.h"

namespace fastrnn::cuda {

inline constexpr int kMostCluster = 16;

struct Limits {
  int capability;        // 90 for 9.0
  int multiprocessors;   // that a launch may count on
  int64_t shared_bytes;  // of one block
  int cluster;           // the most blocks of one, 0 without clusters
  // Clusters of so many blocks that run at once; each lies within a part of the device, so that some multiprocessors
  // may be left over. 0 where that is not known.
  std::array<int, kMostCluster + 1> at_once{};

  int clusters_at_once(int blocks) const {
    const int known = blocks <= kMostCluster ? at_once[blocks] : 0;
    return known ? known : multiprocessors / blocks;
  }
};

struct Request {
  int64_t T, B, H;
  int G;
  CellInfo cell;
  Precision precision;
  bool backward;
};

struct Plan {
  Tier tier;
  Tiling tiling;
  int groups;            // of one launch; the launches follow each other
  int64_t shared_bytes;  // of a block
  // What the caller allocates: bytes, and 32-bit words that begin as zeros.
  int64_t weight_bytes, operand_bytes, slot_bytes, flag_words;

  int blocks(int launched_groups) const { return launched_groups * tiling.replicas * tiling.slices; }
};

// A plan within the limits, or the reason why there is none.
std::variant<Plan, std::string> make_plan(const Request& request, const Limits& limits);

}  // namespace fastrnn::cuda
