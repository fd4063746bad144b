// An asynchronous copy to the middle of a 16-byte chunk.
// launch: grid 1, block 1, shared 64, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u8* s = smem_base();
  cp_async16(s + (broken ? 8 : 16), x, true);  // BUG not a multiple of 16
  cp_async_commit();
  cp_async_wait<0>();
  y[0] = *reinterpret_cast<float*>(s + 16);
  (void)n;
}

KERNEL(misaligned_copy_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(misaligned_copy_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
