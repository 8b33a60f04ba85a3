// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// AMX tiles. INT8_MOE_EMULATE_AMX emulates them by AVX512-VNNI, for tests on
// processors without AMX. With it "amx" counts as supported wherever
// AVX512-VNNI is.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
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

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
static_assert(kKAlign % kTileBytes == 0);

// The operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// All eight tiles have 16 rows of 64 bytes.
constexpr TileConfig kFullTiles = {1,
                                   0,
                                   {},
                                   {64, 64, 64, 64, 64, 64, 64, 64},
                                   {16, 16, 16, 16, 16, 16, 16, 16}};

#if defined(INT8_MOE_EMULATE_AMX)
struct EmulatedTiles {
  TileConfig config;
  alignas(kTileBytes) uint8_t tile[kTiles][kTileRows][kTileBytes];
};
thread_local EmulatedTiles emulated;

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
// Values past a tile's row_bytes stay out of the sums.
template <int C, int A, int B>
void tile_dot() {
  const __mmask16 columns = (1u << emulated.config.row_bytes[C] / kKR) - 1;
  for (int r = 0; r < emulated.config.rows[C]; ++r) {
    __m512i sums = _mm512_load_si512(emulated.tile[C][r]);
    for (int i = 0; i < emulated.config.row_bytes[A]; i += kKR) {
      const __m512i x =
          _mm512_set1_epi32(load_activations(emulated.tile[A][r] + i));
      const __m512i weights = _mm512_load_si512(emulated.tile[B][i / kKR]);
      sums = _mm512_mask_dpbusd_epi32(sums, columns, x, weights);
    }
    _mm512_store_si512(emulated.tile[C][r], sums);
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
  // These are macros because GCC's intrinsics write a tile's number into the
  // assembly.
  #define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
  #define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
  #define TILE_ZERO(t) _tile_zero(t)
  #define TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)
// _tile_loadconfig of GCC below 14 declares 8 of the 64 bytes as read
// (PR 114098), and GCC drops stores to the others. The operand here is the
// whole struct.
void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}
void tile_release() { _tile_release(); }

bool amx_supported() {
  #if defined(__linux__)
  static const bool supported = [] {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & kAmxTile) == 0 || (edx & kAmxInt8) == 0) return false;
    if (!avx512_vnni_supported()) return false;
    // A process has to ask Linux for the tiles' state.
    constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  }();
  return supported;
  #else
  return false;
  #endif
}
#endif

thread_local bool tiles_configured = false;

// Tiles 0 to 3 are sums: 0 and 1 of the first 16 rows, 2 and 3 of the next 16,
// each for the left and the right half of the block's columns. Tiles 4 and 5
// are the activations of the first and the next 16 rows. Tiles 6 and 7 are the
// weights of the left and the right half.
// Every tile has 16 rows, also where fewer rows are left. kMAlign says so: the
// caller's rows past the last one may be read, and it ignores their sums.
struct Amx {
  static constexpr int kZeroPoint = 128;
  static constexpr int kMAlign = kTileRows;
  // Up to this many rows vpdpbusd is as fast, measured for K of 64 to 4096.
  static constexpr int64_t kMaxRowsOfVnni = 6;

  static void finish_thread() {
    if (tiles_configured) tile_release();
    tiles_configured = false;
  }

  static void configure_tiles() {
    tile_configure(kFullTiles);
    tiles_configured = true;
  }

  // The part of the next block that a pair of row tiles prefetches: of each of
  // its weight tiles the rows from row_begin to row_end.
  struct NextBlock {
    const int8_t* block;
    int64_t row_begin, row_end;

    // Prefetches into the L2 cache. Tiles load as fast from there, and one
    // block fills the L1 cache.
    void prefetch_tile(int64_t offset) const {
      for (int64_t r = row_begin; r < row_end; ++r) {
        __builtin_prefetch(block + offset + r * kTileBytes, 0, 2);
      }
    }
  };

  // 16 rows or, with kTwoRowTiles, 32 times a block, to c [16 or 32, kNR].
  template <bool kTwoRowTiles>
  static void multiply_row_tiles(const uint8_t* a, int64_t a_stride,
                                 const int8_t* block, int64_t k,
                                 const NextBlock& next, int32_t* c) {
    constexpr int64_t kSumStride = kNR * sizeof(int32_t);
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (kTwoRowTiles) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    for (int64_t i = 0; i < k; i += kTileBytes) {
      TILE_LOAD(6, block + i * kHalf, kTileBytes);
      TILE_LOAD(7, block + (k + i) * kHalf, kTileBytes);
      TILE_LOAD(4, a + i, a_stride);
      next.prefetch_tile(i * kHalf);
      TILE_DOT(0, 4, 6);
      TILE_DOT(1, 4, 7);
      if (kTwoRowTiles) TILE_LOAD(5, a + kTileRows * a_stride + i, a_stride);
      next.prefetch_tile((k + i) * kHalf);
      if (kTwoRowTiles) {
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    }
    TILE_STORE(0, c, kSumStride);
    TILE_STORE(1, c + kHalf, kSumStride);
    if (kTwoRowTiles) {
      TILE_STORE(2, c + kTileRows * kNR, kSumStride);
      TILE_STORE(3, c + kTileRows * kNR + kHalf, kSumStride);
    }
  }

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
    int8_moe::gemv<Avx512Vnni>(a, half, k, c);
  }

  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* next_block, int32_t* c) {
    if (m <= kMaxRowsOfVnni) {
      return int8_moe::gemm<Avx512Vnni>(a, a_stride, block, k, m, c);
    }
    if (!tiles_configured) configure_tiles();
    constexpr int64_t kPairRows = 2 * kTileRows;
    // Each pair of row tiles prefetches its share of the next block, so that
    // requests to memory are spread evenly.
    const int64_t pairs = (m + kPairRows - 1) / kPairRows;
    const int64_t share =
        next_block == nullptr ? 0 : (kTileRows + pairs - 1) / pairs;
    for (NextBlock next = {next_block, 0, 0}; m > 0; m -= kPairRows) {
      next.row_end = std::min<int64_t>(next.row_begin + share, kTileRows);
      (m > kTileRows
           ? multiply_row_tiles<true>
           : multiply_row_tiles<false>)(a, a_stride, block, k, next, c);
      next.row_begin = next.row_end;
      a += kPairRows * a_stride;
      c += kPairRows * kNR;
    }
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(amx) = {"amx", amx_supported, run_experts<Amx>,
                                         run_router};

}  // namespace int8_moe
