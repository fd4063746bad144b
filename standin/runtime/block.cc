#include "block.h"

#include <string.h>
#include <sys/mman.h>

#include "memory.h"
#include "options.h"
#include "truncate.h"

namespace standin {

thread_local Block* current_block __attribute__((tls_model("initial-exec"))) = nullptr;

Block::Block() : fibers_(kMaxThreads), ready_(kMaxThreads) {
  size_t bytes = kMaxThreads * kStack;
  stacks_ = static_cast<uint8_t*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  // Aligned to 1024 as kernels may expect, with room before and after it that faults.
  size_t room = (kMaxShared + 2 * kPage) / kPage * kPage + 4 * kPage;
  shared_map_ =
      static_cast<uint8_t*>(mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (stacks_ == MAP_FAILED || shared_map_ == MAP_FAILED) abort();
  shared = shared_map_ + kPage;
}

Block::~Block() {
  munmap(stacks_, kMaxThreads * kStack);
  munmap(shared_map_, (kMaxShared + 2 * kPage) / kPage * kPage + 4 * kPage);
}

// ---- scheduling -------------------------------------------------------------------------------------------

void fiber_main() {
  Block& block = *current_block;
  for (;;) {
    const Kernel& kernel = *block.launch->kernel;
    kernel.call(kernel.function, block.launch->arguments);
    block.finish();
    // The next thread may start right here, on the stack that has just become free.
    Fiber* next = block.pick();
    if (next && !next->stack) {
      next->stack = block.running->stack;
      next->state = State::running;
      block.running = next;
      continue;
    }
    Context& mine = block.running->context;
    block.free_stacks_.push_back(block.running->stack);
    block.running = next;
    if (!next) {
      switch_to(mine, block.main_);
    } else {
      next->state = State::running;
      switch_to(mine, next->context);
    }
  }
}

// Takes the next fiber that can run out of the ring.
Fiber* Block::pick() {
  if (ready_count_ == 0) return nullptr;
  if (random_ != 0) {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t other = (ready_head_ + static_cast<uint32_t>((random_ >> 33) % ready_count_)) % kMaxThreads;
    std::swap(ready_[ready_head_], ready_[other]);
  }
  Fiber* fiber = ready_[ready_head_];
  ready_head_ = (ready_head_ + 1) % kMaxThreads;
  --ready_count_;
  return fiber;
}

void Block::make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  ready_[(ready_head_ + ready_count_++) % kMaxThreads] = fiber;
}

// Switches from `from` to the next fiber, on a new stack if it has not started; to the main context if there is none.
void Block::start_next(Context& from) {
  Fiber* next = pick();
  running = next;
  if (!next) {
    switch_to(from, main_);
    return;
  }
  if (!next->stack) {
    if (free_stacks_.empty()) {
      uint8_t* low = stacks_ + stacks_made_++ * kStack;
      mprotect(low, kPage, PROT_NONE);
      free_stacks_.push_back(low);
    }
    next->stack = free_stacks_.back();
    free_stacks_.pop_back();
    // The stack tops have different offsets, so that they do not share the sets of a cache.
    size_t which = static_cast<size_t>(next->stack - stacks_) / kStack;
    prepare(next->context, next->stack + kPage, next->stack + kStack - which % 61 * 64, fiber_main);
  }
  next->state = State::running;
  if (&next->context != &from) switch_to(from, next->context);
}

void Block::wait(const char* what, Site site) {
  Fiber* me = running;
  me->state = State::waiting;
  me->waits_for = what;
  me->site = site;
  start_next(me->context);
}

void Block::finish() {
  Fiber& me = *running;
  Warp& warp = warps_[me.index / kLanes];
  if (!me.copies.empty()) {
    fail(kLaunchFailed,
         format("%s returned with %zu asynchronous copies in flight", who(me).c_str(), me.copies.size()));
  }
  if (warp.arrived) {
    fail(kLaunchFailed,
         format("%s returned while lanes %08x of its warp wait in %s at %s", who(me).c_str(), warp.arrived,
                warp.kind == Collective::sync ? "warp_sync" : "a warp collective", place(warp.site).c_str()));
  }
  for (uint32_t id = 0; id < kBarriers; ++id) {
    if (barriers_[id].arrived && (id == 0 || barriers_[id].expected == threads_)) {
      fail(kLaunchFailed, format("%s returned while others wait in barrier %u at %s", who(me).c_str(), id,
                                 place(barriers_[id].site).c_str()));
    }
  }
  warp.returned |= 1u << me.lane();
  me.state = State::done;
  ++done_;
  uint32_t all = warp.lanes == kLanes ? ~0u : (1u << warp.lanes) - 1;
  if (counting_ && warp.returned == all) flush_log(me.index / kLanes);
}

bool Block::run(Launch& of, uint64_t which) {
  launch = &of;
  const Options& o = *of.options;
  threads_ = of.threads();
  number = static_cast<uint32_t>(which);
  index = {static_cast<uint32_t>(which % of.grid.x), static_cast<uint32_t>(which / of.grid.x % of.grid.y),
           static_cast<uint32_t>(which / of.grid.x / of.grid.y)};
  watching = o.checks != Checks::off || !o.counters.empty();
  counting_ = !o.counters.empty();
  checking_ = o.checks;
  random_ = o.seed ? (uint64_t{o.seed} << 32 ^ (which + 1) * 0x9e3779b97f4a7c15ull) | 1 : 0;
  done_ = 0;
  failed_ = false;
  ready_head_ = ready_count_ = 0;
  free_stacks_.clear();
  for (uint32_t s = 0; s < stacks_made_; ++s)
    free_stacks_.push_back(stacks_ + (stacks_made_ - 1 - s) * kStack);
  clocks_.resize(threads_);
  Clock* beginning = clocks_.fresh(threads_);
  for (uint32_t t = 0; t < threads_; ++t) {
    Fiber& f = fibers_[t];
    f.stack = nullptr;
    f.index = t;
    f.thread = {t % of.block.x, t / of.block.x % of.block.y, t / of.block.x / of.block.y};
    f.clock = beginning;
    f.now = 1;
    f.barriers_passed = 0;
    f.fenced = false;
    f.copy_group = 0;
    f.copies.clear();
    f.log.clear();
    make_ready(&f);
  }
  for (uint32_t w = 0; w * kLanes < threads_; ++w) {
    warps_[w].lanes = threads_ - w * kLanes < kLanes ? threads_ - w * kLanes : kLanes;
    warps_[w].arrived = warps_[w].returned = 0;
    warps_[w].kind = Collective::none;
  }
  for (Barrier& b : barriers_) {
    b.arrived = 0;
    b.waiting.clear();
  }
  acquired_.clear();
  if (of.shared_bytes) memset(shared, 0xff, of.shared_bytes);
  if (checking_ == Checks::on) {
    size_t granules = (of.shared_bytes + 1) / 2;
    if (cells_.size() < granules) cells_.resize(granules);
    memset(static_cast<void*>(cells_.data()), 0, granules * sizeof(Cell));
    reader_tables_.clear();
    free_tables_.clear();
  }

  current_block = this;
  start_next(main_);
  current_block = nullptr;
  if (!failed_ && done_ != threads_) report_deadlock();
  if (counting_) {
    std::lock_guard<std::mutex> guard(of.lock);
    of.counters.add(counters_);
    counters_ = {};
  }
  return !failed_;
}

void Block::fail(int code, const std::string& text) {
  {
    std::lock_guard<std::mutex> guard(launch->lock);
    if (launch->report.code == 0) {
      launch->report.code = code;
      launch->report.text =
          format("kernel `%s` (launch %llu, block %u,%u,%u): ", launch->kernel->bound.name,
                 static_cast<unsigned long long>(launch->number), index.x, index.y, index.z) +
          text;
    }
  }
  launch->failed = true;
  failed_ = true;
  Context abandoned;
  if (running) {
    running = nullptr;
    switch_to(abandoned, main_);
  }
  __builtin_unreachable();
}

void Block::report_deadlock() {
  std::string text = "deadlock: ";
  uint32_t returned = 0;
  for (uint32_t t = 0; t < threads_;) {
    const Fiber& f = fibers_[t];
    if (f.state == State::done) {
      ++returned;
      ++t;
      continue;
    }
    uint32_t end = t + 1;
    while (end < threads_ && fibers_[end].state == State::waiting && fibers_[end].waits_for == f.waits_for &&
           fibers_[end].site.line == f.site.line) {
      ++end;
    }
    text += format("threads %u–%u wait in %s at %s, ", t, end - 1, f.waits_for, place(f.site).c_str());
    t = end;
  }
  text += format("%u returned", returned);
  std::lock_guard<std::mutex> guard(launch->lock);
  if (launch->report.code == 0) {
    launch->report = {kLaunchFailed,
                      format("kernel `%s` (launch %llu, block %u,%u,%u): ", launch->kernel->bound.name,
                             static_cast<unsigned long long>(launch->number), index.x, index.y, index.z) +
                          text};
  }
  launch->failed = true;
  failed_ = true;
}

std::string Block::who(uint32_t thread) const {
  return format("thread %u (warp %u, lane %u)", thread, thread / kLanes, thread % kLanes);
}

std::string Block::where(const void* pc, Site site) const {
  return pc ? place(pc) : place(site);
}

// ---- barriers ---------------------------------------------------------------------------------------------

bool Block::skips(Site site) const {
  const std::string& skipped = launch->options->skip_barrier;
  return !skipped.empty() && place(site) == skipped;
}

void Block::barrier(uint32_t id, uint32_t threads, Site site) {
  Fiber& me = *running;
  if (skips(site)) return;
  uint32_t expected = threads ? threads : threads_;
  const char* name = id == 0 ? "block_sync" : "named_sync";
  if (id >= kBarriers) fail(kLaunchFailed, format("barrier %u does not exist (%s)", id, place(site).c_str()));
  if (expected % kLanes || expected > threads_) {
    if (threads || expected > threads_) {
      fail(kLaunchFailed, format("barrier %u for %u threads in a block of %u: whole warps of this block (%s)",
                                 id, expected, threads_, place(site).c_str()));
    }
  }
  Barrier& b = barriers_[id];
  if (b.arrived == 0) {
    b.expected = expected;
    b.site = site;
    if (expected == threads_ && done_) {
      fail(kLaunchFailed, format("%s waits in %s at %s after %u threads have returned", who(me).c_str(), name,
                                 place(site).c_str(), done_));
    }
  } else if (b.expected != expected) {
    fail(kLaunchFailed,
         format("barrier %u: %s expects %u threads at %s, others expect %u at %s", id, who(me).c_str(),
                expected, place(site).c_str(), b.expected, place(b.site).c_str()));
  } else if (b.site.line != site.line || strcmp(b.site.file, site.file)) {
    fail(kLaunchFailed, format("barrier %u: %s comes from %s, others wait at %s", id, who(me).c_str(),
                               place(site).c_str(), place(b.site).c_str()));
  }
  b.waiting.push_back(&me);
  ++me.barriers_passed;
  if (++b.arrived < expected) {
    wait(name, site);
    return;
  }
  if (checking_ == Checks::on) meet(b.waiting.data(), expected);
  if (counting_) {
    ++counters_.block_barriers;
    for (uint32_t w = 0; w * kLanes < threads_; ++w) flush_log(w);
  }
  b.arrived = 0;
  for (Fiber* f : b.waiting) {
    if (f != &me) make_ready(f);
  }
  b.waiting.clear();
}

// Orders all earlier work of these fibers before all later work of any of them.
void Block::meet(Fiber** who, uint32_t count) {
  Clock* clock = clocks_.copy(who[0]->clock, count);
  const Clock* last = who[0]->clock;
  for (uint32_t i = 1; i < count; ++i) {
    if (who[i]->clock != last) clocks_.join(clock, last = who[i]->clock);
  }
  for (uint32_t i = 0; i < count; ++i) {
    Fiber& f = *who[i];
    clock->time[f.index] = f.now++;
    clocks_.leave(f.clock);
    f.clock = clock;
  }
}

void Block::flush_log(uint32_t w) {
  std::vector<Logged>* logs[kLanes];
  for (uint32_t l = 0; l < warps_[w].lanes; ++l) logs[l] = &fibers_[w * kLanes + l].log;
  counters_.warp_met(logs, warps_[w].lanes);
}

// ---- warp collectives -------------------------------------------------------------------------------------

namespace {

struct Shuffle {
  uint32_t value, other, result;
};
struct Vote {
  bool value;
  uint32_t result;
};
struct Matrices {
  const uint8_t* row;
  uint32_t* registers;
  uint32_t count;
  bool transposed;
};
struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float low(uint32_t v) {
  return __builtin_bit_cast(float, v << 16);
}
float high(uint32_t v) {
  return __builtin_bit_cast(float, v & 0xffff0000u);
}

void compute_mma(void* const* operands, bool truncate) {
  float a[16][16], b[16][8], d[16][8];
  for (uint32_t l = 0; l < kLanes; ++l) {
    const Mma& lane = *static_cast<const Mma*>(operands[l]);
    uint32_t g = l / 4, q = l % 4;
    for (uint32_t r = 0; r < 4; ++r) {
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)] = low(lane.a[r]);
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1) + 1] = high(lane.a[r]);
      d[g + 8 * (r >> 1)][2 * q + (r & 1)] = lane.d[r];
    }
    for (uint32_t r = 0; r < 2; ++r) {
      b[2 * q + 8 * r][g] = low(lane.b[r]);
      b[2 * q + 8 * r + 1][g] = high(lane.b[r]);
    }
  }
  for (uint32_t i = 0; i < 16; ++i) {
    if (truncate) {
      for (uint32_t j = 0; j < 8; ++j) {
        for (uint32_t k = 0; k < 16; k += kTruncatedBlock) {
          double products[kTruncatedBlock];
          for (uint32_t t = 0; t < kTruncatedBlock; ++t) products[t] = double{a[i][k + t]} * b[k + t][j];
          d[i][j] = truncated_sum(d[i][j], products, kTruncatedBlock);
        }
      }
      continue;
    }
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    const Mma& lane = *static_cast<const Mma*>(operands[l]);
    for (uint32_t r = 0; r < 4; ++r) lane.d[r] = d[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
  }
}

