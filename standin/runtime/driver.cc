// The CUDA driver API, the part that a program like Vitrum uses: libcuda.so's own names and error codes.
//
// Work is queued when it is submitted (`schedule.cc`), unless its stream is being captured; then its bytes are kept and
// it is queued at each launch of the graph. Names, types and codes follow NVIDIA's CUDA Driver API reference (CUDA 13.0).
//
// This file has the driver and its GPUs, contexts, and the stand-in's own functions. `driver_errors.cc`,
// `driver_memory.cc`, `driver_streams.cc` and `driver_kernels.cc` have the rest.
#include "driver.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "api.h"
#include "block.h"
#include "launch.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {

Machine& machine() {
  static Machine* m = [] {
    auto* made = new Machine;
    made->random = options().defer;
    return made;
  }();
  return *m;
}

Stream* Machine::new_stream(Primary* context, bool blocking) {
  for (uint32_t slot = 0; slot < kStreams; ++slot) {
    if (streams[slot]) continue;
    auto* stream = new Stream;
    stream->slot = slot;
    stream->context = context;
    stream->blocking = blocking;
    stream->clock = host;
    stream->clock.time[slot] = slot_time[slot];
    return streams[slot] = stream;
  }
  return nullptr;
}

void Machine::drop_stream(Stream* stream) {
  if (std::shared_ptr<Capture> c = stream->capture) {
    c->broken = kCaptureInvalidated;
    c->members.erase(std::remove(c->members.begin(), c->members.end(), stream), c->members.end());
    stream->capture.reset();
  }
  stream->closing = true;
  if (stream->queue.empty()) let_go(stream);
}

void Machine::let_go(Stream* stream) {
  slot_time[stream->slot] = stream->clock.time[stream->slot];
  stream->context->ended.join(stream->clock);
  if (stream->blocking) stream->context->ended_blocking.join(stream->clock);
  streams[stream->slot] = nullptr;
  delete stream;
}

int find_stream(void* handle, Stream** stream) {
  // Handles 1 and 2 are the legacy and the per-thread default stream.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) {
    Primary* context;
    if (int code = current_context(&context)) return code;
    *stream = context->legacy;
    return 0;
  }
  const Record& record = live(Kind::stream, handle);
  *stream = &object_of<Stream>(record);
  return record.context->sticky;
}

void Lock::lock() {
  std::unique_lock<std::mutex> hold(mutex_);
  if (depth_ && owner_ == std::this_thread::get_id()) {
    ++depth_;
    return;
  }
  free_.wait(hold, [this] { return depth_ == 0; });
  owner_ = std::this_thread::get_id();
  depth_ = 1;
}

void Lock::unlock() {
  std::lock_guard<std::mutex> hold(mutex_);
  if (--depth_ == 0) free_.notify_one();
}

void Lock::pause(unsigned microseconds) {
  std::unique_lock<std::mutex> hold(mutex_);
  unsigned depth = depth_;
  depth_ = 0;
  free_.notify_one();
  hold.unlock();
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  hold.lock();
  free_.wait(hold, [this] { return depth_ == 0; });
  owner_ = std::this_thread::get_id();
  depth_ = depth;
}

int fail_sticky(const Running& running, int code) {
  return running.context->sticky = code;
}

// NVIDIA, CUDA C++ Programming Guide 13.0, technical specifications per compute capability. An unlisted one gets those
// of the next older.
DeviceLimits limits() {
  struct {
    int capability;
    DeviceLimits limits;
  } const table[] = {
      {120, {99 << 10, 100 << 10, 24, 1536}}, {100, {227 << 10, 228 << 10, 32, 2048}},
      {90, {227 << 10, 228 << 10, 32, 2048}}, {89, {99 << 10, 100 << 10, 24, 1536}},
      {87, {163 << 10, 164 << 10, 16, 1536}}, {86, {99 << 10, 100 << 10, 16, 1536}},
      {80, {163 << 10, 164 << 10, 32, 2048}},
  };
  for (const auto& row : table) {
    if (options().capability >= row.capability) return row.limits;
  }
  return {64 << 10, 64 << 10, 16, 1024};
}

}  // namespace standin

