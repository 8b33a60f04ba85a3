// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Work of one call, shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#include "arena.h"
#include "int8_moe.h"

namespace int8_moe {
namespace {

template <typename F>
void on_threads(const Threads& threads, const F& body) {
  if (threads.count <= 1) return body(0);
  threads.run(threads.count,
              [](void* f, int thread) { (*static_cast<const F*>(f))(thread); },
              const_cast<void*>(static_cast<const void*>(&body)));
}

// Of a loop that waits: leaves the core to its other thread, and memory alone.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The steps of one parallel region. Each thread has a range of a step's items, the
// same from call to call so that what it reads stays in its cache, and helps with the
// others' when it is through; each item writes what no other one writes. A step begins
// when those before it are done. A thread waits only for items that others have begun,
// so that threads that run one after the other, as in a nested region, wait for nothing.
class Steps {
 public:
  static size_t space(int steps, int threads) {
    return Arena::space<Range>(steps * threads) + Arena::space<Step>(steps);
  }
  Steps(Arena& arena, int steps, int threads)
      : threads_(threads),
        ranges_(arena.take<Range>(steps * threads)),
        steps_(arena.take<Step>(steps)) {}

  // Thread t's range ends with item end(t).
  template <typename F>
  void share(int which, const F& end) {
    Step* step = new (steps_ + which) Step();
    for (int t = 0; t < threads_; ++t) {
      Range* range = new (ranges_ + which * threads_ + t) Range();
      range->next.store(step->items, std::memory_order_relaxed);
      step->items = range->end = end(t);
    }
  }
  void share_evenly(int which, int64_t items) {
    share(which, [&](int t) { return items * (t + 1) / threads_; });
  }

  template <typename F>
  void run(int which, int thread, int64_t at_once, const F& body) {
    Step& step = steps_[which];
    int64_t finished = 0;
    for (int i = 0; i < threads_; ++i) {
      if (step.begun.load(std::memory_order_relaxed)) break;
      Range& range = ranges_[which * threads_ + (thread + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t start = range.next.fetch_add(at_once, std::memory_order_relaxed);
        const int64_t end = std::min(range.end, start + at_once);
        for (int64_t item = start; item < end; ++item) body(item);
        finished += std::max<int64_t>(0, end - start);
      }
    }
    // The others need not look for items in every range.
    if (threads_ > 2) step.begun.store(true, std::memory_order_relaxed);
    if (finished > 0) step.done.fetch_add(finished, std::memory_order_acq_rel);
    for (int spins = 0; step.done.load(std::memory_order_acquire) < step.items; ++spins) {
      pause();
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct alignas(64) Step {
    std::atomic<int64_t> done{0};
    std::atomic<bool> begun{false};  // every item
    int64_t items = 0;
  };
  int threads_;
  Range* ranges_;
  Step* steps_;
};

}  // namespace
}  // namespace int8_moe
