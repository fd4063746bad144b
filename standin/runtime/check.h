// The packed word that remembers an access to global memory: launch, block, thread, the thread's time.
#pragma once

#include <stdint.h>

namespace standin {

constexpr uint32_t kManyBlocks = 0xfffff;   // in the block field: readers in several blocks
constexpr uint32_t kManyTimes = 0x20000;    // in the time field: several threads of the block have read
constexpr uint32_t kManyWarps = 1023;       // in the thread field of those: of several warps; else the warp

struct Touch {
  uint32_t tag, block, thread, time;

  uint64_t packed() const {
    return uint64_t{tag & 0xffff} << 48 | uint64_t{block & 0xfffff} << 28 | uint64_t{thread & 0x3ff} << 18 |
           (time & 0x3ffff);
  }
  static Touch of(uint64_t word) {
    return {static_cast<uint32_t>(word >> 48), static_cast<uint32_t>(word >> 28) & 0xfffff,
            static_cast<uint32_t>(word >> 18) & 0x3ff, static_cast<uint32_t>(word) & 0x3ffff};
  }
};

}  // namespace standin
