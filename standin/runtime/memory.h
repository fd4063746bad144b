// Device memory: one reserved range of addresses, its allocations, and the state of each byte.
//
// A device pointer is the host address of its byte, so kernels use it directly; addresses outside the range are not
// device memory. Allocations are 256-byte aligned with a gap of 4 KiB between them, so an overrun is always noticed.
// A page knows which of its bytes are allocated. Each two-byte granule has a state (which bytes were written?) and its
// last accesses (see `check.h`).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace standin {

// The last accesses to a granule; each word is a packed access, 0 for none.
struct Trace {
  uint64_t writer, reader, other_reader;
};

// The same for a page of 4 KiB, left by copies, fills and products that covered all of it. Both count: an access must
// come after those of its granule and after those of its page.
// No two allocations share a page, and a large one costs little more than its pages: granules are cleared only where
// something has touched them.
struct PageTrace {
  Trace bulk;
  bool touched;          // some granule of the page has a trace of its own
  bool written;          // some granule may have a state
  uint16_t first, last;  // the allocated bytes are first .. last
};
constexpr size_t kPage = 4096;

// Bits of a granule's state: its first and its second byte were written.
constexpr uint8_t kWrittenFirst = 1, kWrittenSecond = 2, kWritten = 3;

struct Device {
  uint8_t* base = nullptr;
  size_t bytes = 0;
  uint8_t* state = nullptr;  // one per granule
  Trace* trace = nullptr;    // one per granule
  PageTrace* pages = nullptr;

  bool contains(uint64_t address) const { return address - reinterpret_cast<uint64_t>(base) < bytes; }
  size_t granule(uint64_t address) const { return (address - reinterpret_cast<uint64_t>(base)) / 2; }
  PageTrace& page(uint64_t address) const {
    return pages[(address - reinterpret_cast<uint64_t>(base)) / kPage];
  }
  bool allocated(uint64_t address, size_t size) const;
  // The first byte of the range that was never written, or `size`.
  size_t first_unwritten(uint64_t address, size_t size) const;
  void mark_written(uint64_t address, size_t size);
  void mark_unwritten(uint64_t address, size_t size);
};

extern Device device;

// 0 if the memory is full.
uint64_t allocate(size_t bytes, int card);
// Frees the allocation that starts there. Reports about later uses say what it was (`what`) and why it is gone. False
// if no allocation starts there.
bool release(uint64_t address, const std::string& what);
void memory_info(int card, size_t* free_bytes, size_t* total);
// Describes an address relative to the nearest allocations, for a report.
const char* nearest_allocation(uint64_t address, char* buffer, size_t bytes);
// Treats everything allocated as written.
void trust_all();
// Discards all past accesses (launch numbers start again).
void forget_traces();

}  // namespace standin
