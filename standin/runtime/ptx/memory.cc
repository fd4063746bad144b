// Loads, stores, addresses, asynchronous copies, atomics, fences. Every access of every lane goes through the
// block's checks.
#include <deque>
#include <mutex>

#include "../memory.h"
#include "warp.h"

namespace standin {
namespace ptx {
namespace {

enum class Space : uint8_t { generic, global, shared, local, constant, parameter };

uint64_t address_of(const WarpState& w, const Instruction& i, int which, uint32_t lane) {
  auto& state = const_cast<WarpState&>(w);
  uint64_t base =
      i.wide_address[which] ? state.at<uint64_t>(i.s[which])[lane] : state.at<uint32_t>(i.s[which])[lane];
  return base + static_cast<uint64_t>(i.offset[which]);
}

// An address in shared memory's own space is an offset; one before its start is negative.
uint64_t shared_address(const WarpState& w, uint64_t address) {
  return reinterpret_cast<uint64_t>(w.block->shared) +
         static_cast<uint64_t>(int64_t{static_cast<int32_t>(address)});
}

bool in_tables(const WarpState& w, uint64_t address, uint32_t size) {
  for (const Module::Range& r : w.program->module->ranges) {
    if (address >= r.low && address + size <= r.high) return true;
  }
  return false;
}

[[noreturn]] void fail_local(const WarpState& w, const Instruction& i, int64_t offset, uint32_t size,
                             bool write) {
  w.block->fail(
      kIllegalAddress,
      format(
          "out of bounds: %s %s %u bytes at offset %lld of a local array (%u bytes are the thread's) at %s",
          w.block->who(*w.block->running).c_str(), write ? "writes" : "reads", size,
          static_cast<long long>(offset), w.program->local_bytes, place(i.site).c_str()));
}

// The host's address of an access, which has been checked.
template <Space space>
uint8_t* reach(WarpState& w, const Instruction& i, uint32_t lane, uint32_t size, bool write) {
  Block& block = *w.block;
  block.become(w.index * kLanes + lane);
  uint64_t address = address_of(w, i, 0, lane);
  uint32_t frame = w.program->local_bytes;
  uint64_t local = reinterpret_cast<uint64_t>(w.local) + uint64_t{lane} * frame;
  if (space == Space::local || (space == Space::generic && frame && address - local < frame)) {
    uint64_t offset = space == Space::local ? address : address - local;
    if (offset > frame || offset + size > frame) fail_local(w, i, static_cast<int64_t>(offset), size, write);
    if (offset % size) {
      block.fail(kMisaligned, format("misaligned: %s %s %u bytes at offset %llu of its local memory at %s",
                                     block.who(*block.running).c_str(), write ? "writes" : "reads", size,
                                     static_cast<unsigned long long>(offset), place(i.site).c_str()));
    }
    return reinterpret_cast<uint8_t*>(local + offset);
  }
  if (space == Space::shared) address = shared_address(w, address);
  if (!write && !w.program->module->ranges.empty() && in_tables(w, address, size))
    return reinterpret_cast<uint8_t*>(address);
  if (space == Space::global && address - reinterpret_cast<uint64_t>(block.shared) < kMaxShared) {
    block.fail(kIllegalAddress,
               format("out of bounds: %s %s shared memory by an instruction for global memory at %s",
                      block.who(*block.running).c_str(), write ? "writes" : "reads", place(i.site).c_str()));
  }
  if (block.watching) block.access(address, size, write, nullptr, i.site);
  return reinterpret_cast<uint8_t*>(address);
}

// Of a load that the compiler made wider than what the source asks for, only the bytes that are used count.
template <Space space>
uint8_t* reach_part(WarpState& w, const Instruction& i, uint32_t lane, uint32_t element, uint32_t count) {
  uint32_t size = element * count;
  Instruction part = i;
  uint8_t* first = nullptr;
  for (uint32_t k = 0; k < count; ++k) {
    part.offset[0] = i.offset[0] + static_cast<int64_t>(k) * element;
    if (!(i.used_bytes >> (k * element) & ((1ull << element) - 1))) continue;
    uint8_t* at = reach<space>(w, part, lane, element, false) - size_t{k} * element;
    if (reinterpret_cast<uint64_t>(at) % size) {
      w.block->fail(kMisaligned, format("misaligned: %s reads %u bytes at %p at %s",
                                        w.block->who(*w.block->running).c_str(), size, static_cast<void*>(at),
                                        place(i.site).c_str()));
    }
    first = at;
  }
  return first;
}

template <Space space, class T, int n>
void load(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    const uint8_t* from = i.used_bytes ? reach_part<space>(w, i, lane, sizeof(T), n)
                                       : reach<space>(w, i, lane, sizeof(T) * n, false);
    for (int k = 0; k < n; ++k) {
      T value = 0;
      if (from) memcpy(&value, from + static_cast<size_t>(k) * sizeof(T), sizeof(T));
      // A short signed value fills the register with its sign.
      w.at<Held<T>>(i.d[k])[lane] = static_cast<Held<T>>(value);
    }
  });
  w.block->count_accesses(w.index);
}

// At an address in a register: an offset among the parameters.
template <class T, int n>
void load_parameter_at(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    uint64_t offset = address_of(w, i, 0, lane);
    if (offset >= w.program->argument_bytes || offset + sizeof(T) * n > w.program->argument_bytes) {
      w.block->become(w.index * kLanes + lane);
      w.block->fail(kIllegalAddress,
                    format("out of bounds: %s reads %zu bytes at offset %lld of %u bytes of parameters at %s",
                           w.block->who(*w.block->running).c_str(), sizeof(T) * n,
                           static_cast<long long>(offset), w.program->argument_bytes, place(i.site).c_str()));
    }
    for (int k = 0; k < n; ++k) {
      T value;
      memcpy(&value, w.arguments + offset + static_cast<size_t>(k) * sizeof(T), sizeof(T));
      w.at<Held<T>>(i.d[k])[lane] = static_cast<Held<T>>(value);
    }
  });
}

