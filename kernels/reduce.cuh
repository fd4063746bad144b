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

// Every thread combines the warps' results in the order of the warps. `scratch` has room for one value per warp. All
// threads of the block take part, in whole warps. The scratch of `block_sum` may be reused after the caller's next
// barrier, that of `block_max` immediately.
template <typename V>
__device__ __forceinline__ V block_sum(V v, V* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  block_sync();
  v = scratch[0];
  for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) v += scratch[warp];
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

// Several sums at the cost of one: `scratch` has room for N values per warp.
template <u32 N, typename V>
__device__ __forceinline__ void block_sums(V (&v)[N], V* scratch) {
#pragma unroll
  for (u32 i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) scratch[threadIdx.x / WARP * N + i] = v[i];
  }
  block_sync();
#pragma unroll
  for (u32 i = 0; i < N; ++i) v[i] = scratch[i];
  for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) v[i] += scratch[warp * N + i];
  }
  block_sync();
}
__device__ __forceinline__ u32 block_min(u32 v, u32* scratch) {
#pragma unroll
  for (u32 mask = WARP / 2; mask > 0; mask /= 2) v = min_u32(v, shfl_xor(v, mask));
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  block_sync();
  v = scratch[0];
  for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) v = min_u32(v, scratch[warp]);
  block_sync();
  return v;
}

// ---- sums over rows ---------------------------------------------------------------------------------------

// Kernels that sum over rows own columns: lane l of every warp holds columns 8l to 8l + 7 of a stretch of 256, and the
// block's warps (at most eight) take different rows. At the end this adds the warps, in order, into `out`, the block's
// own slice of partial sums; `sum_partials` adds the blocks.
constexpr u32 COLUMN_WARPS = 8;
constexpr u32 COLUMN_STRETCH = WARP * VEC;
// Shared memory needed: COLUMN_WARPS · COLUMN_STRETCH · 4 = 8 KiB.

// The two halves of a lane's columns are 128 words apart, so that 16-byte accesses of neighbouring lanes use all banks.
constexpr u32 COLUMN_HALF = COLUMN_STRETCH / 2;

// Adds the warps' sums of a stretch: rows of `scratch`, `pitch` words apart.
__device__ __forceinline__ void add_up_warps(const float* scratch, u32 pitch, float* out, u32 first,
                                             u32 columns) {
  for (u32 word = threadIdx.x; word < COLUMN_STRETCH; word += blockDim.x) {
    u32 column = first + word % COLUMN_HALF / 4 * VEC + word / COLUMN_HALF * 4 + word % 4;
    float sum = scratch[word];
    for (u32 w = 1; w < blockDim.x / WARP; ++w) sum += scratch[w * pitch + word];
    if (column < columns) out[column] = sum;
  }
}

__device__ __forceinline__ void store_column_sums(const float (&v)[VEC], float* scratch, float* out,
                                                  u32 first, u32 columns) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float* mine = scratch + warp * COLUMN_STRETCH + lane * 4;
  st16(mine, {as_u32(v[0]), as_u32(v[1]), as_u32(v[2]), as_u32(v[3])});
  st16(mine + COLUMN_HALF, {as_u32(v[4]), as_u32(v[5]), as_u32(v[6]), as_u32(v[7])});
  block_sync();
  add_up_warps(scratch, COLUMN_STRETCH, out, first, columns);
  block_sync();
}