void compute_ldmatrix(void* const* operands) {
  const Matrices& first = *static_cast<const Matrices*>(operands[0]);
  for (uint32_t m = 0; m < first.count; ++m) {
    const uint8_t* rows[8];
    for (uint32_t i = 0; i < 8; ++i) rows[i] = static_cast<const Matrices*>(operands[8 * m + i])->row;
    for (uint32_t l = 0; l < kLanes; ++l) {
      uint32_t g = l / 4, q = l % 4, value;
      if (first.transposed) {
        uint16_t lo, hi;
        memcpy(&lo, rows[2 * q] + 2 * g, 2);
        memcpy(&hi, rows[2 * q + 1] + 2 * g, 2);
        value = lo | static_cast<uint32_t>(hi) << 16;
      } else {
        memcpy(&value, rows[g] + 4 * q, 4);
      }
      static_cast<const Matrices*>(operands[l])->registers[m] = value;
    }
  }
}

}  // namespace

void Block::complete(Warp& warp, Collective kind) {
  void* const* operands = warp.operands;
  switch (kind) {
    case Collective::none:
    case Collective::sync: break;
    case Collective::shuffle_xor:
      for (uint32_t l = 0; l < kLanes; ++l) {
        auto& s = *static_cast<Shuffle*>(operands[l]);
        s.result = static_cast<Shuffle*>(operands[(l ^ s.other) % kLanes])->value;
      }
      break;
    case Collective::shuffle_index:
      for (uint32_t l = 0; l < kLanes; ++l) {
        auto& s = *static_cast<Shuffle*>(operands[l]);
        s.result = static_cast<Shuffle*>(operands[s.other % kLanes])->value;
      }
      break;
    case Collective::vote: {
      uint32_t result = 0;
      for (uint32_t l = 0; l < kLanes; ++l) result |= uint32_t{static_cast<Vote*>(operands[l])->value} << l;
      for (uint32_t l = 0; l < kLanes; ++l) static_cast<Vote*>(operands[l])->result = result;
      break;
    }
    case Collective::ldmatrix: compute_ldmatrix(operands); break;
    case Collective::mma: compute_mma(operands, launch->options->truncate); break;
  }
}

