// What a queued group of calls does when its turn comes, part by part.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../runtime/options.h"
#include "../runtime/report.h"
#include "comm.h"

namespace standin {

double monotonic() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

const char* Collective::name() const {
  static const char* const names[] = {"ncclAllReduce", "ncclReduce", "ncclReduceScatter", "ncclAllGather",
                                      "ncclBroadcast", "ncclSend",   "ncclRecv"};
  return names[static_cast<int>(call)];
}

uint64_t Collective::bytes_in(int ranks) const {
  uint64_t bytes = count * size_of(type);
  if (call == Verb::receive) return 0;
  return call == Verb::reduce_scatter ? bytes * static_cast<uint64_t>(ranks) : bytes;
}

uint64_t Collective::bytes_out(int rank, int ranks) const {
  uint64_t bytes = count * size_of(type);
  if (call == Verb::send || (call == Verb::reduce && rank != root)) return 0;
  return call == Verb::all_gather ? bytes * static_cast<uint64_t>(ranks) : bytes;
}

namespace {

std::string in_words(const Shape& s) {
  Collective c{static_cast<Verb>(s.call), nullptr, nullptr, s.count, s.type, s.op, s.root};
  return format("%s of %llu elements of type %d (op %d, root %d)", c.name(),
                static_cast<unsigned long long>(s.count), s.type, s.op, s.root);
}

// A group under way.
struct Group {
  std::shared_ptr<Comm> comm;
  std::shared_ptr<const std::vector<Collective>> calls;
  uint64_t number;  // of the communicator's operations, from 1
  bool begun = false, hangs = false;
  std::string fault;
  size_t next = 0;                // of the collectives
  uint64_t at = 0;                // bytes of it that are done
  int share = 0;                  // of a reduce-scatter: whose part
  bool given = false;             // this rank's piece
  std::vector<uint64_t> message;  // per call: bytes of a message that are done
  std::vector<bool> offered;      // per call: the last piece of a send has not been taken yet
  double since = 0;               // it waits

