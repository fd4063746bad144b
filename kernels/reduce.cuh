// Sums and maxima over a warp and over a block, always in one fixed order: the same inputs give the same bits.
#pragma once

#include "types.cuh"

union Bits64 {
  double d;
  u32 half[2];
};
__device__ __forceinline__ double shfl_xor(double v, u32 mask) {
  Bits64 bits;
  bits.d = v;
  bits.half[0] = shfl_xor(bits.half[0], mask);
  bits.half[1] = shfl_xor(bits.half[1], mask);
  return bits.d;
}

// A butterfly: every lane ends with the same bits, because each addition has the same two operands in both lanes.
template <typename V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (u32 mask = WARP / 2; mask > 0; mask /= 2) v += shfl_xor(v, mask);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (u32 mask = WARP / 2; mask > 0; mask /= 2) v = fmaxf(v, shfl_xor(v, mask));
  return v;
}
__device__ __forceinline__ u32 warp_sum_u32(u32 v) {
#pragma unroll
  for (u32 mask = WARP / 2; mask > 0; mask /= 2) v += shfl_xor(v, mask);
  return v;
}

// What each warp found, combined by every thread in the order of the warps. `scratch` has room for one value per
// warp; it may be used again right after. All threads of the block take part, whole warps.
template <typename V>
__device__ __forceinline__ V block_sum(V v, V* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  block_sync();
  v = scratch[0];
  for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) v += scratch[warp];
  block_sync();
  return v;
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
  v = warp_max(v);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  block_sync();
  v = scratch[0];
  for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) v = fmaxf(v, scratch[warp]);
  block_sync();
  return v;
}
