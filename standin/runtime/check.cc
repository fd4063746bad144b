// Checks of single accesses: whether the address is valid, whether the bytes were ever written, and which other threads
// touched them.
//
// Shared memory: FastTrack (Flanagan and Freund, PLDI 2009). A granule remembers its last writer and its concurrent
// readers with their times. An access that does not come after them by the accessor's vector clock is a race, whatever
// order the two happened to run in. Global memory: the same within a block. Between blocks of a launch any conflict is
// a race unless it went through a fence and an atomic. Between launches the clocks of the streams decide.
#include "check.h"

#include <dlfcn.h>
#include <link.h>
#include <string.h>

#include "block.h"
#include "memory.h"
#include "stream.h"

namespace standin {

void Block::access(uint64_t address, uint32_t size, bool write, const void* pc, Site site) {
  Fiber& me = *running;
  if (me.stack && address - reinterpret_cast<uint64_t>(me.stack) < kStack) return;
  uint64_t offset = address - reinterpret_cast<uint64_t>(shared);
  bool in_shared = offset < kMaxShared;
  if (counting_) {
    me.log.push_back({pc ? pc : site.file + site.line, in_shared ? offset : address,
                      static_cast<uint16_t>(size), write, in_shared, false});
  }
  if (checking_ == Checks::off) return;
  if (size > 1 && size <= 16 && address % size) {
    fail(kMisaligned,
         format("misaligned: %s %s %u bytes at %p at %s", who(me).c_str(), write ? "writes" : "reads", size,
                reinterpret_cast<void*>(address), where(pc, site).c_str()));
  }
  if (in_shared || offset + kMaxShared < 2 * kMaxShared) {
    if (offset + size > launch->shared_bytes || !in_shared) {
      fail(kIllegalAddress,
           format("out of bounds: %s %s %u bytes at offset %lld of %u bytes of shared memory at %s",
                  who(me).c_str(), write ? "writes" : "reads", size, static_cast<long long>(offset),
                  launch->shared_bytes, where(pc, site).c_str()));
    }
    if (checking_ == Checks::on) access_shared(static_cast<uint32_t>(offset), size, write, pc, site);
  } else if (device.contains(address)) {
    access_global(address, size, write, pc, site);
  } else {
    access_elsewhere(address, size, write, pc, site);
  }
}

// ---- shared memory ----------------------------------------------------------------------------------------

void Block::access_shared(uint32_t offset, uint32_t size, bool write, const void* pc, Site site,
                          uint32_t identity, uint32_t now) {
  Fiber& me = *running;
  const char* does = write ? "writes" : "reads";
  touch(offset, size);
  for (uint32_t g = offset / 2; g <= (offset + size - 1) / 2; ++g) {
    Cell& cell = cells_[g];
    if (cell.flags & kCellInFlight) {
      fail(kLaunchFailed,
           format("copy in flight: %s %s shared byte %u, which an asynchronous copy of %s still fills, at %s",
                  who(me).c_str(), does, 2 * g, who(cell.writer).c_str(), where(pc, site).c_str()));
    }
    if (!write && !(cell.flags & kCellWritten)) {
      fail(kLaunchFailed, format("uninitialised: %s reads shared byte %u, which nobody wrote, at %s",
                                 who(me).c_str(), 2 * g, where(pc, site).c_str()));
    }
    if (size == 1) {
      // Two threads may own the two bytes of a granule: no race check.
      if (write) cell.flags |= kCellWritten;
      continue;
    }
    if (cell.write_time && !knows(me, cell.writer, cell.write_time)) {
      fail(kLaunchFailed,
           format("race: %s %s shared byte %u, which %s has written without a barrier in between, at %s",
                  who(me).c_str(), does, 2 * g, who(cell.writer).c_str(), where(pc, site).c_str()));
    }
    if (write) {
      uint32_t reader;
      if (!others_ordered(cell, &reader)) {
        fail(kLaunchFailed,
             format("race: %s writes shared byte %u, which %s has read without a barrier in between, at %s",
                    who(me).c_str(), 2 * g, who(reader).c_str(), where(pc, site).c_str()));
      }
      cell.flags |= kCellWritten;
      cell.writer = static_cast<uint16_t>(identity);
      cell.write_time = now;
      cell.read_time = 0;
      if (cell.readers) {
        free_tables_.push_back(cell.readers);
        cell.readers = 0;
      }
    } else if (cell.readers) {
      reader_tables_[size_t{cell.readers - 1} * identities_ + identity] = now;
    } else if (cell.read_time == 0 || knows(me, cell.reader, cell.read_time)) {
      // A later writer that comes after this read also comes after the earlier one.
      cell.reader = static_cast<uint16_t>(identity);
      cell.read_time = now;
    } else {
      read_by_many(cell, identity, now);
    }
  }
}

// A second reader that does not come after the first: from now on the granule has a table of readers.
void Block::read_by_many(Cell& cell, uint32_t identity, uint32_t now) {
  if (free_tables_.empty()) {
    reader_tables_.resize(reader_tables_.size() + identities_);
    cell.readers = static_cast<uint32_t>(reader_tables_.size() / identities_);
  } else {
    cell.readers = free_tables_.back();
    free_tables_.pop_back();
    memset(&reader_tables_[size_t{cell.readers - 1} * identities_], 0, identities_ * sizeof(uint32_t));
  }
  uint32_t* times = &reader_tables_[size_t{cell.readers - 1} * identities_];
  times[cell.reader] = cell.read_time;
  times[identity] = now;
}

namespace {

// Whether one of `count` times is after the one at its place in `known`. Written for wide registers.
bool any_later(const uint32_t* times, const uint32_t* known, uint32_t count) {
  uint32_t later = 0;
  for (uint32_t t = 0; t < count; ++t) later |= known[t] - times[t];
  return later >> 31;
}

}  // namespace

bool Block::others_ordered(const Cell& cell, uint32_t* who) const {
  const Fiber& me = *running;
  if (!cell.readers) {
    *who = cell.reader;
    return cell.read_time == 0 || knows(me, cell.reader, cell.read_time);
  }
  const uint32_t* times = &reader_tables_[size_t{cell.readers - 1} * identities_];
  const uint32_t* known = me.clock->time;
  if (!any_later(times, known, me.index) && !any_later(times + me.index + 1, known + me.index + 1, identities_ - me.index - 1))
    return true;
  for (uint32_t t = 0; t < identities_; ++t) {
    if (times[t] && !knows(me, t, times[t])) {
      *who = t;
      return false;
    }
  }
  return true;
}

// ---- global memory ----------------------------------------------------------------------------------------

namespace {

uint64_t get(const uint64_t& word) {
  return __atomic_load_n(&word, __ATOMIC_RELAXED);
}
void set(uint64_t& word, uint64_t value) {
  __atomic_store_n(&word, value, __ATOMIC_RELAXED);
}

std::string allocation(uint64_t address) {
  char buffer[160];
  return nearest_allocation(address, buffer, sizeof buffer);
}

}  // namespace

bool Block::acquired(uint32_t block) const {
  if (block == kManyBlocks) {
    uint64_t seen = 0;
    for (uint64_t word : acquired_) seen += static_cast<uint64_t>(__builtin_popcountll(word));
    return seen + (block < number ? 0 : 1) >= launch->blocks();
  }
  return block / 64 < acquired_.size() && (acquired_[block / 64] >> (block % 64) & 1);
}

void Block::access_global(uint64_t address, uint32_t size, bool write, const void* pc, Site site) {
  Fiber& me = *running;
  const char* does = write ? "writes" : "reads";
  if (!device.allocated(address, size)) {
    fail(kIllegalAddress,
         format("out of bounds: %s %s %u bytes at %p, %s, at %s", who(me).c_str(), does, size,
                reinterpret_cast<void*>(address), allocation(address).c_str(), where(pc, site).c_str()));
  }
  if (checking_ != Checks::on) {
    if (write) device.mark_written(address, size);
    return;
  }
  // A wide read may extend past a row's end into padding that was never written: its first bytes decide.
  if (!write && device.first_unwritten(address, size) == 0) {
    fail(kLaunchFailed, format("uninitialised: %s reads %u bytes at %p, %s, which nobody wrote, at %s",
                               who(me).c_str(), size, reinterpret_cast<void*>(address),
                               allocation(address).c_str(), where(pc, site).c_str()));
  }
  if (write) {
    device.mark_written(address, size);
    me.fenced = false;
  }
  if (size == 1 || launch->blocks() > kManyBlocks) return;

  const Touch mine{launch->tag, number, me.index, me.now};
  // Whether another access is ordered before this one. `kind` is for the report.
  auto ordered = [&](uint64_t word, const char* kind, uint64_t at) {
    if (!word) return;
    Touch other = Touch::of(word);
    if (other.tag != launch->tag) {
      if (ordered_before(other.tag, launch->ordered)) return;
      fail(kLaunchFailed, format("race between streams: %s %s %p, %s, which an operation on stream %u has %s "
                                 "without an event in between, at %s",
                                 who(me).c_str(), does, reinterpret_cast<void*>(at), allocation(at).c_str(),
                                 stream_of(other.tag), kind, where(pc, site).c_str()));
    }
    if (other.block != number) {
      if (acquired(other.block)) return;
      std::string whose =
          other.block == kManyBlocks ? "several blocks have" : format("block %u has", other.block);
      fail(kLaunchFailed, format("race between blocks: %s %s %p, %s, which %s %s, at %s", who(me).c_str(),
                                 does, reinterpret_cast<void*>(at), allocation(at).c_str(), whose.c_str(),
                                 kind, where(pc, site).c_str()));
    }
    bool known;
    if (other.time & kManyTimes) {
      known = (other.time & (kManyTimes - 1)) != (me.barriers_passed & (kManyTimes - 1)) ||
              other.thread == me.index / kLanes;
    } else {
      known = other.thread == me.index || (me.clock->time[other.thread] & (kManyTimes - 1)) >= other.time;
    }
    if (known) return;
    fail(kLaunchFailed,
         format("race: %s %s global %p, %s, which %s of the block has %s without a barrier in between, at %s",
                who(me).c_str(), does, reinterpret_cast<void*>(at), allocation(at).c_str(),
                other.time & kManyTimes ? "another thread" : who(other.thread).c_str(), kind,
                where(pc, site).c_str()));
  };

  uint64_t word = Touch{mine.tag, mine.block, mine.thread, mine.time & (kManyTimes - 1)}.packed();
  PageTrace& page = device.page(address);
  if (uint64_t writer = get(page.bulk.writer)) ordered(writer, "written", address);
  if (write) {
    ordered(get(page.bulk.reader), "read", address);
    ordered(get(page.bulk.other_reader), "read", address);
  }
  if (!__atomic_load_n(&page.touched, __ATOMIC_RELAXED))
    __atomic_store_n(&page.touched, true, __ATOMIC_RELAXED);
  for (uint64_t a = address & ~uint64_t{1}; a < address + size; a += 2) {
    Trace& trace = device.trace[device.granule(a)];
    uint64_t writer = get(trace.writer);
    if (writer != word) ordered(writer, "written", a);
    if (write) {
      uint64_t reader = get(trace.reader), other_reader = get(trace.other_reader);
      if (reader) {
        ordered(reader, "read", a);
        set(trace.reader, 0);
      }
      if (other_reader) {
        ordered(other_reader, "read", a);
        set(trace.other_reader, 0);
      }
      if (writer != word) set(trace.writer, word);
      continue;
    }
    uint64_t reader = get(trace.reader);
    if (reader == word) continue;
    Touch last = Touch::of(reader);
    if (reader == 0) {
      set(trace.reader, word);
    } else if (last.tag != launch->tag) {
      // The last readers of an earlier launch are kept if nothing orders them before this one.
      if (!ordered_before(last.tag, launch->ordered)) set(trace.other_reader, reader);
      set(trace.reader, word);
    } else if (last.block != number) {
      if (last.block != kManyBlocks) set(trace.reader, Touch{mine.tag, kManyBlocks, 0, 0}.packed());
    } else if (!(last.time & kManyTimes)) {
      if (last.thread == me.index || (me.clock->time[last.thread] & (kManyTimes - 1)) >= last.time) {
        set(trace.reader, word);
      } else {
        uint32_t warp = me.index / kLanes;
        uint32_t whose = last.thread / kLanes == warp ? warp : kManyWarps;
        set(trace.reader,
            Touch{mine.tag, number, whose, kManyTimes | (me.barriers_passed & (kManyTimes - 1))}.packed());
      }
    } else if ((last.time & (kManyTimes - 1)) != (me.barriers_passed & (kManyTimes - 1))) {
      // They read before a barrier that this thread has passed: whoever comes after this read also comes after theirs.
      set(trace.reader, word);
    } else {
      uint32_t warp = me.index / kLanes;
      uint32_t whose = last.thread == warp ? warp : kManyWarps;
      uint64_t many =
          Touch{mine.tag, number, whose, kManyTimes | (me.barriers_passed & (kManyTimes - 1))}.packed();
      if (many != reader) set(trace.reader, many);
    }
  }
}

uint32_t Block::atomic_add(uint32_t* p, uint32_t v, Site site) {
  Fiber& me = *running;
  uint64_t address = reinterpret_cast<uint64_t>(p);
  if (address % 4) {
    fail(kMisaligned, format("misaligned: %s adds atomically at %p at %s", who(me).c_str(),
                             static_cast<void*>(p), place(site).c_str()));
  }
  uint64_t offset = address - reinterpret_cast<uint64_t>(shared);
  bool in_shared = offset < launch->shared_bytes;
  if (!in_shared && !device.allocated(address, 4)) {
    fail(kIllegalAddress, format("out of bounds: %s adds atomically at %p, %s, at %s", who(me).c_str(),
                                 static_cast<void*>(p), allocation(address).c_str(), place(site).c_str()));
  }
  if (counting_) ++counters_.atomics;
  if (checking_ == Checks::on) {
    if (in_shared) {
      Cell* cells = &cells_[offset / 2];
      if (!(cells[0].flags & kCellWritten)) {
        fail(kLaunchFailed,
             format("uninitialised: %s adds atomically to shared byte %llu, which nobody wrote, at %s",
                    who(me).c_str(), static_cast<unsigned long long>(offset), place(site).c_str()));
      }
    } else {
      if (device.first_unwritten(address, 4) != 4) {
        fail(kLaunchFailed,
             format("uninitialised: %s adds atomically at %p, %s, which nobody wrote, at %s", who(me).c_str(),
                    static_cast<void*>(p), allocation(address).c_str(), place(site).c_str()));
      }
      std::lock_guard<std::mutex> guard(launch->lock);
      auto& seen = launch->published[address];
      size_t words = static_cast<size_t>(launch->blocks() + 63) / 64;
      seen.resize(words);
      acquired_.resize(words);
      if (me.fenced) {
        seen[number / 64] |= uint64_t{1} << (number % 64);
        for (size_t i = 0; i < words; ++i) seen[i] |= acquired_[i];
      }
      for (size_t i = 0; i < words; ++i) acquired_[i] |= seen[i];
      return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
    }
  }
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}

// ---- anything else ----------------------------------------------------------------------------------------

namespace {

// The read-only parts of this library: constants and tables of kernels.
bool in_constants(uint64_t address, uint32_t size) {
  struct Range {
    uint64_t low, high;
  };
  static const std::vector<Range> ranges = [] {
    std::vector<Range> found;
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&run_launch), &self);
    struct Search {
      const void* base;
      std::vector<Range>* found;
    } search{self.dli_fbase, &found};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          auto& s = *static_cast<Search*>(data);
          if (info->dlpi_addr != reinterpret_cast<uint64_t>(s.base)) return 0;
          uint64_t relro_low = 0, relro_high = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& p = info->dlpi_phdr[i];
            if (p.p_type == PT_GNU_RELRO) {
              relro_low = info->dlpi_addr + p.p_vaddr;
              relro_high = relro_low + p.p_memsz;
            }
            if (p.p_type == PT_LOAD && !(p.p_flags & PF_W)) {
              s.found->push_back({info->dlpi_addr + p.p_vaddr, info->dlpi_addr + p.p_vaddr + p.p_memsz});
            }
          }
          s.found->push_back({relro_low, relro_high});
          return 1;
        },
        &search);
    return found;
  }();
  for (const Range& r : ranges) {
    if (address >= r.low && address + size <= r.high) return true;
  }
  return false;
}

}  // namespace

