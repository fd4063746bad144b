// The driver's memory: device allocations, page-locked memory, copies and fills.
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "api.h"
#include "memory.h"

namespace standin {
namespace {

// The stream of a copy or a fill. It may belong to another GPU, but some context must be current.
int stream_of_copy(void* handle, Stream** stream) {
  if (int code = find_stream(handle, stream)) return code;
  Primary* current;
  return current_context(&current);
}

int copy(void* stream, uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes,
         const char* what) {
  Stream* s;
  if (int code = stream_of_copy(stream, &s)) return code;
  if (bytes == 0) return 0;
  return submit(s, [=](const Running& running) {
    note_order(running, what, bytes);
    if (from_device) {
      if (int code = touch(running, from, bytes, Access::copy, what)) return fail_sticky(running, code);
    } else {
      refuse_freed(from);
    }
    if (to_device) {
      if (int code = touch(running, to, bytes, Access::write, what)) return fail_sticky(running, code);
    } else {
      refuse_freed(to);
    }
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return 0;
  });
}

template <class T>
int fill(void* stream, uint64_t at, T value, size_t count, const char* what) {
  Stream* s;
  if (int code = stream_of_copy(stream, &s)) return code;
  if (at % sizeof(T)) return kInvalidValue;
  return submit(s, [=](const Running& running) {
    if (int code = touch(running, at, count * sizeof(T), Access::write, what))
      return fail_sticky(running, code);
    std::fill_n(reinterpret_cast<T*>(at), count, value);
    return 0;
  });
}

}  // namespace
}  // namespace standin

using namespace standin;

API cuStreamSynchronize(void* stream);

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER_CONTEXT;
  memory_info(context->card, free_bytes, total);
  return 0;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  ENTER_CONTEXT;
  if (bytes == 0) return kInvalidValue;
  if (int code = refuse_in_capture()) return code;
  if (++m.allocations == options().fail_allocation) return kOutOfMemory;
  *address = allocate(bytes, context->card);
  if (!*address) return kOutOfMemory;
  make_memory(Kind::device_memory, context, *address, bytes);
  return 0;
}
API cuMemFree_v2(uint64_t address) {
  ENTER_INITIALIZED;
  if (address == 0) return 0;
  Record& memory = live_memory(Kind::device_memory, address);
  Primary* context;
  if (int code = current_context(&context)) return code;
  if (int code = refuse_in_capture()) return code;
  return end(memory);
}
// Stream-ordered allocations belong to no context, and outlive them.
API cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
  ENTER_STREAM(stream);
  if (s->capture) return kCaptureUnsupported;
  if (++m.allocations == options().fail_allocation) return kOutOfMemory;
  *address = allocate(bytes, s->context->card);
  if (!*address) return kOutOfMemory;
  make_memory(Kind::device_memory, nullptr, *address, bytes);
  return 0;
}
API cuMemFreeAsync(uint64_t address, void* stream) {
  ENTER_STREAM(stream);
  return end(live_memory(Kind::device_memory, address));
}
API cuMemGetAddressRange_v2(uint64_t*, size_t*, uint64_t) {
  return kNotSupported;
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER_CONTEXT;
  if (int code = refuse_in_capture()) return code;
  if (++m.pinned_allocations == options().fail_pinned) return kOutOfMemory;
  size_t whole = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
  void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return kOutOfMemory;
  memset(at, 0xa5, bytes);
  *pointer = at;
  make_memory(Kind::host_memory, context, reinterpret_cast<uint64_t>(at), whole);
  return 0;
}
API cuMemAllocHost_v2(void** pointer, size_t bytes) {
  ENTER;
  return cuMemHostAlloc(pointer, bytes, 0);
}
API cuMemFreeHost(void* pointer) {
  ENTER_INITIALIZED;
  if (!pointer) return kInvalidValue;
  Record& memory = live_memory(Kind::host_memory, reinterpret_cast<uint64_t>(pointer));
  Primary* context;
  if (int code = current_context(&context)) return code;
  return end(memory);
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
  ENTER_INITIALIZED;
  return copy(stream, to, true, reinterpret_cast<uint64_t>(from), false, bytes, "a copy to the card");
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, reinterpret_cast<uint64_t>(to), false, from, true, bytes, "a copy from the card");
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, to, true, from, true, bytes, "a copy on the card");
}
API cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, to, device.contains(to), from, device.contains(from), bytes, "a copy");
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  ENTER;
  int code = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
  return code ? code : cuStreamSynchronize(nullptr);
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  ENTER;
  int code = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
  return code ? code : cuStreamSynchronize(nullptr);
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  ENTER;
  return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}
API cuMemsetD8Async(uint64_t at, uint8_t value, size_t count, void* stream) {
  ENTER_INITIALIZED;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD16Async(uint64_t at, uint16_t value, size_t count, void* stream) {
  ENTER_INITIALIZED;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD32Async(uint64_t at, uint32_t value, size_t count, void* stream) {
  ENTER_INITIALIZED;
  return fill(stream, at, value, count, "a fill");
}
API cuMemsetD8_v2(uint64_t at, uint8_t value, size_t count) {
  ENTER;
  return cuMemsetD8Async(at, value, count, nullptr);
}
API cuMemsetD16_v2(uint64_t at, uint16_t value, size_t count) {
  ENTER;
  return cuMemsetD16Async(at, value, count, nullptr);
}
API cuMemsetD32_v2(uint64_t at, uint32_t value, size_t count) {
  ENTER;
  return cuMemsetD32Async(at, value, count, nullptr);
}
