// Memory that is kept from call to call.
#pragma once
#include <stdint.h>

#include <memory>
#include <new>

namespace quire {

constexpr int64_t kLine = 64;

class Kept {
 public:
  // At least `count` bytes, a line's multiple from 0 on; what they hold is lost where more are asked for than before.
  char* bytes(int64_t count) {
    if (count > held_) {
      give_back();
      memory_.reset(static_cast<char*>(operator new(size_t(count), std::align_val_t{kLine})));
      held_ = count;
    }
    return memory_.get();
  }

  int64_t held() const { return held_; }

  void give_back() {
    memory_.reset();
    held_ = 0;
  }

 private:
  struct Freed {
    void operator()(char* p) const { operator delete(p, std::align_val_t{kLine}); }
  };
  std::unique_ptr<char, Freed> memory_;
  int64_t held_ = 0;
};

}  // namespace quire
