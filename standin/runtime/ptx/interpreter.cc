#include "interpreter.h"

#include <string.h>

namespace standin {
namespace ptx {
namespace {

// A warp that executes so many instructions without waiting spins. Kernels stay far below it.
constexpr uint64_t kMostInstructions = uint64_t{1} << 26;

}  // namespace

void Interpreter::begin() {
  const Launch& launch = *block_.launch;
  const Program& program = *launch.program;
  uint32_t threads = launch.threads(), warps = (threads + kLanes - 1) / kLanes;
  if (filled_ != program.number || filled_warps_ < warps) {
    registers_.assign((size_t{warps} * program.register_bytes + 256) / 8, ~uint64_t{0});
    warps_.resize(warps);
  }
  // A vector's memory is not aligned as wide as the host's vectors are.
  auto* first =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(registers_.data()) + 127) & ~uintptr_t{127});
  local_.assign((size_t{warps} * kLanes * program.local_bytes + 7) / 8, ~uint64_t{0});
  for (size_t a = 0; a < program.arguments.size(); ++a)
    memcpy(arguments_ + program.argument_offsets[a], launch.arguments[a], program.arguments[a].size);

  if (program.asynchronous) async_.begin(warps * kLanes);
  runnable_ = 0;
  last_ = warps - 1;
  for (uint32_t index = 0; index < warps; ++index) {
    WarpState& w = warps_[index];
    w.block = &block_;
    w.program = &program;
    w.arguments = arguments_;
    w.async = &async_;
    if (program.asynchronous) w.products.begin(program.register_bytes);
    w.registers = first + size_t{index} * program.register_bytes;
    w.local = reinterpret_cast<uint8_t*>(local_.data()) + size_t{index} * kLanes * program.local_bytes;
    w.index = index;
    uint32_t lanes = threads - index * kLanes;
    w.ready = lanes >= kLanes ? kAllLanes : (1u << lanes) - 1;
    w.group = 0;
    memset(w.pcs, 0, sizeof w.pcs);
    runnable_ |= 1u << index;
    fill_specials(w);
  }
  if (filled_ != program.number || filled_warps_ < warps) fill_constants(program);
  filled_ = program.number;
  filled_warps_ = warps;
}

void Interpreter::fill_constants(const Program& program) {
  for (WarpState& w : warps_) {
    for (const Constant& c : program.constants) {
      for (int l = 0; l < 32; ++l) {
        if (c.wide) w.at<uint64_t>(c.place)[l] = c.value;
        else w.at<uint32_t>(c.place)[l] = static_cast<uint32_t>(c.value);
      }
    }
  }
}

void Interpreter::fill_specials(WarpState& w) {
  const Launch& launch = *block_.launch;
  const Dim3 &b = launch.block, &g = launch.grid, &at = block_.index;
  for (const auto& [place, special] : w.program->specials) {
    uint32_t* to = w.at<uint32_t>(place);
    for (uint32_t l = 0; l < kLanes; ++l) {
      uint32_t t = w.index * kLanes + l;
      switch (special) {
        case Special::tid_x: to[l] = t % b.x; break;
        case Special::tid_y: to[l] = t / b.x % b.y; break;
        case Special::tid_z: to[l] = t / b.x / b.y; break;
        case Special::ntid_x: to[l] = b.x; break;
        case Special::ntid_y: to[l] = b.y; break;
        case Special::ntid_z: to[l] = b.z; break;
        case Special::ctaid_x: to[l] = at.x; break;
        case Special::ctaid_y: to[l] = at.y; break;
        case Special::ctaid_z: to[l] = at.z; break;
        case Special::nctaid_x: to[l] = g.x; break;
        case Special::nctaid_y: to[l] = g.y; break;
        case Special::nctaid_z: to[l] = g.z; break;
        case Special::laneid: to[l] = l; break;
        case Special::warpid: to[l] = w.index; break;
      }
    }
  }
}

// ---- scheduling -------------------------------------------------------------------------------------------

void Interpreter::wake(uint32_t thread) {
  warps_[thread / kLanes].ready |= 1u << (thread % kLanes);
  runnable_ |= 1u << (thread / kLanes);
}

std::string Interpreter::missing() const {
  std::string text;
  if (!block_.launch->program->asynchronous) return text;
  for (const auto& [offset, b] : async_.barriers) {
    if (b.waiting.empty()) continue;
    text += format("; the mbarrier at offset %u lacks %u of %u arrivals and %lld bytes", offset, b.pending,
                   b.count, static_cast<long long>(b.bytes));
  }
  return text;
}

