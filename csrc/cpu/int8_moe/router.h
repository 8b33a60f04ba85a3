// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The router: the top_k experts of each token and their weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arena.h"
#include "float16.h"
#include "int8_moe.h"
#include "lanes.h"
#include "scheduler.h"

namespace int8_moe {
namespace {

// scores, ranking: [experts], scratch. Experts are selected by `ranking`, the
// biased scores, and weighted by their scores.
inline void route_token(const Router& r, int64_t token, float* scores,
                        float* ranking) {
  convert_to_float(static_cast<const char*>(r.logits) +
                       token * r.experts * element_size(r.dtype),
                   r.dtype, r.experts, scores);
  if (r.softmax) {
    float largest = scores[0], sum = 0.0f;
    for (int64_t e = 1; e < r.experts; ++e) {
      largest = std::max(largest, scores[e]);
    }
    for (int64_t e = 0; e < r.experts; ++e) {
      scores[e] = exponential(scores[e] - largest);
    }
    for (int64_t e = 0; e < r.experts; ++e) sum += scores[e];
    for (int64_t e = 0; e < r.experts; ++e) scores[e] /= sum;
  } else {
    for (int64_t e = 0; e < r.experts; ++e) scores[e] = sigmoid(scores[e]);
  }
  for (int64_t e = 0; e < r.experts; ++e) {
    const float v = r.bias == nullptr ? scores[e] : scores[e] + r.bias[e];
    // NaN ranks first, as in torch.topk.
    ranking[e] = v != v ? std::numeric_limits<float>::infinity() : v;
  }
  // Insertion sort. Of equal experts the lower id ranks first.
  float* weights = r.weights + token * r.top_k;
  int32_t* ids = r.ids + token * r.top_k;
  int64_t selected = 0;
  for (int64_t e = 0; e < r.experts; ++e) {
    if (selected == r.top_k && !(ranking[e] > ranking[ids[selected - 1]])) {
      continue;
    }
    int64_t rank = selected < r.top_k ? selected++ : selected - 1;
    for (; rank > 0 && ranking[e] > ranking[ids[rank - 1]]; --rank) {
      ids[rank] = ids[rank - 1];
    }
    ids[rank] = static_cast<int32_t>(e);
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < r.top_k; ++k) sum += weights[k] = scores[ids[k]];
  const float factor = r.renormalize ? r.scale / sum : r.scale;
  for (int64_t k = 0; k < r.top_k; ++k) weights[k] *= factor;
}

// Fewer do not keep a thread busy for as long as it takes to wake it.
constexpr int64_t kMinTokensPerThread = 64;
constexpr int64_t kTokensPerItem = 16;

inline void run_router(const Router& r, const Threads& all_threads) {
  const Threads threads = {
      static_cast<int>(std::min<int64_t>(all_threads.count,
                                         1 + r.tokens / kMinTokensPerThread)),
      all_threads.run};
  // Each thread has two arrays, each padded to whole cache lines.
  const int64_t stride = Arena::padded_bytes<float>(r.experts) / sizeof(float);
  Arena arena(Steps::scratch_bytes(1, threads.count) +
              Arena::padded_bytes<float>(2 * stride * threads.count));
  Steps steps(arena, 1, threads.count);
  float* const scratch = arena.allocate<float>(2 * stride * threads.count);
  steps.assign_evenly(0, r.tokens);
  run_on_threads(threads, [&](int thread) {
    float* const scores = scratch + 2 * stride * thread;
    steps.run(0, thread, kTokensPerItem, [&](int64_t token) {
      route_token(r, token, scores, scores + stride);
    });
  });
}

}  // namespace
}  // namespace int8_moe
