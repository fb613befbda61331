// Runs items on the calling thread and on those of a pool.
#pragma once

#include <cstdint>
#include <functional>

namespace paged {

class ThreadPool {
 public:
  virtual ~ThreadPool() = default;
  // The threads that can compute at once, the calling one included.
  virtual int64_t num_threads() const = 0;
  // Runs `task` at some time, on some thread. It may run after the call that scheduled it has returned.
  virtual void schedule(std::function<void()> task) = 0;
};

// Calls `work(i)` for each `i` below `count`, and returns when all have returned.
//
// The calling thread works too, and waits for items, not for helpers. So a pool whose threads are all busy delays
// nothing, and a helper that comes late finds no item.
void for_each_item(ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work);

}  // namespace paged
