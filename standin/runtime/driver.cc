// The CUDA driver API, as much of it as a program like Vitrum uses: libcuda.so's own names and error codes.
//
// Work runs at the moment it is issued, unless its stream is being captured; then its bytes are kept and it
// runs at each launch of the graph. Names, types and codes follow NVIDIA's CUDA Driver API reference
// (CUDA 13.0).
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>

#include "block.h"
#include "launch.h"
#include "memory.h"

namespace standin {

Machine& machine() {
  static Machine* m = new Machine;
  return *m;
}

Stream* Machine::new_stream(bool blocking) {
  for (uint32_t slot = 1; slot < kStreams; ++slot) {
    if (streams[slot]) continue;
    auto* stream = new Stream;
    stream->slot = slot;
    stream->blocking = blocking;
    stream->clock = host;
    stream->clock.time[slot] = slot_time[slot];
    return streams[slot] = stream;
  }
  return nullptr;
}

void Machine::drop_stream(Stream* stream) {
  slot_time[stream->slot] = stream->clock.time[stream->slot];
  // Destroying a stream lets its work finish; nobody can wait for it any more.
  host.join(stream->clock);
  streams[stream->slot] = nullptr;
  delete stream;
}

bool Machine::capturing_globally() const {
  for (Stream* s : streams) {
    if (s && s->capture && s->capture->mode != 2) return true;
  }
  return false;
}

int Machine::break_captures(int code) {
  for (Stream* s : streams) {
    if (s && s->capture && s->capture->mode != 2) s->capture->broken = code;
  }
  return code;
}

Stream* stream_for(void* handle) {
  // Handles 1 and 2 are the legacy and the per-thread default stream.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return &machine().legacy;
  return static_cast<Stream*>(handle);
}

int fail_sticky(int code) {
  return machine().sticky = code;
}

Graph::~Graph() {
  for (Stream* lane : lanes) machine().drop_stream(lane);
}

namespace {

struct Function {
  const Kernel* kernel;
  uint32_t shared_limit = 48 << 10;
};

struct Module {
  std::map<std::string, std::unique_ptr<Function>> functions;
};

struct DeviceLimits {
  int shared_optin, shared_multiprocessor, blocks, threads;
};

DeviceLimits limits() {
  int sm = options().capability;
  if (sm >= 90) return {227 << 10, 228 << 10, 32, 2048};
  if (sm == 80) return {163 << 10, 164 << 10, 32, 2048};
  if (sm >= 86) return {99 << 10, 100 << 10, 16, 1536};
  return {64 << 10, 64 << 10, 16, 1024};
}

int context_token;  // its address is the one context

// Calls that would make a capture wait or allocate are refused while one is under way.
int refuse_in_capture() {
  Machine& m = machine();
  return m.capturing_globally() ? m.break_captures(kCaptureUnsupported) : 0;
}

}  // namespace

std::string counters_json(const Launch& launch);

namespace {

// Writes down an operation: its stream, and how many operations of each stream it comes after (of its own stream:
// itself included). Two operations of which neither comes after the other may run at once.
void note_order(const Running& running, const char* what, uint64_t bytes) {
  const std::string& path = options().order;
  if (path.empty()) return;
  FILE* file = fopen(path.c_str(), "a");
  if (!file) return;
  fprintf(file, "{\"what\":\"%s\",\"bytes\":%llu,\"stream\":%u,\"after\":{", what,
          static_cast<unsigned long long>(bytes), stream_of(running.tag));
  const char* comma = "";
  for (uint32_t s = 0; s < kStreams; ++s) {
    if (!running.ordered[s]) continue;
    fprintf(file, "%s\"%u\":%llu", comma, s, static_cast<unsigned long long>(running.ordered[s]));
    comma = ",";
  }
  fprintf(file, "}}\n");
  fclose(file);
}

// Everything of a launch but its stream, bytes included, so that a graph can run it again.
struct KernelCall {
  const Kernel* kernel;
  Dim3 grid, block;
  uint32_t shared_bytes;
  std::vector<uint8_t> bytes;
  std::vector<size_t> offsets;

