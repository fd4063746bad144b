// The driver's memory: allocations on the card, page-locked memory, copies and fills.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "api.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {
namespace {

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

}  // namespace
}  // namespace standin

using namespace standin;

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
