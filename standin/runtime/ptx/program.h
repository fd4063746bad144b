// A kernel's PTX made ready to run: instructions with their functions, registers with their places.
#pragma once

#include <stdint.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../../kernels/ptx.cuh"
#include "../block.h"
#include "source.h"

namespace standin {
namespace ptx {

struct Instruction;
struct WarpState;
// Executes an instruction for the lanes of `WarpState::mask`.
using Step = void (*)(WarpState&, const Instruction&);

// What an instruction does to the flow of its warp.
enum class Flow : uint8_t {
  plain,       // goes on with the next
  branch,      // goes on elsewhere
  exit,        // the lanes return
  barrier,     // may wait for other warps
  collective,  // waits for all lanes of the warp
  wait,        // lanes that it parks stay at it
};

// One instruction with all its modifiers, as it is written, and how its operands are.
//
// Operands: `W`, `L`, `P` a register of up to 32 bits, of 64, a predicate that it writes; small letters: that
// it reads, and for `w` and `l` also a number or an address; `X`, `x` as `W`, `w`, but the register may have
// 64 bits; `Q` as `W`, with or without `|predicate`; `4W` a vector in braces; `m` an address in brackets; `i`
// a literal number; `t` a label.
struct Form {
  const char* name;
  const char* operands;
  Step step;
  Flow flow = Flow::plain;
  Collective collective = Collective::none;
  const char* called = "";  // its function in kernels/ptx.cuh, for reports
};

// All forms of that name: some instructions take operands in more than one way.
const std::vector<const Form*>* find_forms(const std::string& name);

constexpr uint32_t kNoRegister = ~0u;

struct Instruction {
  const Form* form = nullptr;
  Step step = nullptr;
  Flow flow = Flow::plain;
  bool negated = false;
  bool wide_address[3] = {};       // the register of an address has 64 bits
  uint32_t guard = kNoRegister;    // the predicate's place
  const uint32_t* d = nullptr;     // places of the registers that it writes, in bytes from the warp's first
  const uint32_t* s = nullptr;     // of those it reads; an address counts as one
  uint32_t written = 0, read = 0;  // how many
  uint32_t target = 0;             // of a branch
  uint32_t used_bytes = 0;         // of a load: see `Statement`
  int64_t offset[3] = {};          // of its addresses
  int64_t literals[4] = {};
  Site site{};
  uint32_t line = 0;  // in the PTX text
};

// A register whose value is the same in all lanes from the start: a number, or an address.
struct Constant {
  uint32_t place;
  bool wide;
  uint64_t value;
};

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
};

struct Module;

struct Program {
  std::string name;
  uint64_t number = 0;  // no other program has or had it
  const Module* module = nullptr;
  Kernel kernel{};  // as the driver sees it
  std::vector<Argument> arguments;
  std::vector<uint32_t> argument_offsets;
  uint32_t argument_bytes = 0;

  std::vector<Instruction> code;
  std::vector<uint32_t> places;  // what the instructions' `d` and `s` point into
  uint32_t register_bytes = 0;   // of one warp
  std::vector<Constant> constants;
  std::vector<std::pair<uint32_t, Special>> specials;
  uint32_t local_bytes = 0;       // of one thread
  bool asynchronous = false;      // has instructions of `async.h`
  std::deque<std::string> texts;  // what the instructions' sites point to
};

// A module: the text, its tables in memory, and its kernels, made ready when they are first asked for.
struct Module {
  Source source;
  std::map<std::string, uint64_t> tables;  // address by name
  std::vector<std::unique_ptr<uint64_t[]>> memory;
  struct Range {
    uint64_t low, high;
  };
  std::vector<Range> ranges;  // of the tables
  std::map<std::string, std::unique_ptr<Program>> programs;
};

// Empty if it worked.
Error assemble(Module& module, const Function& entry, Program* program);

}  // namespace ptx
}  // namespace standin
