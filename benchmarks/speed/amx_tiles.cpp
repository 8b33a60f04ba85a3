// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// How fast a core loads AMX tiles, multiplies them, and does both, as csrc/cpu/int8_moe/amx.cpp does:
//
//     c++ -std=c++20 -O3 -march=sapphirerapids -pthread benchmarks/speed/amx_tiles.cpp -o amx_tiles && ./amx_tiles
//
// Prints nanoseconds for 64 values of K of 32 rows and 32 columns, which take four tile loads and four products: the
// 5th, 50th and 95th percentile of all threads' rounds, on CPU 0 alone, on every other CPU, and on all. The operands
// are 128 rows and one block, in the L2 cache. The parts run in turn, so that what changes on the host meets them all.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr long kK = 4096, kStride = kK + 64, kTileRows = 16, kRows = 128, kRounds = 25, kRepeats = 31;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// 32 rows of a times a block of b, to c [32, 32]; left out: the loads or the products.
template <bool kLoad, bool kMultiply>
void run_tiles(const uint8_t* a, const int8_t* b, int32_t* c) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long i = 0; i < kK; i += 64) {
    if (kLoad) {
      _tile_loadd(6, b + i * kTileRows, 64);
      _tile_loadd(7, b + (kK + i) * kTileRows, 64);
      _tile_loadd(4, a + i, kStride);
    }
    if (kMultiply) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
    }
    if (kLoad) {
      _tile_loadd(5, a + kTileRows * kStride + i, kStride);
    }
    if (kMultiply) {
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}

struct Part {
  const char* name;
  void (*run)(const uint8_t*, const int8_t*, int32_t*);
};
constexpr Part kParts[] = {
    {"products", run_tiles<false, true>}, {"loads", run_tiles<true, false>}, {"both", run_tiles<true, true>}};

void measure(const char* which, const std::vector<int>& cpus) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, cpus.size());
  std::vector<std::vector<double>> times(cpus.size() * std::size(kParts));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < cpus.size(); ++t) {
    threads.emplace_back([&, t] {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(cpus[t], &own);
      sched_setaffinity(0, sizeof(own), &own);
      const size_t size = 4 << 20;
      auto* memory = static_cast<uint8_t*>(std::aligned_alloc(2 << 20, size));
      madvise(memory, size, MADV_HUGEPAGE);
      std::memset(memory, 1, size);
      const TileConfig config;
      asm volatile("ldtilecfg %0" : : "m"(config));
      for (long round = -1; round < kRounds; ++round) {
        for (size_t p = 0; p < std::size(kParts); ++p) {
          pthread_barrier_wait(&barrier);
          const double begin = now();
          for (long i = 0; i < kRepeats; ++i) {
            for (long row = 0; row < kRows; row += 32) {
              kParts[p].run(memory + row * kStride, reinterpret_cast<int8_t*>(memory) + (2 << 20),
                            reinterpret_cast<int32_t*>(memory + (3 << 20)) + row * 32);
            }
          }
          const double steps = kRepeats * (kRows / 32) * (kK / 64);
          if (round >= 0) times[t * std::size(kParts) + p].push_back((now() - begin) / steps * 1e9);
        }
      }
      _tile_release();
      std::free(memory);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%-16s", which);
  for (size_t p = 0; p < std::size(kParts); ++p) {
    std::vector<double> all;
    for (size_t t = 0; t < cpus.size(); ++t) {
      const auto& own = times[t * std::size(kParts) + p];
      all.insert(all.end(), own.begin(), own.end());
    }
    std::sort(all.begin(), all.end());
    std::printf("  %s %.0f %.0f %.0f", kParts[p].name, all[all.size() / 20], all[all.size() / 2],
                all[all.size() * 19 / 20]);
  }
  std::puts("");
}

}  // namespace

int main() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) != 0) {
    std::fputs("amx_tiles: this processor or kernel has no AMX\n", stderr);
    return 2;
  }
  std::vector<int> all, even;
  for (int cpu = 0; cpu < static_cast<int>(std::thread::hardware_concurrency()); ++cpu) {
    all.push_back(cpu);
    if (cpu % 2 == 0) even.push_back(cpu);
  }
  measure("CPU 0", {0});
  measure("every other CPU", even);
  measure("all CPUs", all);
  return 0;
}
