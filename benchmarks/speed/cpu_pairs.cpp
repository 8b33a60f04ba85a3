// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
//
// cpu_pairs.py builds this file as a library for each version, with its kernels (CPU_PAIRS_LIBRARY), and once as the
// program that has all versions run the same experts in turn.
#include <cstdint>

using RunOnThreads = void (*)(int count, void (*body)(void*, int), void* context);

#ifdef CPU_PAIRS_LIBRARY

  #include "int8_moe.h"

namespace {

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
                 int threads, RunOnThreads run, int8_t* packed) {
  const auto order = gated ? int8_moe::Order::halves : int8_moe::Order::plain;
  const int8_moe::Weight to = as_packed(packed, rows, k, gated);
  int8_moe::pack(weight, scale, nullptr, experts, rows, order, to, {threads, run});
}

// x, out: [tokens, hidden] bfloat16
void run_experts_of(int8_t* w13, int8_t* w2, int64_t experts, int64_t intermediate, int64_t hidden, int64_t tokens,
                    int64_t top_k, const uint16_t* x, const float* weights, const int32_t* ids, int threads,
                    RunOnThreads run, uint16_t* out) {
  int8_moe::Problem p = {};
  p.x = x, p.x_stride = hidden, p.out = out, p.dtype = int8_moe::Dtype::bf16;
  p.tokens = tokens, p.hidden = hidden, p.intermediate = intermediate, p.experts = experts, p.top_k = top_k;
  p.topk_weights = weights, p.experts_of = ids, p.activation = int8_moe::Activation::silu, p.limit = 1e30f;
  p.w13 = as_packed(w13, 2 * intermediate, hidden, true);
  p.w2 = as_packed(w2, hidden, intermediate, false);
  int8_moe::isas().front()->experts(p, {threads, run});
}
}

#else

  #include <dlfcn.h>
  #include <omp.h>

  #include <algorithm>
  #include <bit>
  #include <chrono>
  #include <cstdio>
  #include <cstdlib>
  #include <random>
  #include <string>
  #include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int all_threads = 1;

// As PyTorch does: all threads take part whatever `count` is. OpenMP ends threads where a region has fewer.
void run_on_threads(int count, void (*body)(void*, int), void* context) {
  #pragma omp parallel num_threads(all_threads)
  if (const int thread = omp_get_thread_num(); thread < count) body(context, thread);
}

struct Version {
  std::string name;
  const char* (*name_isa)();
  int64_t (*count_bytes)(int64_t, int64_t, int64_t, bool);
  void (*pack_weight)(const int8_t*, const float*, int64_t, int64_t, int64_t, bool, int, RunOnThreads, int8_t*);
  void (*run)(int8_t*, int8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const uint16_t*, const float*,
              const int32_t*, int, RunOnThreads, uint16_t*);
  int8_t *w13, *w2;

  // argument: NAME=LIBRARY
  explicit Version(const std::string& argument) : name(argument.substr(0, argument.find('='))) {
    void* library = dlopen(argument.substr(name.size() + 1).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::fprintf(stderr, "cpu_pairs: %s\n", dlerror()), std::exit(2);
    find(library, "name_isa", name_isa);
    find(library, "count_bytes", count_bytes);
    find(library, "pack_weight", pack_weight);
    find(library, "run_experts_of", run);
  }

  template <class F>
  static void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
  }

  int8_t* pack(int64_t experts, int64_t rows, int64_t k, bool gated, int threads) const {
    std::vector<int8_t> weight(experts * rows * k);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(i * 2654435761u >> 24);
    const std::vector<float> scale(experts * rows, 0.001f);
    const int64_t size = (count_bytes(experts, rows, k, gated) + (2 << 20)) >> 21 << 21;
    auto* packed = static_cast<int8_t*>(std::aligned_alloc(2 << 20, size));
    pack_weight(weight.data(), scale.data(), experts, rows, k, gated, threads, run_on_threads, packed);
    return packed;
  }
};