  Advance advance(const Running& running);
  Advance begin(const Running& running);
  // The next piece of the collective `next`.
  Advance collective(const Running& running);
  // Messages that can go on.
  Advance messages(const Running& running);
  Advance wait_for(const Running& running, int other, const char* doing);
  void flip_a_bit();
};

bool is_message(const Collective& c) {
  return c.call == Verb::send || c.call == Verb::receive;
}

Advance Group::begin(const Running& running) {
  Comm& c = *comm;
  begun = true;
  message.resize(calls->size());
  offered.resize(calls->size());
  fault = c.fault(number);
  if (fault == "die") kill(getpid(), SIGKILL);
  if (fault == "hang") {
    publish({0, format("nccl: rank %d hangs in operation %llu, on demand", c.rank,
                       static_cast<unsigned long long>(number))});
    hangs = true;
    return Advance::blocked;
  }
  if (fault == "error") {
    c.shared->failed = c.rank + 1;
    c.shared->error = kRemoteError;
    return c.break_off(running, kSystemError, format("operation %llu fails on demand", static_cast<unsigned long long>(number)));
  }
  c.shared->seat[c.rank].operations = number;
  for (const Collective& call : *calls) {
    auto in = reinterpret_cast<uint64_t>(call.send), out = reinterpret_cast<uint64_t>(call.receive);
    bool reads = call.call != Verb::broadcast || c.rank == call.root;
    int code = reads ? touch(running, in, call.bytes_in(c.ranks), Access::read, call.name()) : 0;
    if (!code) code = touch(running, out, call.bytes_out(c.rank, c.ranks), Access::write, call.name());
    if (code) {
      c.fail(kCudaError, "an operation reads or writes what it must not");
      fail_sticky(running, code);
      return Advance::done;
    }
  }
  return Advance::moved;
}

Advance Group::wait_for(const Running& running, int other, const char* doing) {
  Comm& c = *comm;
  double now = monotonic();
  if (since == 0) since = now;
  if (c.shared->error && c.async == kOk) {
    c.fail(kRemoteError, format("rank %d has failed", c.shared->failed.load() - 1));
  }
  std::string gone;
  if (c.async == kOk && now - c.last_look > 0.02) {
    c.last_look = now;
    if (c.is_gone(other, &gone)) {
      c.fail(kRemoteError, format("rank %d waits in %s for rank %d, which %s", c.rank, doing, other, gone.c_str()));
    }
  }
  uint64_t limit = options().nccl_timeout;
  if (limit && now - since > static_cast<double>(limit)) {
    const Seat& seat = c.shared->seat[other];
    std::string reason = format(
        "rank %d waits in %s for rank %d, which has not come within %llu s (it is at operation %llu, we are at %llu)",
        c.rank, doing, other, static_cast<unsigned long long>(limit),
        static_cast<unsigned long long>(seat.operations.load()), static_cast<unsigned long long>(number));
    return c.break_off(running, c.async == kOk ? kInternalError : c.async, reason);
  }
  return Advance::blocked;
}

Advance Group::collective(const Running& running) {
  Comm& c = *comm;
  const Collective& call = (*calls)[next];
  Segment& shared = *c.shared;
  Seat& own = shared.seat[c.rank];
  uint64_t part = call.count * size_of(call.type);
  uint64_t bytes = part - at < kPiece ? part - at : kPiece;
  if (!given) {
    // The last piece lies in the same place until everyone has read it.
    for (int r = 0; r < c.ranks; ++r) {
      if (shared.seat[r].read.load() < c.pieces) return wait_for(running, r, call.name());
    }
    own.shape = {static_cast<int>(call.call), call.type, call.op, call.root, call.count};
    if (call.call != Verb::broadcast || c.rank == call.root) {
      uint64_t from = call.call == Verb::reduce_scatter ? static_cast<uint64_t>(share) * part + at : at;
      if (bytes) memcpy(shared.data[c.rank], call.send + from, bytes);
    }
    own.given = c.pieces + 1;
    given = true;
    since = 0;
    return Advance::moved;
  }
  for (int r = 0; r < c.ranks; ++r) {
    if (shared.seat[r].given.load() <= c.pieces) return wait_for(running, r, call.name());
    const Shape &theirs = shared.seat[r].shape, &ours = own.shape;
    if (memcmp(&theirs, &ours, sizeof theirs)) {
      shared.failed = c.rank + 1;
      shared.error = kRemoteError;
      return c.break_off(
          running, kInvalidUsage,
          format("operation %llu differs: rank %d calls %s, rank %d %s; a real communicator would hang or mix them up",
                 static_cast<unsigned long long>(number), c.rank, in_words(ours).c_str(), r,
                 in_words(theirs).c_str()));
    }
  }
  char* out = call.receive;
  if (bytes) {
    switch (call.call) {
      case Verb::all_gather:
        for (int r = 0; r < c.ranks; ++r) memcpy(out + static_cast<uint64_t>(r) * part + at, shared.data[r], bytes);
        break;
      case Verb::broadcast: memcpy(out + at, shared.data[call.root], bytes); break;
      case Verb::reduce_scatter:
        if (share == c.rank) reduce(shared, c.ranks, call.type, call.op, bytes, out + at);
        break;
      case Verb::reduce:
        if (call.root == c.rank) reduce(shared, c.ranks, call.type, call.op, bytes, out + at);
        break;
      default: reduce(shared, c.ranks, call.type, call.op, bytes, out + at);
    }
  }
  own.read = ++c.pieces;
  given = false;
  since = 0;
  at += bytes;
  if (at < part) return Advance::moved;
  at = 0;
  if (call.call == Verb::reduce_scatter && ++share < c.ranks) return Advance::moved;
  share = 0;
  ++next;
  return Advance::moved;
}

Advance Group::messages(const Running& running) {
  Comm& c = *comm;
  Advance all = Advance::done;
  int other = -1;
  const char* doing = "";
  for (size_t i = 0; i < calls->size(); ++i) {
    const Collective& call = (*calls)[i];
    uint64_t bytes = call.count * size_of(call.type);
    bool sends = call.call == Verb::send;
    if (!is_message(call) || (message[i] == bytes && !offered[i] && bytes)) continue;
    // Messages of one pair follow each other.
    bool first = true;
    for (size_t j = 0; j < i; ++j) {
      const Collective& before = (*calls)[j];
      bool open = message[j] < before.count * size_of(before.type) || offered[j];
      if (before.call == call.call && before.root == call.root && open) first = false;
    }
    if (!first || !bytes) continue;
    Channel& channel = sends ? c.shared->channel[c.rank][call.root] : c.shared->channel[call.root][c.rank];
    uint64_t here = channel.given.load() - channel.taken.load();
    uint64_t size = bytes - message[i] < kMessage ? bytes - message[i] : kMessage;
    if (sends && offered[i] && !here) {
      offered[i] = false;
      all = Advance::moved;
      if (message[i] == bytes) continue;
    }
    if (sends ? offered[i] : !here) {
      if (all == Advance::done) all = Advance::blocked;
      other = call.root;
      doing = call.name();
      continue;
    }
    if (sends) {
      channel.bytes = bytes;
      memcpy(channel.data, call.send + message[i], size);
      channel.given = channel.given.load() + 1;
      offered[i] = true;
    } else {
      if (channel.bytes != bytes) {
        c.shared->failed = c.rank + 1;
        c.shared->error = kRemoteError;
        return c.break_off(running, kInvalidUsage,
                           format("rank %d receives %llu bytes from rank %d, which sends %llu", c.rank,
                                  static_cast<unsigned long long>(bytes), call.root,
                                  static_cast<unsigned long long>(channel.bytes)));
      }
      memcpy(call.receive + message[i], channel.data, size);
      channel.taken = channel.taken.load() + 1;
    }
    message[i] += size;
    all = Advance::moved;
  }
  if (all == Advance::moved) since = 0;
  return all == Advance::blocked ? wait_for(running, other, doing) : all;
}

void Group::flip_a_bit() {
  for (const Collective& call : *calls) {
    uint64_t bytes = call.bytes_out(comm->rank, comm->ranks);
    if (bytes) call.receive[bytes / 2] = static_cast<char>(call.receive[bytes / 2] ^ 1);
  }
}

Advance Group::advance(const Running& running) {
  Comm& c = *comm;
  if (hangs) return Advance::blocked;
  if (!begun) {
    // Operations of one communicator run in the order of their calls, on whatever streams.
    if (c.finished + 1 != number) return Advance::blocked;
    if (c.async != kOk && c.async != kInProgress) return wait_for(running, c.rank, "a communicator that has failed");
    return begin(running);
  }
  while (next < calls->size() && is_message((*calls)[next])) ++next;
  if (next < calls->size()) return collective(running);
  Advance state = messages(running);
  if (state != Advance::done) return state;
  if (fault == "flip") flip_a_bit();
  c.finished = number;
  return Advance::done;
}

}  // namespace

int enqueue(const std::shared_ptr<Comm>& comm, Stream* stream, std::vector<Collective> calls) {
  bool captured = stream->capture != nullptr;
  std::shared_ptr<int> held = captured ? comm->graphs : nullptr;  // lives as long as the graph
  auto shared = std::make_shared<const std::vector<Collective>>(std::move(calls));
  Task task;
  task.what = shared->front().name();
  for (const Collective& c : *shared) task.bytes += c.bytes_in(comm->ranks) + c.bytes_out(comm->rank, comm->ranks);
  task.start = [comm, held, shared] {
    auto group = std::make_shared<Group>();
    group->comm = comm;
    group->calls = shared;
    group->number = ++comm->issued;
    return [group](const Running& running) { return group->advance(running); };
  };
  return submit(stream, std::move(task));
}

}  // namespace standin
