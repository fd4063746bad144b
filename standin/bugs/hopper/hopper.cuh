// What the planted bugs about Hopper's instructions have in common: small copies and a small product.
#pragma once

#include "../../../kernels/hopper.cuh"

// Rows of 64 bf16: a box of 8 rows, swizzled by 128 bytes.
constexpr u32 kBox = 1024;

__device__ __forceinline__ void load_box(u32 to, const TensorMap& map, u32 barrier, u32 row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, u32 from, u32 row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(0), "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// A tile of rows of 16 values: unswizzled cores of 8×8, the second half of k 1024 bytes after the first.
__device__ __forceinline__ u64 tile(u32 at) {
  return (at & 0x3ffff) >> 4 | u64{1024 >> 4} << 16 | u64{128 >> 4} << 32;
}
// d += a·bᵀ, 64 rows of a, 8 rows of b.
__device__ __forceinline__ void product(float (&d)[4], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b)
               : "memory");
}

#define BUG_KERNELS(name)                                             \
  KERNEL(name##_broken, 1024, 1)                                      \
  (float* x, float* y, u32 n, const __grid_constant__ TensorMap from, \
   const __grid_constant__ TensorMap to) {                            \
    body<true>(x, y, n, from, to);                                    \
  }                                                                   \
  KERNEL(name##_mended, 1024, 1)                                      \
  (float* x, float* y, u32 n, const __grid_constant__ TensorMap from, \
   const __grid_constant__ TensorMap to) {                            \
    body<false>(x, y, n, from, to);                                   \
  }
