// Included ahead of kernels.cpp where it uses the AMX tiles, whose loads and stores are bare instructions that no
// sanitizer sees: here each first touches the memory it is about to move, row by row, in plain C++.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace fastrnn_sanitize {

struct Row {
  unsigned char bytes[64];
};

constexpr int kTileRows = 16;  // the most that gemm.h configures a tile for

inline void read_rows(const void* base, ptrdiff_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    const auto* const row = reinterpret_cast<const Row*>(static_cast<const char*>(base) + r * stride);
    for (size_t i = 0; i < sizeof row->bytes; i += 4) static_cast<void>(*(const volatile int*)(row->bytes + i));
  }
}

inline void write_rows(void* base, ptrdiff_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    auto* const row = reinterpret_cast<Row*>(static_cast<char*>(base) + r * stride);
    for (size_t i = 0; i < sizeof row->bytes; i += 4) *(volatile int*)(row->bytes + i) = 0;
  }
}

}  // namespace fastrnn_sanitize

#undef _tile_loadd
#undef _tile_stored
#if defined(__clang__)
#define FASTRNN_TILE_LOAD(tile, base, stride) __builtin_ia32_tileloadd64(tile, base, static_cast<size_t>(stride))
#define FASTRNN_TILE_STORE(tile, base, stride) __builtin_ia32_tilestored64(tile, base, static_cast<size_t>(stride))
#else
#define FASTRNN_TILE_LOAD(tile, base, stride) _tile_loadd_internal(tile, base, stride)
#define FASTRNN_TILE_STORE(tile, base, stride) _tile_stored_internal(tile, base, stride)
#endif

#define _tile_loadd(tile, base, stride)        \
  do {                                         \
    fastrnn_sanitize::read_rows(base, stride); \
    FASTRNN_TILE_LOAD(tile, base, stride);     \
  } while (0)
#define _tile_stored(tile, base, stride)        \
  do {                                          \
    fastrnn_sanitize::write_rows(base, stride); \
    FASTRNN_TILE_STORE(tile, base, stride);     \
  } while (0)