  int run(const Running& running) {
    Machine& m = machine();
    const Options& o = options();
    ++m.launches;
    note_order(running, kernel->bound.name, 0);
    if (o.fail_launch && m.launches == o.fail_launch) {
      publish({o.fail_code, format("kernel `%s` (launch %llu) fails on demand", kernel->bound.name,
                                   static_cast<unsigned long long>(m.launches))});
      return fail_sticky(o.fail_code);
    }
    // Tensor maps want 64-byte aligned arguments.
    alignas(64) uint8_t copy[4096 + 64];
    memcpy(copy, bytes.data(), bytes.size());
    void* pointers[256];
    for (size_t i = 0; i < offsets.size(); ++i) pointers[i] = copy + offsets[i];
    Launch launch;
    launch.kernel = kernel;
    launch.grid = grid;
    launch.block = block;
    launch.shared_bytes = shared_bytes;
    launch.arguments = pointers;
    launch.tag = running.tag;
    launch.ordered = running.ordered;
    launch.number = m.launches;
    launch.options = &o;
    Report report = run_launch(launch);
    if (!o.counters.empty()) {
      if (FILE* file = fopen(o.counters.c_str(), "a")) {
        fprintf(file, "%s\n", counters_json(launch).c_str());
        fclose(file);
      }
    }
    if (report.code == 0) return 0;
    publish(report);
    return fail_sticky(report.code);
  }
};

int bad_launch(const char* name, int code, const std::string& why) {
  publish({code, format("kernel `%s`: %s", name, why.c_str())});
  return code;
}

int launch_kernel(Function* f, Dim3 grid, Dim3 block, uint32_t shared_bytes, void* stream,
                  void** parameters) {
  const Bound& bound = f->kernel->bound;
  uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads)
    return bad_launch(bound.name, kInvalidValue, "an empty grid or block");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return bad_launch(bound.name, kInvalidValue,
                      format("a grid of %u,%u,%u (y and z at most 65535)", grid.x, grid.y, grid.z));
  }
  if (threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return bad_launch(bound.name, kInvalidValue,
                      format("a block of %u,%u,%u (1024 threads at most)", block.x, block.y, block.z));
  }
  if (threads > bound.max_threads) {
    return bad_launch(bound.name, kOutOfResources,
                      format("%llu threads, but its launch bound is %u",
                             static_cast<unsigned long long>(threads), bound.max_threads));
  }
  if (shared_bytes > f->shared_limit) {
    return bad_launch(
        bound.name, kInvalidValue,
        format("%u bytes of shared memory, but %u are allowed (cuFuncSetAttribute raises it to %d at most)",
               shared_bytes, f->shared_limit, limits().shared_optin));
  }
  auto call = std::make_shared<KernelCall>();
  call->kernel = f->kernel;
  call->grid = grid;
  call->block = block;
  call->shared_bytes = shared_bytes;
  for (uint32_t i = 0; i < f->kernel->argument_count; ++i) {
    const Argument& a = f->kernel->arguments[i];
    size_t at = (call->bytes.size() + a.align - 1) / a.align * a.align;
    call->bytes.resize(at + a.size);
    if (call->bytes.size() > 4096 || i == 256)
      return bad_launch(bound.name, kInvalidValue, "arguments beyond 4096 bytes");
    if (!parameters || !parameters[i]) {
      return bad_launch(bound.name, kInvalidValue,
                        format("argument %u of %u is missing", i, f->kernel->argument_count));
    }
    memcpy(call->bytes.data() + at, parameters[i], a.size);
    call->offsets.push_back(at);
  }
  return submit(stream_for(stream), [call](const Running& running) { return call->run(running); });
}

