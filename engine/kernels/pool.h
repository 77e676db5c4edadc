// Threads that share the work of one call.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

// Woken once a call, spinning only between the phases of a layer.
class Pool {
 public:
  explicit Pool(int threads) : all_(threads), wanted_(threads), threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  // Has every thread do work(thread). `more`: the next call comes in a moment, so that it pays to
  // wait for it awake.
  template <class F>
  void run(F work, bool more = false) {
    auto call = [](void* data, int thread) { (*static_cast<F*>(data))(thread); };
    {
      std::lock_guard<std::mutex> lock(mutex_);
      threads_ = wanted_;  // with the round: a worker that wakes late sees both or neither
      call_ = call;
      data_ = &work;
      more_ = more;
      busy_.store(threads_ - 1, std::memory_order_relaxed);
      round_.fetch_add(1);
    }
    if (threads_ > 1) wake_.notify_all();
    work(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire); ++spins) pause(spins);
  }
  void barrier() {
    if (threads_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) pause(spins);
  }
  int threads() const { return wanted_; }
  int most_threads() const { return all_; }
  // From the next call on.
  void use(int threads) { wanted_ = std::max(1, std::min(threads, all_)); }

 private:
  static constexpr auto kMoment = std::chrono::microseconds(200);

  static void pause(int spins) {
    // Another process may have our core: do not burn its time for long.
    if (spins < 4000) _mm_pause(); else std::this_thread::yield();
  }
  void stay_awake(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kMoment;
    while (round_.load(std::memory_order_acquire) == seen) {
      for (int i = 0; i < 32; ++i) _mm_pause();
      if (std::chrono::steady_clock::now() > end) return;
    }
  }
  void serve(int thread) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
        seen = round_.load();
        if (stop_) return;
        if (thread >= threads_) continue;
      }
      const bool more = more_;
      call_(data_, thread);
      busy_.fetch_sub(1, std::memory_order_release);
      if (more) stay_awake(seen);
    }
  }
  const int all_;
  int wanted_, threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  bool stop_ = false, more_ = false;
  void (*call_)(void*, int) = nullptr;
  void* data_ = nullptr;
  std::atomic<int> busy_{0}, arrived_{0}, turn_{0};
};

struct Span {
  int begin, end;  // of `count` things, those of one thread
  Span(int count, int thread, int threads)
      : begin(int(int64_t(count) * thread / threads)),
        end(int(int64_t(count) * (thread + 1) / threads)) {}
  Span(int begin, int end) : begin(begin), end(end) {}
};

// Hands out parts of a block of memory; from null on it only counts bytes.
class Carver {
 public:
  explicit Carver(void* start) : at_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    char* found = at_;
    at_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(found);
  }
  int64_t bytes() const { return reinterpret_cast<intptr_t>(at_); }

 private:
  char* at_;
};