void Block::access_elsewhere(uint64_t address, uint32_t size, bool write, const void* pc, Site site) {
  if (!write && in_constants(address, size)) return;
  const char* what = address < 4096 ? "a null pointer" : "memory of the host, or none at all";
  for (uint32_t t = 0; t < threads_; ++t) {
    if (fibers_[t].stack && address - reinterpret_cast<uint64_t>(fibers_[t].stack) < kStack) {
      what = "another thread's local variable";
    }
  }
  fail(kIllegalAddress, format("out of bounds: %s %s %u bytes at %p: %s, at %s", who(*running).c_str(),
                               write ? "writes" : "reads", size, reinterpret_cast<void*>(address), what,
                               where(pc, site).c_str()));
}

}  // namespace standin

// ---- the hooks that `-fsanitize=thread` calls -------------------------------------------------------------

using standin::current_block;
using standin::Site;

#define HOOK(bytes)                                                                                \
  extern "C" void __tsan_read##bytes(void* p) {                                                    \
    standin::Block* b = current_block;                                                             \
    if (b && b->watching)                                                                          \
      b->access(reinterpret_cast<uint64_t>(p), bytes, false, __builtin_return_address(0), Site{}); \
  }                                                                                                \
  extern "C" void __tsan_write##bytes(void* p) {                                                   \
    standin::Block* b = current_block;                                                             \
    if (b && b->watching)                                                                          \
      b->access(reinterpret_cast<uint64_t>(p), bytes, true, __builtin_return_address(0), Site{});  \
  }                                                                                                \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                          \
    standin::Block* b = current_block;                                                             \
    if (b && b->watching)                                                                          \
      b->access(reinterpret_cast<uint64_t>(p), bytes, false, __builtin_return_address(0), Site{}); \
  }                                                                                                \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                         \
    standin::Block* b = current_block;                                                             \
    if (b && b->watching)                                                                          \
      b->access(reinterpret_cast<uint64_t>(p), bytes, true, __builtin_return_address(0), Site{});  \
  }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
