// Streams, events, captured graphs: which work is ordered before which.
//
// Work runs when it is issued, so a stream needs no queue; it has a vector clock instead. An operation on a stream
// advances that stream's entry; waiting for an event merges the event's clock. Two launches that touch the same bytes
// without being ordered this way are a race, whatever order they happened to run in.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <memory>
#include <vector>

#include "export.h"

namespace standin {

constexpr uint32_t kStreams = 64;

struct StreamClock {
  uint64_t time[kStreams] = {};
  void join(const StreamClock& other) {
    for (uint32_t s = 0; s < kStreams; ++s) {
      if (other.time[s] > time[s]) time[s] = other.time[s];
    }
  }
};

struct Capture;
struct Primary;
struct Record;

struct Stream {
  uint32_t slot = 0;  // its entry in the clocks
  Primary* context = nullptr;
  bool legacy = false;    // its context's default stream
  bool blocking = false;  // waits for the default stream, and that for it
  StreamClock clock;
  std::shared_ptr<Capture> capture;
  uint32_t lane = 0;  // in the capture
};

struct Event {
  StreamClock clock;
  bool recorded = false;
  bool timed = true;
  double seconds = 0;
  std::weak_ptr<Capture> capture;  // while it was recorded in one
  uint32_t number = 0;             // in that capture
};

// The information that an operation may ask for while it runs.
struct Running {
  uint32_t tag;
  const uint64_t* ordered;  // per stream slot
  Primary* context;
};
using Work = std::function<int(const Running&)>;

struct Node {
  enum Kind { work, record, wait, outside } kind;
  uint32_t lane;
  Work run;
  uint32_t event;
  Record* target;  // `outside`: the handle of an event recorded for others, or null
};

struct Capture {
  Stream* origin = nullptr;
  int mode = 0;
  int broken = 0;  // an error code
  uint32_t lanes = 1, events = 0;
  std::vector<Node> nodes;
  std::vector<Stream*> members;
  std::vector<uint64_t> last;                     // per lane: its operations so far
  std::vector<std::vector<uint64_t>> seen;        // per lane: of each lane, the operations it comes after
  std::vector<std::vector<uint64_t>> event_seen;  // the same at each event
};

// Runs work on a stream, or records it there. Returns a driver error code.
STANDIN_EXPORT int submit(Stream* stream, Work work);
// Whether the work of launch `tag` is ordered before the holder of `ordered`.
bool ordered_before(uint32_t tag, const uint64_t* ordered);
// The stream's number, for a report.
uint32_t stream_of(uint32_t tag);

// A whole-range access of the running operation. Checks bounds, order between streams, and for `Access::read` whether
// all bytes were written (`copy` moves them as they are). Returns an error code and publishes a report on failure.
enum class Access { copy, read, write };
STANDIN_EXPORT int touch(const Running& running, uint64_t address, size_t bytes, Access access,
                         const char* what);

}  // namespace standin
