// A communicator: shared memory of one machine, named by the id, and the operations on it.
//
// Every rank has a seat with its process, what it calls, and how many pieces of data it has given and read. Data
// travels in pieces through the seats, messages of two ranks through a channel for each pair. Nothing blocks: an
// operation looks whether the others are far enough, and comes again (`Task::start`).
#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../runtime/driver.h"

namespace standin {

// ncclResult_t
enum Result {
  kOk,
  kCudaError,
  kSystemError,
  kInternalError,
  kInvalidArgument,
  kInvalidUsage,
  kRemoteError,
  kInProgress
};

enum class Verb : int { all_reduce, reduce, reduce_scatter, all_gather, broadcast, send, receive };

constexpr int kMostRanks = 16, kMostSplits = 16;
constexpr size_t kPiece = 1 << 20, kMessage = 256 << 10;

// One operation of a group.
struct Collective {
  Verb call;
  const char* send;
  char* receive;
  uint64_t count;
  int type, op;
  int root;  // or the other rank
  const char* name() const;
  uint64_t bytes_in(int ranks) const;
  uint64_t bytes_out(int rank, int ranks) const;
};

// What a rank calls, for the others to compare with.
struct Shape {
  int call, type, op, root;
  uint64_t count;
};

struct Seat {
  std::atomic<int> pid, joined, left, bus, size;
  std::atomic<uint64_t> operations;  // begun
  std::atomic<uint64_t> given, read;  // pieces
  Shape shape;                        // of the collective whose pieces are given
  struct {
    std::atomic<int> asked;
    int color, key;
  } split[kMostSplits];
};

struct Channel {
  std::atomic<uint64_t> given, taken;
  uint64_t bytes;  // of the whole message
  char data[kMessage];
};

struct Segment {
  std::atomic<int> error, failed;  // the first rank's error that all hear of; its number + 1
  Seat seat[kMostRanks];
  char data[kMostRanks][kPiece];
  Channel channel[kMostRanks][kMostRanks];  // from, to
};

size_t size_of(int type);
// Adds or compares the values of all ranks, in the order of ranks.
void reduce(const Segment& shared, int ranks, int type, int op, size_t bytes, char* out);

struct Comm {
  std::string name;
  int rank = 0, ranks = 0;
  Segment* shared = nullptr;
  Primary* context = nullptr;
  bool ready = false, blocking = true, finalized = false;
  const char* ended_by = nullptr;
  int async = kInProgress;
  std::string why;  // the last error, in words
  uint64_t issued = 0, finished = 0, pieces = 0, splits = 0;
  int progress = 0;                            // polls until `pending` is submitted
  std::vector<std::function<int()>> pending;   // calls that are in progress
  std::function<bool()> joins;                 // until it returns true, the communicator is being made
  std::shared_ptr<int> graphs = std::make_shared<int>(0);  // held by operations in graphs
  double last_look = 0;

  // Lets what is in progress go on, and looks after the others. The state as ncclCommGetAsyncError gives it.
  int poll();
  // The error of this communicator, with its reason, for all later calls.
  int fail(int result, const std::string& reason);
  // The same for an operation: its context breaks, too.
  Advance break_off(const Running& running, int result, const std::string& reason);
  // A rank that can never come; `why` says so.
  bool is_gone(int r, std::string* why) const;
  // What operation `number` of this rank is to do wrong, by the option; empty: nothing.
  std::string fault(uint64_t number) const;
};

// Queues the operations of one group of calls on a stream. A driver's code.
int enqueue(const std::shared_ptr<Comm>& comm, Stream* stream, std::vector<Collective> calls);

double monotonic();

}  // namespace standin
