#include "block.h"

#include <string.h>
#include <sys/mman.h>

#include "memory.h"
#include "options.h"
#include "ptx/interpreter.h"

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

// Runs all the threads of a block.
void interpreter_main() {
  Block& block = *current_block;
  block.interpreter_->run();
  block.running = nullptr;
  switch_to(block.interpreting_, block.main_);
}

uint32_t Block::random(uint32_t count) {
  if (random_ == 0) return 0;
  random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>((random_ >> 33) % count);
}

// Takes the next fiber that can run out of the ring.
Fiber* Block::pick() {
  if (ready_count_ == 0) return nullptr;
  if (random_ != 0) std::swap(ready_[ready_head_], ready_[(ready_head_ + random(ready_count_)) % kMaxThreads]);
  Fiber* fiber = ready_[ready_head_];
  ready_head_ = (ready_head_ + 1) % kMaxThreads;
  --ready_count_;
  return fiber;
}

void Block::make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  if (launch->program) {
    interpreter_->wake(fiber->index);
    return;
  }
  ready_[(ready_head_ + ready_count_++) % kMaxThreads] = fiber;
}

// The low end of a stack that no fiber has.
uint8_t* Block::take_stack() {
  if (free_stacks_.empty()) {
    uint8_t* low = stacks_ + stacks_made_++ * kStack;
    mprotect(low, kPage, PROT_NONE);
    free_stacks_.push_back(low);
  }
  uint8_t* stack = free_stacks_.back();
  free_stacks_.pop_back();
  return stack;
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
    next->stack = take_stack();
    // The stack tops have different offsets, so that they do not share the sets of a cache.
    size_t which = static_cast<size_t>(next->stack - stacks_) / kStack;
    prepare(next->context, next->stack + kPage, next->stack + kStack - which % 61 * 64, fiber_main);
  }
  next->state = State::running;
  if (&next->context != &from) switch_to(from, next->context);
}

void Block::waits(const char* what, Site site) {
  running->state = State::waiting;
  running->waits_for = what;
  running->site = site;
}

void Block::wait(const char* what, Site site) {
  Fiber* me = running;
  waits(what, site);
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
  // Agents are in the clocks after the threads; after them, for each thread, its writes that agents may read.
  bool agents = of.program && of.program->asynchronous;
  identities_ = threads_ + (agents ? 2 * ((threads_ + kLanes - 1) / kLanes) + 1 : 0);
  clocks_.resize(agents ? identities_ + threads_ : threads_);
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
    f.state = State::ready;
    if (!of.program) make_ready(&f);
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
    size_t parts = (granules + kCellsTogether - 1) / kCellsTogether;
    if (touched_.size() < parts) {
      touched_.resize(parts);
      cells_.resize(parts * kCellsTogether);
    }
    for (size_t part = 0; part < parts; ++part) {
      if (!touched_[part]) continue;
      touched_[part] = 0;
      memset(static_cast<void*>(&cells_[part * kCellsTogether]), 0, kCellsTogether * sizeof(Cell));
    }
    reader_tables_.clear();
    free_tables_.clear();
  }

  current_block = this;
  if (of.program) {
    if (!interpreter_) interpreter_.reset(new ptx::Interpreter(*this));
    interpreter_->begin();
    uint8_t* stack = take_stack();
    prepare(interpreting_, stack + kPage, stack + kStack, interpreter_main);
    switch_to(main_, interpreting_);
  } else {
    start_next(main_);
  }
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
  if (launch->program) text += interpreter_->missing();
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
  uint32_t warps = (threads_ + kLanes - 1) / kLanes;
  if (thread >= threads_ + 2 * warps) return "a bulk copy";
  if (thread >= threads_) {
    const char* what = thread < threads_ + warps ? "a product (wgmma)" : "a bulk store";
    return format("%s of warp %u", what, (thread - threads_) % warps);
  }
  return format("thread %u (warp %u, lane %u)", thread, thread / kLanes, thread % kLanes);
}

std::string Block::where(const void* pc, Site site) const {
  return pc ? place(pc) : place(site);
}

// ---- barriers ---------------------------------------------------------------------------------------------

bool Block::skips(Site site) const {
  const std::string& skipped = launch->options->skip_barrier;
  return !skipped.empty() && place(Site{site.file, site.line}) == skipped;
}

void Block::barrier(uint32_t id, uint32_t threads, Site site) {
  Fiber& me = *running;
  if (!arrive(id, threads, site)) start_next(me.context);
}

bool Block::arrive(uint32_t id, uint32_t threads, Site site) {
  Fiber& me = *running;
  if (skips(site)) return true;
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
  } else if (!b.site.is(site)) {
    fail(kLaunchFailed, format("barrier %u: %s comes from %s, others wait at %s", id, who(me).c_str(),
                               place(site).c_str(), place(b.site).c_str()));
  }
  b.waiting.push_back(&me);
  ++me.barriers_passed;
  if (++b.arrived < expected) {
    waits(name, site);
    return false;
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
  return true;
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
void barrier(uint32_t id, uint32_t threads, Site site) {
  current_block->barrier(id, threads, site);
}
uint32_t atomic_add(uint32_t* p, uint32_t v, Site site) {
  return current_block->atomic_add(p, v, site);
}
void fence() {
  current_block->running->fenced = true;
}

}  // namespace standin
