// The card's memory: one reserved range of addresses, what is allocated in it, and what is known of each
// byte.
//
// A device pointer is the host address of its byte, so kernels use it as it is; whatever lies outside the
// range is not the card's. Allocations are 256-byte aligned with a gap of 4 KiB between them, so that running
// over an end is always seen. For each two-byte granule there is a state (allocated? written?) and the last
// accesses (see `check.h`).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace standin {

// Who touched a granule last; each word is a packed access, 0 for nobody.
struct Trace {
  uint64_t writer, reader, other_reader;
};

// The same for a page of 4 KiB, left by copies, fills and products that covered all of it. Both count: an
// access comes after what its granule says and after what its page says.
struct PageTrace {
  Trace bulk;
  bool touched;  // some granule of the page has a trace of its own
};
constexpr size_t kPage = 4096;

// Bits of a granule's state; the first two are for its first and second byte, the next two likewise.
constexpr uint8_t kAllocated = 0x3, kWritten = 0xc;

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

// 0 if the card is full.
uint64_t allocate(size_t bytes, int card);
// Frees what starts there; `what` it was and why it is gone stands in reports of those who use it all the
// same. False if nothing starts there.
bool release(uint64_t address, const std::string& what);
void memory_info(int card, size_t* free_bytes, size_t* total);
// Where an address lies with respect to the allocations nearest to it, for a report.
const char* nearest_allocation(uint64_t address, char* buffer, size_t bytes);
// Takes everything allocated for written.
void trust_all();
// Forgets all accesses of the past (the launch numbers start again).
void forget_traces();

}  // namespace standin
