// The state of the driver's functions.
#pragma once

#include <stdint.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "handles.h"
#include "stream.h"

namespace standin {

// The driver's error codes that are used here.
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kNoDevice = 100, kInvalidDevice = 101,
              kInvalidImage = 200, kInvalidPtx = 218, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
              kNotReady = 600, kOutOfResources = 701, kNotSupported = 801, kCaptureUnsupported = 900,
              kCaptureInvalidated = 901, kCaptureMerge = 902, kCaptureUnmatched = 903, kCaptureUnjoined = 904,
              kCaptureIsolation = 905, kCaptureImplicit = 906, kCapturedEvent = 907,
              kCaptureWrongThread = 908, kContextIsDestroyed = 709;

// A captured graph, or one that can be launched.
struct Graph {
  std::shared_ptr<const std::vector<Node>> nodes;
  uint32_t lane_count = 1, events = 0;
  std::vector<Stream*> lanes;  // of an executable graph: stand-ins for the streams that joined the capture
  StreamClock last;            // of its last launch
  ~Graph();
};

int replay(Graph& graph, Stream& stream);

// The lock of every call. A thread may take it several times.
class STANDIN_EXPORT Lock {
 public:
  void lock();
  void unlock();
  // Lets other threads of the host in for a moment, however often this one has taken the lock.
  void pause(unsigned microseconds);

 private:
  std::mutex mutex_;
  std::condition_variable free_;
  std::thread::id owner_;
  unsigned depth_ = 0;
};

struct Machine {
  Lock lock;  // held by every call: the host's threads take turns
  bool initialized = false;
  StreamClock host;  // what the host has waited for
  Stream* streams[kStreams] = {};
  uint64_t slot_time[kStreams] = {};
  uint64_t done[kStreams] = {};  // per slot: the operations that have run
  uint64_t random = 0;           // the state of the schedule's generator
  bool eager = false;            // work may begin when it is submitted
  double ahead = 0;  // seconds by which the clock of events is ahead of the host's
  uint64_t allocations = 0, pinned_allocations = 0, launches = 0;

  Stream* new_stream(Primary* context, bool blocking);  // null: too many
  void drop_stream(Stream* stream);                     // once its work is done
  void let_go(Stream* stream);                          // whose work is done
  // Calls that a capture forbids: those that a driver documents as unsafe for the calling thread, those on a context,
  // those on its default stream. The error code, once the captures are broken; 0: allowed.
  int refuse_unsafe();
  int refuse_context(const Primary* context);
  int refuse_legacy(const Primary* context);
};

STANDIN_EXPORT Machine& machine();
// The stream of a handle, or the error code of calls on it. Without a handle: the default stream of the current
// context.
STANDIN_EXPORT int find_stream(void* handle, Stream** stream);
// Breaks the operation's context with this error, and returns it.
STANDIN_EXPORT int fail_sticky(const Running& running, int code);

// The limits of a GPU, by its compute capability.
struct DeviceLimits {
  int shared_optin, shared_multiprocessor, blocks, threads;
};
DeviceLimits limits();

// The clock of events.
STANDIN_EXPORT double seconds_now();
// During its lifetime, that clock runs this many times as fast.
class STANDIN_EXPORT Slowed {
 public:
  explicit Slowed(uint64_t factor) : factor_(factor), start_(factor > 1 ? seconds_now() : 0) {}
  ~Slowed() {
    if (factor_ > 1) machine().ahead += static_cast<double>(factor_ - 1) * (seconds_now() - start_);
  }

 private:
  uint64_t factor_;
  double start_;
};

// Waits for a stream; refused while it is captured.
int synchronize(Stream* stream);

}  // namespace standin
