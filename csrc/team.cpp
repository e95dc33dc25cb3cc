#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;
constexpr Clock::duration kMostSpin = std::chrono::microseconds(50), kLeastSpin = kMostSpin / 64;
constexpr int kLooks = 32;  // between two offers of the core to others; a microsecond or so

void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// A number that threads wait to see changed. The one who changes it and the one who falls asleep each write first and then read
// what the other wrote, in the one order of all sequentially consistent operations: so one of them sees the other.
class alignas(64) Gate {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }

  void open() {
    value_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

  void wait(uint32_t seen) {
    static thread_local Clock::duration spin = kMostSpin;
    const auto longer = [] { spin = std::min(kMostSpin, 2 * spin); };
    const auto start = Clock::now();
    do {
      for (int i = 0; i < kLooks; ++i) {
        if (now() != seen) return longer();
        pause();
      }
      std::this_thread::yield();
    } while (Clock::now() - start < spin);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      changed_.wait(lock, [&] { return value_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    Clock::now() - start < 2 * kMostSpin ? longer() : static_cast<void>(spin = std::max(kLeastSpin, spin / 2));
  }

 private:
  std::atomic<uint32_t> value_{0}, sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace

class Team {
 public:
  ~Team() {
    body_ = nullptr;
    for (auto& worker : workers_) {
      worker->go.open();
      worker->thread.join();
    }
  }

  void run(int count, void (*body)(void*, const Member&), void* context) {
    hire(count - 1);
    count_ = int(workers_.size()) + 1 < count ? int(workers_.size()) + 1 : count;
    if (count_ == 1) return body(context, {0, 1, nullptr});
    body_ = body;
    context_ = context;
    const uint32_t before = done_.now();
    working_.store(count_ - 1, std::memory_order_relaxed);
    for (int i = 1; i < count_; ++i) workers_[size_t(i - 1)]->go.open();
    body(context, {0, count_, this});
    done_.wait(before);
  }

  void meet() {
    const uint32_t before = met_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < count_) return met_.wait(before);
    arrived_.store(0, std::memory_order_relaxed);
    met_.open();
  }

 private:
  struct Worker {
    Gate go;
    std::thread thread;
  };

  void hire(int wanted) {
    while (int(workers_.size()) < wanted) {
      auto worker = std::make_unique<Worker>();
      try {
        worker->thread = std::thread([this, &go = worker->go, id = int(workers_.size()) + 1] { serve(go, id); });
      } catch (const std::system_error&) {
        return;
      }
      workers_.push_back(std::move(worker));
    }
  }

  void serve(Gate& go, int id) {
    for (uint32_t seen = 0;; ++seen) {
      go.wait(seen);
      if (body_ == nullptr) return;
      body_(context_, {id, count_, this});
      if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.open();
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  void (*body_)(void*, const Member&) = nullptr;
  void* context_ = nullptr;
  int count_ = 1;
  Gate done_, met_;
  alignas(64) std::atomic<int> working_{0};
  alignas(64) std::atomic<int> arrived_{0};
};

namespace {

// After a fork the child has none of its parent's threads: it forgets teams made before, without a farewell to their workers.
std::atomic<int> forks{0};

struct OwnTeam {
  std::unique_ptr<Team> team;
  int made = forks;

  Team& get() {
    if (made != forks) {
      static_cast<void>(team.release());
      made = forks;
    }
    if (!team) team = std::make_unique<Team>();
    return *team;
  }

  ~OwnTeam() {
    if (made != forks) static_cast<void>(team.release());
  }
};

const int watches_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

}  // namespace

void Member::meet() const {
  if (team != nullptr) team->meet();
}

void run_team(int count, void (*body)(void*, const Member&), void* context) {
  if (count <= 1) return body(context, {0, 1, nullptr});
  static thread_local OwnTeam own;
  own.get().run(count, body, context);
}

}  // namespace quire