int copy(void* stream, uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes,
         const char* what) {
  if (bytes == 0) return 0;
  return submit(stream_for(stream), [=](const Running& running) {
    note_order(running, what, bytes);
    if (from_device) {
      if (int code = touch(running, from, bytes, Access::copy, what)) return fail_sticky(code);
    }
    if (to_device) {
      if (int code = touch(running, to, bytes, Access::write, what)) return fail_sticky(code);
    }
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return 0;
  });
}

template <class T>
int fill(void* stream, uint64_t at, T value, size_t count, const char* what) {
  if (at % sizeof(T)) return kInvalidValue;
  return submit(stream_for(stream), [=](const Running& running) {
    if (int code = touch(running, at, count * sizeof(T), Access::write, what)) return fail_sticky(code);
    std::fill_n(reinterpret_cast<T*>(at), count, value);
    return 0;
  });
}

double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

int synchronize(Stream* stream) {
  if (stream->capture) {
    stream->capture->broken = kCaptureUnsupported;
    return kCaptureUnsupported;
  }
  if (int code = refuse_in_capture()) return code;
  machine().host.join(stream->clock);
  return 0;
}

struct ErrorText {
  int code;
  const char *name, *text;
};
const ErrorText kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

}  // namespace
}  // namespace standin

using namespace standin;

// Every function: takes the lock, refuses before cuInit, and repeats the error that broke the context.
#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER                                          \
  Machine& m = machine();                              \
  std::lock_guard<std::recursive_mutex> guard(m.lock); \
  (void)m
#define ENTER_CONTEXT                         \
  ENTER;                                      \
  if (!m.initialized) return kNotInitialized; \
  if (m.sticky) return m.sticky

// ---- the driver and its cards -----------------------------------------------------------------------------

API cuInit(unsigned) {
  ENTER;
  if (options().cards == 0) return kNoDevice;
  m.initialized = true;
  return 0;
}
API cuDriverGetVersion(int* version) {
  *version = options().driver;
  return 0;
}
API cuDeviceGetCount(int* count) {
  ENTER;
  if (!m.initialized) return kNotInitialized;
  *count = options().cards;
  return 0;
}
API cuDeviceGet(int* device, int ordinal) {
  ENTER;
  if (!m.initialized) return kNotInitialized;
  if (ordinal < 0 || ordinal >= options().cards) return kInvalidDevice;
  *device = ordinal;
  return 0;
}
API cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, static_cast<size_t>(bytes), "%s", options().name.c_str());
  return 0;
}
API cuDeviceGetUuid_v2(uint8_t* uuid, int device) {
  memset(uuid, 0, 16);
  uuid[15] = static_cast<uint8_t>(device);
  return 0;
}
API cuDeviceGetPCIBusId(char* text, int bytes, int device) {
  snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", device);
  return 0;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = options().memory;
  return 0;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
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

API cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER_CONTEXT;
  *context = &context_token;
  return 0;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  return 0;
}
API cuDevicePrimaryCtxReset_v2(int) {
  ENTER;
  m.sticky = 0;
  return 0;
}
API cuCtxSetCurrent(void*) {
  ENTER;
  return m.initialized ? 0 : kNotInitialized;
}
API cuCtxGetCurrent(void** context) {
  ENTER;
  *context = m.initialized ? &context_token : nullptr;
  return 0;
}
API cuCtxPushCurrent_v2(void*) {
  return 0;
}
API cuCtxPopCurrent_v2(void** context) {
  if (context) *context = &context_token;
  return 0;
}
API cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
API cuCtxSynchronize() {
  ENTER_CONTEXT;
  if (int code = refuse_in_capture()) return code;
  m.host.join(m.legacy.clock);
  for (Stream* s : m.streams) {
    if (s) m.host.join(s->clock);
  }
  return 0;
}
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
API cuCtxSetLimit(int, size_t) {
  return 0;
}
API cuProfilerStart() {
  return 0;
}
API cuProfilerStop() {
  return 0;
}

