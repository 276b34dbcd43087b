// Working memory of kernels. The system takes large blocks back when they are freed and clears them, page by page, when
// they are used again: a few are kept for the next call instead.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace resfuse {

class Scratch {
 public:
  // A block of at least `bytes`, aligned to cache lines; bytes becomes its size.
  void* take(int64_t& bytes) {
    if (bytes >= large) {
      const std::lock_guard<std::mutex> guard(lock_);
      for (size_t i = 0; i < kept_.size(); ++i) {
        if (kept_[i].bytes < bytes || kept_[i].bytes > 2 * bytes) continue;
        const Block found = kept_[i];
        kept_.erase(kept_.begin() + i);
        bytes = found.bytes;
        return found.data;
      }
    }
    return ::operator new(bytes, std::align_val_t(64));
  }

  void give(void* data, int64_t bytes) {
    if (bytes >= large && bytes <= most) {
      const std::lock_guard<std::mutex> guard(lock_);
      kept_.push_back({data, bytes});
      int64_t total = 0;
      for (const Block& block : kept_) total += block.bytes;
      for (; total > most; kept_.erase(kept_.begin())) {  // the oldest go
        total -= kept_.front().bytes;
        ::operator delete(kept_.front().data, std::align_val_t(64));
      }
      return;
    }
    ::operator delete(data, std::align_val_t(64));
  }

  static Scratch& all() {
    static Scratch scratch;
    return scratch;
  }

  ~Scratch() {
    for (const Block& block : kept_) ::operator delete(block.data, std::align_val_t(64));
  }

 private:
  static constexpr int64_t large = 256 << 10;
  static constexpr int64_t most = 24 << 20;  // of what is kept, together
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::mutex lock_;
  std::vector<Block> kept_;
};

// Working memory of one share, aligned to cache lines, uninitialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_(static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(count, 1)),
        data_(static_cast<T*>(Scratch::all().take(bytes_))) {}
  ~Buffer() { Scratch::all().give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  int64_t bytes_;
  T* data_;
};

}  // namespace resfuse
