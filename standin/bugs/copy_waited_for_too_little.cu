// The wait leaves one group under way, the very one that is read.
// launch: grid 1, block 32, shared 1024, n 256
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  cp_async16(s + 4 * t, x + 4 * t, true);
  cp_async_commit();
  cp_async16(s + 128 + 4 * t, x + 128 + 4 * t, true);
  cp_async_commit();
  cp_async_wait<broken ? 1 : 0>();
  y[t] = s[128 + 4 * t];  // BUG copy in flight:
  cp_async_wait<0>();
}

KERNEL(copy_waited_for_too_little_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_waited_for_too_little_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