#undef HOOK

// Struct copies arrive as ranges: split into words, as a GPU would move them.
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  standin::Block* b = current_block;
  if (!b || !b->watching) return;
  uint64_t a = reinterpret_cast<uint64_t>(p);
  for (size_t i = 0; i < bytes; i += 4) {
    b->access(a + i, bytes - i < 4 ? static_cast<uint32_t>(bytes - i) : 4, false, __builtin_return_address(0),
              Site{});
  }
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  standin::Block* b = current_block;
  if (!b || !b->watching) return;
  uint64_t a = reinterpret_cast<uint64_t>(p);
  for (size_t i = 0; i < bytes; i += 4) {
    b->access(a + i, bytes - i < 4 ? static_cast<uint32_t>(bytes - i) : 4, true, __builtin_return_address(0),
              Site{});
  }
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// `-fsanitize=bounds`: an index outside a local array.
namespace {
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct OutOfBounds {
  SourceLocation where;
};
}  // namespace
extern "C" void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uint64_t at) {
  standin::Block* b = current_block;
  if (!b) abort();
  b->fail(
      standin::kIllegalAddress,
      standin::format("out of bounds: index %lld of a local array at %s", static_cast<long long>(at),
                      standin::place(Site{data->where.file, static_cast<int>(data->where.line)}).c_str()));
}