void Block::collective(Collective kind, void* operand, Site site, const char* name) {
  Fiber& me = *running;
  uint32_t w = me.index / kLanes;
  Warp& warp = warps_[w];
  if (warp.lanes != kLanes) {
    fail(kLaunchFailed, format("%s at %s in a warp of %u lanes: the block's size must be a multiple of 32",
                               name, place(site).c_str(), warp.lanes));
  }
  if (warp.returned) {
    fail(kLaunchFailed, format("%s calls %s at %s after lanes %08x of its warp have returned",
                               who(me).c_str(), name, place(site).c_str(), warp.returned));
  }
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
  } else if (warp.kind != kind || warp.site.line != site.line || strcmp(warp.site.file, site.file)) {
    fail(kLaunchFailed, format("%s calls %s at %s while lanes %08x of its warp wait at %s", who(me).c_str(),
                               name, place(site).c_str(), warp.arrived, place(warp.site).c_str()));
  }
  warp.operands[me.lane()] = operand;
  warp.arrived |= 1u << me.lane();
  if (warp.arrived != ~0u) {
    wait(name, site);
    return;
  }
  warp.arrived = 0;
  Fiber* first = &fibers_[w * kLanes];
  if (kind == Collective::sync && checking_ == Checks::on) {
    Fiber* lanes[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) lanes[l] = first + l;
    meet(lanes, kLanes);
  }
  complete(warp, kind);
  if (counting_) {
    switch (kind) {
      case Collective::sync: ++counters_.warp_barriers; break;
      case Collective::ldmatrix: ++counters_.ldmatrix; break;
      case Collective::mma: ++counters_.mma; break;
      default: ++counters_.shuffles; break;
    }
    flush_log(w);
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    if (first + l != &me) make_ready(first + l);
  }
}