template <class T, int n>
void load_parameter(WarpState& w, const Instruction& i) {
  if (i.wide_address[0]) return load_parameter_at<T, n>(w, i);
  for (int k = 0; k < n; ++k) {
    T value;
    memcpy(&value, w.arguments + i.offset[0] + static_cast<size_t>(k) * sizeof(T), sizeof(T));
    Held<T> r[32];
    for (auto& lane : r) lane = static_cast<Held<T>>(value);
    keep(w, i.d[k], r);
  }
}

template <Space space, class T, int n>
void store(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    uint8_t* to = reach<space>(w, i, lane, sizeof(T) * n, true);
    for (int k = 0; k < n; ++k) {
      T value = static_cast<T>(w.at<Held<T>>(i.s[1 + k])[lane]);
      memcpy(to + static_cast<size_t>(k) * sizeof(T), &value, sizeof(T));
    }
  });
  w.block->count_accesses(w.index);
}

// ---- addresses --------------------------------------------------------------------------------------------

// A generic address of shared or local memory is the host's.
template <Space space, bool to_space>
void convert_address(WarpState& w, const Instruction& i) {
  uint64_t r[32];
  const uint64_t* a = w.at<uint64_t>(i.s[0]);
  for (uint64_t lane = 0; lane < 32; ++lane) {
    uint64_t window = space == Space::shared ? reinterpret_cast<uint64_t>(w.block->shared)
                      : space == Space::local
                          ? reinterpret_cast<uint64_t>(w.local) + lane * w.program->local_bytes
                      : space == Space::parameter ? reinterpret_cast<uint64_t>(w.arguments)
                                                  : 0;
    r[lane] = to_space ? a[lane] - window : a[lane] + window;
  }
  keep(w, i.d[0], r);
}

// ---- asynchronous copies, atomics, fences -----------------------------------------------------------------

