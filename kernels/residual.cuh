// What may be applied to a branch before it joins the residual stream: dropout per element, LayerScale per column,
// drop-path per sample (Huang et al. 2016; Touvron et al. 2021). Used by the LayerNorms that compute the sum first, and
// by `residual.cu`.
#pragma once

#include "philox.cuh"

struct BranchArgs {
  const float* layer_scale;  // [D], or null
  MaskArgs dropout, drop_path;
  u32 tokens;  // rows of one sample
};

// A branch bound to the current step.
struct Branch {
  const float* layer_scale;
  Mask dropout, drop_path;
  u32 tokens, columns;
};

__device__ __forceinline__ Branch bind_branch(const BranchArgs& args, const StepParams* params, u32 columns) {
  return {args.layer_scale, bind_mask(args.dropout, params), bind_mask(args.drop_path, params), args.tokens,
          columns};
}

// The drop-path factor of a row.
__device__ __forceinline__ float path_factor(const Branch& b, u32 row) {
  return b.drop_path.rate == 0.0f ? 1.0f : mask_factor(b.drop_path, row / b.tokens, 0);
}

// The product of the dropout and drop-path factors, for eight elements of a row.
__device__ __forceinline__ void mask_factors(const Branch& b, u32 row, u32 column, float path,
                                             float (&f)[VEC]) {
  if (b.dropout.rate == 0.0f) {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) f[i] = path;
    return;
  }
  mask_factors8(b.dropout, row / b.tokens, row % b.tokens * b.columns + column, f);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) f[i] *= path;
}

// The same times LayerScale: the factor of a branch element in the sum.
__device__ __forceinline__ void branch_factors(const Branch& b, u32 row, u32 column, u32 n, float path,
                                               float (&f)[VEC]) {
  mask_factors(b, row, column, path, f);
  if (!b.layer_scale) return;
  float scale[VEC];
  load8(b.layer_scale + column, n, scale);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) f[i] *= scale[i];
}
