// NCCL, the part that data-parallel training needs: libnccl.so.2's own names, structs and refusals, for processes on
// one machine.
//
// Names and numbers follow NVIDIA's NCCL documentation (2.27). A call that a real communicator would hang in, or mix up
// with another, is refused where it is noticed.
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "../runtime/options.h"
#include "../runtime/report.h"
#include "comm.h"

using namespace standin;

namespace {

struct Id {
  char bytes[128];
};

// ncclConfig_t of 2.17: later versions append to it, and read no more than `size`.
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster, min_ctas, max_ctas;
  const char* network;
};

// Communicators by their handles, which are never given away again.
std::map<const void*, std::shared_ptr<Comm>>& communicators() {
  static auto* all = new std::map<const void*, std::shared_ptr<Comm>>;
  return *all;
}

struct Grouped {
  std::shared_ptr<Comm> comm;
  Stream* stream;
  Collective call;
};
thread_local int group_depth = 0;
thread_local std::vector<Grouped> group;
std::string last_error;

int refuse(int result, const std::string& why) {
  last_error = why;
  publish({0, "nccl: " + why});
  return result;
}

std::shared_ptr<Comm> find(const void* handle) {
  auto found = communicators().find(handle);
  if (found == communicators().end()) return nullptr;
  if (found->second->ended_by)
    misuse(format("a communicator that %s has ended", found->second->ended_by));
  return found->second;
}

// Whether a process still runs. One that has ended and was not waited for does not.
bool runs(int pid) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* file = fopen(path, "r");
  if (!file) return false;
  size_t n = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[n] = 0;
  const char* state = strrchr(text, ')');
  return state && state[1] && state[2] != 'Z' && state[2] != 'X';
}

int open_segment(Comm& c) {
  int fd = shm_open(c.name.c_str(), O_RDWR | O_CREAT, 0600);
  if (fd < 0) return refuse(kSystemError, format("%s: %s", c.name.c_str(), strerror(errno)));
  void* at = ftruncate(fd, sizeof(Segment)) ? MAP_FAILED
                                            : mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return refuse(kSystemError, format("%s: %s", c.name.c_str(), strerror(errno)));
  c.shared = static_cast<Segment*>(at);
  return kOk;
}

// Takes this rank's seat. `c.poll()` then waits for the others.
int take_seat(Comm& c) {
  std::string fault = c.fault(0);
  if (fault == "die") kill(getpid(), SIGKILL);
  if (fault == "hang") {
    c.joins = [] { return false; };
    return kOk;
  }
  if (int code = open_segment(c)) return code;
  Seat& own = c.shared->seat[c.rank];
  if (own.joined.exchange(1)) return refuse(kInvalidUsage, format("rank %d has already joined", c.rank));
  own.pid = getpid();
  own.bus = options().bus + c.context->card + 1;
  own.size = c.ranks;
  c.joins = [&c] {
    for (int r = 0; r < c.ranks; ++r) {
      const Seat& seat = c.shared->seat[r];
      if (!seat.size.load()) return false;
      if (seat.size.load() != c.ranks) {
        c.fail(kInvalidArgument, format("rank %d joins %d ranks, rank %d %d", c.rank, c.ranks, r, seat.size.load()));
        return true;
      }
      if (r != c.rank && seat.bus.load() == c.shared->seat[c.rank].bus.load()) {
        c.fail(kInvalidUsage, format("duplicate GPU: rank %d and rank %d both on bus %d", c.rank, r, seat.bus.load() - 1));
        return true;
      }
    }
    // Everybody has opened it.
    if (c.rank == 0) shm_unlink(c.name.c_str());
    return true;
  };
  return kOk;
}

// Finishes a blocking call; of a non-blocking one, the others are waited for by polling.
int settle_making(Comm& c) {
  if (!c.blocking) return kInProgress;
  double start = monotonic();
  while (c.poll() == kInProgress) {
    if (options().nccl_timeout && monotonic() - start > static_cast<double>(options().nccl_timeout))
      return c.fail(kSystemError, "not all ranks have joined");
    machine().lock.pause(200);
  }
  return c.async;
}

