// An asynchronous copy beyond the shared memory of the launch.
// launch: grid 1, block 32, shared 512, n 128
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  u32 row = broken ? t + 1 : t;
  cp_async16(s + 4 * row, x + 4 * t, true);  // BUG cp_async16 to outside
  cp_async_commit();
  cp_async_wait<0>();
  y[t] = x[t];
}

KERNEL(copy_past_shared_memory_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_past_shared_memory_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
