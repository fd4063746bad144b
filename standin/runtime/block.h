// One block of threads, run by one host thread: every CUDA thread is a fiber with its own stack. Where the kernel's PTX runs
// instead, the fibers have no stacks: `ptx::Interpreter` moves them along, by the same rules.
//
// A fiber runs until it waits (for a barrier, for the other lanes of its warp) or returns; then the next ready fiber
// continues. The order is first come, first served, or random with a seed. If no fiber can run and some wait, that is a
// deadlock. An error switches from the fiber to the block's main context and ends the launch.
#pragma once

#include <stdint.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../kernels/ptx.cuh"
#include "clock.h"
#include "context.h"
#include "counters.h"
#include "options.h"
#include "report.h"

namespace standin {

namespace ptx {
class Interpreter;
struct Program;
}  // namespace ptx

constexpr uint32_t kMaxThreads = 1024, kLanes = 32, kBarriers = 16;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kStack = 256 << 10;

// One kernel launch.
struct Launch {
  const Kernel* kernel;
  const ptx::Program* program = nullptr;  // to run instead of the kernel's function
  Dim3 grid, block;
  uint32_t shared_bytes;
  void* const* arguments;
  uint32_t tag;             // 1 to 65535: the launch in the traces of global memory
  const uint64_t* ordered;  // per stream: what happened there before this launch
  uint64_t number;          // counted from the start, for reports
  const Options* options;

  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  uint32_t threads() const { return block.x * block.y * block.z; }

  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  Report report;
  Counters counters;
  // What blocks have published through a fence and an atomic, by the atomic's address: one bit per block.
  std::map<uint64_t, std::vector<uint64_t>> published;
};

// What reads and writes shared memory on its own, asked by a thread.
enum class Agent : uint8_t {
  product,  // of a warp: wgmma
  store,    // of a warp: bulk copies to global memory
  copy,     // of the block: bulk copies to shared memory
};

enum class State : uint8_t { ready, running, waiting, done };

// A pending copy from global to shared memory.
struct AsyncCopy {
  uint32_t to;  // offset in shared memory
  uint32_t group;
  const void* from;  // null: zeros
};

struct Fiber {
  Context context;
  uint8_t* stack = nullptr;  // its low end
  uint32_t index = 0;        // in the block
  Dim3 thread{};
  State state = State::ready;
  Site site{};  // where it waits
  const char* waits_for = "";
  // What it knows of the others, and its own time.
  Clock* clock = nullptr;
  uint32_t now = 1;
  uint32_t barriers_passed = 0;
  bool fenced = false;
  uint32_t copy_group = 0;
  std::vector<AsyncCopy> copies;
  std::vector<Logged> log;  // accesses since the warp last met

  uint32_t lane() const { return index % kLanes; }
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  Site site{};
  std::vector<Fiber*> waiting;
};

enum class Collective : uint8_t { none, sync, shuffle_xor, shuffle_index, vote, ldmatrix, mma, other };

struct Warp {
  uint32_t lanes = 0;    // how many exist
  uint32_t arrived = 0;  // a bit per lane
  uint32_t returned = 0;
  Collective kind = Collective::none;
  Site site{};
  uint32_t copy = 0;  // which of the instructions that the compiler made of that place
  void* operands[kLanes];
};

// The last accesses to a granule of two bytes of shared memory.
struct Cell {
  uint32_t write_time, read_time;
  uint16_t writer, reader;
  uint16_t flags;
  uint16_t spare;
  uint32_t readers;  // 1 + index of a table of read times per thread, 0: at most one reader
};
constexpr uint16_t kCellWritten = 1, kCellInFlight = 2;
// Granules that are cleared together before a block runs, if the block before has touched one of them.
constexpr uint32_t kCellsTogether = 256;

class Block {
 public:
  Block();
  ~Block();

  // Runs block number `number` of a launch. False if it failed; then the launch holds the report.
  bool run(Launch& launch, uint64_t number);

  // ---- for the counterparts of `ptx.cuh`; called on a fiber's stack
  void barrier(uint32_t id, uint32_t threads, Site site);
  void collective(Collective kind, void* operand, Site site, const char* name);
  void copy_async16(void* shared, const void* global, bool valid, Site site);
  void copy_async_commit();
  void copy_async_wait(uint32_t newest, Site site);
  void ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site);
  uint32_t atomic_add(uint32_t* p, uint32_t v, Site site);

