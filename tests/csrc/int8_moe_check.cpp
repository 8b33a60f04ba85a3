// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// The operator without PyTorch, for processors and sanitizers that PyTorch is not at hand for: every instruction set
// of this processor against plain double sums, and several threads against one. Prints the names of the instruction
// sets. Exit code 1 where a result differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/int8_moe/int8_moe.h"

using namespace int8_moe;

namespace {

std::mt19937 random_bits(0);

// One after the other: the first does the work of all.
void run_in_turn(int count, void (*body)(void*, int), void* context) {
  for (int i = 0; i < count; ++i) body(context, i);
}

void run_at_once(int count, void (*body)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, context, i);
  for (std::thread& thread : threads) thread.join();
}

// Quantizes a row in place, and returns its scale.
double quantize_row(std::vector<double>& row) {
  double largest = 0;
  for (double v : row) largest = std::max(largest, std::fabs(v));
  const double scale = largest > 0 ? largest / 127 : 1;
  for (double& v : row) v = std::nearbyint(v / scale);
  return scale;
}

// A random weight, as [experts, rows, k] and packed.
struct RandomWeight {
  int64_t experts, rows, k;
  std::vector<int8_t> values;
  std::vector<float> scale;
  std::vector<int8_t> buffer;
  Weight packed;

  RandomWeight(int64_t experts, int64_t rows, int64_t k, bool gated)
      : experts(experts), rows(rows), k(k), values(experts * rows * k), scale(experts * rows) {
    for (auto& v : values) v = static_cast<int8_t>(random_bits() % 256 - 128);
    for (auto& s : scale) s = 0.001f + 0.001f * (random_bits() % 100);
    packed = {nullptr, gated ? 2 * round_up(rows / 2, kHalf) : round_up(rows, kNR), k};
    buffer.resize(experts * packed.bytes() + kCacheLine);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    packed.packed = buffer.data() + (round_up(address, kCacheLine) - address);
    pack(values.data(), scale.data(), nullptr, experts, rows, gated ? Order::halves : Order::plain, packed,
         {2, run_at_once});
  }
  RandomWeight(RandomWeight&&) = default;  // a copy's `packed` would point into the original

  // The quantized x [k] times an expert.
  std::vector<double> multiply(int64_t expert, std::vector<double> x) const {
    const double x_scale = quantize_row(x);
    std::vector<double> out(rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < k; ++i) out[r] += x[i] * values[(expert * rows + r) * k + i];
      out[r] *= x_scale * scale[expert * rows + r];
    }
    return out;
  }
};

// Experts with random weights, inputs and routing.
struct RandomProblem {
  int64_t experts, intermediate, hidden, tokens, top_k;
  RandomWeight w13, w2;
  std::vector<float> x, weights;
  std::vector<int32_t> ids;

  RandomProblem(int64_t experts, int64_t intermediate, int64_t hidden, int64_t tokens, int64_t top_k)
      : experts(experts),
        intermediate(intermediate),
        hidden(hidden),
        tokens(tokens),
        top_k(top_k),
        w13(experts, 2 * intermediate, hidden, true),
        w2(experts, hidden, intermediate, false),
        x(tokens * hidden),
        weights(tokens * top_k),
        ids(tokens * top_k) {
    std::normal_distribution<float> normal;
    for (auto& v : x) v = normal(random_bits);
    for (auto& v : weights) v = 0.1f * (random_bits() % 10);
    for (auto& v : ids) v = static_cast<int32_t>(random_bits() % experts);
  }

  std::vector<float> run(const Isa& isa, const Threads& threads) const {
    std::vector<float> out(tokens * hidden);
    Problem p = {};
    p.x = x.data(), p.x_stride = hidden, p.out = out.data(), p.dtype = Dtype::f32;
    p.tokens = tokens, p.hidden = hidden, p.intermediate = intermediate, p.experts = experts, p.top_k = top_k;
    p.topk_weights = weights.data(), p.experts_of = ids.data(), p.w13 = w13.packed, p.w2 = w2.packed;
    p.activation = Activation::silu, p.limit = 7.0f;
    isa.experts(p, threads);
    return out;
  }

  // Whether every number of threads gives the same bits.
  bool runs_alike(const Isa& isa) const {
    const std::vector<float> out = run(isa, {1, run_at_once});
    return run(isa, {2, run_in_turn}) == out && run(isa, {2, run_at_once}) == out &&
           run(isa, {4, run_in_turn}) == out && run(isa, {4, run_at_once}) == out;
  }

  double measure_error(const Isa& isa) const {
    const std::vector<float> out = run(isa, {1, run_at_once});
    double error = 0, norm = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> sum(hidden);
      for (int64_t j = 0; j < top_k; ++j) {
        const int32_t expert = ids[t * top_k + j];
        const auto gate_up = w13.multiply(expert, {x.begin() + t * hidden, x.begin() + (t + 1) * hidden});
        std::vector<double> act(intermediate);
        for (int64_t i = 0; i < intermediate; ++i) {
          act[i] = gate_up[i] / (1 + std::exp(-gate_up[i])) * gate_up[intermediate + i];
        }
        const auto down = w2.multiply(expert, act);
        for (int64_t i = 0; i < hidden; ++i) sum[i] += weights[t * top_k + j] * down[i];
      }
      for (int64_t i = 0; i < hidden; ++i) {
        error += std::pow(out[t * hidden + i] - sum[i], 2);
        norm += std::pow(sum[i], 2);
      }
    }
    return std::sqrt(error / norm);
  }
};

// Whether threads change no bit of the router's output.
bool routes_alike(const Isa& isa, int64_t tokens, int64_t experts, int64_t top_k) {
  std::vector<float> logits(tokens * experts), weights[2];
  std::vector<int32_t> ids[2];
  std::normal_distribution<float> normal;
  for (auto& v : logits) v = normal(random_bits);
  for (int i = 0; i < 2; ++i) {
    weights[i].resize(tokens * top_k), ids[i].resize(tokens * top_k);
    const Router r = {logits.data(), Dtype::f32, tokens, experts,           top_k,        nullptr,
                      false,         true,       3.0f,   weights[i].data(), ids[i].data()};
    isa.route(r, {i == 0 ? 1 : 4, run_at_once});
  }
  return weights[0] == weights[1] && ids[0] == ids[1];
}

}  // namespace

int main() {
  std::vector<RandomProblem> problems;
  for (int64_t tokens : {1, 2, 3, 7, 40}) {
    problems.emplace_back(3, 21, 37, tokens, 2);
    problems.emplace_back(2, 64, 128, tokens, 1);
  }
  problems.emplace_back(4, 96, 320, 70, 3);  // enough products for several threads
  bool passed = true;
  for (const Isa* isa : isas()) {
    double worst = 0;
    bool alike = routes_alike(*isa, 500, 32, 4);
    for (const RandomProblem& problem : problems) {
      worst = std::max(worst, problem.measure_error(*isa));
      alike = alike && problem.runs_alike(*isa);
    }
    std::printf("%s %.1e%s\n", isa->name, worst, alike ? "" : ", other bits on several threads");
    passed = passed && worst < 0.01 && alike;
  }
  // More rows than are in memory at once, with weights that no cache holds, and with such that threads part the tokens.
  // The scheduler is the same for every instruction set.
  passed = passed && RandomProblem(3, 2048, 4, 1200, 3).runs_alike(*isas().front());
  passed = passed && RandomProblem(3, 512, 4, 6000, 3).runs_alike(*isas().front());
  return passed ? 0 : 1;
}
