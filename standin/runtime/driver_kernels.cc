// The driver's modules, functions and launches.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "api.h"
#include "block.h"
#include "launch.h"
#include "ptx/module.h"

namespace standin {

std::string counters_json(const Launch& launch);

namespace {

struct Function {
  const Kernel* kernel;
  std::shared_ptr<ptx::Module> ptx;  // of a module that was loaded under `engine=ptx`, with the kernel's program
  const ptx::Program* program = nullptr;
  uint32_t shared_limit = 48 << 10;
  int carveout = -1;
};

struct Module {
  std::shared_ptr<ptx::Module> ptx;
  std::map<std::string, Record*> functions;
};

// Everything of a launch except its stream, including its bytes, so that a graph can run it again.
struct KernelCall {
  const Record* function;
  const Kernel* kernel;
  std::shared_ptr<ptx::Module> ptx;
  const ptx::Program* program;
  Dim3 grid, block;
  uint32_t shared_bytes;
  std::vector<uint8_t> bytes;
  std::vector<size_t> offsets;

  int run(const Running& running) {
    live(Kind::function, function);  // its module may be gone
    const Options& o = options();
    if (o.fail_launch && running.launch == o.fail_launch) {
      publish({o.fail_code, format("kernel `%s` (launch %llu) fails on demand", kernel->bound.name,
                                   static_cast<unsigned long long>(running.launch))});
      return fail_sticky(running, o.fail_code);
    }
    // Tensor maps want 64-byte aligned arguments.
    alignas(64) uint8_t copy[4096 + 64];
    memcpy(copy, bytes.data(), bytes.size());
    void* pointers[256];
    for (size_t i = 0; i < offsets.size(); ++i) pointers[i] = copy + offsets[i];
    Launch launch;
    launch.kernel = kernel;
    launch.program = program;
    launch.grid = grid;
    launch.block = block;
    launch.shared_bytes = shared_bytes;
    launch.arguments = pointers;
    launch.tag = running.tag;
    launch.ordered = running.ordered;
    launch.number = running.launch;
    launch.options = &o;
    Slowed slowed(o.slow_kernels);
    Report report = run_launch(launch);
    if (!o.counters.empty()) {
      if (FILE* file = fopen(o.counters.c_str(), "a")) {
        fprintf(file, "%s\n", counters_json(launch).c_str());
        fclose(file);
      }
    }
    if (report.code == 0) return 0;
    publish(report);
    return fail_sticky(running, report.code);
  }
};

int bad_launch(const char* name, int code, const std::string& why) {
  publish({code, format("kernel `%s`: %s", name, why.c_str())});
  return code;
}

int launch_kernel(const Record& function, Dim3 grid, Dim3 block, uint32_t shared_bytes, Stream* stream,
                  void** parameters) {
  auto* f = &object_of<Function>(function);
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
  call->function = &function;
  call->kernel = f->kernel;
  call->ptx = f->ptx;
  call->program = f->program;
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
  for (size_t at = 0; at + 8 <= call->bytes.size(); at += 8) {
    uint64_t word;
    memcpy(&word, call->bytes.data() + at, 8);
    refuse_foreign(word, *function.context);
  }
  Task task;
  task.run = [call](const Running& running) { return call->run(running); };
  task.what = bound.name;
  task.kernel = &function;
  return submit(stream, std::move(task));
}

}  // namespace
}  // namespace standin

using namespace standin;

// Defines the record of a module or a function, which must belong to the current context.
#define ENTER_OF_CONTEXT(kind, handle)                   \
  ENTER_INITIALIZED;                                     \
  if (!(handle)) return kInvalidHandle;                  \
  Record& record = live(kind, handle);                   \
  Primary* context;                                      \
  if (int code = current_context(&context)) return code; \
  same_context(record, *context)

