// Shared memory is read while the asynchronous copy into it is under way.
// launch: grid 1, block 32, shared 512, n 128
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  cp_async16(s + 4 * t, x + 4 * t, true);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  y[t] = s[4 * t];  // BUG copy in flight:
  cp_async_wait<0>();
}

KERNEL(copy_not_waited_for_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_not_waited_for_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