struct Shape {
  int64_t experts, intermediate, hidden, top_k;
};

// The numbers in `text`, which stand between separators.
std::vector<int64_t> read_numbers(const char* text) {
  std::vector<int64_t> numbers;
  for (char* end; *text != '\0'; text = *end == '\0' ? end : end + 1) numbers.push_back(std::strtoll(text, &end, 10));
  return numbers;
}

double find_quantile(std::vector<double> values, double quantile) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(quantile * values.size())];
}

void measure(std::vector<Version>& versions, const Shape& s, int64_t tokens, int threads) {
  std::mt19937 random(tokens);
  std::vector<uint16_t> x(tokens * s.hidden);
  const std::vector<float> weights(tokens * s.top_k, 0.2f);
  std::vector<int32_t> ids(tokens * s.top_k);
  for (uint16_t& value : x) value = std::bit_cast<uint32_t>(static_cast<float>(random() % 2000) / 1000 - 1) >> 16;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(random() % (s.experts / s.top_k) * s.top_k + i % s.top_k);
  }
  const size_t count = versions.size();
  std::vector<std::vector<uint16_t>> out(count, std::vector<uint16_t>(tokens * s.hidden));
  std::vector<std::vector<double>> ratios(count), seconds(count);
  const double start = now();
  for (size_t round = 0; round < 5 || (round < 200 && now() - start < 2 * count); ++round) {
    for (size_t i = 0; i < count; ++i) {
      const size_t turn = (i + round) % count;
      const Version& v = versions[turn];
      const double begin = now();
      v.run(v.w13, v.w2, s.experts, s.intermediate, s.hidden, tokens, s.top_k, x.data(), weights.data(), ids.data(),
            threads, run_on_threads, out[turn].data());
      seconds[turn].push_back(now() - begin);
    }
    for (size_t i = 0; i < count; ++i) ratios[i].push_back(seconds[0].back() / seconds[i].back());
  }
  std::printf("E=%ld N=%ld K=%ld, %ld tokens, %zu rounds: %s %.0f us", s.experts, s.intermediate, s.hidden, tokens,
              seconds[0].size(), versions[0].name.c_str(), find_quantile(seconds[0], 0.5) * 1e6);
  for (size_t i = 1; i < count; ++i) {
    std::printf("; %s %.0f us, %.2f (%.2f to %.2f)%s", versions[i].name.c_str(), find_quantile(seconds[i], 0.5) * 1e6,
                find_quantile(ratios[i], 0.5), find_quantile(ratios[i], 0.25), find_quantile(ratios[i], 0.75),
                out[i] == out[0] ? "" : ", other bits");
  }
  std::puts("");
  std::fflush(stdout);
}

}  // namespace

// cpu_pairs THREADS TOKENS,... E,N,K,top-k;... NAME=LIBRARY ...: a line for each shape and number of tokens.
int main(int count, char** arguments) {
  const int threads = all_threads = std::atoi(arguments[1]);
  const std::vector<int64_t> tokens = read_numbers(arguments[2]), shapes = read_numbers(arguments[3]);
  std::vector<Version> versions(arguments + 4, arguments + count);
  std::printf("%s, %d threads; each ratio is %s's time over the version's\n", versions[0].name_isa(), threads,
              versions[0].name.c_str());
  for (size_t i = 0; i + 3 < shapes.size(); i += 4) {
    const Shape s = {shapes[i], shapes[i + 1], shapes[i + 2], shapes[i + 3]};
    for (Version& v : versions) {
      v.w13 = v.pack(s.experts, 2 * s.intermediate, s.hidden, true, threads);
      v.w2 = v.pack(s.experts, s.hidden, s.intermediate, false, threads);
    }
    for (const int64_t t : tokens) measure(versions, s, t, threads);
    for (Version& v : versions) std::free(v.w13), std::free(v.w2);
  }
}

#endif
