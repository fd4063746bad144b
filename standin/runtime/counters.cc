#include "counters.h"

#include "block.h"

namespace standin {

void Counters::add(const Counters& o) {
  auto sum = [](SpaceCounters& a, const SpaceCounters& b) {
    a.instructions += b.instructions;
    a.bytes += b.bytes;
    a.sectors += b.sectors;
  };
  sum(global_read, o.global_read);
  sum(global_write, o.global_write);
  read_sectors.insert(o.read_sectors.begin(), o.read_sectors.end());
  written_sectors.insert(o.written_sectors.begin(), o.written_sectors.end());
  shared_reads += o.shared_reads;
  shared_writes += o.shared_writes;
  shared_read_wavefronts += o.shared_read_wavefronts;
  shared_read_ideal += o.shared_read_ideal;
  shared_write_wavefronts += o.shared_write_wavefronts;
  shared_write_ideal += o.shared_write_ideal;
  instructions += o.instructions;
  mma += o.mma;
  ldmatrix += o.ldmatrix;
  shuffles += o.shuffles;
  block_barriers += o.block_barriers;
  warp_barriers += o.warp_barriers;
  copies += o.copies;
  atomics += o.atomics;
}

namespace {

// Passes over the 32 banks for one warp access, and the minimum for its distinct words. Lanes are grouped: 32 for
// accesses of up to 4 bytes, 16 for 8, 8 for 16 (and for the rows of ldmatrix).
void count_wavefronts(const Logged* const* lanes, uint32_t count, uint64_t* wavefronts, uint64_t* ideal) {
  uint32_t together = lanes[0]->size <= 4 ? 32 : lanes[0]->size == 8 ? 16 : 8;
  for (uint32_t start = 0; start < count; start += together) {
    uint32_t end = start + together < count ? start + together : count;
    uint32_t words[128], distinct = 0, per_bank[32] = {};
    for (uint32_t l = start; l < end; ++l) {
      uint32_t first = static_cast<uint32_t>(lanes[l]->address / 4);
      uint32_t last = static_cast<uint32_t>((lanes[l]->address + lanes[l]->size - 1) / 4);
      for (uint32_t w = first; w <= last; ++w) {
        bool known = false;
        for (uint32_t i = 0; i < distinct; ++i) known |= words[i] == w;
        if (known || distinct == 128) continue;
        words[distinct++] = w;
        ++per_bank[w % 32];
      }
    }
    uint32_t most = 0;
    for (uint32_t n : per_bank) most = n > most ? n : most;
    *wavefronts += most;
    *ideal += (distinct + 31) / 32;
  }
}

}  // namespace

void Counters::warp_met(std::vector<Logged>* const* logs, uint32_t lanes) {
  // The k-th access of each lane at one place in the code is one access of the warp. Lanes mostly agree on the order;
  // lanes that took another path are included when their own first access comes.
  size_t at[32] = {};
  for (;;) {
    const Logged* leader = nullptr;
    for (uint32_t l = 0; l < lanes && !leader; ++l) {
      if (at[l] < logs[l]->size()) leader = &(*logs[l])[at[l]];
    }
    if (!leader) break;
    const Logged* group[32];
    uint32_t count = 0;
    for (uint32_t l = 0; l < lanes; ++l) {
      if (at[l] >= logs[l]->size()) continue;
      const Logged& a = (*logs[l])[at[l]];
      if (a.pc != leader->pc || a.shared != leader->shared || a.write != leader->write ||
          a.size != leader->size)
        continue;
      group[count++] = &a;
      ++at[l];
    }
    if (leader->shared) {
      ++(leader->write ? shared_writes : shared_reads);
      count_wavefronts(group, count, leader->write ? &shared_write_wavefronts : &shared_read_wavefronts,
                       leader->write ? &shared_write_ideal : &shared_read_ideal);
      continue;
    }
    SpaceCounters& space = leader->write ? global_write : global_read;
    std::unordered_set<uint64_t>& all = leader->write ? written_sectors : read_sectors;
    ++space.instructions;
    uint64_t seen[64];
    uint32_t distinct = 0;
    for (uint32_t i = 0; i < count; ++i) {
      space.bytes += group[i]->size;
      for (uint64_t s = group[i]->address / 32; s <= (group[i]->address + group[i]->size - 1) / 32; ++s) {
        bool known = false;
        for (uint32_t k = 0; k < distinct; ++k) known |= seen[k] == s;
        if (known || distinct == 64) continue;
        seen[distinct++] = s;
        all.insert(s);
      }
    }
    space.sectors += distinct;
  }
  for (uint32_t l = 0; l < lanes; ++l) logs[l]->clear();
}

std::string counters_json(const Launch& launch) {
  const Counters& c = launch.counters;
  auto n = [](uint64_t v) { return static_cast<unsigned long long>(v); };
  return format(
      "{\"kernel\":\"%s\",\"launch\":%llu,\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared_bytes\":%u,"
      "\"global_read\":{\"instructions\":%llu,\"bytes\":%llu,\"sectors\":%llu,\"unique_sectors\":%llu},"
      "\"global_write\":{\"instructions\":%llu,\"bytes\":%llu,\"sectors\":%llu,\"unique_sectors\":%llu},"
      "\"shared_read\":{\"instructions\":%llu,\"wavefronts\":%llu,\"ideal\":%llu},"
      "\"shared_write\":{\"instructions\":%llu,\"wavefronts\":%llu,\"ideal\":%llu},"
      "\"instructions\":%llu,\"mma\":%llu,\"ldmatrix\":%llu,\"shuffles\":%llu,\"block_barriers\":%llu,\"warp_barriers\":%llu,"
      "\"async_copies\":%llu,\"atomics\":%llu}",
      launch.kernel->bound.name, n(launch.number), launch.grid.x, launch.grid.y, launch.grid.z,
      launch.block.x, launch.block.y, launch.block.z, launch.shared_bytes, n(c.global_read.instructions),
      n(c.global_read.bytes), n(c.global_read.sectors), n(c.read_sectors.size()),
      n(c.global_write.instructions), n(c.global_write.bytes), n(c.global_write.sectors),
      n(c.written_sectors.size()), n(c.shared_reads), n(c.shared_read_wavefronts), n(c.shared_read_ideal),
      n(c.shared_writes), n(c.shared_write_wavefronts), n(c.shared_write_ideal), n(c.instructions), n(c.mma), n(c.ldmatrix),
      n(c.shuffles), n(c.block_barriers), n(c.warp_barriers), n(c.copies), n(c.atomics));
}

}  // namespace standin
