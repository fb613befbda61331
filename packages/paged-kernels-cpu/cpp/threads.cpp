#include "threads.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace paged {
namespace {

// What the threads of one call share. It lives until the last helper has come, maybe after the call.
struct Items {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> left;
  const int64_t count;
  const std::function<void(int64_t)>* work;  // valid while an item is left

  Items(int64_t count, const std::function<void(int64_t)>* work) : left(count), count(count), work(work) {}

  void run() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      (*work)(i);
      left.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }
};

}  // namespace

void for_each_item(ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const auto items = std::make_shared<Items>(count, &work);
  for (int64_t i = 0; i < helpers; ++i) pool.schedule([items] { items->run(); });
  items->run();
  items->wait();
}

}  // namespace paged
