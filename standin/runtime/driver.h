// The state behind the driver's functions.
#pragma once

#include <stdint.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "stream.h"

namespace standin {

// The driver's error codes that are used here.
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kNoDevice = 100, kInvalidDevice = 101,
              kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
              kNotReady = 600, kOutOfResources = 701, kNotSupported = 801, kCaptureUnsupported = 900,
              kCaptureInvalidated = 901, kCaptureUnmatched = 903, kCaptureUnjoined = 904,
              kCaptureImplicit = 906, kCapturedEvent = 907;

// A captured graph, or one that can be launched.
struct Graph {
  std::shared_ptr<const std::vector<Node>> nodes;
  uint32_t lane_count = 1, events = 0;
  std::vector<Stream*> lanes;  // of an executable graph: stand-ins for the streams that joined the capture
  ~Graph();
};

int replay(Graph& graph, Stream& stream);

struct Machine {
  std::recursive_mutex lock;  // held by every call: the host's threads take turns
  bool initialized = false;
  int sticky = 0;    // the error that broke the context; every later call returns it
  StreamClock host;  // what the host has waited for
  Stream legacy;
  Stream* streams[kStreams] = {};
  uint64_t slot_time[kStreams] = {};
  std::map<void*, size_t> pinned;
  uint64_t allocations = 0, pinned_allocations = 0, launches = 0;

  Stream* new_stream(bool blocking);  // null: too many
  void drop_stream(Stream* stream);
  bool capturing_globally() const;
  int break_captures(int code);
};

STANDIN_EXPORT Machine& machine();
// The stream behind a handle.
STANDIN_EXPORT Stream* stream_for(void* handle);
// Breaks the context with this error, and returns it.
STANDIN_EXPORT int fail_sticky(int code);

// What a card allows, by its compute capability.
struct DeviceLimits {
  int shared_optin, shared_multiprocessor, blocks, threads;
};
DeviceLimits limits();

// Waits for a stream; refused where it is captured.
int synchronize(Stream* stream);
// Calls that would make a capture wait or allocate are refused while one is under way.
int refuse_in_capture();
// Writes down an operation: its stream, and how many operations of each stream it comes after (of its own
// stream: itself included). Two operations of which neither comes after the other may run at once.
void note_order(const Running& running, const char* what, uint64_t bytes);

}  // namespace standin
