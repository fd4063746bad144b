#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>

#include "options.h"

namespace standin {

Device device;

namespace {

constexpr size_t kGap = 4096, kAlign = 256, kPoisoned = 4 << 20;

std::mutex lock;
struct Allocation {
  size_t bytes;  // that were asked for
  size_t room;   // with the gap after it
  int card;
};
struct Former {
  size_t bytes;
  std::string what;  // and why it is no more
};

std::map<uint64_t, Allocation> live;   // by its start
std::map<uint64_t, Former> former;     // what lay there before, until something else does
std::map<uint64_t, size_t> free_room;  // start → bytes, gaps included
std::map<int, size_t> used;            // bytes of each card

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  madvise(p, bytes, MADV_DONTDUMP);
  return p;
}

// Reserves the range at the first allocation: twice the GPUs' memory, for gaps and fragments. Smaller ranges are tried
// if the system refuses so many addresses.
void open_range() {
  if (device.base) return;
  size_t cards = static_cast<size_t>(options().cards > 0 ? options().cards : 1);
  for (size_t bytes = 2 * cards * options().memory + (64 << 20); bytes >= (64 << 20); bytes /= 2) {
    bytes &= ~size_t{4095};
    void* base = reserve(bytes);
    void* state = reserve(bytes / 2);
    void* trace = reserve(bytes / 2 * sizeof(Trace));
    void* pages = reserve(bytes / kPage * sizeof(PageTrace));
    if (base && state && trace && pages) {
      device = {static_cast<uint8_t*>(base), bytes, static_cast<uint8_t*>(state), static_cast<Trace*>(trace),
                static_cast<PageTrace*>(pages)};
      free_room[reinterpret_cast<uint64_t>(base) + kGap] = bytes - 2 * kGap;
      return;
    }
    if (base) munmap(base, bytes);
    if (state) munmap(state, bytes / 2);
    if (trace) munmap(trace, bytes / 2 * sizeof(Trace));
    if (pages) munmap(pages, bytes / kPage * sizeof(PageTrace));
  }
  fprintf(stderr, "stand-in GPU: no room for the card's memory in the address space\n");
  abort();
}

size_t room_for(size_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign + std::max<size_t>(kGap, options().gap);
}

}  // namespace

namespace {
// Calls `each` with the pages of an allocation and their addresses.
template <class F>
void for_pages(uint64_t start, size_t bytes, F each) {
  for (uint64_t a = start & ~uint64_t{kPage - 1}; a < start + bytes; a += kPage) each(device.page(a), a);
}

void clear_traces(PageTrace& page, uint64_t at) {
  if (page.touched) memset(device.trace + device.granule(at), 0, kPage / 2 * sizeof(Trace));
  page.touched = false;
  page.bulk = {};
}
}  // namespace

uint64_t allocate(size_t bytes, int card) {
  std::lock_guard<std::mutex> guard(lock);
  open_range();
  if (bytes > options().memory || used[card] + bytes > options().memory) return 0;
  size_t room = room_for(bytes);
  for (auto it = free_room.begin(); it != free_room.end(); ++it) {
    if (it->second < room) continue;
    uint64_t start = it->first;
    size_t rest = it->second - room;
    free_room.erase(it);
    if (rest) free_room[start + room] = rest;
    auto over = former.lower_bound(start);
    if (over != former.begin() && std::prev(over)->first + std::prev(over)->second.bytes > start) --over;
    former.erase(over, former.lower_bound(start + room));
    live[start] = {bytes, room, card};
    used[card] += bytes;
    for_pages(start, bytes, [&](PageTrace& page, uint64_t at) {
      page.first = static_cast<uint16_t>(start > at ? start - at : 0);
      page.last = static_cast<uint16_t>(std::min<uint64_t>(start + bytes - at, kPage));
    });
    // Fresh memory contains NaN in f32 and bf16. Filling the start of a large arena is enough.
    memset(reinterpret_cast<void*>(start), 0xff, bytes < kPoisoned ? bytes : kPoisoned);
    return start;
  }
  return 0;
}

bool release(uint64_t address, const std::string& what) {
  std::lock_guard<std::mutex> guard(lock);
  auto it = live.find(address);
  if (it == live.end()) return false;
  size_t bytes = it->second.bytes, room = it->second.room;
  used[it->second.card] -= bytes;
  live.erase(it);
  former[address] = {bytes, what};
  for_pages(address, bytes, [](PageTrace& page, uint64_t at) {
    clear_traces(page, at);
    if (page.written) memset(device.state + device.granule(at), 0, kPage / 2);
    page = {};
  });
  auto next = free_room.lower_bound(address);
  if (next != free_room.end() && address + room == next->first) {
    room += next->second;
    next = free_room.erase(next);
  }
  if (next != free_room.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == address) {
      before->second += room;
      return true;
    }
  }
  free_room[address] = room;
  return true;
}