int read_config(const Config* config, bool* blocking) {
  *blocking = true;
  if (!config) return kOk;
  if (config->magic != 0xcafebeef) return refuse(kInvalidArgument, "a config that was not initialised");
  if (config->size < sizeof(Config)) return refuse(kInvalidArgument, format("a config of %zu bytes", config->size));
  if (config->version < 21700 || config->version > 30000)
    return refuse(kInvalidArgument, format("a config of version %u", config->version));
  if (config->blocking != INT_MIN && config->blocking != 0 && config->blocking != 1)
    return refuse(kInvalidArgument, format("blocking is %d", config->blocking));
  for (int ctas : {config->cga_cluster, config->min_ctas, config->max_ctas}) {
    if (ctas != INT_MIN && ctas < 0) return refuse(kInvalidArgument, format("%d in a config", ctas));
  }
  *blocking = config->blocking != 0;
  return kOk;
}

// Submits the calls of a group: those of one communicator are one operation.
int submit_group(std::vector<Grouped> calls) {
  const Capture* capture = nullptr;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Capture* own = calls[i].stream->capture.get();
    if (i && own != capture) return refuse(kInvalidUsage, "a group that is captured in part, or by several graphs");
    capture = own;
  }
  int worst = kOk;
  while (!calls.empty()) {
    Grouped first = calls.front();
    std::vector<Collective> own;
    std::vector<Grouped> rest;
    for (Grouped& g : calls) {
      if (g.comm != first.comm) {
        rest.push_back(g);
        continue;
      }
      if (g.stream != first.stream) return refuse(kInvalidUsage, "a group with one communicator on two streams");
      own.push_back(g.call);
    }
    calls = std::move(rest);
    int ranks = first.comm->ranks, rank = first.comm->rank;
    for (size_t i = 0; i < own.size(); ++i) {
      for (size_t j = 0; j < own.size(); ++j) {
        auto out = reinterpret_cast<uint64_t>(own[i].receive), out_end = out + own[i].bytes_out(rank, ranks);
        auto in = reinterpret_cast<uint64_t>(own[j].send), in_end = in + own[j].bytes_in(ranks);
        auto out2 = reinterpret_cast<uint64_t>(own[j].receive), out2_end = out2 + own[j].bytes_out(rank, ranks);
        bool over = (out < in_end && in < out_end) || (out < out2_end && out2 < out_end);
        if (i != j && over)
          return refuse(kInvalidUsage, format("%s writes what %s of the same group uses", own[i].name(), own[j].name()));
      }
    }
    std::shared_ptr<Comm> comm = first.comm;
    Stream* stream = first.stream;
    auto go = [comm, stream, own] {
      int code = enqueue(comm, stream, own);
      if (!code) return static_cast<int>(kOk);
      return comm->async == kOk || comm->async == kInProgress
                 ? comm->fail(kCudaError, format("%s: the driver's code %d", own.front().name(), code))
                 : comm->async;
    };
    if (!comm->blocking && options().nccl_progress) {
      comm->pending.push_back(go);
      comm->progress = options().nccl_progress;
      comm->async = kInProgress;
      worst = std::max<int>(worst, kInProgress);
    } else {
      worst = std::max(worst, go());
    }
  }
  return worst;
}