// ---- memory -----------------------------------------------------------------------------------------------

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER_CONTEXT;
  memory_info(free_bytes, total);
  return 0;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  ENTER_CONTEXT;
  if (bytes == 0) return kInvalidValue;
  if (int code = refuse_in_capture()) return code;
  if (++m.allocations == options().fail_allocation) return kOutOfMemory;
  *address = allocate(bytes);
  return *address ? 0 : kOutOfMemory;
}
API cuMemFree_v2(uint64_t address) {
  ENTER_CONTEXT;
  if (address == 0) return 0;
  if (int code = refuse_in_capture()) return code;
  return release(address) ? 0 : kInvalidValue;
}
API cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
  ENTER_CONTEXT;
  if (stream_for(stream)->capture) return kCaptureUnsupported;
  if (++m.allocations == options().fail_allocation) return kOutOfMemory;
  *address = allocate(bytes);
  return *address ? 0 : kOutOfMemory;
}
API cuMemFreeAsync(uint64_t address, void*) {
  ENTER_CONTEXT;
  return release(address) ? 0 : kInvalidValue;
}
API cuMemGetAddressRange_v2(uint64_t*, size_t*, uint64_t) {
  return kNotSupported;
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER_CONTEXT;
  if (int code = refuse_in_capture()) return code;
  if (++m.pinned_allocations == options().fail_pinned) return kOutOfMemory;
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*pointer) return kOutOfMemory;
  memset(*pointer, 0xa5, bytes);
  m.pinned[*pointer] = bytes;
  return 0;
}
API cuMemAllocHost_v2(void** pointer, size_t bytes) {
  return cuMemHostAlloc(pointer, bytes, 0);
}
API cuMemFreeHost(void* pointer) {
  ENTER;
  if (!m.pinned.erase(pointer)) return kInvalidValue;
  free(pointer);
  return m.sticky;
}
API cuMemHostRegister_v2(void*, size_t, unsigned) {
  ENTER_CONTEXT;
  return 0;
}
API cuMemHostUnregister(void*) {
  ENTER_CONTEXT;
  return 0;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  ENTER_CONTEXT;
  return copy(stream, to, true, reinterpret_cast<uint64_t>(from), false, bytes, "a copy to the card");
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  ENTER_CONTEXT;
  return copy(stream, reinterpret_cast<uint64_t>(to), false, from, true, bytes, "a copy from the card");
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_CONTEXT;
  return copy(stream, to, true, from, true, bytes, "a copy on the card");
}
API cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_CONTEXT;
  return copy(stream, to, device.contains(to), from, device.contains(from), bytes, "a copy");
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  int code = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
  ENTER;
  return code ? code : synchronize(&m.legacy);
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  int code = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
  ENTER;
  return code ? code : synchronize(&m.legacy);
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}
API cuMemsetD8Async(uint64_t at, uint8_t value, size_t count, void* stream) {
  ENTER_CONTEXT;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD16Async(uint64_t at, uint16_t value, size_t count, void* stream) {
  ENTER_CONTEXT;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD32Async(uint64_t at, uint32_t value, size_t count, void* stream) {
  ENTER_CONTEXT;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD8_v2(uint64_t at, uint8_t value, size_t count) {
  return cuMemsetD8Async(at, value, count, nullptr);
}
API cuMemsetD16_v2(uint64_t at, uint16_t value, size_t count) {
  return cuMemsetD16Async(at, value, count, nullptr);
}
API cuMemsetD32_v2(uint64_t at, uint32_t value, size_t count) {
  return cuMemsetD32Async(at, value, count, nullptr);
}

// ---- streams and events -----------------------------------------------------------------------------------

API cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  ENTER_CONTEXT;
  Stream* made = m.new_stream(!(flags & 1));
  if (!made) return kOutOfMemory;
  *stream = made;
  return 0;
}
API cuStreamCreate(void** stream, unsigned flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}
API cuStreamDestroy_v2(void* stream) {
  ENTER;
  Stream* s = stream_for(stream);
  if (s == &m.legacy) return kInvalidHandle;
  m.drop_stream(s);
  return m.sticky;
}
API cuStreamSynchronize(void* stream) {
  ENTER_CONTEXT;
  return synchronize(stream_for(stream));
}
API cuStreamQuery(void* stream) {
  ENTER_CONTEXT;
  return synchronize(stream_for(stream));
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  auto* e = static_cast<Event*>(event);
  std::shared_ptr<Capture> from = e->capture.lock();
  if (!from) {
    if (s->capture) {
      // A wait for work outside the graph would not be in it.
      s->capture->broken = kCaptureUnsupported;
      return e->recorded ? 905 : 0;
    }
    if (e->recorded) s->clock.join(e->clock);
    return 0;
  }
  if (!s->capture) {
    s->capture = from;
    s->lane = from->lanes++;
    from->members.push_back(s);
    from->last.push_back(0);
    from->seen.emplace_back(from->lanes, 0);
  } else if (s->capture != from) {
    return 902;
  }
  from->nodes.push_back({Node::wait, s->lane, nullptr, e->number, nullptr});
  auto& seen = from->seen[s->lane];
  const auto& other = from->event_seen[e->number];
  if (seen.size() < from->lanes) seen.resize(from->lanes);
  for (size_t l = 0; l < other.size(); ++l) seen[l] = std::max(seen[l], other[l]);
  return 0;
}
API cuEventCreate(void** event, unsigned flags) {
  ENTER_CONTEXT;
  auto* e = new Event;
  e->timed = !(flags & 2);
  *event = e;
  return 0;
}
API cuEventDestroy_v2(void* event) {
  ENTER;
  delete static_cast<Event*>(event);
  return m.sticky;
}
API cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  auto* e = static_cast<Event*>(event);
  if (Capture* c = s->capture.get()) {
    if (flags & 1) {
      c->nodes.push_back({Node::outside, s->lane, nullptr, 0, e});
      return 0;
    }
    e->capture = s->capture;
    e->number = c->events++;
    auto seen = c->seen[s->lane];
    seen.resize(c->lanes);
    seen[s->lane] = c->last[s->lane];
    c->event_seen.push_back(seen);
    c->nodes.push_back({Node::record, s->lane, nullptr, e->number, nullptr});
    return 0;
  }
  e->capture.reset();
  s->clock.join(m.host);
  e->clock = s->clock;
  e->recorded = true;
  e->seconds = seconds_now();
  return 0;
}
API cuEventRecord(void* event, void* stream) {
  return cuEventRecordWithFlags(event, stream, 0);
}
API cuEventSynchronize(void* event) {
  ENTER_CONTEXT;
  auto* e = static_cast<Event*>(event);
  if (std::shared_ptr<Capture> c = e->capture.lock()) {
    c->broken = kCapturedEvent;
    return kCapturedEvent;
  }
  if (int code = refuse_in_capture()) return code;
  if (e->recorded) m.host.join(e->clock);
  return 0;
}
API cuEventQuery(void* event) {
  ENTER_CONTEXT;
  auto* e = static_cast<Event*>(event);
  if (!e->capture.expired()) return kCapturedEvent;
  if (e->recorded) m.host.join(e->clock);
  return 0;
}
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  ENTER_CONTEXT;
  auto *a = static_cast<Event*>(start), *b = static_cast<Event*>(end);
  if (!a->recorded || !b->recorded || !a->timed || !b->timed) return kInvalidHandle;
  *milliseconds = static_cast<float>(1e3 * (b->seconds - a->seconds));
  return 0;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- modules, functions, launches -------------------------------------------------------------------------

API cuModuleLoadData(void** module, const void*) {
  ENTER_CONTEXT;
  *module = new Module;
  return 0;
}
API cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  return cuModuleLoadData(module, image);
}
API cuModuleLoadFatBinary(void** module, const void* image) {
  return cuModuleLoadData(module, image);
}
API cuModuleLoad(void** module, const char*) {
  return cuModuleLoadData(module, nullptr);
}
API cuModuleUnload(void* module) {
  ENTER;
  delete static_cast<Module*>(module);
  return m.sticky;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER_CONTEXT;
  const Kernel* kernel = find_kernel(name);
  if (!kernel) return kNotFound;
  auto& place = static_cast<Module*>(module)->functions[name];
  if (!place) place.reset(new Function{kernel});
  *function = place.get();
  return 0;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
  ENTER_CONTEXT;
  if (attribute == 8) {
    if (value < 0 || value > limits().shared_optin) return kInvalidValue;
    static_cast<Function*>(function)->shared_limit = static_cast<uint32_t>(value);
  }
  return 0;
}
API cuFuncGetAttribute(int* value, int attribute, void* function) {
  ENTER_CONTEXT;
  auto* f = static_cast<Function*>(function);
  switch (attribute) {
    case 0: *value = static_cast<int>(f->kernel->bound.max_threads); break;
    case 6: *value = options().capability; break;
    case 8: *value = static_cast<int>(f->shared_limit); break;
    default: *value = 0;
  }
  return 0;
}
API cuFuncSetCacheConfig(void*, int) {
  return 0;
}
API cuFuncGetName(const char** name, void* function) {
  *name = static_cast<Function*>(function)->kernel->bound.name;
  return 0;
}
// The place and the size of a kernel's argument; kInvalidValue past the last one.
API cuFuncGetParamInfo(void* function, size_t which, size_t* offset, size_t* size) {
  const Kernel& k = *static_cast<Function*>(function)->kernel;
  if (which >= k.argument_count) return kInvalidValue;
  size_t at = 0;
  for (size_t i = 0;; ++i) {
    at = (at + k.arguments[i].align - 1) / k.arguments[i].align * k.arguments[i].align;
    if (i == which) break;
    at += k.arguments[i].size;
  }
  *offset = at;
  if (size) *size = k.arguments[which].size;
  return 0;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int block, size_t shared_bytes) {
  ENTER_CONTEXT;
  if (block <= 0 || !function) return kInvalidValue;
  DeviceLimits l = limits();
  int by_threads = l.threads / ((block + 31) / 32 * 32);
  int by_shared = l.shared_multiprocessor / static_cast<int>(shared_bytes + 1024);
  *blocks = std::min({by_threads, by_shared, l.blocks});
  return 0;
}
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  ENTER_CONTEXT;
  if (!function) return kInvalidHandle;
  if (extra) return kNotSupported;
  return launch_kernel(static_cast<Function*>(function), {gx, gy, gz}, {bx, by, bz}, shared_bytes, stream,
                       parameters);
}
API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  ENTER_CONTEXT;
  return submit(stream_for(stream), [=](const Running&) {
    function(data);
    return 0;
  });
}