void Block::ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site) {
  Matrices operand{static_cast<const uint8_t*>(row), registers, matrices, transposed};
  if (running->lane() < 8 * matrices) {
    uint64_t address = reinterpret_cast<uint64_t>(row), offset = address - reinterpret_cast<uint64_t>(shared);
    if (offset >= launch->shared_bytes || offset + 16 > launch->shared_bytes) {
      fail(kIllegalAddress,
           format("%s: ldmatrix row outside the %u bytes of shared memory (offset %lld) at %s",
                  who(*running).c_str(), launch->shared_bytes, static_cast<long long>(offset),
                  place(site).c_str()));
    }
    if (offset % 16) {
      fail(kMisaligned,
           format("%s: ldmatrix row at offset %llu, not a multiple of 16, at %s", who(*running).c_str(),
                  static_cast<unsigned long long>(offset), place(site).c_str()));
    }
    if (checking_ == Checks::on) access_shared(static_cast<uint32_t>(offset), 16, false, nullptr, site);
    if (counting_) running->log.push_back({site.file + site.line, offset, 16, false, true, true});
  }
  collective(Collective::ldmatrix, &operand, site, "ldmatrix");
}

// ---- asynchronous copies ----------------------------------------------------------------------------------

void Block::copy_async16(void* to, const void* from, bool valid, Site site) {
  Fiber& me = *running;
  uint64_t offset = reinterpret_cast<uint64_t>(to) - reinterpret_cast<uint64_t>(shared);
  if (offset >= launch->shared_bytes || offset + 16 > launch->shared_bytes) {
    fail(kIllegalAddress,
         format("%s: cp_async16 to outside the %u bytes of shared memory (offset %lld) at %s",
                who(me).c_str(), launch->shared_bytes, static_cast<long long>(offset), place(site).c_str()));
  }
  if (offset % 16) {
    fail(kMisaligned, format("%s: cp_async16 to offset %llu, not a multiple of 16, at %s", who(me).c_str(),
                             static_cast<unsigned long long>(offset), place(site).c_str()));
  }
  if (valid && reinterpret_cast<uint64_t>(from) % 16) {
    fail(kMisaligned, format("%s: cp_async16 from %p, not a multiple of 16, at %s", who(me).c_str(), from,
                             place(site).c_str()));
  }
  if (valid && watching) access(reinterpret_cast<uint64_t>(from), 16, false, nullptr, site);
  uint32_t at = static_cast<uint32_t>(offset);
  if (checking_ == Checks::on) {
    access_shared(at, 16, true, nullptr, site);
    for (uint32_t g = at / 2; g < at / 2 + 8; ++g) cells_[g].flags |= kCellInFlight;
  }
  if (counting_) {
    ++counters_.copies;
    me.log.push_back({site.file + site.line, offset, 16, true, true, false});
  }
  // Until the wait, the destination contains NaN.
  memset(to, 0xff, 16);
  me.copies.push_back({at, me.copy_group, valid ? from : nullptr});
}