API cuModuleLoadData(void** module, const void* image) {
  ENTER_CONTEXT;
  if (int code = m.refuse_unsafe()) return code;
  auto made = std::make_shared<Module>();
  if (options().engine == Engine::ptx) {
    ptx::Error error;
    made->ptx = ptx::open_module(image, &error);
    if (!made->ptx) {
      publish({kInvalidPtx, error});
      return kInvalidPtx;
    }
  }
  *module = make_handle(Kind::module, context, made);
  return 0;
}
API cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  ENTER;
  return cuModuleLoadData(module, image);
}
API cuModuleLoadFatBinary(void** module, const void* image) {
  ENTER;
  return cuModuleLoadData(module, image);
}
API cuModuleLoad(void** module, const char*) {
  ENTER;
  return cuModuleLoadData(module, nullptr);
}
API cuModuleUnload(void* module) {
  ENTER_OF_CONTEXT(Kind::module, module);
  if (int code = m.refuse_unsafe()) return code;
  return end(record);
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER_OF_CONTEXT(Kind::module, module);
  Module& of = object_of<Module>(record);
  Function made{find_kernel(name), of.ptx};
  if (of.ptx) {
    ptx::Error error;
    made.program = ptx::find_program(*of.ptx, name, &error);
    if (!error.empty()) {
      publish({kInvalidPtx, format("kernel `%s`: %s", name, error.c_str())});
      return kInvalidPtx;
    }
    made.kernel = made.program ? &made.program->kernel : nullptr;
  }
  if (!made.kernel) return kNotFound;
  Record*& place = of.functions[name];
  if (!place) {
    // Lazy loading, the driver's default, loads a kernel when it is first asked for.
    if (int code = m.refuse_unsafe()) return code;
    place = make_handle(Kind::function, context, std::make_shared<Function>(made));
    place->module = &record;
  }
  *function = place;
  return 0;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
  ENTER_OF_CONTEXT(Kind::function, function);
  if (attribute == 8) {
    if (value < 0 || value > limits().shared_optin) return kInvalidValue;
    object_of<Function>(record).shared_limit = static_cast<uint32_t>(value);
  }
  // The preferred share of shared memory, in percent; -1 leaves it to the driver.
  if (attribute == 9) {
    if (value < -1 || value > 100) return kInvalidValue;
    object_of<Function>(record).carveout = value;
  }
  return 0;
}
API cuFuncGetAttribute(int* value, int attribute, void* function) {
  ENTER_OF_CONTEXT(Kind::function, function);
  const auto& f = object_of<Function>(record);
  switch (attribute) {
    case 0: *value = static_cast<int>(f.kernel->bound.max_threads); break;
    case 6: *value = options().capability; break;
    case 8: *value = static_cast<int>(f.shared_limit); break;
    case 9: *value = f.carveout; break;
    default: *value = 0;
  }
  return 0;
}
API cuFuncSetCacheConfig(void* function, int) {
  ENTER_OF_CONTEXT(Kind::function, function);
  return 0;
}
API cuFuncGetName(const char** name, void* function) {
  ENTER_INITIALIZED;
  *name = object_of<Function>(live(Kind::function, function)).kernel->bound.name;
  return 0;
}
// The offset and the size of a kernel's argument; kInvalidValue past the last one.
API cuFuncGetParamInfo(void* function, size_t which, size_t* offset, size_t* size) {
  ENTER_INITIALIZED;
  const Kernel& k = *object_of<Function>(live(Kind::function, function)).kernel;
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
  ENTER_OF_CONTEXT(Kind::function, function);
  if (block <= 0) return kInvalidValue;
  DeviceLimits l = limits();
  int by_threads = l.threads / ((block + 31) / 32 * 32);
  int by_shared = l.shared_multiprocessor / static_cast<int>(shared_bytes + 1024);
  *blocks = std::min({by_threads, by_shared, l.blocks});
  return 0;
}
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  ENTER_OF_CONTEXT(Kind::function, function);
  if (extra) return kNotSupported;
  Stream* s;
  if (int code = find_stream(stream, &s)) return code;
  if (!s->legacy) same_context(live(Kind::stream, stream), *context);
  return launch_kernel(record, {gx, gy, gz}, {bx, by, bz}, shared_bytes, s, parameters);
}
API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  ENTER_STREAM(stream);
  Task task;
  task.run = [=](const Running&) {
    function(data);
    return 0;
  };
  return submit(s, std::move(task));
}
