// The settings of `VITRUM_STANDIN=key=value,…` and `standin_configure`: the checks, the schedule, the GPU, the faults.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "export.h"

namespace standin {

enum class Checks : uint8_t {
  off,     // run and compute, look at nothing
  bounds,  // out of bounds and misaligned accesses only
  on,      // also uninitialised reads, races, copies in flight
};

// What runs a kernel.
enum class Engine : uint8_t {
  host,  // the kernel's function, compiled for the host
  ptx,   // the PTX that nvcc made of it
};

// The status that cuBLASLt returns for products of one row or column.
enum class Thin : uint8_t { taken, invalid, unsupported };

// What the heuristic of cuBLASLt finds for a product.
enum class Finding : uint8_t {
  algorithms,
  refusal,  // NOT_SUPPORTED, as documented; cublasLtMatmul refuses likewise
  nothing,  // success without a result
  unfit,    // success with results whose state is NOT_SUPPORTED
};

struct Options {
  Checks checks = Checks::on;
  uint32_t seed = 0;     // 0: threads in order; others: a random but repeatable schedule
  uint32_t defer = 1;    // the seed of the order in which deferred work runs; 0: work runs when it is submitted
  uint32_t threads = 0;  // host threads that run blocks; 0: one per core
  Engine engine = Engine::host;
  std::string ptx;       // the folder of the images and their PTX; empty: target/kernels
  std::string counters;  // a file that gets one JSON line per launch
  std::string order;     // a file that gets one JSON line per kernel and copy: what each comes after
  std::string contexts;  // a file that gets one JSON line per context and cuBLASLt handle: made, destroyed

  // The GPU.
  int cards = 1;
  int capability = 90;
  int multiprocessors = 132;
  int driver = 13000;
  uint64_t memory = 4ull << 30;
  uint64_t gap = 0;  // bytes between allocations, at least: 4 KiB and more of addresses, not of memory
  std::string name = "Vitrum stand-in GPU";
  uint64_t blaslt = 130000;  // cublasLtGetVersion
  int nccl = 22703;          // ncclGetVersion
  int bus = 0;               // the PCI bus of the first GPU; the others follow

  bool truncate = false;  // tensor cores drop what does not fit, instead of rounding it (`truncate.h`)

  // Faults. Counts start at 1; 0: never.
  uint64_t fail_allocation = 0;  // the n-th device allocation finds no memory
  uint64_t fail_launch = 0;      // the n-th launch breaks the context
  int fail_code = 719;           // with this error
  uint64_t fail_pinned = 0;      // the n-th page-locked allocation finds no memory
  int refuse_algorithm = -1;     // AlgoCheck and Matmul refuse this algorithm number
  int algorithms = 100;          // the heuristic finds at most so many
  Finding heuristic = Finding::algorithms;  // what it finds
  std::vector<uint32_t> refused_epilogues;  // it finds nothing for products with these
  int init_code = 0;             // cuInit's answer
  Thin thin = Thin::taken;
  bool split_fault = false;        // splits that do not divide k are summed as a faulty version does
  bool no_split_epilogue = false;  // only plain products are split
  int first_algorithm = -1;        // this algorithm number is offered before all others
  int wrong_algorithm = -1;        // this algorithm number computes half of the sum
  int fail_algorithm = -1;         // this one is found and accepted, and cannot be launched
  int fail_status = 13;            // what cublasLtMatmul says then
  uint64_t slow_epilogue = 1;      // products with more than a bias take so many times as long
  uint64_t slow_kernels = 1;       // and so do kernels
  std::string skip_barrier;        // FILE:LINE: the barrier there does nothing

  // NCCL.
  std::string nccl_fault;     // RANK:OPERATION:WHAT, joined by `+`
  uint64_t nccl_timeout = 300;  // seconds after which a collective that waits for another rank fails; 0: never
  int nccl_progress = 0;      // calls on a non-blocking communicator are still in progress for so many polls
};

STANDIN_EXPORT const Options& options();

// Sets what `text` names and leaves the rest. False, with the offending part in `wrong`, if it cannot be parsed.
bool configure(const char* text, std::string* wrong);
void reset_options();  // to the defaults and the environment

}  // namespace standin
