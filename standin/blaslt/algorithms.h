// The algorithms that a product is offered: how they sum over k, the attributes they report, and their planted faults.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "matmul.h"

namespace standin {

// How operands are aligned that an algorithm may be used with, in bytes: matrices as the preference says, bias and aux as
// their pointers in the description were ("routines that do not dereference this pointer depend on its value").
struct Alignment {
  uint32_t matrices, bias, aux;
};

// The 64 opaque bytes of cublasLtMatmulAlgo_t.
struct Algorithm {
  uint32_t magic, number;
  uint32_t split;
  Alignment align;
  uint64_t problem;  // what it was found for
  uint64_t workspace;
  uint64_t spare[3];
};
static_assert(sizeof(Algorithm) == 64);

// What an algorithm was found for: everything that it depends on.
struct Problem {
  const Matmul& product;
  uint32_t epilogue;  // cublasLtEpilogue_t
};

// The numbers of the algorithms offered for a product, the likely fastest first. `reductions` are the allowed schemes
// (cublasLtReductionScheme_t), `workspace` the available bytes.
std::vector<uint32_t> offers(const Problem& problem, uint32_t reductions, uint64_t workspace);
Algorithm algorithm_for(const Problem& problem, uint32_t number, const Alignment& align);
// Whether these bytes are one of our algorithms.
bool is_algorithm(const Algorithm& algorithm);
// Whether it belongs to this problem and the library still accepts it.
bool fits(const Algorithm& algorithm, const Problem& problem);
size_t workspace_of(const Matmul& product, uint32_t number);
// Makes the product sum as the algorithm does, including its faults.
void sum_as(uint32_t number, Matmul* product);

// An attribute of cublasLtMatmulAlgoConfigAttributes_t, and its size in bytes; false if there is no such attribute.
bool configuration(const Algorithm& algorithm, int attribute, uint32_t* value, size_t* bytes);

// Whether this epilogue sums over a matrix besides the product.
inline bool bias_sums(const Epilogue& e) {
  return e.bias_gradient || e.gradient_a || e.gradient_b;
}

}  // namespace standin
