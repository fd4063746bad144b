// What each version of cuBLASLt supports, as tables: epilogues, attributes, types. Sources: the enumerations of the headers of
// CUDA 11.4 to 13.4, their comments, and the table of types of cublasLtMatmul in NVIDIA's cuBLAS documentation (regular
// orders). FP8, integers, f16 and complex numbers are not computed here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "matmul.h"

namespace standin {

// A version as major · 10000 + minor · 100 + patch, whatever the library's own function returns: before version 12 that
// was major · 1000 + minor · 100 + patch.
uint32_t version_of(uint64_t reported);

constexpr uint32_t kEver = 0xffffffff;

// One attribute of cublasLtMatmulDescAttributes_t.
struct Attribute {
  int number;
  uint32_t bytes;
  int64_t initial;
  uint32_t since, before;  // the versions that have it: since ≤ version < before
  // The only value that a product may have here: null pointers of FP8's scales, C not transposed. kAny: any.
  int64_t only;
};
constexpr int64_t kAny = INT64_MIN;
constexpr int kAttributes = 42;
// Null if there is no such attribute, in this version.
const Attribute* attribute(int number, uint32_t version);
// What an attribute is until it is set, in every version.
int64_t initial_value(int number);

// An attribute of cublasLtMatmulPreferenceAttributes_t: its bytes, or 0.
uint32_t preference_bytes(int number, uint32_t version);

// The parts of a cublasLtEpilogue_t; false if this version has no such epilogue. Masks of ReLU are not computed here.
bool epilogue_of(uint32_t number, uint32_t version, Epilogue* e);

// Whether a product of these types (cudaDataType_t, cublasComputeType_t) exists, from this compute capability on: a row
// of the documentation's table. The bias has the type of D.
struct Types {
  int compute, scale, input, output;
  int capability;
};
const Types* types_of(int compute, int scale, int input, int output);

}  // namespace standin