void Block::copy_async_commit() {
  ++running->copy_group;
}

void Block::copy_async_wait(uint32_t newest, Site site) {
  (void)site;
  Fiber& me = *running;
  size_t kept = 0;
  for (const AsyncCopy& copy : me.copies) {
    if (copy.group + newest >= me.copy_group) {
      me.copies[kept++] = copy;
      continue;
    }
    if (copy.from) memcpy(shared + copy.to, copy.from, 16);
    else memset(shared + copy.to, 0, 16);
    if (checking_ == Checks::on) {
      for (uint32_t g = copy.to / 2; g < copy.to / 2 + 8; ++g) {
        Cell& cell = cells_[g];
        cell.flags = static_cast<uint16_t>((cell.flags & ~kCellInFlight) | kCellWritten);
        cell.writer = static_cast<uint16_t>(me.index);
        cell.write_time = me.now;
      }
    }
  }
  me.copies.resize(kept);
}

// ---- the counterparts that kernels call -------------------------------------------------------------------

Dim3 thread_index() {
  return current_block->running->thread;
}
Dim3 block_index() {
  return current_block->index;
}
Dim3 block_size() {
  return current_block->launch->block;
}
Dim3 grid_size() {
  return current_block->launch->grid;
}
uint8_t* shared_memory() {
  return current_block->shared;
}

