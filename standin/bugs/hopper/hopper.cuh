// Hopper's instructions, for the planted bugs about them. A warpgroup multiplies 64×16 by 16×64.
#pragma once

#include "../../../kernels/ptx.cuh"

// Rows of 64 bf16: a box of 8 rows, swizzled by 128 bytes.
struct alignas(64) Map {
  u8 bytes[128];
};
constexpr u32 kBox = 1024;

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; "
      "}" ::"r"(at),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_box(u32 to, const Map& map, u32 barrier, u32 row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_box(const Map& map, u32 from, u32 row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(0), "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile of rows of 16 values: unswizzled cores of 8×8, the second half of k 1024 bytes after the first.
__device__ __forceinline__ u64 tile(u32 at) {
  return (at & 0x3ffff) >> 4 | u64{1024 >> 4} << 16 | u64{128 >> 4} << 32;
}
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// The compiler must not move what computes or uses these registers across this place.
__device__ __forceinline__ void settle(float (&d)[4]) {
  asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
}
// d += a·bᵀ, 64 rows of a, 8 rows of b.
__device__ __forceinline__ void product(float (&d)[4], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b)
               : "memory");
}

#define BUG_KERNELS(name)                                                                         \
  KERNEL(name##_broken, 1024, 1)                                                                  \
  (float* x, float* y, u32 n, const __grid_constant__ Map from, const __grid_constant__ Map to) { \
    body<true>(x, y, n, from, to);                                                                \
  }                                                                                               \
  KERNEL(name##_mended, 1024, 1)                                                                  \
  (float* x, float* y, u32 n, const __grid_constant__ Map from, const __grid_constant__ Map to) { \
    body<false>(x, y, n, from, to);                                                               \
  }
