// torch's CPU allocator with one allocation that fails, on demand. Every other one is the former allocator's own, which
// also frees it, so tensors from before and after live on whatever is installed.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> counted{0}, failing{0};

class FailingAllocator final : public c10::Allocator {
 public:
  explicit FailingAllocator(c10::Allocator* former) : former_(former) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes > 0 && counting && ++counted == failing) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "injected at allocation ", failing.load(), ", of ", bytes, " bytes");
    }
    return former_->allocate(bytes);
  }
  bool is_simple_data_ptr(const c10::DataPtr& data) const override { return former_->is_simple_data_ptr(data); }
  c10::DeleterFnPtr raw_deleter() const override { return former_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { former_->copy_data(to, from, bytes); }

 private:
  c10::Allocator* former_;
};

}  // namespace

extern "C" {

void install() {
  c10::SetCPUAllocator(new FailingAllocator(c10::GetCPUAllocator()), 1);  // torch keeps it for good
}

// Count from one on; the k-th allocation fails, none for 0.
void start(int64_t k) {
  counted = 0;
  failing = k;
  counting = true;
}

// Count and fail no more; how many there were.
int64_t stop() {
  counting = false;
  return counted;
}

}
