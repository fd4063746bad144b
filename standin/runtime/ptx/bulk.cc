// Barriers in shared memory, bulk copies with and without a tensor map, and the fence between the threads'
// accesses and theirs.
#include <string.h>

#include "../memory.h"
#include "async.h"

namespace standin {
namespace ptx {
namespace {

uint32_t shared_offset(WarpState& w, const Instruction& i, int address, size_t source, uint32_t lane) {
  uint64_t base = i.wide_address[address]
                      ? w.at<uint64_t>(i.s[source])[lane] - reinterpret_cast<uint64_t>(w.block->shared)
                      : w.at<uint32_t>(i.s[source])[lane];
  return static_cast<uint32_t>(base + static_cast<uint64_t>(i.offset[address]));
}

[[noreturn]] void fail(WarpState& w, const Instruction& i, int code, const std::string& what) {
  w.block->fail(code, format("%s: %s, at %s", w.block->who(*w.block->running).c_str(), what.c_str(),
                             place(i.site).c_str()));
}

Fiber* become(WarpState& w, uint32_t lane) {
  return w.block->become(w.index * kLanes + lane);
}

// ---- barriers ---------------------------------------------------------------------------------------------

MemoryBarrier& barrier_at(WarpState& w, const Instruction& i, uint32_t offset) {
  auto at = w.async->barriers.find(offset);
  if (at == w.async->barriers.end())
    fail(w, i, kLaunchFailed, format("no mbarrier was initialised at offset %u of shared memory", offset));
  return at->second;
}

// Ends a phase that is complete, and wakes those who waited for it.
void settle(Block& block, MemoryBarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
  block.join_clocks(b.passed, b.arriving);
  std::vector<MemoryBarrier::Waiting> waiting;
  std::swap(waiting, b.waiting);
  for (const auto& one : waiting) {
    if (b.phase != one.parity) block.wake(one.thread);
    else b.waiting.push_back(one);
  }
}

void initialise(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    uint32_t offset = shared_offset(w, i, 0, 0, lane), count = w.at<uint32_t>(i.s[1])[lane];
    if (offset % 8) fail(w, i, kMisaligned, format("an mbarrier at offset %u, not a multiple of 8", offset));
    if (w.block->watching)
      w.block->access(reinterpret_cast<uint64_t>(w.block->shared) + offset, 8, true, nullptr, i.site);
    if (count == 0 || count >= 1u << 20)
      fail(w, i, kLaunchFailed, format("an mbarrier for %u arrivals", count));
    MemoryBarrier& b = w.async->barriers[offset];
    b = {};
    b.count = b.pending = count;
    b.arriving = w.block->new_clock();
    b.passed = w.block->new_clock();
    w.block->release(b.passed);
  });
}
void invalidate(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    uint32_t offset = shared_offset(w, i, 0, 0, lane);
    barrier_at(w, i, offset);
    w.async->barriers.erase(offset);
  });
}

// The thread must know of the initialisation: whoever learns of the barrier's bytes learns of that.
void check_known(WarpState& w, const Instruction& i, uint32_t offset) {
  if (w.block->watching)
    w.block->access(reinterpret_cast<uint64_t>(w.block->shared) + offset, 8, false, nullptr, i.site);
}

enum class Arrival : uint8_t { one, counted, with_bytes, bytes_only };

template <Arrival how>
void arrive(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    uint32_t offset = shared_offset(w, i, 0, 0, lane);
    MemoryBarrier& b = barrier_at(w, i, offset);
    check_known(w, i, offset);
    uint32_t number = how == Arrival::one ? 1 : w.at<uint32_t>(i.s[1])[lane];
    if (how == Arrival::with_bytes || how == Arrival::bytes_only) b.bytes += number;
    if (how == Arrival::bytes_only) return;
    if (how != Arrival::counted) number = 1;
    if (number > b.pending) {
      fail(w, i, kLaunchFailed,
           format("%u arrivals at the mbarrier at offset %u, whose phase lacks %u of %u", number, offset,
                  b.pending, b.count));
    }
    w.at<uint64_t>(i.d[0])[lane] = b.phase;
    w.block->release(b.arriving);
    b.pending -= number;
    settle(*w.block, b);
  });
}

