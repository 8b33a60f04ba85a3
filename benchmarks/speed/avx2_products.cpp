// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// How fast a core multiplies INT8 with AVX2, beside what its instructions allow:
//
//     c++ -std=c++20 -O3 -mavx2 -mfma -mf16c -DINT8_MOE_X86 -Icsrc/cpu/int8_moe benchmarks/speed/avx2_products.cpp
//     ./a.out
//
// Prints 1e9 products of a weight and an activation per second, the best of many rounds of a millisecond: of
// independent pairs of vpmaddwd and vpaddd, of what vpmaddubsw would take for any values (vpsignb, vpmaddubsw,
// vpmaddwd, vpaddd), and of the kernel in csrc/cpu/int8_moe/avx2.cpp.
#include "avx2.cpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class F>
double find_least_seconds(const F& run, int rounds) {
  double least = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const double begin = now();
    run();
    least = std::min(least, now() - begin);
  }
  return least;
}

#define TWELVE(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)
#define CLOBBERED                                                                                                      \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",  \
      "xmm14", "xmm15"
#define WITH_MADD(n) "vpmaddwd %%ymm15, %%ymm14, %%ymm13\n vpaddd %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
#define WITH_MADDUBS(n)                                                                                                \
  "vpsignb %%ymm15, %%ymm14, %%ymm13\n vpmaddubsw %%ymm13, %%ymm12, %%ymm13\n"                                         \
  "vpmaddwd %%ymm13, %%ymm15, %%ymm13\n vpaddd %%ymm13, %%ymm" #n ", %%ymm" #n "\n"

constexpr long kTimes = 300000, kK = 4096;

}  // namespace

int main() {
  const double madd = find_least_seconds(
      [] {
        for (long i = 0; i < kTimes; ++i) asm volatile(TWELVE(WITH_MADD)::: CLOBBERED);
      },
      60);
  const double maddubs = find_least_seconds(
      [] {
        for (long i = 0; i < kTimes; ++i) asm volatile(TWELVE(WITH_MADDUBS)::: CLOBBERED);
      },
      60);
  std::printf("vpmaddwd and vpaddd: %.1f\n", 12 * 16 * kTimes / madd / 1e9);
  std::printf("with vpmaddubsw: %.1f\n", 12 * 32 * kTimes / maddubs / 1e9);
  for (const long rows : {1, 2, 3, 6, 16, 64, 192}) {
    constexpr long kBlocks = 8, kStride = kK + 64;
    std::vector<uint8_t> a(rows * kStride, 3);
    std::vector<int8_t> b(kBlocks * int8_moe::kNR * kK);
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(7 * i);
    std::vector<int32_t> c(rows * int8_moe::kNR);
    const double seconds = find_least_seconds(
        [&] {
          for (long i = 0; i < kBlocks; ++i) {
            int8_moe::Avx2Microkernel::gemm(a.data(), kStride, b.data() + i * int8_moe::kNR * kK, kK, rows, nullptr,
                                            c.data());
          }
        },
        rows < 16 ? 200 : 60);
    std::printf("%ld rows: %.1f\n", rows, rows * kK * int8_moe::kNR * kBlocks / seconds / 1e9);
  }
}
