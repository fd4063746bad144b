// The machine: every PTX instruction and every compiler builtin that the kernels use, one function per instruction.
//
// Kernels use only these names. nvcc reads the second half of this file; a host C++ compiler with VITRUM_STANDIN
// defined reads `standin/include/standin.cuh` instead, where each function has a counterpart that the stand-in GPU
// runs, checks and counts. So there is no inline assembly, no `__shared__` and no `<<< >>>` anywhere else.
//
// Lanes: l is the lane, g = l / 4, q = l % 4. Elements of a packed register are counted from its low half.
#pragma once

#include <stdint.h>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

// The value of one 16-byte or one 8-byte access.
struct alignas(16) vec4 {
  u32 x, y, z, w;
};
struct alignas(8) vec2 {
  u32 x, y;
};

// A bfloat16 in memory. Arithmetic is in f32: unpack, compute, pack.
struct bf16 {
  u16 bits;
};

#ifdef VITRUM_STANDIN
#include "../standin/include/standin.cuh"
#else

// KERNEL(name, most threads of a block, least blocks of a multiprocessor)(ARGS(Struct)) { … args.member … }
//
// A kernel takes one struct of plain data, at most 4 KiB: pointers, integers, floats, and structs of those. The host
// fills the same struct, which the build derives from this one (`build/contracts.rs`). `__grid_constant__` says that
// the kernel only reads it; without it the compiler treats members as memory that may change, and needs more registers.
#define KERNEL(name, max_threads, min_blocks) \
  extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name
#define ARGS(...) const __grid_constant__ __VA_ARGS__ args
// A kernel in which a register spill fails the strict build.
#define HOT_KERNEL(name, max_threads, min_blocks) KERNEL(name, max_threads, min_blocks)

// ---- shared memory ----------------------------------------------------------------------------------------

// The block's one dynamic buffer, 1024-byte aligned; divide it by offsets. There is no other shared memory.
__device__ __forceinline__ u8* smem_base() {
  extern __shared__ __align__(1024) u8 vitrum_shared_memory[];
  return vitrum_shared_memory;
}

// A generic pointer into shared memory as the 32-bit address that PTX expects.
__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- loads and stores -------------------------------------------------------------------------------------

// One access of 16, 8 or 4 bytes, at a multiple of its size, in global or shared memory.
__device__ __forceinline__ vec4 ld16(const void* p) {
  uint4 v = *reinterpret_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ void st16(void* p, vec4 v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.x, v.y, v.z, v.w);
}
__device__ __forceinline__ vec2 ld8(const void* p) {
  uint2 v = *reinterpret_cast<const uint2*>(p);
  return {v.x, v.y};
}
__device__ __forceinline__ void st8(void* p, vec2 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(v.x, v.y);
}
__device__ __forceinline__ u32 ld4(const void* p) {
  return *reinterpret_cast<const u32*>(p);
}
__device__ __forceinline__ void st4(void* p, u32 v) {
  *reinterpret_cast<u32*>(p) = v;
}

// ld.global.nc.L1::no_allocate (sm_70): 16 bytes of global memory that are not written during the kernel and that this
// block reads once.
__device__ __forceinline__ vec4 ld16_stream(const void* p) {
  vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- asynchronous copies (sm_80) --------------------------------------------------------------------------

// cp.async.cg: 16 bytes from global to shared memory, bypassing L1; zeros where `valid` is false (then nothing is
// read). The bytes are visible to the issuing thread after `cp_async_wait`, to the others after a barrier that follows
// it.
__device__ __forceinline__ void cp_async16(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(smem)), "l"(gmem), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of the copies issued since the last call.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the N newest groups of this thread are pending.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices of a warp -----------------------------------------------------------------------------------

// ldmatrix (sm_75): row i of 8×8 matrix m (16-bit elements) lies at the address that lane 8m + i gives,
// 16-byte aligned. Lane l gets of each matrix row g, columns 2q and 2q + 1; transposed: rows 2q and 2q + 1 of
// column g.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}
// Only the addresses of lanes 0 to 15 are used; the others must pass any valid one.
__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

// mma.m16n8k16 (sm_80): d += a·b with a [16, 16] and b [16, 8] in bf16, d [16, 8] in f32.
// a, register r, half h: row g + 8 (r & 1), column 2q + 8 (r >> 1) + h. b: row 2q + 8r + h, column g.
// d, register i: row g + 8 (i >> 1), column 2q + (i & 1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- barriers and warp collectives ------------------------------------------------------------------------

// All threads of the block, from one place in the source; orders their memory accesses.
__device__ __forceinline__ void block_sync() {
  __syncthreads();
}
// All 32 lanes; orders their memory accesses. Shuffles, ballots, ldmatrix and mma do not.
__device__ __forceinline__ void warp_sync() {
  __syncwarp();
}
// bar.sync: `threads` threads (whole warps) at barrier `id`, 1 to 15.
__device__ __forceinline__ void named_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Full warp: all 32 lanes take part.
__device__ __forceinline__ float shfl_xor(float v, u32 mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ __forceinline__ u32 shfl_xor(u32 v, u32 mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ __forceinline__ float shfl_idx(float v, u32 lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
__device__ __forceinline__ u32 shfl_idx(u32 v, u32 lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
__device__ __forceinline__ u32 warp_ballot(bool v) {
  return __ballot_sync(0xffffffffu, v);
}

// ---- arithmetic -------------------------------------------------------------------------------------------

// Approximations of the special-function unit, subnormals flushed: within 2 ulp (ex2), 1 ulp (rcp), 2^-22
// relative (rsqrt, lg2 outside [0.5, 2]).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cvt.rn.bf16x2.f32 (sm_80): two floats, each rounded to the nearest bf16, ties to even.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
__device__ __forceinline__ float bf16_lo(u32 packed) {
  return __uint_as_float(packed << 16);
}
__device__ __forceinline__ float bf16_hi(u32 packed) {
  return __uint_as_float(packed & 0xffff0000u);
}

// ---- between blocks ---------------------------------------------------------------------------------------

// Integers only: a sum of floats would depend on the order. Returns the old value.
__device__ __forceinline__ u32 atomic_add(u32* p, u32 v) {
  return atomicAdd(p, v);
}
// Earlier writes of this thread become visible to the whole GPU before its later writes.
__device__ __forceinline__ void fence_device() {
  __threadfence();
}

#endif  // VITRUM_STANDIN

// Does nothing, but hides the value of `v` from the compiler: values derived from it are recomputed instead of being
// kept in registers between two passes over a row.
__device__ __forceinline__ void opaque(u32& v) {
#ifdef VITRUM_STANDIN
  (void)v;
#else
  asm volatile("" : "+r"(v));
#endif
}