template <bool sized>
void copy_async(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    w.block->become(w.index * kLanes + lane);
    uint32_t bytes = sized ? w.at<uint32_t>(i.s[2])[lane] : 16;
    if (i.literals[0] != 16 || (bytes != 16 && bytes != 0)) {
      w.block->fail(kLaunchFailed,
                    format("an asynchronous copy of %u of %lld bytes at %s: the stand-in knows those of 16 "
                           "bytes, all of them or none",
                           bytes, static_cast<long long>(i.literals[0]), place(i.site).c_str()));
    }
    auto* to = reinterpret_cast<void*>(shared_address(w, address_of(w, i, 0, lane)));
    auto* from = reinterpret_cast<const void*>(address_of(w, i, 1, lane));
    w.block->copy_async16(to, from, bytes != 0, i.site);
  });
  w.block->count_accesses(w.index);
}
void copy_commit(WarpState& w, const Instruction&) {
  each_lane(w.mask, [&](uint32_t lane) {
    w.block->become(w.index * kLanes + lane);
    w.block->copy_async_commit();
  });
}
void copy_wait(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    w.block->become(w.index * kLanes + lane);
    w.block->copy_async_wait(static_cast<uint32_t>(i.literals[0]), i.site);
  });
}

template <Space space, bool keeps>
void atomic_add(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    w.block->become(w.index * kLanes + lane);
    uint64_t address = address_of(w, i, 0, lane);
    if (space == Space::shared) address = shared_address(w, address);
    uint32_t old =
        w.block->atomic_add(reinterpret_cast<uint32_t*>(address), w.at<uint32_t>(i.s[1])[lane], i.site);
    if (keeps) w.at<uint32_t>(i.d[0])[lane] = old;
  });
}

void fence_device(WarpState& w, const Instruction&) {
  each_lane(w.mask, [&](uint32_t lane) { w.block->become(w.index * kLanes + lane)->fenced = true; });
}
void fence_block(WarpState&, const Instruction&) {}  // of one block's lanes, barriers order the accesses

// ---- the forms --------------------------------------------------------------------------------------------

void trap(WarpState& w, const Instruction& i) {
  w.block->become(w.index * kLanes + static_cast<uint32_t>(__builtin_ctz(w.mask)));
  w.block->fail(kLaunchFailed, format("trap: %s stops the kernel at %s",
                                      w.block->who(*w.block->running).c_str(), place(i.site).c_str()));
}

const Form kForms[] = {
    {"trap", "", trap},
    {"cvta.param.u64", "L l", convert_address<Space::parameter, false>},
    {"cvta.to.global.u64", "L l", convert_address<Space::global, true>},
    {"cvta.global.u64", "L l", convert_address<Space::global, false>},
    {"cvta.to.shared.u64", "L l", convert_address<Space::shared, true>},
    {"cvta.shared.u64", "L l", convert_address<Space::shared, false>},
    {"cvta.to.local.u64", "L l", convert_address<Space::local, true>},
    {"cvta.local.u64", "L l", convert_address<Space::local, false>},
    {"cvta.to.const.u64", "L l", convert_address<Space::constant, true>},
    {"cvta.const.u64", "L l", convert_address<Space::constant, false>},
    {"cp.async.cg.shared.global", "m m i w", copy_async<true>},
    {"cp.async.cg.shared.global", "m m i", copy_async<false>},
    {"cp.async.commit_group", "", copy_commit},
    {"cp.async.wait_group", "i", copy_wait},
    {"cp.async.wait_all", "", copy_wait},
    {"atom.global.add.u32", "W m w", atomic_add<Space::global, true>},
    {"atom.shared.add.u32", "W m w", atomic_add<Space::shared, true>},
    {"atom.add.u32", "W m w", atomic_add<Space::generic, true>},
    {"red.global.add.u32", "m w", atomic_add<Space::global, false>},
    {"red.shared.add.u32", "m w", atomic_add<Space::shared, false>},
    {"red.add.u32", "m w", atomic_add<Space::generic, false>},
    {"membar.gl", "", fence_device},
    {"membar.sys", "", fence_device},
    {"membar.cta", "", fence_block},
    {"fence.sc.gpu", "", fence_device},
    {"fence.acq_rel.gpu", "", fence_device},
};