// Lanes whose phase is not over stay here; the wait never says no.
void try_wait(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    Fiber* me = become(w, lane);
    uint32_t offset = shared_offset(w, i, 0, 0, lane), parity = w.at<uint32_t>(i.s[1])[lane] & 1;
    MemoryBarrier& b = barrier_at(w, i, offset);
    check_known(w, i, offset);
    if (b.phase == parity) {
      b.waiting.push_back({me->index, parity});
      w.block->waits("mbarrier.try_wait", i.site);
      w.parked |= 1u << lane;
      return;
    }
    w.block->acquire(b.passed);
  });
  w.mask &= ~w.parked;
  w.set_predicate(i.d[0], kAllLanes);
}

// ---- copies -----------------------------------------------------------------------------------------------

// Checks a copy's pieces as accesses of the running thread and of the agent that will make it.
void check_pieces(WarpState& w, const Instruction& i, const std::vector<Piece>& pieces, Agent kind,
                  uint32_t time, bool to_shared) {
  Block& block = *w.block;
  uint32_t agent = block.agent(kind, w.index);
  for (const Piece& p : pieces) {
    block.access_as(agent, time, p.shared, p.bytes, to_shared, i.site);
    for (uint32_t at = 0; p.global && block.watching && at < p.bytes; at += 16)
      block.access(p.global + at, p.bytes - at < 16 ? p.bytes - at : 16, !to_shared, nullptr, i.site);
  }
}

void start_load(WarpState& w, const Instruction& i, uint32_t lane, std::vector<Piece> pieces,
                uint32_t barrier) {
  Fiber* me = become(w, lane);
  barrier_at(w, i, barrier);
  check_pieces(w, i, pieces, Agent::copy, w.async->loads_landed + 1, true);
  uint32_t bytes = 0;
  for (const Piece& p : pieces) {
    bytes += p.bytes;
    memset(w.block->shared + p.shared, 0xff, p.bytes);  // NaN until it lands
  }
  w.async->loads.push_back({std::move(pieces), barrier, bytes, me->index});
}

void start_store(WarpState& w, const Instruction& i, uint32_t lane, std::vector<Piece> pieces) {
  Fiber* me = become(w, lane);
  uint32_t time = ++w.async->stores_made;
  check_pieces(w, i, pieces, Agent::store, time, false);
  w.async->stores.push_back({std::move(pieces), me->index, w.async->store_groups[me->index], time});
}

// The bytes of a tensor's box, row by row, where its swizzle puts them.
std::vector<Piece> box_of(WarpState& w, const Instruction& i, const TensorMap& t, const int64_t* at,
                          uint32_t shared, bool load) {
  std::vector<Piece> pieces;
  uint32_t rows = 1;
  for (uint32_t d = 1; d < t.rank; ++d) rows *= t.box[d];
  uint32_t row_bytes = t.box[0] * t.element;
  uint32_t index[5] = {};
  for (uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    uint64_t start = t.base;
    for (uint32_t d = 1; d < t.rank; ++d) {
      int64_t x = at[d] + index[d];
      inside &= x >= 0 && x < t.size[d];
      start += static_cast<uint64_t>(x) * t.stride[d];
    }
    // Sixteen bytes stay together whatever the swizzle.
    for (uint32_t b = 0; b < row_bytes; b += 16) {
      uint32_t bytes = row_bytes - b < 16 ? row_bytes - b : 16, place = shared + row * row_bytes + b;
      if (t.swizzle) place ^= (place >> 7 & ((1u << t.swizzle) - 1)) << 4;
      int64_t first = at[0] + b / t.element, count = bytes / t.element;
      // Elements of a piece may lie partly outside: one piece for each then.
      bool whole = first >= 0 && first + count <= t.size[0];
      uint32_t part = whole ? bytes : t.element;
      for (uint32_t e = 0; e < bytes; e += part) {
        int64_t x = first + e / t.element;
        bool there = inside && x >= 0 && x < t.size[0];
        if (there || load)
          pieces.push_back({place + e, there ? start + static_cast<uint64_t>(x) * t.element : 0, part});
      }
    }
    for (uint32_t d = 1; d < t.rank; ++d) {
      if (++index[d] < t.box[d]) break;
      index[d] = 0;
    }
  }
  if (shared % 128)
    fail(w, i, kMisaligned, format("a tensor's box at offset %u, not a multiple of 128", shared));
  return pieces;
}

