// Streams, events, captured graphs: which work is ordered before which, and when it runs.
//
// Work is queued when it is submitted and runs when something waits for it (`schedule.cc`). A stream has a vector clock:
// an operation advances that stream's entry, and waiting for an event merges the event's clock. Everything is ordered
// when it is submitted: an operation may run once all that its clock contains has run. Two operations that touch the
// same bytes without being ordered this way are a race, whatever order they happened to run in.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <deque>
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

// The information that an operation may ask for while it runs.
struct Running {
  uint32_t tag;
  const uint64_t* ordered;  // per stream slot
  Primary* context;
  uint64_t launch;  // the number of a kernel's launch, from 1
};
using Work = std::function<int(const Running&)>;

// How an operation that needs other processes stands after a part of its work.
enum class Advance { blocked, moved, done };
using Part = std::function<Advance(const Running&)>;

// One kernel, copy, fill, product, collective or call of the host.
struct Task {
  Work run;
  // Instead of `run`, for work with other processes: called whenever the operation is queued. What it returns is called
  // until it is done, or its context broken. Nothing waits inside it, so the host's other threads go on.
  std::function<Part()> start;
  const char* what = nullptr;  // for the file of the option `order`; null: it has no line there
  uint64_t bytes = 0;
  const Record* kernel = nullptr;  // the function, if it is a launch
  // Page-locked memory that it reads, or writes.
  uint64_t host = 0;
  size_t host_bytes = 0;
  bool writes_host = false;
};

// A recorded point of a stream. Events that were recorded again leave it to those that wait for it.
struct Point {
  StreamClock clock;
  bool done = false;
  double seconds = 0;  // by the clock of events, once done
};

// An entry of a stream's queue: a task, or a point to be passed.
struct Operation {
  std::shared_ptr<const Task> task;
  std::shared_ptr<Point> point;
  StreamClock ordered;  // what must have run before, and of its own stream: itself included
  uint64_t launch = 0;
  const char* call = nullptr;  // that submitted it
  Part part;                   // of work with other processes
  uint32_t tag = 0;            // once it has begun
};

struct Stream {
  uint32_t slot = 0;  // its entry in the clocks
  Primary* context = nullptr;
  bool legacy = false;    // its context's default stream
  bool blocking = false;  // waits for the default stream, and that for it
  bool closing = false;   // destroyed, with work left to do
  StreamClock clock;      // of all that was submitted
  std::deque<Operation> queue;
  std::shared_ptr<Capture> capture;
  uint32_t lane = 0;  // in the capture
};

struct Event {
  std::shared_ptr<Point> point;  // null: never recorded
  bool timed = true;
  std::weak_ptr<Capture> capture;  // while it was recorded in one
  uint32_t number = 0;             // in that capture
};

struct Node {
  enum Kind { work, record, wait, outside } kind;
  uint32_t lane;
  std::shared_ptr<const Task> task;
  uint32_t event;
  Record* target;  // `outside`: the handle of an event recorded for others, or null
};

struct Capture {
  Stream* origin = nullptr;
  int mode = 0;
  uint64_t thread = 0;  // that began it
  int broken = 0;       // an error code
  uint32_t lanes = 1, events = 0;
  std::vector<Node> nodes;
  std::vector<Stream*> members;
  std::vector<uint64_t> last;                     // per lane: its operations so far
  std::vector<std::vector<uint64_t>> seen;        // per lane: of each lane, the operations it comes after
  std::vector<std::vector<uint64_t>> event_seen;  // the same at each event
};

// Queues work on a stream, or records it there. Returns a driver error code: that of the submission alone, unless
// nothing is deferred.
STANDIN_EXPORT int submit(Stream* stream, Task task);
// Records a point of a stream, after all that was submitted to it.
std::shared_ptr<Point> record(Stream& stream);
// Runs what is in this clock, and whatever else a GPU might run in the meantime.
void wait_for(const StreamClock& goal);
bool has_run(const StreamClock& clock);
// Lets a GPU work for a moment, as while the host polls.
void work_a_little();
// Runs all work of a context; without one, of every context.
void finish_all(const Primary* context);
// Whether a queued operation uses page-locked memory; its call, or null. `reads`: only those that read it.
const char* in_flight(uint64_t address, size_t bytes, bool reads);

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
