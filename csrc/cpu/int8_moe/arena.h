// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "int8_moe.h"

namespace int8_moe {
namespace {

// The most scratch that stays allocated for the next call, in bytes.
constexpr size_t kMaxRetainedBytes = 64 << 20;
constexpr size_t kPageBytes = 4096;

// The scratch of one call, for all of its threads. Its buffer is thread_local
// to the calling thread, so a thread has at most one such Arena at a time.
class Arena {
 public:
  // `bytes` is the sum of padded_bytes of all that is allocated at once.
  explicit Arena(size_t bytes) : buffer_(&retained_buffer()) {
    if (bytes > buffer_->size) grow_buffer(bytes);
    data_ = buffer_->data;
  }
  // A part of another Arena's memory, aligned to a cache line.
  explicit Arena(char* data) : data_(data) {}
  ~Arena() {
    if (buffer_ != nullptr && buffer_->size > kMaxRetainedBytes) {
      buffer_->release();
    }
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The end of a Scope frees what was allocated after its start.
  struct Scope {
    explicit Scope(Arena& arena) : arena(arena), used(arena.used_) {}
    ~Scope() { arena.used_ = used; }
    Arena& arena;
    size_t used;
  };

  // Not initialized, aligned to a cache line.
  template <typename T>
  T* allocate(int64_t count) {
    char* start = data_ + used_;
    used_ += padded_bytes<T>(count);
    return reinterpret_cast<T*>(start);
  }
  template <typename T>
  static size_t padded_bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kCacheLine - 1) /
           kCacheLine * kCacheLine;
  }

 private:
  struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    ~Buffer() { release(); }
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
  };
  static Buffer& retained_buffer() {
    thread_local Buffer buffer;
    return buffer;
  }

  void grow_buffer(size_t bytes) {
    buffer_->release();
    // A quarter more serves a call with a few more tokens. What exceeds
    // kMaxRetainedBytes would be released anyway.
    const size_t size =
        std::max(bytes, std::min(kMaxRetainedBytes, bytes + bytes / 4));
    const size_t whole_pages =
        (size + kPageBytes - 1) / kPageBytes * kPageBytes;
    buffer_->data =
        static_cast<char*>(std::aligned_alloc(kPageBytes, whole_pages));
    if (buffer_->data == nullptr) throw std::bad_alloc();
    buffer_->size = whole_pages;
  }

  Buffer* buffer_ = nullptr;
  char* data_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace int8_moe