template <uint32_t rank, bool load>
void copy_tensor(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    // Load: to, map, coordinates, barrier. Store: map, coordinates, from.
    size_t map_at = load ? 1 : 0;
    uint64_t address = w.at<uint64_t>(i.s[map_at])[lane], low = reinterpret_cast<uint64_t>(w.arguments);
    TensorMap map;
    if (address < low || address + 128 > low + w.program->argument_bytes)
      fail(w, i, kIllegalAddress, "a tensor map that is no argument of the kernel");
    memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
    if (map.magic != TensorMap::kMagic || map.rank != rank)
      fail(w, i, kLaunchFailed, format("no tensor map of %u dimensions", rank));
    int64_t at[5];
    for (uint32_t d = 0; d < rank; ++d)
      at[d] = static_cast<int32_t>(w.at<uint32_t>(i.s[map_at + 1 + d])[lane]);
    if (load) {
      auto pieces = box_of(w, i, map, at, shared_offset(w, i, 0, 0, lane), true);
      start_load(w, i, lane, std::move(pieces), shared_offset(w, i, 2, 2 + rank, lane));
    } else {
      start_store(w, i, lane, box_of(w, i, map, at, shared_offset(w, i, 1, 1 + rank, lane), false));
    }
  });
}

// Bytes in a row: both addresses and their number are multiples of 16.
template <bool load>
void copy_bytes(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    int global_at = load ? 1 : 0, shared_at = load ? 0 : 1;
    uint64_t global = w.at<uint64_t>(i.s[global_at])[lane] + static_cast<uint64_t>(i.offset[global_at]);
    uint32_t shared = shared_offset(w, i, shared_at, static_cast<size_t>(shared_at), lane);
    uint32_t bytes = w.at<uint32_t>(i.s[2])[lane];
    if (global % 16 || shared % 16 || bytes % 16)
      fail(w, i, kMisaligned,
           format("a bulk copy of %u bytes between %p and offset %u: not multiples of 16", bytes,
                  reinterpret_cast<void*>(global), shared));
    std::vector<Piece> pieces;
    for (uint32_t b = 0; b < bytes; b += 16) pieces.push_back({shared + b, global + b, 16});
    if (load) start_load(w, i, lane, std::move(pieces), shared_offset(w, i, 2, 3, lane));
    else start_store(w, i, lane, std::move(pieces));
  });
}

void commit_stores(WarpState& w, const Instruction&) {
  each_lane(w.mask, [&](uint32_t lane) { ++w.async->store_groups[w.index * kLanes + lane]; });
}

// Of the thread's groups, at most the newest `literal` may still be under way.
void wait_stores(WarpState& w, const Instruction& i) {
  each_lane(w.mask, [&](uint32_t lane) {
    uint32_t thread = become(w, lane)->index, open = w.async->store_groups[thread];
    std::vector<BulkStore> left;
    for (BulkStore& s : w.async->stores) {
      if (s.thread != thread || s.group + static_cast<uint32_t>(i.literals[0]) >= open) {
        left.push_back(std::move(s));
        continue;
      }
      for (const Piece& p : s.pieces)
        memcpy(reinterpret_cast<void*>(p.global), w.block->shared + p.shared, p.bytes);
      w.block->learn(thread, w.block->agent(Agent::store, w.index), s.time);
    }
    w.async->stores = std::move(left);
  });
}

