#include "algorithms.h"

#include <algorithm>
#include <iterator>

#include "../runtime/options.h"

namespace standin {
namespace {

constexpr uint32_t kMagic = 0x5ab1e;

// How each algorithm sums over k. They differ in the order of summation, so in the last bits; those whose parts pass
// through D's type differ by more than that where it is bf16.
struct Way {
  uint32_t split;
  Reduction reduction;
};
constexpr Way kWays[] = {
    {1, Reduction::none},         {2, Reduction::compute_type}, {3, Reduction::compute_type},
    {4, Reduction::compute_type}, {6, Reduction::compute_type}, {8, Reduction::compute_type},
    {4, Reduction::output_type},  {8, Reduction::in_place},
};
// The option that saves the most memory traffic is assumed to be the fastest.
constexpr uint32_t kOrder[] = {6, 7, 0, 1, 2, 3, 4, 5};

// cublasLtMatmulStages_t and cublasLtMatmulTile_t.
constexpr uint32_t kStages64x3 = 15, kTile128x128 = 20, kStageDepth = 64;
// Configurations of the real library; some of its versions computed the second incorrectly.
constexpr uint32_t kConfiguration = 21, kFaultyConfiguration = 66;

// One number for all that an algorithm depends on.
uint64_t fingerprint(const Problem& problem) {
  const Matmul& p = problem.product;
  uint64_t h = 0xcbf29ce484222325ull;
  for (uint64_t v : {p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.ldd, uint64_t{p.transpose_a},
                     uint64_t{p.transpose_b}, static_cast<uint64_t>(p.input), static_cast<uint64_t>(p.output),
                     uint64_t{p.tf32}, uint64_t{problem.epilogue}, options().blaslt}) {
    for (int i = 0; i < 8; ++i) h = (h ^ (v >> (8 * i) & 0xff)) * 0x100000001b3ull;
  }
  return h;
}

bool may_split(const Problem& problem) {
  const Epilogue& e = problem.product.epilogue;
  if (options().no_split_epilogue && problem.epilogue != 1) return false;
  return !bias_sums(e) && !e.aux_out && !e.dgelu;
}

}  // namespace

std::vector<uint32_t> offers(const Problem& problem, uint32_t reductions, uint64_t workspace) {
  std::vector<uint32_t> found;
  for (uint32_t number : kOrder) {
    const Way& way = kWays[number];
    if (static_cast<int>(number) == options().refuse_algorithm) continue;
    if (way.split > problem.product.k || workspace_of(problem.product, number) > workspace) continue;
    bool allowed = static_cast<uint32_t>(way.reduction) & reductions;
    if (way.split > 1 && !(allowed && may_split(problem))) continue;
    found.push_back(number);
  }
  auto first = std::find(found.begin(), found.end(), static_cast<uint32_t>(options().first_algorithm));
  if (first != found.end()) std::rotate(found.begin(), first, first + 1);
  return found;
}

Algorithm algorithm_for(const Problem& problem, uint32_t number, const Alignment& align) {
  return {
      kMagic, number, kWays[number].split, align, fingerprint(problem), workspace_of(problem.product, number),
      {}};
}

bool is_algorithm(const Algorithm& a) {
  return a.magic == kMagic && a.number < std::size(kWays) && a.split == kWays[a.number].split;
}

bool fits(const Algorithm& a, const Problem& problem) {
  return static_cast<int>(a.number) != options().refuse_algorithm && a.problem == fingerprint(problem) &&
         a.split <= problem.product.k;
}

size_t workspace_of(const Matmul& p, uint32_t number) {
  const Way& way = kWays[number];
  size_t size = way.reduction == Reduction::compute_type  ? sizeof(float)
                : way.reduction == Reduction::output_type ? bytes_of(p.output)
                                                          : 0;
  return (p.m * p.n * way.split * size + 255) / 256 * 256;
}

void sum_as(uint32_t number, Matmul* p) {
  p->split = kWays[number].split;
  p->reduction = kWays[number].reduction;
  p->sum_to = p->k;
  uint64_t part = p->k / p->split;
  bool faulty = options().split_fault && p->k % p->split && part % kStageDepth == 0;
  if (faulty) p->sum_to -= part;
  if (static_cast<int>(number) == options().wrong_algorithm) p->sum_to = p->k / 2;
}

bool configuration(const Algorithm& a, int attribute, uint32_t* value, size_t* bytes) {
  *value = 0;
  *bytes = 4;
  // The real library reads whatever bytes it is given.
  if (!is_algorithm(a) && attribute >= 0 && attribute <= 6) return true;
  switch (attribute) {
    case 0: *value = options().split_fault && a.split > 1 ? kFaultyConfiguration : kConfiguration; break;
    case 1: *value = kTile128x128; break;
    case 2: *value = a.split; break;
    case 3: *value = static_cast<uint32_t>(kWays[a.number].reduction); break;
    case 4:
    case 5: break;  // swizzling, a custom option
    case 6: *value = kStages64x3; break;
    case 7:
    case 8: *bytes = 2; break;  // inner shape, cluster shape
    default: return false;
  }
  return true;
}

}  // namespace standin
