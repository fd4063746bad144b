#include "stream.h"

#include <string.h>

#include "check.h"
#include "driver.h"
#include "handles.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {
namespace {

struct Issued {
  uint32_t slot;
  uint64_t time;
};
Issued issued[1 << 16];
uint32_t last_tag = 0;

// A number for the next operation. When they run out, the past is discarded and they start again.
uint32_t next_tag() {
  if (++last_tag > 0xffff) {
    forget_traces();
    last_tag = 1;
  }
  return last_tag;
}

int run_now(Stream& stream, const Work& work) {
  Machine& m = machine();
  StreamClock& clock = stream.clock;
  clock.join(m.host);
  if (stream.legacy) {
    for (Stream* other : m.streams) {
      if (other && other->blocking && other->context == stream.context) clock.join(other->clock);
    }
  } else if (stream.blocking) {
    clock.join(stream.context->legacy->clock);
  }
  ++clock.time[stream.slot];
  uint32_t tag = next_tag();
  issued[tag] = {stream.slot, clock.time[stream.slot]};
  return work({tag, clock.time, stream.context});
}

}  // namespace

bool ordered_before(uint32_t tag, const uint64_t* ordered) {
  return ordered[issued[tag].slot] >= issued[tag].time;
}

uint32_t stream_of(uint32_t tag) {
  return issued[tag].slot;
}

int submit(Stream* stream, Work work) {
  if (Capture* capture = stream->capture.get()) {
    if (capture->broken) return kCaptureInvalidated;
    capture->nodes.push_back({Node::work, stream->lane, std::move(work), 0, nullptr});
    ++capture->last[stream->lane];
    return 0;
  }
  if (stream->legacy && machine().capturing_globally()) return machine().break_captures(kCaptureImplicit);
  return run_now(*stream, work);
}

int replay(Graph& graph, Stream& stream) {
  stream.clock.join(machine().host);
  std::vector<Stream*> lanes(graph.lanes.size() + 1);
  lanes[0] = &stream;
  for (size_t l = 0; l < graph.lanes.size(); ++l) {
    lanes[l + 1] = graph.lanes[l];
    graph.lanes[l]->clock.join(stream.clock);
  }
  std::vector<StreamClock> events(graph.events);
  for (const Node& node : *graph.nodes) {
    Stream& lane = *lanes[node.lane];
    switch (node.kind) {
      case Node::work:
        if (int code = run_now(lane, node.run)) return code;
        break;
      case Node::record: events[node.event] = lane.clock; break;
      case Node::wait: lane.clock.join(events[node.event]); break;
      case Node::outside: {
        Event& target = object_of<Event>(live(Kind::event, node.target));
        target.clock = lane.clock;
        target.recorded = true;
        break;
      }
    }
  }
  for (Stream* lane : lanes) stream.clock.join(lane->clock);
  return 0;
}

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
