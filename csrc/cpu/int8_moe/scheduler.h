// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The work of one call, shared among threads.
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
void run_on_threads(const Threads& threads, const F& body) {
  if (threads.count <= 1) return body(0);
  threads.run(
      threads.count,
      [](void* f, int thread) { (*static_cast<const F*>(f))(thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// For loops that wait: leaves the core's resources to its other hyperthread.
inline void relax_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The steps of one parallel region. A step has items, and no two items of a
// step write the same memory. A step begins when all items of the step before
// it are finished.
//
// Each thread is assigned a range of a step's items. The ranges are the same
// from call to call, so that a thread finds what it reads in its cache. A
// thread that has finished its range takes items of the other ranges.
//
// A thread waits only for items that others have begun. So threads may also run
// one after the other, as in a nested region: then none waits.
class Steps {
 public:
  static size_t scratch_bytes(int steps, int threads) {
    return Arena::padded_bytes<Range>(steps * threads) +
           Arena::padded_bytes<Step>(steps);
  }
  Steps(Arena& arena, int steps, int threads)
      : threads_(threads),
        ranges_(arena.allocate<Range>(steps * threads)),
        steps_(arena.allocate<Step>(steps)) {}

  // Assigns to thread t the items from end_of(t - 1) to end_of(t).
  template <typename F>
  void assign(int index, const F& end_of) {
    Step* step = new (steps_ + index) Step();
    for (int t = 0; t < threads_; ++t) {
      Range* range = new (ranges_ + index * threads_ + t) Range();
      range->next.store(step->items, std::memory_order_relaxed);
      step->items = range->end = end_of(t);
    }
  }
  void assign_evenly(int index, int64_t items) {
    assign(index, [&](int t) { return items * (t + 1) / threads_; });
  }

  // Calls body(item) for items of a step, `grain` at a time, until all of them
  // are finished.
  template <typename F>
  void run(int index, int thread, int64_t grain, const F& body) {
    Step& step = steps_[index];
    int64_t finished = 0;
    for (int i = 0; i < threads_; ++i) {
      if (step.all_begun.load(std::memory_order_relaxed)) break;
      Range& range = ranges_[index * threads_ + (thread + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t start =
            range.next.fetch_add(grain, std::memory_order_relaxed);
        const int64_t end = std::min(range.end, start + grain);
        for (int64_t item = start; item < end; ++item) body(item);
        finished += std::max<int64_t>(0, end - start);
      }
    }
    // Every range is used up: later threads need not look into each.
    if (threads_ > 2) step.all_begun.store(true, std::memory_order_relaxed);
    if (finished > 0) {
      step.finished.fetch_add(finished, std::memory_order_acq_rel);
    }
    for (int spins = 0;
         step.finished.load(std::memory_order_acquire) < step.items; ++spins) {
      relax_cpu();
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  struct alignas(kCacheLine) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct alignas(kCacheLine) Step {
    std::atomic<int64_t> finished{0};    // items
    std::atomic<bool> all_begun{false};  // every item was taken
    int64_t items = 0;
  };
  int threads_;
  Range* ranges_;
  Step* steps_;
};

}  // namespace
}  // namespace int8_moe
