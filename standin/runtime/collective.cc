// What the lanes of a warp do together: they meet, and the last to arrive computes the results of all.
#include <string.h>

#include "block.h"
#include "options.h"
#include "truncate.h"

namespace standin {
namespace {

struct Shuffle {
  uint32_t value, other, result;
};
struct Vote {
  bool value;
  uint32_t result;
};
struct Matrices {
  const uint8_t* row;
  uint32_t* registers;
  uint32_t count;
  bool transposed;
};
struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float low(uint32_t v) {
  return __builtin_bit_cast(float, v << 16);
}
float high(uint32_t v) {
  return __builtin_bit_cast(float, v & 0xffff0000u);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))  // the same sums: none is fused or reordered
#endif
void compute_mma(void* const* operands, bool truncate) {
  float a[16][16], b[16][8], d[16][8];
  for (uint32_t l = 0; l < kLanes; ++l) {
    const Mma& lane = *static_cast<const Mma*>(operands[l]);
    uint32_t g = l / 4, q = l % 4;
    for (uint32_t r = 0; r < 4; ++r) {
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)] = low(lane.a[r]);
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1) + 1] = high(lane.a[r]);
      d[g + 8 * (r >> 1)][2 * q + (r & 1)] = lane.d[r];
    }
    for (uint32_t r = 0; r < 2; ++r) {
      b[2 * q + 8 * r][g] = low(lane.b[r]);
      b[2 * q + 8 * r + 1][g] = high(lane.b[r]);
    }
  }
  for (uint32_t i = 0; i < 16; ++i) {
    if (truncate) {
      for (uint32_t j = 0; j < 8; ++j) {
        for (uint32_t k = 0; k < 16; k += kTruncatedBlock) {
          double products[kTruncatedBlock];
          for (uint32_t t = 0; t < kTruncatedBlock; ++t) products[t] = double{a[i][k + t]} * b[k + t][j];
          d[i][j] = truncated_sum(d[i][j], products, kTruncatedBlock);
        }
      }
      continue;
    }
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    const Mma& lane = *static_cast<const Mma*>(operands[l]);
    for (uint32_t r = 0; r < 4; ++r) lane.d[r] = d[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
  }
}

void compute_ldmatrix(void* const* operands) {
  const Matrices& first = *static_cast<const Matrices*>(operands[0]);
  for (uint32_t m = 0; m < first.count; ++m) {
    const uint8_t* rows[8];
    for (uint32_t i = 0; i < 8; ++i) rows[i] = static_cast<const Matrices*>(operands[8 * m + i])->row;
    for (uint32_t l = 0; l < kLanes; ++l) {
      uint32_t g = l / 4, q = l % 4, value;
      if (first.transposed) {
        uint16_t lo, hi;
        memcpy(&lo, rows[2 * q] + 2 * g, 2);
        memcpy(&hi, rows[2 * q + 1] + 2 * g, 2);
        value = lo | static_cast<uint32_t>(hi) << 16;
      } else {
        memcpy(&value, rows[g] + 4 * q, 4);
      }
      static_cast<const Matrices*>(operands[l])->registers[m] = value;
    }
  }
}

}  // namespace

// ---- the rendezvous -------------------------------------------------------------------------------------

void Block::complete(Warp& warp, Collective kind) {
  void* const* operands = warp.operands;
  switch (kind) {
    case Collective::none:
    case Collective::other:
    case Collective::sync: break;
    case Collective::shuffle_xor:
      for (uint32_t l = 0; l < kLanes; ++l) {
        auto& s = *static_cast<Shuffle*>(operands[l]);
        s.result = static_cast<Shuffle*>(operands[(l ^ s.other) % kLanes])->value;
      }
      break;
    case Collective::shuffle_index:
      for (uint32_t l = 0; l < kLanes; ++l) {
        auto& s = *static_cast<Shuffle*>(operands[l]);
        s.result = static_cast<Shuffle*>(operands[s.other % kLanes])->value;
      }
      break;
    case Collective::vote: {
      uint32_t result = 0;
      for (uint32_t l = 0; l < kLanes; ++l) result |= uint32_t{static_cast<Vote*>(operands[l])->value} << l;
      for (uint32_t l = 0; l < kLanes; ++l) static_cast<Vote*>(operands[l])->result = result;
      break;
    }
    case Collective::ldmatrix: compute_ldmatrix(operands); break;
    case Collective::mma: compute_mma(operands, launch->options->truncate); break;
  }
}

void Block::collective(Collective kind, void* operand, Site site, const char* name) {
  Fiber& me = *running;
  uint32_t w = me.index / kLanes;
  warps_[w].operands[me.lane()] = operand;
  if (!join(kind, site, name, 0)) {
    wait(name, site);
    return;
  }
  complete(warps_[w], kind);
  joined(w, kind);
  wake_warp(w);
}