int call(const void* handle, Collective c, void* stream) {
  std::shared_ptr<Comm> comm = find(handle);
  if (!comm) return refuse(kInvalidArgument, "no communicator");
  if (comm->poll() == kInProgress)
    return refuse(kInvalidArgument, "a communicator on which an earlier call is still in progress");
  if (comm->async != kOk) return comm->async;
  if (comm->finalized) return refuse(kInvalidUsage, "a communicator that was finalized");
  if (!size_of(c.type)) return refuse(kInvalidArgument, format("type %d", c.type));
  if (c.op < 0 || c.op > 4) return refuse(kInvalidArgument, format("reduction %d", c.op));
  if (c.root < 0 || c.root >= comm->ranks) return refuse(kInvalidArgument, format("rank %d", c.root));
  bool message = c.call == Verb::send || c.call == Verb::receive;
  if (message && c.root == comm->rank && !group_depth)
    return refuse(kInvalidUsage, "a message to oneself outside a group");
  Stream* s;
  if (find_stream(stream, &s)) return kCudaError;
  if (s->context != comm->context) misuse("a communicator of one GPU with a stream of another");
  auto in = reinterpret_cast<uint64_t>(c.send), out = reinterpret_cast<uint64_t>(c.receive);
  uint64_t bytes = c.count * size_of(c.type), ins = c.bytes_in(comm->ranks),
           outs = c.bytes_out(comm->rank, comm->ranks), own = bytes * static_cast<uint64_t>(comm->rank);
  if ((ins && !in) || (outs && !out)) return refuse(kInvalidArgument, format("%s of a null pointer", c.name()));
  for (uint64_t at : {ins ? in : 0, outs ? out : 0}) {
    if (!at) continue;
    refuse_foreign(at, *s->context);
    if (at % size_of(c.type)) return refuse(kInvalidArgument, format("%s of a misaligned pointer", c.name()));
  }
  uint64_t in_place = c.call == Verb::reduce_scatter ? in + own : c.call == Verb::all_gather ? in - own : in;
  if (in < out + outs && out < in + ins && out != in_place)
    return refuse(kInvalidArgument, format("%s in place at the wrong offset", c.name()));
  if (group_depth) {
    group.push_back({comm, s, c});
    return kOk;
  }
  return submit_group({{comm, s, c}});
}

}  // namespace

namespace standin {

int Comm::fail(int result, const std::string& reason) {
  async = result;
  why = last_error = reason;
  publish({0, "nccl: " + reason});
  return result;
}

Advance Comm::break_off(const Running& running, int result, const std::string& reason) {
  fail(result, reason);
  fail_sticky(running, 719);
  return Advance::done;
}

bool Comm::is_gone(int r, std::string* gone) const {
  const Seat& seat = shared->seat[r];
  if (seat.left.load()) *gone = "has destroyed its communicator";
  else if (seat.pid.load() && !runs(seat.pid.load())) *gone = "is dead";
  return !gone->empty();
}

std::string Comm::fault(uint64_t number) const {
  const std::string& all = options().nccl_fault;
  for (size_t at = 0; at < all.size();) {
    size_t end = std::min(all.find('+', at), all.size());
    int who;
    unsigned long long which;
    char what[16];
    if (sscanf(all.substr(at, end - at).c_str(), "%d:%llu:%15[a-z]", &who, &which, what) == 3 && who == rank &&
        which == number)
      return what;
    at = end + 1;
  }
  return "";
}

int Comm::poll() {
  if (joins) {
    if (joins()) {
      joins = nullptr;
      if (async == kInProgress) async = kOk;
    }
  } else if (!pending.empty() && --progress <= 0) {
    async = kOk;
    std::vector<std::function<int()>> now = std::move(pending);
    pending.clear();
    for (auto& go : now) go();
  }
  if (async == kOk && shared && shared->error && shared->failed.load() != rank + 1)
    fail(kRemoteError, format("rank %d has failed", shared->failed.load() - 1));
  if (async == kOk && shared && monotonic() - last_look > 0.02) {
    last_look = monotonic();
    std::string gone;
    for (int r = 0; r < ranks; ++r) {
      if (r != rank && !shared->seat[r].left.load() && is_gone(r, &gone))
        return fail(kRemoteError, format("rank %d: rank %d %s", rank, r, gone.c_str()));
    }
  }
  return async;
}

}  // namespace standin

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER                                  \
  std::lock_guard<Lock> guard(machine().lock); \
  Call entered(__func__)
// Defines `c`, the communicator of a handle.
#define ENTER_COMM(handle)                    \
  ENTER;                                      \
  std::shared_ptr<Comm> c = find(handle);     \
  if (!c) return refuse(kInvalidArgument, "no communicator")

// ---- communicators ----------------------------------------------------------------------------------------

