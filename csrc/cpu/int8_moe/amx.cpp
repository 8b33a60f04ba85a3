// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// AMX tiles. INT8_MOE_EMULATE_AMX computes them in plain C++, for tests on
// processors that have none; where it is set, "amx" counts as supported.
#include <algorithm>
#include <cstring>

#include "avx512_vnni.h"
#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

#if defined(__linux__) && !defined(INT8_MOE_EMULATE_AMX)
  #include <cpuid.h>
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace int8_moe {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// All eight tiles are whole: 16 rows of 64 bytes.
constexpr TileConfig kWholeTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#if defined(INT8_MOE_EMULATE_AMX)
struct Emulated {
  TileConfig config;
  uint8_t tile[8][16][64];
};
thread_local Emulated emulated;

template <int T>
void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < emulated.config.rows[T]; ++r) {
    std::memcpy(emulated.tile[T][r],
                static_cast<const uint8_t*>(from) + r * stride,
                emulated.config.row_bytes[T]);
  }
}
template <int T>
void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < emulated.config.rows[T]; ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, emulated.tile[T][r],
                emulated.config.row_bytes[T]);
  }
}
template <int T>
void tile_zero() {
  std::memset(emulated.tile[T], 0, sizeof(emulated.tile[T]));
}
template <int C, int A, int B>
void tile_dot() {
  for (int r = 0; r < emulated.config.rows[C]; ++r) {
    for (int n = 0; n < emulated.config.row_bytes[C] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, emulated.tile[C][r] + 4 * n, 4);
      for (int k = 0; k < emulated.config.row_bytes[A]; ++k) {
        sum += emulated.tile[A][r][k] *
               static_cast<int8_t>(emulated.tile[B][k / 4][4 * n + k % 4]);
      }
      std::memcpy(emulated.tile[C][r] + 4 * n, &sum, 4);
    }
  }
}
void tile_configure(const TileConfig& config) { emulated.config = config; }
void tile_release() {}
bool amx_supported() { return avx512_vnni_supported(); }
  #define TILE_LOAD(t, from, stride) tile_load<t>(from, stride)
  #define TILE_STORE(t, to, stride) tile_store<t>(to, stride)
  #define TILE_ZERO(t) tile_zero<t>()
  #define TILE_DOT(c, a, b) tile_dot<c, a, b>()
#else
  // Macros: GCC's intrinsics write a tile's number into the assembly.
  #define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
  #define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
  #define TILE_ZERO(t) _tile_zero(t)
  #define TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)
// _tile_loadconfig tells GCC below 14 of 8 of the 64 bytes that it reads (PR 114098):
// stores to the others may go.
void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}
void tile_release() { _tile_release(); }

bool amx_supported() {
  #if defined(__linux__)
  static const bool found = [] {
    unsigned a, b, c, d;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
    if (!avx512_vnni_supported()) return false;
    // Linux gives a process tiles when it asks for them (ARCH_REQ_XCOMP_PERM,
    // XFEATURE_XTILEDATA).
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return found;
  #else
  return false;
  #endif
}
#endif

thread_local bool configured = false;

// Tiles 0 to 3: sums of rows 0-15 and 16-31, left and right half of the columns.
// 4, 5: the rows' activations. 6, 7: the halves' weights. All have 16 rows: those past
// the last one may be read, for kReadsRows says so, and their sums are not.
struct Amx {
  static constexpr int kOffset = 128;
  static constexpr int kReadsRows = 16;
  static constexpr int64_t kTileRows = 16;
  // Up to so many rows vpdpbusd is as fast, measured for K of 64 to 4096.
  static constexpr int64_t kFewRows = 6;

  static void end() {
    if (configured) tile_release();
    configured = false;
  }

  static void configure() {
    tile_configure(kWholeTiles);
    configured = true;
  }

  // Rows `begin` to `end` of each tile of the block after this one are prefetched.
  struct Next {
    const int8_t* block;
    int64_t begin, end;

    // Into the second level, from where tiles come as fast: a block fills the first.
    void prefetch(int64_t at) const {
      for (int64_t r = begin; r < end; ++r) __builtin_prefetch(block + at + r * 64, 0, 2);
    }
  };

  template <bool kLower>
  static void tiles(const uint8_t* a, int64_t stride, const int8_t* block,
                    int64_t k, const Next& next, int32_t* c) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (kLower) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    for (int64_t i = 0; i < k; i += 64) {
      TILE_LOAD(6, block + i * kHalf, 64);
      TILE_LOAD(7, block + (k + i) * kHalf, 64);
      TILE_LOAD(4, a + i, stride);
      next.prefetch(i * kHalf);
      TILE_DOT(0, 4, 6);
      TILE_DOT(1, 4, 7);
      if (kLower) TILE_LOAD(5, a + 16 * stride + i, stride);
      next.prefetch((k + i) * kHalf);
      if (kLower) {
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    }
    TILE_STORE(0, c, 4 * kNR);
    TILE_STORE(1, c + kHalf, 4 * kNR);
    if (kLower) {
      TILE_STORE(2, c + 16 * kNR, 4 * kNR);
      TILE_STORE(3, c + 16 * kNR + kHalf, 4 * kNR);
    }
  }

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    int8_moe::gemv<Avx512Vnni>(a, half, k, c);
  }

  static void gemm(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* after, int32_t* c) {
    if (m <= kFewRows) return int8_moe::gemm<Avx512Vnni>(a, stride, block, k, m, c);
    if (!configured) configure();
    // Each pair of 16 rows prefetches its share: memory is asked for evenly.
    const int64_t pairs = (m + 31) / 32;
    const int64_t rows = after == nullptr ? 0 : (kTileRows + pairs - 1) / pairs;
    for (Next next = {after, 0, 0}; m > 0; m -= 32) {
      next.end = std::min(next.begin + rows, kTileRows);
      (m > 16 ? tiles<true> : tiles<false>)(a, stride, block, k, next, c);
      next.begin = next.end;
      a += 32 * stride;
      c += 32 * kNR;
    }
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(amx) = {"amx", amx_supported, run_experts<Amx>,
                                         run_router};

}  // namespace int8_moe
