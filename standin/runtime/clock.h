// Vector clocks: what a thread of a block knows about the others' progress.
//
// Threads that met at a barrier know the same, so they share one clock, which is replaced when they meet again.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace standin {

struct Clock {
  uint32_t users;
  uint32_t time[];  // per thread: the accesses up to there have happened before
};

class ClockPool {
 public:
  ~ClockPool() { drop_all(); }

  // For blocks of `threads` threads; discards every clock.
  void resize(uint32_t threads) {
    if (threads != threads_) drop_all();
    threads_ = threads;
    free_ = all_;
  }
  // A clock of zeros with `users` users.
  Clock* fresh(uint32_t users) {
    Clock* c = take();
    c->users = users;
    memset(c->time, 0, threads_ * sizeof(uint32_t));
    return c;
  }
  Clock* copy(const Clock* from, uint32_t users) {
    Clock* c = take();
    c->users = users;
    memcpy(c->time, from->time, threads_ * sizeof(uint32_t));
    return c;
  }
  void join(Clock* into, const Clock* from) const {
    for (uint32_t t = 0; t < threads_; ++t) {
      if (from->time[t] > into->time[t]) into->time[t] = from->time[t];
    }
  }
  void leave(Clock* c) {
    if (--c->users == 0) free_.push_back(c);
  }

 private:
  Clock* take() {
    if (free_.empty()) {
      all_.push_back(static_cast<Clock*>(malloc(sizeof(Clock) + threads_ * sizeof(uint32_t))));
      return all_.back();
    }
    Clock* c = free_.back();
    free_.pop_back();
    return c;
  }
  void drop_all() {
    for (Clock* c : all_) free(c);
    all_.clear();
    free_.clear();
  }

  uint32_t threads_ = 0;
  std::vector<Clock*> all_, free_;
};

}  // namespace standin