API ncclGetVersion(int* version) {
  if (!version) return kInvalidArgument;
  *version = options().nccl;
  return kOk;
}
API ncclGetUniqueId(Id* id) {
  if (!id) return kInvalidArgument;
  static std::atomic<unsigned> count{0};
  memset(id, 0, sizeof *id);
  snprintf(id->bytes, sizeof id->bytes, "/vitrum-standin-nccl-%d-%u-%llx", getpid(), ++count,
           static_cast<unsigned long long>(monotonic() * 1e9));
  return kOk;
}
API ncclCommInitRankConfig(void** out, int ranks, Id id, int rank, const Config* config) {
  ENTER;
  if (!out) return kInvalidArgument;
  *out = nullptr;
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks)
    return refuse(kInvalidArgument, format("rank %d of %d", rank, ranks));
  Primary* context;
  if (current_context(&context)) return refuse(kCudaError, "no context is current");
  auto c = std::make_shared<Comm>();
  if (int code = read_config(config, &c->blocking)) return code;
  c->rank = rank;
  c->ranks = ranks;
  c->context = context;
  c->name.assign(id.bytes, strnlen(id.bytes, sizeof id.bytes));
  if (c->name.compare(0, 21, "/vitrum-standin-nccl-") != 0) return refuse(kInvalidArgument, "an id that is none");
  if (int code = take_seat(*c)) return code;
  communicators()[c.get()] = c;
  *out = c.get();
  return settle_making(*c);
}
API ncclCommInitRank(void** out, int ranks, Id id, int rank) {
  return ncclCommInitRankConfig(out, ranks, id, rank, nullptr);
}
API ncclCommSplit(const void* handle, int color, int key, void** out, const Config* config) {
  ENTER_COMM(handle);
  if (!out || color < -1) return kInvalidArgument;
  *out = nullptr;
  if (c->poll() != kOk) return c->async == kInProgress ? refuse(kInvalidArgument, "an earlier call is in progress") : c->async;
  auto part = std::make_shared<Comm>();
  bool blocking;
  if (int code = read_config(config, &blocking)) return code;
  part->blocking = config ? blocking : c->blocking;
  if (c->splits == kMostSplits) return refuse(kInvalidUsage, "too many splits");
  uint64_t round = c->splits++;
  auto& own = c->shared->seat[c->rank].split[round];
  own.color = color;
  own.key = key;
  own.asked = 1;
  part->context = c->context;
  Comm* p = part.get();
  part->joins = [c, p, round, color] {
    std::vector<std::pair<int, int>> members;  // key, rank
    for (int r = 0; r < c->ranks; ++r) {
      auto& split = c->shared->seat[r].split[round];
      if (!split.asked.load()) return false;
      if (split.color == color) members.push_back({split.key, r});
    }
    if (color == -1) return true;
    std::sort(members.begin(), members.end());
    p->ranks = static_cast<int>(members.size());
    for (size_t i = 0; i < members.size(); ++i) {
      if (members[i].second == c->rank) p->rank = static_cast<int>(i);
    }
    p->name = format("%s-%llu-%d", c->name.c_str(), static_cast<unsigned long long>(round), color);
    // Replaces this function, which runs.
    auto keep = std::move(p->joins);
    if (int code = take_seat(*p)) p->fail(code, "a part of a communicator cannot be made");
    return p->joins == nullptr;
  };
  if (color != -1) {
    communicators()[p] = part;
    *out = p;
  }
  return settle_making(*p);
}
API ncclCommGetAsyncError(const void* handle, int* error) {
  ENTER_COMM(handle);
  if (!error) return kInvalidArgument;
  *error = c->poll();
  return kOk;
}
API ncclCommCount(const void* handle, int* count) {
  ENTER_COMM(handle);
  if (c->poll() == kInProgress) return refuse(kInvalidArgument, "a communicator that is still being made");
  *count = c->ranks;
  return kOk;
}
API ncclCommUserRank(const void* handle, int* rank) {
  ENTER_COMM(handle);
  if (c->poll() == kInProgress) return refuse(kInvalidArgument, "a communicator that is still being made");
  *rank = c->rank;
  return kOk;
}
API ncclCommCuDevice(const void* handle, int* device) {
  ENTER_COMM(handle);
  *device = c->context->card;
  return kOk;
}

