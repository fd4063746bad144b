// What a launch did, counted per warp as the hardware counts: sectors, bank conflicts, mma, barriers.
#pragma once

#include <stdint.h>

#include <string>
#include <unordered_set>
#include <vector>

namespace standin {

// One access of one lane.
struct Logged {
  const void* pc;
  uint64_t address;  // offset where `shared`
  uint16_t size;
  bool write, shared, matrix;
};

struct SpaceCounters {
  uint64_t instructions = 0;  // warp accesses
  uint64_t bytes = 0;         // asked for by the lanes
  uint64_t sectors = 0;       // 32-byte sectors, each once per warp access
};

struct Counters {
  SpaceCounters global_read, global_write;
  // Distinct 32-byte sectors of the whole launch: the traffic that no cache can save.
  std::unordered_set<uint64_t> read_sectors, written_sectors;
  // Shared memory: passes over the banks, and the minimum for the same words.
  uint64_t shared_reads = 0, shared_writes = 0;
  uint64_t shared_read_wavefronts = 0, shared_read_ideal = 0;
  uint64_t shared_write_wavefronts = 0, shared_write_ideal = 0;
  uint64_t instructions = 0;  // of warps, under `engine=ptx`
  uint64_t mma = 0, ldmatrix = 0, shuffles = 0, block_barriers = 0, warp_barriers = 0, copies = 0,
           atomics = 0;

  void add(const Counters& other);
  // Adds what the lanes of one warp have logged since they last met.
  void warp_met(std::vector<Logged>* const* logs, uint32_t lanes);
};

struct Launch;
// One line of JSON.
std::string counters_json(const Launch& launch);

}  // namespace standin
