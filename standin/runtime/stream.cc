// Accesses of whole ranges: copies, fills, products.
#include "stream.h"

#include <string.h>

#include "check.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {

int touch(const Running& running, uint64_t address, size_t bytes, Access access, const char* what) {
  if (bytes == 0) return 0;
  Checks checks = options().checks;
  bool write = access == Access::write;
  const char* does = write ? "writes" : "reads";
  char at[160];
  bool inside = checks == Checks::off
                    ? device.allocated(address, 1) && device.allocated(address + bytes - 1, 1)
                    : device.allocated(address, bytes);
  if (!inside) {
    publish({kIllegalAddress,
             format("out of bounds: %s %s %zu bytes at %p: %s", what, does, bytes,
                    reinterpret_cast<void*>(address), nearest_allocation(address, at, sizeof at))});
    return kIllegalAddress;
  }
  if (checks == Checks::off) return 0;
  if (write) device.mark_written(address, bytes);
  if (checks != Checks::on) return 0;
  size_t unwritten = access == Access::read ? device.first_unwritten(address, bytes) : bytes;
  if (unwritten < bytes) {
    uint64_t a = address + unwritten;
    publish({kLaunchFailed, format("uninitialised: %s reads %p, %s, which nobody wrote", what,
                                   reinterpret_cast<void*>(a), nearest_allocation(a, at, sizeof at))});
    return kLaunchFailed;
  }
  uint64_t word = Touch{running.tag, 0, 0, 1}.packed();
  auto check = [&](uint64_t other, uint64_t a, const char* kind) {
    if (!other || other == word) return true;
    uint32_t tag = Touch::of(other).tag;
    if (tag == running.tag || ordered_before(tag, running.ordered)) return true;
    publish({kLaunchFailed, format("race between streams: %s %s %p, %s, which an operation on stream %u has "
                                   "%s without an event in between",
                                   what, does, reinterpret_cast<void*>(a),
                                   nearest_allocation(a, at, sizeof at), stream_of(tag), kind)});
    return false;
  };
  // Whether this access is ordered after the traced one.
  auto after = [&](const Trace& trace, uint64_t a) {
    return check(trace.writer, a, "written") &&
           (!write || (check(trace.reader, a, "read") && check(trace.other_reader, a, "read")));
  };
  auto leave = [&](Trace& trace) {
    if (write) {
      trace = {word, 0, 0};
    } else if (trace.reader != word) {
      // The last readers that nothing orders before this one are kept.
      if (trace.reader && !ordered_before(Touch::of(trace.reader).tag, running.ordered))
        trace.other_reader = trace.reader;
      trace.reader = word;
    }
  };
  uint64_t first = address & ~uint64_t{1}, end = address + bytes,
           base = reinterpret_cast<uint64_t>(device.base);
  while (first < end) {
    uint64_t page_start = base + (first - base) / kPage * kPage,
             stop = page_start + kPage < end ? page_start + kPage : end;
    PageTrace& page = device.page(first);
    if (!after(page.bulk, first)) return kLaunchFailed;
    bool whole = first == page_start && stop == page_start + kPage;
    if (page.touched || !whole) {
      for (uint64_t a = first; a < stop; a += 2) {
        Trace& trace = device.trace[device.granule(a)];
        if (!after(trace, a)) return kLaunchFailed;
        if (!whole) leave(trace);
      }
    }
    if (!whole) {
      page.touched = true;
    } else {
      leave(page.bulk);
      if (write && page.touched) {
        memset(&device.trace[device.granule(first)], 0, kPage / 2 * sizeof(Trace));
        page.touched = false;
      }
    }
    first = stop;
  }
  return 0;
}

}  // namespace standin