// Why a communicator must not end now; a real one would not return.
static std::string in_use(const Comm& c) {
  if (c.graphs.use_count() > 1)
    return format("%ld of its operations are in live graphs: the real call would not return", c.graphs.use_count() - 1);
  return "";
}
API ncclCommFinalize(const void* handle) {
  ENTER_COMM(handle);
  if (c->finalized) return refuse(kInvalidArgument, "a communicator that was finalized before");
  if (c->poll() != kOk) return c->async;
  std::string why = in_use(*c);
  if (!why.empty()) return refuse(kInvalidUsage, "ncclCommFinalize: " + why);
  c->finalized = true;
  if (!c->blocking) {
    c->async = kInProgress;
    c->joins = [c = c.get()] { return c->finished == c->issued; };
    return kInProgress;
  }
  return c->finished == c->issued ? static_cast<int>(kOk) : refuse(kInvalidUsage, "operations are still queued");
}
static int end_comm(const std::shared_ptr<Comm>& c, bool abort) {
  std::string why = in_use(*c);
  if (why.empty() && !abort && c->finished != c->issued) why = "operations are still queued";
  if (!why.empty()) return refuse(kInternalError, format("%s: %s", Call::name(), why.c_str()));
  c->ended_by = Call::name();
  if (!c->shared) return kOk;
  if (abort && !c->finalized) {
    c->shared->failed = c->rank + 1;
    c->shared->error = kRemoteError;
  }
  c->shared->seat[c->rank].left = 1;
  return kOk;
}
API ncclCommDestroy(const void* handle) {
  ENTER_COMM(handle);
  if (c->poll() == kInProgress) return refuse(kInvalidArgument, "ncclCommDestroy: an earlier call is in progress");
  return end_comm(c, false);
}
API ncclCommAbort(const void* handle) {
  ENTER_COMM(handle);
  return end_comm(c, true);
}
extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(int result) {
  static const char* const names[] = {"no error",         "unhandled cuda error", "unhandled system error",
                                      "internal error",   "invalid argument",     "invalid usage",
                                      "remote process exited or there was a network error", "in progress"};
  return result >= 0 && result < 8 ? names[result] : "unknown result code";
}
extern "C" __attribute__((visibility("default"))) const char* ncclGetLastError(const void*) {
  return last_error.c_str();
}

// ---- operations -------------------------------------------------------------------------------------------

API ncclGroupStart() {
  ++group_depth;
  return kOk;
}
API ncclGroupEnd() {
  ENTER;
  if (group_depth == 0) return refuse(kInvalidUsage, "ncclGroupEnd without ncclGroupStart");
  if (--group_depth) return kOk;
  std::vector<Grouped> now = std::move(group);
  group.clear();
  return now.empty() ? static_cast<int>(kOk) : submit_group(std::move(now));
}
API ncclAllReduce(const void* from, void* to, size_t count, int type, int op, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::all_reduce, static_cast<const char*>(from), static_cast<char*>(to), count, type, op, 0}, stream);
}
API ncclReduce(const void* from, void* to, size_t count, int type, int op, int root, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::reduce, static_cast<const char*>(from), static_cast<char*>(to), count, type, op, root}, stream);
}
API ncclReduceScatter(const void* from, void* to, size_t count, int type, int op, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::reduce_scatter, static_cast<const char*>(from), static_cast<char*>(to), count, type, op, 0}, stream);
}
API ncclAllGather(const void* from, void* to, size_t count, int type, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::all_gather, static_cast<const char*>(from), static_cast<char*>(to), count, type, 0, 0}, stream);
}
API ncclBroadcast(const void* from, void* to, size_t count, int type, int root, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::broadcast, static_cast<const char*>(from), static_cast<char*>(to), count, type, 0, root}, stream);
}
API ncclSend(const void* from, size_t count, int type, int peer, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::send, static_cast<const char*>(from), nullptr, count, type, 0, peer}, stream);
}
API ncclRecv(void* to, size_t count, int type, int peer, const void* comm, void* stream) {
  ENTER;
  return call(comm, {Verb::receive, nullptr, static_cast<char*>(to), count, type, 0, peer}, stream);
}