// Loads and stores have a form for every space, type and width of vector.
class AccessForms {
 public:
  AccessForms() {
    for (const char* name : {".global", ".global.nc", ".global.nc.L1::no_allocate"})
      loads<Space::global>(name);
    loads<Space::generic>("");
    loads<Space::shared>(".shared");
    loads<Space::local>(".local");
    loads<Space::constant>(".const");
    parameters();
    stores<Space::generic>("");
    stores<Space::global>(".global");
    stores<Space::shared>(".shared");
    stores<Space::local>(".local");
    for (const Form& form : kForms) forms.push_back(form);
  }
  std::vector<Form> forms;

 private:
  // `type` without its letter; `letters` may be before it.
  template <class F>
  void each_type(const char* letters, const char* bits, F f) {
    for (; *letters; ++letters) f(std::string(".") + *letters + bits);
  }
  void add(const std::string& name, const std::string& operands, Step step) {
    names_.push_back(name);
    const char* kept = names_.back().c_str();
    names_.push_back(operands);
    forms.push_back({kept, names_.back().c_str(), step});
  }
  template <class T>
  static std::string letter(int n, char small) {
    char c = static_cast<char>(sizeof(T) == 8 ? small == 'w' ? 'l' : 'L' : small == 'w' ? 'x' : 'X');
    return n == 1 ? std::string(1, c) : std::to_string(n) + c;
  }
  static const char* vector(int n) { return n == 1 ? "" : n == 2 ? ".v2" : ".v4"; }

  template <class T, int n>
  void load_of(const std::string& name, const char* letters, const char* bits, Step step) {
    each_type(letters, bits, [&](const std::string& type) {
      add("ld" + name + vector(n) + type, letter<T>(n, 'W') + " m", step);
    });
  }
  template <Space space, class T>
  void loads_of(const std::string& name, const char* letters, const char* bits) {
    load_of<T, 1>(name, letters, bits, load<space, T, 1>);
    load_of<T, 2>(name, letters, bits, load<space, T, 2>);
    if constexpr (sizeof(T) <= 4) load_of<T, 4>(name, letters, bits, load<space, T, 4>);
  }
  template <Space space>
  void loads(const std::string& name) {
    loads_of<space, uint8_t>(name, "ub", "8");
    loads_of<space, int8_t>(name, "s", "8");
    loads_of<space, uint16_t>(name, "ub", "16");
    loads_of<space, int16_t>(name, "s", "16");
    loads_of<space, uint32_t>(name, "usbf", "32");
    loads_of<space, uint64_t>(name, "usbf", "64");
  }
  template <class T>
  void parameters_of(const char* letters, const char* bits) {
    load_of<T, 1>(".param", letters, bits, load_parameter<T, 1>);
    load_of<T, 2>(".param", letters, bits, load_parameter<T, 2>);
    if constexpr (sizeof(T) <= 4) load_of<T, 4>(".param", letters, bits, load_parameter<T, 4>);
  }
  void parameters() {
    parameters_of<uint8_t>("ub", "8");
    parameters_of<int8_t>("s", "8");
    parameters_of<uint16_t>("ub", "16");
    parameters_of<int16_t>("s", "16");
    parameters_of<uint32_t>("usbf", "32");
    parameters_of<uint64_t>("usbf", "64");
  }
  template <Space space, class T>
  void stores_of(const std::string& name, const char* letters, const char* bits) {
    auto one = [&](int n, Step step) {
      each_type(letters, bits, [&](const std::string& type) {
        add("st" + name + vector(n) + type, "m " + letter<T>(n, 'w'), step);
      });
    };
    one(1, store<space, T, 1>);
    one(2, store<space, T, 2>);
    if constexpr (sizeof(T) <= 4) one(4, store<space, T, 4>);
  }
  template <Space space>
  void stores(const std::string& name) {
    stores_of<space, uint8_t>(name, "usb", "8");
    stores_of<space, uint16_t>(name, "usb", "16");
    stores_of<space, uint32_t>(name, "usbf", "32");
    stores_of<space, uint64_t>(name, "usbf", "64");
  }

  std::deque<std::string> names_;
};

}  // namespace

Forms memory_forms() {
  static const AccessForms* all = new AccessForms;
  return {all->forms.data(), all->forms.size()};
}

}  // namespace ptx
}  // namespace standin