void fence_proxy(WarpState& w, const Instruction&) {
  each_lane(w.mask, [&](uint32_t lane) {
    become(w, lane);
    w.block->fence_agents();
  });
}
void nothing(WarpState&, const Instruction&) {}

#define TENSOR(n)                                                                                          \
  {"cp.async.bulk.tensor." #n "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes", "m " #n "T m", \
   copy_tensor<n, true>},                                                                                  \
      {"cp.async.bulk.tensor." #n "d.shared::cta.global.tile.mbarrier::complete_tx::bytes", "m " #n "T m", \
       copy_tensor<n, true>},                                                                              \
  {                                                                                                        \
    "cp.async.bulk.tensor." #n "d.global.shared::cta.tile.bulk_group", #n "T m", copy_tensor<n, false>     \
  }

const Form kForms[] = {
    {"mbarrier.init.shared::cta.b64", "m w", initialise},
    {"mbarrier.inval.shared::cta.b64", "m", invalidate},
    {"mbarrier.arrive.shared::cta.b64", "L m", arrive<Arrival::one>},
    {"mbarrier.arrive.shared::cta.b64", "L m w", arrive<Arrival::counted>},
    {"mbarrier.arrive.expect_tx.shared::cta.b64", "L m w", arrive<Arrival::with_bytes>},
    {"mbarrier.expect_tx.relaxed.cta.shared::cta.b64", "m w", arrive<Arrival::bytes_only>},
    {"mbarrier.try_wait.parity.shared::cta.b64", "P m w", try_wait, Flow::wait},
    {"mbarrier.try_wait.parity.shared::cta.b64", "P m w w", try_wait, Flow::wait},
    TENSOR(1),
    TENSOR(2),
    TENSOR(3),
    TENSOR(4),
    TENSOR(5),
    {"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "m m w m", copy_bytes<true>},
    {"cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes", "m m w m", copy_bytes<true>},
    {"cp.async.bulk.global.shared::cta.bulk_group", "m m w", copy_bytes<false>},
    {"cp.async.bulk.commit_group", "", commit_stores},
    {"cp.async.bulk.wait_group", "i", wait_stores},
    {"cp.async.bulk.wait_group.read", "i", wait_stores},
    {"fence.proxy.async", "", fence_proxy},
    {"fence.proxy.async.shared::cta", "", fence_proxy},
    {"fence.mbarrier_init.release.cluster", "", nothing},
    // How many registers a warp may use is ptxas's business.
    {"setmaxnreg.inc.sync.aligned.u32", "i", nothing},
    {"setmaxnreg.dec.sync.aligned.u32", "i", nothing},
};

}  // namespace

Forms bulk_forms() {
  return {kForms, sizeof kForms / sizeof *kForms};
}

void AsyncState::land_one(Block& block) {
  size_t which = block.random(static_cast<uint32_t>(loads.size()));
  BulkLoad load = std::move(loads[which]);
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(which));
  block.become(load.thread);
  uint32_t agent = block.agent(Agent::copy, 0), time = ++loads_landed;
  for (const Piece& p : load.pieces) {
    if (p.global) memcpy(block.shared + p.shared, reinterpret_cast<const void*>(p.global), p.bytes);
    else memset(block.shared + p.shared, 0, p.bytes);
    block.land(agent, time, p.shared, p.bytes);
  }
  auto at = barriers.find(load.barrier);
  if (at == barriers.end()) return;
  MemoryBarrier& b = at->second;
  b.arriving->time[agent] = time;
  b.bytes -= load.bytes;
  settle(block, b);
}

void AsyncState::check_return(Block& block, const WarpState& w) const {
  uint32_t thread = block.running->index;
  if (!w.products.pending.empty()) {
    block.fail(kLaunchFailed,
               format("%s returned with products in flight (wgmma)", block.who(thread).c_str()));
  }
  for (const BulkStore& s : stores) {
    if (s.thread != thread) continue;
    block.fail(kLaunchFailed, format("%s returned with bulk stores in flight", block.who(thread).c_str()));
  }
}

}  // namespace ptx
}  // namespace standin