void memory_info(int card, size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> guard(lock);
  *total = options().memory;
  *free_bytes = used[card] < *total ? *total - used[card] : 0;
}

const char* nearest_allocation(uint64_t address, char* buffer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  auto number = [](uint64_t v) { return static_cast<unsigned long long>(v); };
  auto after = live.upper_bound(address);
  auto before = after == live.begin() ? live.end() : std::prev(after);
  uint64_t end = before == live.end() ? 0 : before->first + before->second.bytes;
  auto gone = former.upper_bound(address);
  if (address < end) {
    snprintf(buffer, bytes, "byte %llu of an allocation of %zu bytes", number(address - before->first),
             before->second.bytes);
  } else if (gone != former.begin() && address < std::prev(gone)->first + std::prev(gone)->second.bytes) {
    --gone;
    snprintf(buffer, bytes, "byte %llu of %s", number(address - gone->first), gone->second.what.c_str());
  } else if (end && (after == live.end() || address - end <= after->first - address)) {
    snprintf(buffer, bytes, "%llu bytes after the end of an allocation of %zu bytes", number(address - end),
             before->second.bytes);
  } else if (after != live.end() && device.contains(address)) {
    snprintf(buffer, bytes, "%llu bytes before an allocation of %zu bytes", number(after->first - address),
             after->second.bytes);
  } else {
    snprintf(buffer, bytes, "not the card's memory");
  }
  return buffer;
}

void trust_all() {
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [start, allocation] : live) device.mark_written(start, allocation.bytes);
}

void forget_traces() {
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [start, allocation] : live) for_pages(start, allocation.bytes, clear_traces);
}

namespace {

// The first granule in `at .. end` that was not all written; `end` if there is none.
size_t first_not_written(const uint8_t* state, size_t at, size_t end) {
  constexpr uint64_t all = 0x0101010101010101ull * kWritten;
  uint64_t eight;
  while (at + 8 <= end) {
    memcpy(&eight, state + at, 8);
    if (eight != all) break;
    at += 8;
  }
  while (at < end && state[at] == kWritten) ++at;
  return at;
}

void set_written(Device& d, uint64_t address, size_t size, bool written) {
  uint64_t at = address, end = address + size;
  // Blocks on several host threads may mark the two bytes of one granule.
  auto one = [&](size_t granule, uint8_t bits) {
    uint8_t* state = d.state + granule;
    if (!written) __atomic_fetch_and(state, static_cast<uint8_t>(~bits), __ATOMIC_RELAXED);
    else if ((__atomic_load_n(state, __ATOMIC_RELAXED) & bits) != bits)
      __atomic_fetch_or(state, bits, __ATOMIC_RELAXED);
  };
  for (uint64_t a = at & ~uint64_t{kPage - 1}; written && a < end; a += kPage) {
    PageTrace& page = d.page(a);
    if (!__atomic_load_n(&page.written, __ATOMIC_RELAXED)) __atomic_store_n(&page.written, true, __ATOMIC_RELAXED);
  }
  if (at % 2 && at < end) {
    one(d.granule(at), kWrittenSecond);
    ++at;
  }
  size_t whole = d.granule(at), last = d.granule(end);
  if (last - whole > 64) {
    memset(d.state + whole, written ? kWritten : 0, last - whole);
  } else {
    for (size_t g = whole; g < last; ++g) one(g, kWritten);
  }
  if (end % 2 && end > at) one(last, kWrittenFirst);
}

}  // namespace

bool Device::allocated(uint64_t address, size_t size) const {
  if (size == 0) return true;
  if (!contains(address) || !contains(address + size)) return false;
  for (uint64_t at = address, end = address + size; at < end;) {
    const PageTrace& its = page(at);
    uint64_t from = at % kPage, to = std::min<uint64_t>(from + (end - at), kPage);
    if (from < its.first || to > its.last) return false;
    at += to - from;
  }
  return true;
}
size_t Device::first_unwritten(uint64_t address, size_t size) const {
  uint64_t at = address, end = address + size;
  if (at % 2 && at < end) {
    if (!(state[granule(at)] & kWrittenSecond)) return 0;
    ++at;
  }
  size_t whole = granule(at), last = granule(end);  // `end` may be the first byte past the range
  size_t found = first_not_written(state, whole, last);
  if (found < last) return at + 2 * (found - whole) - address + (state[found] & kWrittenFirst ? 1 : 0);
  if (end % 2 && end > at && !(state[last] & kWrittenFirst)) return size - 1;
  return size;
}
void Device::mark_written(uint64_t address, size_t size) {
  set_written(*this, address, size, true);
}
void Device::mark_unwritten(uint64_t address, size_t size) {
  set_written(*this, address, size, false);
}

}  // namespace standin
