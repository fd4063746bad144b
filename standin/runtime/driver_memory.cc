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

// One side of a copy.
struct Place {
  uint64_t at;
  bool on_device;
  bool staged = false;  // host memory that the copy owns

  bool pageable() const { return !on_device && !page_locked(at); }
};

int copy_now(const Running& running, Place to, Place from, size_t bytes, const char* what) {
  if (from.on_device) {
    if (int code = touch(running, from.at, bytes, Access::copy, what)) return fail_sticky(running, code);
  } else if (!from.staged) {
    refuse_freed(from.at);
  }
  if (to.on_device) {
    if (int code = touch(running, to.at, bytes, Access::write, what)) return fail_sticky(running, code);
  } else {
    refuse_freed(to.at);
  }
  memmove(reinterpret_cast<void*>(to.at), reinterpret_cast<const void*>(from.at), bytes);
  return 0;
}

// NVIDIA, CUDA Driver API 13.0, "API synchronization behavior". A copy from pageable memory takes the bytes before the
// call returns; a copy to pageable memory is done when it returns; page-locked memory is read and written when the copy
// runs.
int copy(void* stream, Place to, Place from, size_t bytes, const char* what) {
  Stream* s;
  if (int code = stream_of_copy(stream, &s)) return code;
  if (bytes == 0) return 0;
  for (const Place& place : {to, from}) {
    if (!place.on_device) refuse_freed(place.at);
  }
  bool from_pageable = from.pageable(), to_pageable = to.pageable();
  // A graph would keep an address that the program is about to reuse.
  if (s->capture && (from_pageable || to_pageable)) return s->capture->broken = kCaptureUnsupported;
  Task task;
  task.what = what;
  task.bytes = bytes;
  if (!from_pageable && !from.on_device) task.host = from.at, task.host_bytes = bytes;
  if (!to_pageable && !to.on_device) task.host = to.at, task.host_bytes = bytes, task.writes_host = true;
  std::shared_ptr<std::vector<uint8_t>> staged;
  if (from_pageable) {
    auto* first = reinterpret_cast<const uint8_t*>(from.at);
    staged = std::make_shared<std::vector<uint8_t>>(first, first + bytes);
    from = {reinterpret_cast<uint64_t>(staged->data()), false, true};
  }
  task.run = [=](const Running& running) {
    (void)staged;
    return copy_now(running, to, from, bytes, what);
  };
  if (int code = submit(s, std::move(task))) return code;
  return to_pageable ? synchronize(s) : 0;
}

// The same on the default stream, without `Async` in the call's name.
int copy_and_wait(Place to, Place from, size_t bytes, const char* what) {
  Machine& m = machine();
  Primary* context;
  if (int code = current_context(&context)) return code;
  if (int code = m.refuse_legacy(context)) return code;
  if (int code = m.refuse_unsafe()) return code;
  bool staged = to.on_device && from.pageable();
  if (staged) {
    if (int code = synchronize(context->legacy)) return code;
  }
  if (int code = copy(nullptr, to, from, bytes, what)) return code;
  bool returns_early = staged || (to.on_device && from.on_device);
  return returns_early ? 0 : synchronize(context->legacy);
}

Place on_host(const void* at) {
  return {reinterpret_cast<uint64_t>(at), false};
}
Place on_device(uint64_t at) {
  return {at, true};
}
Place anywhere(uint64_t at) {
  return {at, device.contains(at)};
}

template <class T>
int fill(void* stream, uint64_t at, T value, size_t count, const char* what) {
  Stream* s;
  if (int code = stream_of_copy(stream, &s)) return code;
  if (at % sizeof(T)) return kInvalidValue;
  Task task;
  task.run = [=](const Running& running) {
    if (int code = touch(running, at, count * sizeof(T), Access::write, what))
      return fail_sticky(running, code);
    std::fill_n(reinterpret_cast<T*>(at), count, value);
    return 0;
  };
  return submit(s, std::move(task));
}

}  // namespace
}  // namespace standin

using namespace standin;

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER_CONTEXT;
  memory_info(context->card, free_bytes, total);
  return 0;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  ENTER_CONTEXT;
  if (bytes == 0) return kInvalidValue;
  if (int code = m.refuse_unsafe()) return code;
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
  if (int code = m.refuse_unsafe()) return code;
  // The manual promises this for memory of cuMemAlloc alone. What the host knows does not grow by it.
  if (!memory.in_stream_order) finish_all(memory.context);
  if (int code = context->sticky) return code;
  return end(memory);
}
// Stream-ordered allocations belong to no context, and outlive them.
API cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
  ENTER_STREAM(stream);
  // A driver would make it a node of the graph, which is not to be had here.
  if (s->capture) return s->capture->broken = kCaptureUnsupported;
  if (++m.allocations == options().fail_allocation) return kOutOfMemory;
  *address = allocate(bytes, s->context->card);
  if (!*address) return kOutOfMemory;
  make_memory(Kind::device_memory, nullptr, *address, bytes)->in_stream_order = true;
  return 0;
}
API cuMemFreeAsync(uint64_t address, void* stream) {
  ENTER_STREAM(stream);
  if (s->capture) return s->capture->broken = kCaptureUnsupported;
  const Record& memory = live_memory(Kind::device_memory, address);
  mark_ended(const_cast<Record&>(memory));
  Task task;
  task.run = [&memory](const Running&) {
    give_back(memory);
    return 0;
  };
  return submit(s, std::move(task));
}
API cuMemGetAddressRange_v2(uint64_t*, size_t*, uint64_t) {
  return kNotSupported;
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER_CONTEXT;
  if (int code = m.refuse_unsafe()) return code;
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
// The manual promises no wait here.
API cuMemFreeHost(void* pointer) {
  ENTER_INITIALIZED;
  if (!pointer) return kInvalidValue;
  Record& memory = live_memory(Kind::host_memory, reinterpret_cast<uint64_t>(pointer));
  Primary* context;
  if (int code = current_context(&context)) return code;
  if (int code = m.refuse_unsafe()) return code;
  refuse_in_use(memory);
  return end(memory);
}
API cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
  ENTER_CONTEXT;
  if (!pointer || !bytes) return kInvalidValue;
  if (int code = m.refuse_unsafe()) return code;
  make_memory(Kind::registered_memory, context, reinterpret_cast<uint64_t>(pointer), bytes);
  return 0;
}
API cuMemHostUnregister(void* pointer) {
  ENTER_CONTEXT;
  Record& memory = live_memory(Kind::registered_memory, reinterpret_cast<uint64_t>(pointer));
  if (int code = m.refuse_unsafe()) return code;
  refuse_in_use(memory);
  return end(memory);
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, on_device(to), on_host(from), bytes, "a copy to the card");
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, on_host(to), on_device(from), bytes, "a copy from the card");
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, on_device(to), on_device(from), bytes, "a copy on the card");
}
API cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER_INITIALIZED;
  return copy(stream, anywhere(to), anywhere(from), bytes, "a copy");
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  ENTER_INITIALIZED;
  return copy_and_wait(on_device(to), on_host(from), bytes, "a copy to the card");
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  ENTER_INITIALIZED;
  return copy_and_wait(on_host(to), on_device(from), bytes, "a copy from the card");
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  ENTER_INITIALIZED;
  return copy_and_wait(on_device(to), on_device(from), bytes, "a copy on the card");
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
