// Agents: what reads and writes shared memory on its own, while the threads that asked for it go on.
//
// They are in the vector clocks like threads. A thread knows an agent's work when it has waited for it, and
// an agent may read what threads wrote when the one who asks knows of the write and of a proxy fence after
// it.
#include "block.h"
#include "ptx/program.h"

namespace standin {

uint32_t Block::agent(Agent kind, uint32_t warp) const {
  uint32_t warps = (threads_ + kLanes - 1) / kLanes;
  switch (kind) {
    case Agent::product: return threads_ + warp;
    case Agent::store: return threads_ + warps + warp;
    case Agent::copy: break;
  }
  return threads_ + 2 * warps;
}

void Block::access_as(uint32_t agent, uint32_t time, uint64_t offset, uint32_t size, bool write, Site site) {
  Fiber& me = *running;
  if (offset > launch->shared_bytes || offset + size > launch->shared_bytes) {
    fail(kIllegalAddress,
         format(
             "out of bounds: %s, asked by %s, %s %u bytes at offset %lld of %u bytes of shared memory at %s",
             who(agent).c_str(), who(me).c_str(), write ? "writes" : "reads", size,
             static_cast<long long>(offset), launch->shared_bytes, place(site).c_str()));
  }
  if (checking_ != Checks::on) return;
  uint32_t at = static_cast<uint32_t>(offset);
  access_shared(at, size, write, nullptr, site, agent, time);
  for (uint32_t g = at / 2; g <= (at + size - 1) / 2; ++g) {
    Cell& cell = cells_[g];
    if (write) {
      cell.flags |= kCellInFlight;
      continue;
    }
    if (cell.writer >= threads_ || !cell.write_time) continue;
    uint32_t fenced = me.clock->time[identities_ + cell.writer];
    if (fenced < cell.write_time) {
      fail(
          kLaunchFailed,
          format(
              "proxy fence: %s reads shared byte %u, which %s has written without a fence.proxy.async since, "
              "at %s",
              who(agent).c_str(), 2 * g, who(cell.writer).c_str(), place(site).c_str()));
    }
  }
}

void Block::land(uint32_t agent, uint32_t time, uint32_t offset, uint32_t size) {
  if (checking_ != Checks::on) return;
  touch(offset, size);
  for (uint32_t g = offset / 2; g <= (offset + size - 1) / 2; ++g) {
    Cell& cell = cells_[g];
    cell.flags = static_cast<uint16_t>((cell.flags & ~kCellInFlight) | kCellWritten);
    cell.writer = static_cast<uint16_t>(agent);
    cell.write_time = time;
  }
}

void Block::learn(uint32_t thread, uint32_t identity, uint32_t time) {
  Fiber& f = fibers_[thread];
  if (f.clock->time[identity] >= time) return;
  Clock* own = clocks_.copy(f.clock, 1);
  own->time[identity] = time;
  clocks_.leave(f.clock);
  f.clock = own;
}

void Block::release(Clock* into) {
  Fiber& f = *running;
  clocks_.join(into, f.clock);
  into->time[f.index] = f.now++;
}

void Block::acquire(const Clock* from) {
  Fiber& f = *running;
  Clock* own = clocks_.copy(f.clock, 1);
  clocks_.join(own, from);
  clocks_.leave(f.clock);
  f.clock = own;
}

void Block::fence_agents() {
  Fiber& f = *running;
  Clock* own = clocks_.copy(f.clock, 1);
  for (uint32_t t = 0; t < threads_; ++t) {
    uint32_t known = t == f.index ? f.now : own->time[t];
    if (own->time[identities_ + t] < known) own->time[identities_ + t] = known;
  }
  ++f.now;  // later writes are not among them
  clocks_.leave(f.clock);
  f.clock = own;
}

}  // namespace standin