void copy_async16(void* to, const void* from, bool valid, Site site) {
  current_block->copy_async16(to, from, valid, site);
}
void copy_async_commit() {
  current_block->copy_async_commit();
}
void copy_async_wait(uint32_t newest, Site site) {
  current_block->copy_async_wait(newest, site);
}
void ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site) {
  current_block->ldmatrix(registers, row, matrices, transposed, site);
}
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Mma operand{d, a, b};
  current_block->collective(Collective::mma, &operand, site, "mma");
}
void barrier(uint32_t id, uint32_t threads, Site site) {
  current_block->barrier(id, threads, site);
}
void sync_warp(Site site) {
  if (current_block->skips(site)) return;
  current_block->collective(Collective::sync, nullptr, site, "warp_sync");
}
uint32_t shuffle_xor(uint32_t v, uint32_t mask, Site site) {
  Shuffle s{v, mask, 0};
  current_block->collective(Collective::shuffle_xor, &s, site, "shfl_xor");
  return s.result;
}
uint32_t shuffle_index(uint32_t v, uint32_t lane, Site site) {
  Shuffle s{v, lane, 0};
  current_block->collective(Collective::shuffle_index, &s, site, "shfl_idx");
  return s.result;
}
uint32_t vote(bool v, Site site) {
  Vote operand{v, 0};
  current_block->collective(Collective::vote, &operand, site, "ballot");
  return operand.result;
}
uint32_t atomic_add(uint32_t* p, uint32_t v, Site site) {
  return current_block->atomic_add(p, v, site);
}
void fence() {
  current_block->running->fenced = true;
}

}  // namespace standin
