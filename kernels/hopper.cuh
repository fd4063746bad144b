// Hopper's instructions (sm_90a): bulk copies by tensor maps, barriers that count their bytes, products of a warpgroup.
// Like `ptx.cuh` one function per instruction, but without counterparts on the host: kernels that use them exist only
// as PTX.
#pragma once

#include "ptx.cuh"

// A description of a matrix for bulk copies: `CUtensorMap`, made by the host.
struct alignas(64) TensorMap {
  u64 words[16];
};

// ---- registers --------------------------------------------------------------------------------------------

// setmaxnreg: a warpgroup gives registers of its threads back, or takes some.
template <int N>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- barriers in shared memory ----------------------------------------------------------------------------

// An mbarrier is 8 bytes. A phase is complete after `count` arrivals and all bytes that were announced.
__device__ __forceinline__ void mbarrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// Makes the initialisation known to bulk copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// An arrival that announces the bytes of bulk copies.
__device__ __forceinline__ void mbarrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity. The first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(u32 at, u32 parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra again; }" ::"r"(at),
      "r"(parity)
      : "memory");
}

// ---- bulk copies ------------------------------------------------------------------------------------------

// A box of a matrix of four dimensions into shared memory; what lies outside is zero. `barrier` counts its bytes.
__device__ __forceinline__ void load_box(u32 to, const TensorMap& map, u32 barrier, u32 row, u32 head,
                                         u32 image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(head), "r"(image), "r"(barrier)
      : "memory");
}
// The reverse; what lies outside is left out. A group of its own.
__device__ __forceinline__ void store_box(const TensorMap& map, u32 from, u32 row, u32 head, u32 image) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
                   &map),
               "r"(0), "r"(row), "r"(head), "r"(image), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's stores have read shared memory. What they write is there when the kernel ends.
__device__ __forceinline__ void stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Makes this thread's writes of shared memory visible to bulk copies and products.
__device__ __forceinline__ void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products of a warpgroup ------------------------------------------------------------------------------

// The warpgroup's own barrier, one of 1 to 15.
__device__ __forceinline__ void warpgroup_sync(u32 barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}
// wgmma.fence: before the first product, and after registers of one were written otherwise.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// The compiler must not move what computes or uses these registers across this place: a product fills them until it has
// been waited for, which it cannot see.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// A tile of rows of 128 bytes, swizzled by 128 bytes: groups of eight rows follow each other every 1024 bytes.
__device__ __forceinline__ u64 swizzled_tile(u32 at) {
  return u64{(at & 0x3ffff) >> 4} | u64{1} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)

// D (64 × 208) = A (64 × 16) · B (16 × 208) [+ D], both operands K-major in shared memory. Thread t of the warpgroup
// has rows t / 32 · 16 + g and g + 8; d[4j + 2h + e] is row g + 8h, column 8j + 2q + e.
__device__ __forceinline__ void product_64x208(float (&d)[104], u64 a, u64 b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %106, 0; wgmma.mma_async.sync.aligned.m64n208k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
      "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
      "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
      "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103"
      "}, %104, %105, add, 1, 1, 0, 0; }"
      : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F4(96), F4(100)
      : "l"(a), "l"(b), "r"(static_cast<u32>(add)));
}

// D (64 × 64) = A (64 × 16) · B (16 × 64) [+ D]: A in registers, as D of a product packed in pairs; B N-major in shared
// memory.
__device__ __forceinline__ void product_64x64(float (&d)[32], const u32 (&a)[4], u64 b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
      : F16(0), F16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)));
}

#undef F16
#undef F4
