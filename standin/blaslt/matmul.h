// One matrix product as cuBLASLt describes it: column-major, D = epilogue(alpha · op(A) · op(B) + beta · C).
#pragma once

#include <stdint.h>

namespace standin {

enum class Type : uint8_t { f32, bf16 };

inline uint32_t bytes_of(Type t) {
  return t == Type::f32 ? 4 : 2;
}

// The parts of a cublasLtEpilogue_t.
struct Epilogue {
  bool bias = false;  // + bias[row] before the activation
  bool relu = false, gelu = false;
  bool aux_out = false;        // keeps the value before GELU in aux
  bool dgelu = false;          // × GELU'(aux)
  bool bias_gradient = false;  // bias[row] = sum of D over its columns (with dgelu)
  bool gradient_a = false;     // bias[row] = sum of op(A) over k
  bool gradient_b = false;     // bias[column] = sum of op(B) over k
};

// How the parts of a split sum are combined (cublasLtReductionScheme_t).
enum class Reduction : uint8_t {
  none = 0,
  in_place = 1,      // each is added to what lies in D, in D's type
  compute_type = 2,  // in f32, in the workspace
  output_type = 4,   // in D's type, in the workspace
};

struct Matmul {
  uint64_t m, n, k;
  bool transpose_a, transpose_b;
  Type input, output;
  bool tf32;      // inputs rounded to 10 bits of mantissa
  bool truncate;  // on tensor cores that drop what does not fit
  uint64_t lda, ldb, ldc, ldd, ld_aux;
  Epilogue epilogue;
  uint32_t split;       // k goes in this many parts, summed in order
  Reduction reduction;  // of the parts
  uint64_t sum_to;      // k, or less where a fault is planted: what comes after is left out
  float alpha, beta;
  const void *a, *b, *c;
  void *d, *bias, *aux;
};

// Sums in f32, rounds once when it stores; spread over the host's threads.
void run_matmul(const Matmul& p);

}  // namespace standin