// ---- graphs -----------------------------------------------------------------------------------------------

API cuStreamBeginCapture_v2(void* stream, int mode) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  if (s == &m.legacy || s->capture) return kCaptureUnsupported;
  s->capture = std::make_shared<Capture>();
  s->capture->origin = s;
  s->capture->mode = mode;
  s->capture->members.push_back(s);
  s->capture->last.push_back(0);
  s->capture->seen.emplace_back(1, 0);
  s->lane = 0;
  return 0;
}
API cuStreamIsCapturing(void* stream, int* status) {
  ENTER_CONTEXT;
  Capture* c = stream_for(stream)->capture.get();
  *status = !c ? 0 : c->broken ? 2 : 1;
  return 0;
}
API cuStreamEndCapture(void* stream, void** graph) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  std::shared_ptr<Capture> c = s->capture;
  *graph = nullptr;
  if (!c) return kInvalidValue;
  if (c->origin != s) return kCaptureUnmatched;
  for (Stream* member : c->members) member->capture.reset();
  if (c->broken) return kCaptureInvalidated;
  for (uint32_t l = 1; l < c->lanes; ++l) {
    if (c->last[l] > (l < c->seen[0].size() ? c->seen[0][l] : 0)) return kCaptureUnjoined;
  }
  auto* made = new Graph;
  made->lane_count = c->lanes;
  made->events = c->events;
  made->nodes = std::make_shared<const std::vector<Node>>(std::move(c->nodes));
  *graph = made;
  return 0;
}
API cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
  ENTER_CONTEXT;
  auto& all = *static_cast<Graph*>(graph)->nodes;
  size_t work = static_cast<size_t>(
      std::count_if(all.begin(), all.end(), [](const Node& n) { return n.kind == Node::work; }));
  for (size_t i = 0; nodes && i < *count && i < work; ++i) nodes[i] = nullptr;
  *count = work;
  return 0;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  ENTER_CONTEXT;
  auto* g = static_cast<Graph*>(graph);
  auto made = std::make_unique<Graph>();
  made->nodes = g->nodes;
  made->lane_count = g->lane_count;
  made->events = g->events;
  for (uint32_t l = 1; l < g->lane_count; ++l) {
    Stream* lane = m.new_stream(false);
    if (!lane) return kOutOfMemory;
    made->lanes.push_back(lane);
  }
  *executable = made.release();
  return 0;
}
API cuGraphInstantiate_v2(void** executable, void* graph, void*, char*, size_t) {
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}
API cuGraphUpload(void*, void*) {
  ENTER_CONTEXT;
  return 0;
}
API cuGraphLaunch(void* executable, void* stream) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  if (s->capture) return kNotSupported;
  return replay(*static_cast<Graph*>(executable), *s);
}
API cuGraphDestroy(void* graph) {
  ENTER;
  delete static_cast<Graph*>(graph);
  return m.sticky;
}
API cuGraphExecDestroy(void* executable) {
  ENTER;
  delete static_cast<Graph*>(executable);
  return m.sticky;
}

