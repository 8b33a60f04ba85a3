// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// cpu_pairs.py builds this file twice as a library, with the kernels of each revision (CPU_PAIRS_LIBRARY), and once as
// the program that has both run the same experts in turn.
#include <cstdint>

#ifdef CPU_PAIRS_LIBRARY

  #include <thread>
  #include <vector>

  #include "int8_moe.h"

namespace {

void run_on_threads(int count, void (*body)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(body, context, i);
  body(context, 0);
  for (std::thread& thread : others) thread.join();
}

int8_moe::Weight as_packed(int8_t* packed, int64_t rows, int64_t k, bool gated) {
  using int8_moe::round_up;
  return {packed, gated ? round_up(rows / 2, int8_moe::kHalf) * 2 : round_up(rows, int8_moe::kNR), k};
}

}  // namespace

extern "C" {

const char* name_isa() { return int8_moe::isas().front()->name; }

int64_t count_bytes(int64_t experts, int64_t rows, int64_t k, bool gated) {
  return experts * as_packed(nullptr, rows, k, gated).bytes();
}

void pack_weight(const int8_t* weight, const float* scale, int64_t experts, int64_t rows, int64_t k, bool gated,
                 int8_t* packed) {
  const auto order = gated ? int8_moe::Order::halves : int8_moe::Order::plain;
  const int8_moe::Weight to = as_packed(packed, rows, k, gated);
  int8_moe::pack(weight, scale, nullptr, experts, rows, order, to, {1, run_on_threads});
}

void run_experts_of(int8_t* w13, int8_t* w2, int64_t experts, int64_t intermediate, int64_t hidden, int64_t tokens,
                    int64_t top_k, const float* x, const float* weights, const int32_t* ids, int threads, float* out) {
  int8_moe::Problem p = {};
  p.x = x, p.x_stride = hidden, p.out = out, p.dtype = int8_moe::Dtype::f32;
  p.tokens = tokens, p.hidden = hidden, p.intermediate = intermediate, p.experts = experts, p.top_k = top_k;
  p.topk_weights = weights, p.experts_of = ids, p.activation = int8_moe::Activation::silu, p.limit = 1e30f;
  p.w13 = as_packed(w13, 2 * intermediate, hidden, true);
  p.w2 = as_packed(w2, hidden, intermediate, false);
  int8_moe::isas().front()->experts(p, {threads, run_on_threads});
}
}

#else

  #include <dlfcn.h>

  #include <algorithm>
  #include <chrono>
  #include <cstdio>
  #include <cstdlib>
  #include <cstring>
  #include <random>
  #include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Side {
  const char* (*name_isa)();
  int64_t (*count_bytes)(int64_t, int64_t, int64_t, bool);
  void (*pack_weight)(const int8_t*, const float*, int64_t, int64_t, int64_t, bool, int8_t*);
  void (*run)(int8_t*, int8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*, const int32_t*,
              int, float*);
  int8_t *w13, *w2;

  explicit Side(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::fprintf(stderr, "cpu_pairs: %s\n", dlerror()), std::exit(1);
    find(library, "name_isa", name_isa);
    find(library, "count_bytes", count_bytes);
    find(library, "pack_weight", pack_weight);
    find(library, "run_experts_of", run);
  }

  template <class F>
  static void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
  }

  int8_t* pack(int64_t experts, int64_t rows, int64_t k, bool gated) const {
    std::vector<int8_t> weight(experts * rows * k);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(i * 2654435761u >> 24);
    const std::vector<float> scale(experts * rows, 0.001f);
    const int64_t size = (count_bytes(experts, rows, k, gated) + (2 << 20)) >> 21 << 21;
    auto* packed = static_cast<int8_t*>(std::aligned_alloc(2 << 20, size));
    pack_weight(weight.data(), scale.data(), experts, rows, k, gated, packed);
    return packed;
  }
};

struct Shape {
  int64_t experts, intermediate, hidden, top_k;
};

}  // namespace

// cpu_pairs OLD.so NEW.so THREADS: a line for each shape and number of tokens.
int main(int, char** argv) {
  Side sides[2] = {Side(argv[1]), Side(argv[2])};
  const int threads = std::atoi(argv[3]);
  std::printf("%s, %d threads\n", sides[1].name_isa(), threads);
  for (const Shape& s : {Shape{16, 64, 128, 4}, Shape{32, 1280, 4096, 8}, Shape{128, 768, 2048, 8}}) {
    for (Side& side : sides) {
      side.w13 = side.pack(s.experts, 2 * s.intermediate, s.hidden, true);
      side.w2 = side.pack(s.experts, s.hidden, s.intermediate, false);
    }
    for (const int64_t tokens : {1, 8, 64, 128, 256, 512, 2048}) {
      std::mt19937 random(tokens);
      std::vector<float> x(tokens * s.hidden), weights(tokens * s.top_k, 0.2f), out[2];
      std::vector<int32_t> ids(tokens * s.top_k);
      for (float& value : x) value = static_cast<float>(random() % 2000) / 1000 - 1;
      for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>(random() % (s.experts / s.top_k) * s.top_k + i % s.top_k);
      }
      std::vector<double> ratios, seconds[2];
      const double start = now();
      while (ratios.size() < 5 || (ratios.size() < 200 && now() - start < 4)) {
        for (int i = 0; i < 2; ++i) {
          out[i].resize(tokens * s.hidden);
          const Side& side = sides[i];
          const double begin = now();
          side.run(side.w13, side.w2, s.experts, s.intermediate, s.hidden, tokens, s.top_k, x.data(), weights.data(),
                   ids.data(), threads, out[i].data());
          seconds[i].push_back(now() - begin);
        }
        ratios.push_back(seconds[0].back() / seconds[1].back());
      }
      for (auto* values : {&ratios, &seconds[0], &seconds[1]}) std::sort(values->begin(), values->end());
      const size_t middle = ratios.size() / 2;
      const bool same = std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(float)) == 0;
      std::printf("E=%ld N=%ld K=%ld, %ld tokens: old %.0f us, new %.0f us, old / new %.2f (%.2f to %.2f)%s\n", s.experts,
                  s.intermediate, s.hidden, tokens, seconds[0][middle] * 1e6, seconds[1][middle] * 1e6, ratios[middle],
                  ratios[ratios.size() / 4], ratios[ratios.size() * 3 / 4], same ? "" : ", other bits");
      std::fflush(stdout);
    }
    for (Side& side : sides) std::free(side.w13), std::free(side.w2);
  }
}

#endif