bool Block::join(Collective kind, Site site, const char* name, uint32_t copy) {
  Fiber& me = *running;
  Warp& warp = warps_[me.index / kLanes];
  if (warp.lanes != kLanes) {
    fail(kLaunchFailed, format("%s at %s in a warp of %u lanes: the block's size must be a multiple of 32",
                               name, place(site).c_str(), warp.lanes));
  }
  if (warp.returned) {
    fail(kLaunchFailed, format("%s calls %s at %s after lanes %08x of its warp have returned",
                               who(me).c_str(), name, place(site).c_str(), warp.returned));
  }
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
    warp.copy = copy;
  } else if (warp.kind != kind || !warp.site.is(site) || warp.copy != copy) {
    fail(kLaunchFailed, format("%s calls %s at %s while lanes %08x of its warp wait at %s%s", who(me).c_str(),
                               name, place(site).c_str(), warp.arrived, place(warp.site).c_str(),
                               warp.copy != copy ? " (another instruction)" : ""));
  }
  warp.arrived |= 1u << me.lane();
  if (warp.arrived != ~0u) return false;
  warp.arrived = 0;
  return true;
}

void Block::joined(uint32_t w, Collective kind) {
  Fiber* first = &fibers_[w * kLanes];
  if (kind == Collective::sync && checking_ == Checks::on) {
    Fiber* lanes[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) lanes[l] = first + l;
    meet(lanes, kLanes);
  }
  if (counting_) {
    switch (kind) {
      case Collective::sync: ++counters_.warp_barriers; break;
      case Collective::ldmatrix: ++counters_.ldmatrix; break;
      case Collective::mma: ++counters_.mma; break;
      case Collective::other: break;
      default: ++counters_.shuffles; break;
    }
    flush_log(w);
  }
}

// All lanes but the running one go on.
void Block::wake_warp(uint32_t w) {
  for (uint32_t l = 0; l < kLanes; ++l) {
    Fiber* f = &fibers_[w * kLanes + l];
    if (f->state == State::waiting) make_ready(f);
  }
}

void Block::ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site) {
  Matrices operand{static_cast<const uint8_t*>(row), registers, matrices, transposed};
  if (running->lane() < 8 * matrices) check_matrix_row(row, site);
  collective(Collective::ldmatrix, &operand, site, "ldmatrix");
}

void Block::check_matrix_row(const void* row, Site site) {
  uint64_t address = reinterpret_cast<uint64_t>(row), offset = address - reinterpret_cast<uint64_t>(shared);
  if (offset >= launch->shared_bytes || offset + 16 > launch->shared_bytes) {
    fail(kIllegalAddress, format("%s: ldmatrix row outside the %u bytes of shared memory (offset %lld) at %s",
                                 who(*running).c_str(), launch->shared_bytes, static_cast<long long>(offset),
                                 place(site).c_str()));
  }
  if (offset % 16) {
    fail(kMisaligned,
         format("%s: ldmatrix row at offset %llu, not a multiple of 16, at %s", who(*running).c_str(),
                static_cast<unsigned long long>(offset), place(site).c_str()));
  }
  if (checking_ == Checks::on) access_shared(static_cast<uint32_t>(offset), 16, false, nullptr, site);
  if (counting_) running->log.push_back({site.file + site.line, offset, 16, false, true, true});
}

// ---- the counterparts that kernels call -------------------------------------------------------------------

void ldmatrix(uint32_t* registers, const void* row, uint32_t matrices, bool transposed, Site site) {
  current_block->ldmatrix(registers, row, matrices, transposed, site);
}
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Mma operand{d, a, b};
  current_block->collective(Collective::mma, &operand, site, "mma");
}
void sync_warp(Site site) {
  if (current_block->skips(site)) return;
  current_block->collective(Collective::sync, nullptr, site, "warp_sync");
}
uint32_t shuffle_xor(uint32_t v, uint32_t mask, Site site) {
  Shuffle s{v, mask, 0};
  current_block->collective(Collective::shuffle_xor, &s, site, "shfl_xor");
  return s.result;
}
uint32_t shuffle_index(uint32_t v, uint32_t lane, Site site) {
  Shuffle s{v, lane, 0};
  current_block->collective(Collective::shuffle_index, &s, site, "shfl_idx");
  return s.result;
}
uint32_t vote(bool v, Site site) {
  Vote operand{v, 0};
  current_block->collective(Collective::vote, &operand, site, "ballot");
  return operand.result;
}

}  // namespace standin