using namespace standin;

// ---- the driver and its cards -----------------------------------------------------------------------------

API cuInit(unsigned) {
  ENTER;
  if (options().init_code) return options().init_code;
  if (options().cards == 0) return kNoDevice;
  m.initialized = true;
  return 0;
}
API cuDriverGetVersion(int* version) {
  *version = options().driver;
  return 0;
}
API cuDeviceGetCount(int* count) {
  ENTER_INITIALIZED;
  *count = options().cards;
  return 0;
}
API cuDeviceGet(int* device, int ordinal) {
  ENTER_CARD(ordinal);
  *device = ordinal;
  return 0;
}
API cuDeviceGetName(char* name, int bytes, int device) {
  ENTER_CARD(device);
  snprintf(name, static_cast<size_t>(bytes), "%s", options().name.c_str());
  return 0;
}
API cuDeviceGetUuid_v2(uint8_t* uuid, int device) {
  ENTER_CARD(device);
  memset(uuid, 0, 16);
  uuid[15] = static_cast<uint8_t>(options().bus + device);
  return 0;
}
API cuDeviceGetPCIBusId(char* text, int bytes, int device) {
  ENTER_CARD(device);
  snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", options().bus + device);
  return 0;
}
API cuDeviceTotalMem_v2(size_t* bytes, int device) {
  ENTER_CARD(device);
  *bytes = options().memory;
  return 0;
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER_CARD(device);
  const Options& o = options();
  DeviceLimits l = limits();
  switch (attribute) {
    case 1:
    case 2:
    case 3: *value = 1024; break;        // threads of a block; its x and y
    case 4: *value = 64; break;          // its z
    case 5: *value = 0x7fffffff; break;  // a grid's x
    case 6:
    case 7: *value = 65535; break;     // its y and z
    case 8: *value = 48 << 10; break;  // shared memory of a block
    case 9: *value = 64 << 10; break;  // constant memory
    case 10: *value = 32; break;       // lanes of a warp
    case 12:
    case 82: *value = 65536; break;    // registers of a block, of a multiprocessor
    case 13: *value = 1000000; break;  // clock, kHz
    case 16: *value = o.multiprocessors; break;
    case 31: *value = 1; break;          // concurrent kernels
    case 36: *value = 1000000; break;    // memory clock, kHz
    case 37: *value = 4096; break;       // memory bus, bits
    case 38: *value = 64 << 10; break;   // L2: cleared before each timing, so it is small here
    case 39: *value = l.threads; break;  // threads of a multiprocessor
    case 40: *value = 2; break;          // copy engines
    case 41: *value = 1; break;          // unified addresses
    case 75: *value = o.capability / 10; break;
    case 76: *value = o.capability % 10; break;
    case 78: *value = 1; break;  // stream priorities
    case 81: *value = l.shared_multiprocessor; break;
    case 97: *value = l.shared_optin; break;
    case 106: *value = l.blocks; break;  // blocks of a multiprocessor
    case 111: *value = 1 << 10; break;   // shared memory the system keeps of each block
    default:
      if (attribute < 1 || attribute > 160) return kInvalidValue;
      *value = 0;
  }
  return 0;
}

// ---- contexts ---------------------------------------------------------------------------------------------

API cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER_CARD(device);
  Card& c = card(device);
  if (c.context && c.context->sticky) return c.context->sticky;
  if (!c.context && !begin_context(c)) return kOutOfMemory;
  ++c.references;
  *context = &c;
  return 0;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER_CARD(device);
  Card& c = card(device);
  if (c.references == 0) return kInvalidContext;
  if (--c.references == 0 && c.context) end_context(c);
  return 0;
}
// All references to the context are released, and it begins anew when it is retained next.
API cuDevicePrimaryCtxReset_v2(int device) {
  ENTER_CARD(device);
  if (card(device).context) end_context(card(device));
  return 0;
}
API cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  ENTER_CARD(device);
  *flags = 0;
  *active = card(device).context != nullptr;
  return 0;
}
API cuCtxSetCurrent(void* context) {
  ENTER_INITIALIZED;
  ContextStack& stack = context_stack();
  if (!context) {
    stack.depth -= stack.depth > 0;
    return 0;
  }
  Card* c = card_of(context);
  if (!c || !c->context) return kInvalidContext;
  stack.depth += stack.depth == 0;
  stack.cards[stack.depth - 1] = c;
  return 0;
}
API cuCtxGetCurrent(void** context) {
  ENTER_INITIALIZED;
  ContextStack& stack = context_stack();
  *context = stack.depth ? stack.cards[stack.depth - 1] : nullptr;
  return 0;
}
API cuCtxPushCurrent_v2(void* context) {
  ENTER_INITIALIZED;
  ContextStack& stack = context_stack();
  Card* c = card_of(context);
  if (!c || !c->context) return kInvalidContext;
  if (stack.depth == ContextStack::kMost) return kInvalidValue;
  stack.cards[stack.depth++] = c;
  return 0;
}
API cuCtxPopCurrent_v2(void** context) {
  ENTER_INITIALIZED;
  ContextStack& stack = context_stack();
  if (stack.depth == 0) return kInvalidContext;
  --stack.depth;
  if (context) *context = stack.cards[stack.depth];
  return 0;
}
API cuCtxGetDevice(int* device) {
  ENTER_CONTEXT;
  *device = context->card;
  return 0;
}
API cuCtxSynchronize() {
  ENTER_CONTEXT;
  if (int code = m.refuse_context(context)) return code;
  StreamClock all = context->ended;
  for (Stream* s : m.streams) {
    if (s && s->context == context) all.join(s->clock);
  }
  wait_for(all);
  m.host.join(all);
  return context->sticky;
}
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER_CONTEXT;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
API cuCtxSetLimit(int, size_t) {
  ENTER_CONTEXT;
  return 0;
}
API cuProfilerStart() {
  ENTER_CONTEXT;
  return 0;
}
API cuProfilerStop() {
  ENTER_CONTEXT;
  return 0;
}

// ---- the stand-in's own functions -------------------------------------------------------------------------

// Sets options while the program runs, after all submitted work; the text is that of VITRUM_STANDIN. kInvalidValue if it
// cannot be parsed.
API standin_configure(const char* text) {
  ENTER;
  std::string wrong;
  Checks before = options().checks;
  uint32_t order = options().defer;
  finish_all(nullptr);
  bool good = configure(text, &wrong);
  if (options().defer != order) m.random = options().defer;
  // Without checks, writes were not recorded.
  if (before == Checks::off && options().checks != Checks::off) trust_all();
  if (good) return 0;
  fprintf(stderr, "stand-in GPU: cannot read `%s`\n", wrong.c_str());
  return kInvalidValue;
}
// Repairs contexts after an error and restarts all fault counts; options are read from the environment again.
API standin_reset() {
  ENTER;
  finish_all(nullptr);
  if (options().checks == Checks::off) trust_all();
  reset_options();
  m.random = options().defer;
  m.eager = false;
  for (Stream* s : m.streams) {
    if (s) s->context->sticky = 0;
  }
  m.allocations = m.pinned_allocations = m.launches = 0;
  return 0;
}
// Marks these bytes as uninitialised: reading them before they are written is an error.
API standin_discard(uint64_t address, size_t bytes) {
  ENTER;
  if (!device.allocated(address, bytes)) return kInvalidValue;
  device.mark_unwritten(address, bytes);
  memset(reinterpret_cast<void*>(address), 0xff, bytes);
  return 0;
}
// The number of kernels; writes the name of the n-th to `name`.
API standin_kernel(int which, const char** name) {
  std::vector<const Kernel*> all = all_kernels();
  if (name && which >= 0 && which < static_cast<int>(all.size()))
    *name = all[static_cast<size_t>(which)]->bound.name;
  return static_cast<int>(all.size());
}