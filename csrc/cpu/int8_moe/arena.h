// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace int8_moe {
namespace {

// What of a call's scratch stays for the next call, in bytes.
constexpr size_t kKept = 64 << 20;

// Scratch of one call, its threads' included: of the thread that calls.
class Arena {
 public:
  explicit Arena(size_t bytes) : kept_(last()) {
    if (bytes <= kept_.size) return;
    kept_.give_back();
    // a little more, for a call with a few more tokens, but no more than is kept
    const size_t wanted = std::max(bytes, std::min(kKept, bytes + bytes / 4));
    const size_t size = (wanted + 4095) / 4096 * 4096;
    kept_.data = static_cast<char*>(std::aligned_alloc(4096, size));
    if (kept_.data == nullptr) throw std::bad_alloc();
    kept_.size = size;
  }
  ~Arena() {
    if (kept_.size > kKept) kept_.give_back();
  }
  // Gives back, at its end, what was taken after it.
  struct Mark {
    explicit Mark(Arena& arena) : arena(arena), used(arena.used_) {}
    ~Mark() { arena.used_ = used; }
    Arena& arena;
    size_t used;
  };

  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* take(int64_t count) {
    char* found = kept_.data + used_;
    used_ += space<T>(count);
    return reinterpret_cast<T*>(found);
  }
  template <typename T>
  static size_t space(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  struct Kept {
    char* data = nullptr;
    size_t size = 0;

    ~Kept() { give_back(); }
    void give_back() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
  };
  static Kept& last() {
    thread_local Kept kept;
    return kept;
  }

  Kept& kept_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace int8_moe
