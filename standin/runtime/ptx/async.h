// Hopper's instructions that start work and go on: barriers in shared memory that count bytes, bulk copies,
// products of four warps. Their results come as late as the kernel allows: copies land when no thread can
// run, products are computed at the wait. Until then their operands may not be touched.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "warp.h"

namespace standin {
namespace ptx {

// An mbarrier. Its eight bytes in shared memory are not its state: kernels may not look into them.
struct MemoryBarrier {
  uint32_t count = 0, pending = 0;  // arrivals of a phase, and those that are missing
  int64_t bytes = 0;                // that are expected and have not come
  uint32_t phase = 0;
  Clock* arriving = nullptr;  // what those who arrived know
  Clock* passed = nullptr;    // what those who wait learn
  struct Waiting {
    uint32_t thread, parity;
  };
  std::vector<Waiting> waiting;
};

// As `cuTensorMapEncodeTiled` of the stand-in writes it, in the 128 bytes of a CUtensorMap.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x56545450;
  uint32_t magic, rank, element, swizzle;  // bytes of an element; 0 to 3: none, 32, 64, 128 bytes
  uint64_t base;
  uint64_t stride[5];  // bytes
  uint32_t size[5], box[5];
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap has 128 bytes");

// A piece of a copy: bytes that lie together on both sides.
struct Piece {
  uint32_t shared;
  uint64_t global;  // 0: outside the tensor; zeros are loaded, and nothing is stored
  uint32_t bytes;
};

// A copy to shared memory that has not landed.
struct BulkLoad {
  std::vector<Piece> pieces;
  uint32_t barrier;  // offset
  uint32_t bytes;
  uint32_t thread;  // that asked
};

// A copy from shared memory that has not been made.
struct BulkStore {
  std::vector<Piece> pieces;
  uint32_t thread, group, time;
};

struct AsyncState {
  std::map<uint32_t, MemoryBarrier> barriers;  // by offset
  std::deque<BulkLoad> loads;
  std::vector<BulkStore> stores;
  std::vector<uint32_t> store_groups;  // of each thread: the group that is open
  uint32_t loads_landed = 0, stores_made = 0;

  void begin(uint32_t threads) {
    barriers.clear();
    loads.clear();
    stores.clear();
    store_groups.assign(threads, 0);
    loads_landed = stores_made = 0;
  }
  // Lands the copy that was asked for first, or any with a seed.
  void land_one(Block& block);
  // The running thread, of that warp, returns.
  void check_return(Block& block, const WarpState& w) const;
};

// Before an instruction that is not a product: whether it touches the registers of one that is pending; and
// what it writes.
void watch_registers(WarpState& w, const Instruction& i);

}  // namespace ptx
}  // namespace standin
