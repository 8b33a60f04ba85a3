// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// The operator without PyTorch, for processors that PyTorch is not at hand for: every
// instruction set that this one has against plain double sums. Exit code 1 where one
// differs; prints their names.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/int8_moe/int8_moe.h"

using namespace int8_moe;

namespace {

std::mt19937 random_bits(0);

double quantized(std::vector<double>& row) {
  double most = 0;
  for (double v : row) most = std::max(most, std::fabs(v));
  const double scale = most > 0 ? most / 127 : 1;
  for (double& v : row) v = std::nearbyint(v / scale);
  return scale;
}

struct Plain {
  int64_t experts, rows, k;
  std::vector<int8_t> weight;
  std::vector<float> scale;
  std::vector<int8_t> packed;
  Weight as;

  Plain(int64_t experts, int64_t rows, int64_t k, bool gated)
      : experts(experts), rows(rows), k(k), weight(experts * rows * k), scale(experts * rows) {
    for (auto& w : weight) w = static_cast<int8_t>(random_bits() % 256 - 128);
    for (auto& s : scale) s = 0.001f + 0.001f * (random_bits() % 100);
    as = {nullptr, gated ? 2 * round_up(rows / 2, 16) : round_up(rows, kNR), k};
    packed.resize(experts * as.bytes() + 64);
    as.packed = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
    pack(weight.data(), scale.data(), nullptr, experts, rows, gated ? Order::halves : Order::plain, as,
         {1, [](int, void (*body)(void*, int), void* context) { body(context, 0); }});
  }

  std::vector<double> times(int64_t expert, std::vector<double> x) const {
    const double s = quantized(x);
    std::vector<double> out(rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < k; ++i) out[r] += x[i] * weight[(expert * rows + r) * k + i];
      out[r] *= s * scale[expert * rows + r];
    }
    return out;
  }
};

double check(const Isa& isa, int64_t experts, int64_t width, int64_t hidden, int64_t tokens, int64_t top_k) {
  const Plain w13(experts, 2 * width, hidden, true), w2(experts, hidden, width, false);
  std::vector<float> x(tokens * hidden), weights(tokens * top_k), out(tokens * hidden);
  std::vector<int32_t> ids(tokens * top_k);
  std::normal_distribution<float> normal;
  for (auto& v : x) v = normal(random_bits);
  for (auto& v : weights) v = 0.1f * (random_bits() % 10);
  for (auto& v : ids) v = static_cast<int32_t>(random_bits() % experts);
  Problem p = {x.data(), hidden, out.data(), Dtype::f32, tokens, hidden, width, experts, top_k,
               weights.data(), ids.data(), w13.as, w2.as, Activation::silu, 7.0f, nullptr, nullptr, false};
  // two threads, one after the other: what one left the other does
  isa.experts(p, {2, [](int count, void (*body)(void*, int), void* context) {
                    for (int i = 0; i < count; ++i) body(context, i);
                  }});
  double error = 0, norm = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> sum(hidden);
    for (int64_t j = 0; j < top_k; ++j) {
      const int32_t e = ids[t * top_k + j];
      const auto both = w13.times(e, {x.begin() + t * hidden, x.begin() + (t + 1) * hidden});
      std::vector<double> act(width);
      for (int64_t i = 0; i < width; ++i) act[i] = both[i] / (1 + std::exp(-both[i])) * both[width + i];
      const auto down = w2.times(e, act);
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weights[t * top_k + j] * down[i];
    }
    for (int64_t i = 0; i < hidden; ++i) {
      error += std::pow(out[t * hidden + i] - sum[i], 2);
      norm += std::pow(sum[i], 2);
    }
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main() {
  int failed = 0;
  for (const Isa* isa : isas()) {
    double worst = 0;
    for (int64_t tokens : {1, 2, 3, 7, 40}) {
      worst = std::max(worst, check(*isa, 3, 21, 37, tokens, 2));
      worst = std::max(worst, check(*isa, 2, 64, 128, tokens, 1));
    }
    std::printf("%s %.1e\n", isa->name, worst);
    failed |= !(worst < 0.01);
  }
  return failed;
}
