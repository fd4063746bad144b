// Launches: the kernels by name, and the host threads that run the blocks of a grid.
#include "launch.h"

#include <string.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "block.h"

namespace standin {
namespace {

std::unordered_map<std::string, Kernel>& registry() {
  static std::unordered_map<std::string, Kernel> kernels;
  return kernels;
}

}  // namespace

void register_kernel(const Kernel& kernel) {
  auto [at, fresh] = registry().emplace(kernel.bound.name, kernel);
  if (!fresh) {
    fprintf(stderr, "stand-in GPU: two kernels named `%s`: %s and %s\n", kernel.bound.name,
            place(at->second.bound.site).c_str(), place(kernel.bound.site).c_str());
    abort();
  }
}

const Kernel* find_kernel(const char* name) {
  auto at = registry().find(name);
  return at == registry().end() ? nullptr : &at->second;
}

std::vector<const Kernel*> all_kernels() {
  std::vector<const Kernel*> list;
  for (auto& entry : registry()) list.push_back(&entry.second);
  return list;
}

namespace {

void run_blocks(Block& block, Launch& launch) {
  uint64_t blocks = launch.blocks();
  for (;;) {
    uint64_t which = launch.next_block.fetch_add(1, std::memory_order_relaxed);
    if (which >= blocks || launch.failed.load(std::memory_order_relaxed)) return;
    block.run(launch, which);
  }
}

// Host threads that wait for work. They live as long as the process.
class Pool {
 public:
  // Calls `body(worker)` on `count` workers, with this thread as worker 0, and waits for all.
  void run(uint32_t count, const std::function<void(uint32_t)>& body) {
    std::unique_lock<std::mutex> guard(lock_);
    while (workers_ + 1 < count) {
      uint32_t number = ++workers_;
      std::thread([this, number] { serve(number); }).detach();
    }
    body_ = &body;
    count_ = count;
    left_ = count - 1;
    ++round_;
    wake_.notify_all();
    guard.unlock();
    body(0);
    guard.lock();
    done_.wait(guard, [&] { return left_ == 0; });
  }

 private:
  void serve(uint32_t number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> guard(lock_);
    for (;;) {
      wake_.wait(guard, [&] { return round_ != seen; });
      seen = round_;
      if (number >= count_) continue;
      const auto& body = *body_;
      guard.unlock();
      body(number);
      guard.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex lock_;
  std::condition_variable wake_, done_;
  uint32_t workers_ = 0, count_ = 0, left_ = 0;
  uint64_t round_ = 0;
  const std::function<void(uint32_t)>* body_ = nullptr;
};

Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: its threads outlive `main`
  return *p;
}

}  // namespace

uint32_t host_threads() {
  uint32_t n = options().threads ? options().threads : std::thread::hardware_concurrency();
  return n ? n : 1;
}

void parallel(uint32_t count, const std::function<void(uint32_t)>& body) {
  if (count <= 1) {
    body(0);
  } else {
    pool().run(count, body);
  }
}

Report run_launch(Launch& launch) {
  static std::vector<Block*>* blocks = new std::vector<Block*>;  // one per worker, reused
  uint64_t grid = launch.blocks();
  uint32_t workers = host_threads();
  if (workers > grid) workers = static_cast<uint32_t>(grid);
  while (blocks->size() < workers) blocks->push_back(new Block);
  parallel(workers, [&](uint32_t worker) { run_blocks(*(*blocks)[worker], launch); });
  return launch.report;
}

}  // namespace standin