// ---- errors -----------------------------------------------------------------------------------------------

API cuGetErrorName(int code, const char** text) {
  for (const ErrorText& e : kErrors) {
    if (e.code == code) return *text = e.name, 0;
  }
  *text = nullptr;
  return kInvalidValue;
}
API cuGetErrorString(int code, const char** text) {
  for (const ErrorText& e : kErrors) {
    if (e.code == code) return *text = e.text, 0;
  }
  *text = nullptr;
  return kInvalidValue;
}

// ---- the stand-in's own functions -------------------------------------------------------------------------

// Sets options while the program runs; the text is that of VITRUM_STANDIN. kInvalidValue if it cannot be
// read.
API standin_configure(const char* text) {
  ENTER;
  std::string wrong;
  Checks before = options().checks;
  bool good = configure(text, &wrong);
  // While nobody looked, nobody noted what was written.
  if (before == Checks::off && options().checks != Checks::off) trust_all();
  if (good) return 0;
  fprintf(stderr, "stand-in GPU: cannot read `%s`\n", wrong.c_str());
  return kInvalidValue;
}
// Mends the context after an error and starts all counts of faults again; options go back to the
// environment's.
API standin_reset() {
  ENTER;
  if (options().checks == Checks::off) trust_all();
  reset_options();
  m.sticky = 0;
  m.allocations = m.pinned_allocations = m.launches = 0;
  return 0;
}
// The contents of these bytes are nobody's any more: reading them before they are written is an error.
API standin_discard(uint64_t address, size_t bytes) {
  ENTER;
  if (!device.allocated(address, bytes)) return kInvalidValue;
  device.mark_unwritten(address, bytes);
  memset(reinterpret_cast<void*>(address), 0xff, bytes);
  return 0;
}
// The number of kernels; the name of the n-th in `name`.
API standin_kernel(int which, const char** name) {
  std::vector<const Kernel*> all = all_kernels();
  if (name && which >= 0 && which < static_cast<int>(all.size()))
    *name = all[static_cast<size_t>(which)]->bound.name;
  return static_cast<int>(all.size());
}
