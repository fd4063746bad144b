// Runs a block's warps through their program, each instruction for all lanes that are at it.
//
// Lanes that branch apart run one after the other, those at the lowest instruction first, and join where
// their positions meet. A collective waits for all lanes of its warp, a barrier for its threads; the rules
// are those of `Block`.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "async.h"

namespace standin {
namespace ptx {

class Interpreter {
 public:
  explicit Interpreter(Block& block) : block_(block) {}

  // Prepares the registers for a block of the block's launch.
  void begin();
  // Runs until no lane can: all have returned, or the rest waits for ever.
  void run();
  // For a report of a deadlock: what the barriers in shared memory lack that threads wait for.
  std::string missing() const;
  // A thread that waited can run.
  void wake(uint32_t thread);

 private:
  void fill_constants(const Program& program);
  void fill_specials(WarpState& w);
  uint32_t pick();
  void run_warp(WarpState& w);
  void choose(WarpState& w);
  void leave_group(WarpState& w, uint32_t lanes, uint32_t pc);
  void branch(WarpState& w, const Instruction& i);
  void exit(WarpState& w);
  void barrier(WarpState& w, const Instruction& i);
  void wait(WarpState& w, const Instruction& i);
  void collective(WarpState& w, const Instruction& i);

  Block& block_;
  std::vector<WarpState> warps_;
  std::vector<uint64_t> registers_, local_;
  alignas(128) uint8_t arguments_[4096 + 128];  // tensor maps among them are aligned
  AsyncState async_;
  uint64_t filled_ = 0;  // the program whose constants the registers hold
  uint32_t filled_warps_ = 0;
  uint32_t runnable_ = 0;  // a bit per warp
  uint32_t last_ = 0;      // the warp that ran last
};

}  // namespace ptx
}  // namespace standin
