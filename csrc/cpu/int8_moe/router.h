// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The experts of each token.
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

// score, choice: [experts], scratch
inline void route_token(const Router& r, int64_t t, float* score, float* choice) {
  to_float(static_cast<const char*>(r.logits) + t * r.experts * size_of(r.dtype),
           r.dtype, r.experts, score);
  if (r.softmax) {
    float most = score[0], total = 0.0f;
    for (int64_t e = 1; e < r.experts; ++e) most = std::max(most, score[e]);
    for (int64_t e = 0; e < r.experts; ++e) score[e] = exponential(score[e] - most);
    for (int64_t e = 0; e < r.experts; ++e) total += score[e];
    for (int64_t e = 0; e < r.experts; ++e) score[e] /= total;
  } else {
    for (int64_t e = 0; e < r.experts; ++e) score[e] = sigmoid(score[e]);
  }
  for (int64_t e = 0; e < r.experts; ++e) {
    const float v = r.bias == nullptr ? score[e] : score[e] + r.bias[e];
    // NaN first, as torch.topk has it
    choice[e] = v != v ? std::numeric_limits<float>::infinity() : v;
  }
  float* weights = r.weights + t * r.top_k;
  int32_t* ids = r.ids + t * r.top_k;
  int64_t kept = 0;
  for (int64_t e = 0; e < r.experts; ++e) {
    if (kept == r.top_k && !(choice[e] > choice[ids[kept - 1]])) continue;
    int64_t place = kept < r.top_k ? kept++ : kept - 1;
    for (; place > 0 && choice[e] > choice[ids[place - 1]]; --place) {
      ids[place] = ids[place - 1];
    }
    ids[place] = static_cast<int32_t>(e);
  }
  float total = 0.0f;
  for (int64_t k = 0; k < r.top_k; ++k) total += weights[k] = score[ids[k]];
  const float factor = r.renormalize ? r.scale / total : r.scale;
  for (int64_t k = 0; k < r.top_k; ++k) weights[k] *= factor;
}

constexpr int64_t kTokensWorthAThread = 64;

inline void run_router(const Router& r, const Threads& all) {
  const Threads threads = {static_cast<int>(std::min<int64_t>(
                               all.count, 1 + r.tokens / kTokensWorthAThread)),
                           all.run};
  const int64_t some = Arena::space<float>(r.experts) / sizeof(float);
  Arena arena(Steps::space(1, threads.count) +
              Arena::space<float>(2 * some * threads.count));
  Steps steps(arena, 1, threads.count);
  float* const scores = arena.take<float>(2 * some * threads.count);
  steps.share_evenly(0, r.tokens);
  on_threads(threads, [&](int thread) {
    float* const own = scores + 2 * some * thread;
    steps.run(0, thread, 16, [&](int64_t t) { route_token(r, t, own, own + some); });
  });
}

}  // namespace
}  // namespace int8_moe