  // ---- for the interpreter, which runs a thread by becoming it
  Fiber* become(uint32_t thread) { return running = &fibers_[thread]; }
  // The running thread arrives at a barrier. False: it waits.
  bool arrive(uint32_t id, uint32_t threads, Site site);
  // The running lane arrives at a collective; true: it is the last. `copy`: see `Warp`.
  bool join(Collective kind, Site site, const char* name, uint32_t copy);
  // All lanes of a warp have met in a collective: it orders them, and is counted.
  void joined(uint32_t warp, Collective kind);
  // Whether the warp has 32 lanes, all there and none waiting.
  bool is_whole(uint32_t warp) const {
    return warps_[warp].lanes == kLanes && !warps_[warp].arrived && !warps_[warp].returned;
  }
  void waits(const char* what, Site site);
  void wake(uint32_t thread) { make_ready(&fibers_[thread]); }
  void wake_warp(uint32_t warp);
  // The running thread returns.
  void finish();
  void check_matrix_row(const void* row, Site site);
  // Copies and products that run on their own have identities after those of the threads.
  uint32_t agent(Agent kind, uint32_t warp) const;
  // An access of shared memory that such an agent is asked for by the running thread, which must know what came before.
  void access_as(uint32_t agent, uint32_t time, uint64_t offset, uint32_t size, bool write, Site site);
  // Its write has been made, and is known to those who learn of `time`.
  void land(uint32_t agent, uint32_t time, uint32_t offset, uint32_t size);
  void learn(uint32_t thread, uint32_t identity, uint32_t time);
  // What the running thread knows goes into a clock, and what a clock knows to the thread.
  void release(Clock* into);
  void acquire(const Clock* from);
  Clock* new_clock() { return clocks_.fresh(1); }
  void join_clocks(Clock* into, const Clock* from) { clocks_.join(into, from); }
  // The running thread's writes, and those that it knows of, are visible to agents that know of this.
  void fence_agents();
  // The lanes of the warp have made one access together.
  void count_accesses(uint32_t warp) {
    if (counting_) flush_log(warp);
  }
  void count_instructions(uint64_t executed) {
    if (counting_) counters_.instructions += executed;
  }
  // Below `count`: 0 without a seed.
  uint32_t random(uint32_t count);
  std::string who(uint32_t thread) const;
  std::string who(const Fiber& fiber) const { return who(fiber.index); }

  // An access of the running fiber; `pc` or `site` gives the place.
  void access(uint64_t address, uint32_t size, bool write, const void* pc, Site site);
  // Whether this is the barrier that a mutation test skips.
  bool skips(Site site) const;

  [[noreturn]] void fail(int code, const std::string& text);

  Launch* launch = nullptr;
  Fiber* running = nullptr;
  bool watching = false;  // checks or counters want to hear of every access
  Dim3 index{};
  uint32_t number = 0;
  uint8_t* shared = nullptr;

 private:
  friend void fiber_main();
  friend void interpreter_main();

  void start_next(Context& from);
  Fiber* pick();
  void make_ready(Fiber* fiber);
  uint8_t* take_stack();
  void wait(const char* what, Site site);
  void report_deadlock();
  void complete(Warp& warp, Collective kind);
  void meet(Fiber** who, uint32_t count);
  void flush_log(uint32_t warp);

  void access_shared(uint32_t offset, uint32_t size, bool write, const void* pc, Site site) {
    access_shared(offset, size, write, pc, site, running->index, running->now);
  }
  void access_shared(uint32_t offset, uint32_t size, bool write, const void* pc, Site site, uint32_t identity,
                     uint32_t now);
  void access_global(uint64_t address, uint32_t size, bool write, const void* pc, Site site);
  void access_elsewhere(uint64_t address, uint32_t size, bool write, const void* pc, Site site);
  void touch(uint32_t offset, uint32_t size) {
    for (uint32_t part = offset / 2 / kCellsTogether; part <= (offset + size - 1) / 2 / kCellsTogether; ++part)
      touched_[part] = 1;
  }
  void read_by_many(Cell& cell, uint32_t identity, uint32_t now);
  bool others_ordered(const Cell& cell, uint32_t* who) const;
  bool knows(const Fiber& fiber, uint32_t thread, uint32_t time) const {
    return fiber.index == thread || fiber.clock->time[thread] >= time;
  }
  bool acquired(uint32_t block) const;
  std::string where(const void* pc, Site site) const;

  Context main_, interpreting_;
  std::unique_ptr<ptx::Interpreter> interpreter_;
  std::vector<Fiber> fibers_;
  uint8_t* stacks_ = nullptr;
  std::vector<uint8_t*> free_stacks_;
  uint32_t stacks_made_ = 0;
  uint8_t* shared_map_ = nullptr;
  uint32_t threads_ = 0, done_ = 0;
  uint32_t identities_ = 0;  // threads and agents
  std::vector<Fiber*> ready_;  // a ring
  uint32_t ready_head_ = 0, ready_count_ = 0;
  uint64_t random_ = 0;
  bool failed_ = false, counting_ = false;
  Checks checking_ = Checks::on;
  Counters counters_;
  Barrier barriers_[kBarriers];
  Warp warps_[kMaxThreads / kLanes];
  std::vector<Fiber*> group_;  // scratch: who meets
  ClockPool clocks_;
  std::vector<Cell> cells_;
  std::vector<uint8_t> touched_;  // whether one of each kCellsTogether granules may not be zero
  std::vector<uint32_t> reader_tables_;  // identities_ entries each
  std::vector<uint32_t> free_tables_;
  std::vector<uint64_t> acquired_;  // blocks whose published writes this block has seen
};

// The block that this host thread runs, or null.
extern thread_local Block* current_block __attribute__((tls_model("initial-exec")));

// Runs a launch over the host's threads. The report is empty if it succeeded.
Report run_launch(Launch& launch);

}  // namespace standin