// The next warp in turn, or any with a seed.
uint32_t Interpreter::pick() {
  uint32_t count = static_cast<uint32_t>(__builtin_popcount(runnable_));
  uint32_t which = block_.random(count);
  uint32_t turn = (last_ + 1) % kLanes;
  uint32_t turned = runnable_ >> turn | (turn ? runnable_ << (kLanes - turn) : 0);
  for (; which; --which) turned &= turned - 1;
  return (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % kLanes;
}

void Interpreter::run() {
  for (;;) {
    while (runnable_) {
      last_ = pick();
      runnable_ &= ~(1u << last_);
      run_warp(warps_[last_]);
    }
    // Copies land when nothing else can happen.
    if (!block_.launch->program->asynchronous || async_.loads.empty()) return;
    async_.land_one(block_);
  }
}

// The ready lanes at the lowest instruction become the group.
void Interpreter::choose(WarpState& w) {
  uint32_t lowest = ~0u;
  each_lane(w.ready, [&](uint32_t l) { lowest = w.pcs[l] < lowest ? w.pcs[l] : lowest; });
  w.group = 0;
  w.next = ~0u;
  each_lane(w.ready, [&](uint32_t l) {
    if (w.pcs[l] == lowest) w.group |= 1u << l;
    else if (w.pcs[l] < w.next) w.next = w.pcs[l];
  });
  w.pc = lowest;
}

void Interpreter::leave_group(WarpState& w, uint32_t lanes, uint32_t pc) {
  each_lane(lanes, [&](uint32_t l) { w.pcs[l] = pc; });
  w.group &= ~lanes;
}

void Interpreter::run_warp(WarpState& w) {
  const Instruction* code = w.program->code.data();
  bool watches = w.program->asynchronous;
  choose(w);
  uint64_t executed = 0;
  for (; w.group; ++executed) {
    if (w.pc >= w.next) {
      leave_group(w, w.group, w.pc);
      choose(w);
    }
    const Instruction& i = code[w.pc];
    w.mask = w.group;
    if (i.guard != kNoRegister) w.mask &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    if (watches && w.mask) watch_registers(w, i);
    if (i.flow == Flow::plain) {
      if (w.mask) i.step(w, i);
      ++w.pc;
      continue;
    }
    if (executed > kMostInstructions) {
      block_.become(w.index * kLanes + static_cast<uint32_t>(__builtin_ctz(w.group)));
      block_.fail(kLaunchFailed, format("%s spins: %llu instructions without waiting, at %s",
                                        block_.who(*block_.running).c_str(),
                                        static_cast<unsigned long long>(executed), place(i.site).c_str()));
    }
    switch (i.flow) {
      case Flow::plain: break;
      case Flow::branch: branch(w, i); break;
      case Flow::exit: exit(w); break;
      case Flow::barrier: barrier(w, i); break;
      case Flow::wait: wait(w, i); break;
      case Flow::collective: collective(w, i); break;
    }
  }
  block_.count_instructions(executed);
}

// ---- the flow ---------------------------------------------------------------------------------------------

void Interpreter::branch(WarpState& w, const Instruction& i) {
  if (w.mask == w.group) {
    w.pc = i.target;
  } else if (w.mask == 0) {
    ++w.pc;
  } else {
    uint32_t rest = w.group & ~w.mask;
    leave_group(w, w.mask, i.target);
    leave_group(w, rest, w.pc + 1);
    choose(w);
  }
}

void Interpreter::exit(WarpState& w) {
  each_lane(w.mask, [&](uint32_t l) {
    block_.become(w.index * kLanes + l);
    if (w.program->asynchronous) async_.check_return(block_, w);
    block_.finish();
  });
  w.ready &= ~w.mask;
  w.group &= ~w.mask;
  ++w.pc;
  if (!w.group) choose(w);
}

void Interpreter::barrier(WarpState& w, const Instruction& i) {
  bool counted = i.form->operands[1] != '\0';
  uint32_t lanes = w.mask;
  leave_group(w, w.group, w.pc + 1);
  each_lane(lanes, [&](uint32_t l) {
    block_.become(w.index * kLanes + l);
    uint32_t id = w.at<uint32_t>(i.s[0])[l], threads = counted ? w.at<uint32_t>(i.s[1])[l] : 0;
    // The last to arrive wakes all who wait, lanes of this warp among them.
    if (!block_.arrive(id, threads, i.site)) w.ready &= ~(1u << l);
  });
  choose(w);
}

void Interpreter::wait(WarpState& w, const Instruction& i) {
  w.parked = 0;
  if (w.mask) i.step(w, i);
  w.ready &= ~w.parked;
  leave_group(w, w.parked, w.pc);
  leave_group(w, w.group, w.pc + 1);
  choose(w);
}

void Interpreter::collective(WarpState& w, const Instruction& i) {
  if (w.mask == 0 || (i.form->collective == Collective::sync && block_.skips(i.site))) {
    ++w.pc;
    return;
  }
  if (w.mask == kAllLanes && block_.is_whole(w.index)) {
    i.step(w, i);
    block_.joined(w.index, i.form->collective);
    ++w.pc;
    return;
  }
  uint32_t lanes = w.mask, pc = w.pc;
  leave_group(w, w.group & ~lanes, pc + 1);
  bool complete = false;
  each_lane(lanes, [&](uint32_t l) {
    Fiber* me = block_.become(w.index * kLanes + l);
    complete = block_.join(i.form->collective, i.site, i.form->called, pc);
    w.pcs[l] = pc + 1;
    if (complete) return;
    block_.waits(i.form->called, i.site);
    w.ready &= ~(1u << me->lane());
  });
  w.group = 0;
  if (complete) {
    w.mask = kAllLanes;
    i.step(w, i);
    block_.joined(w.index, i.form->collective);
    block_.wake_warp(w.index);
  }
  choose(w);
}

}  // namespace ptx
}  // namespace standin
