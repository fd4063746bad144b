// A ragged tail is copied without `valid` = false.
// launch: grid 1, block 32, shared 512, n 100
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  bool inside = 4 * t + 4 <= n;
  cp_async16(s + 4 * t, x + 4 * t, inside || broken);  // BUG out of bounds:
  cp_async_commit();
  cp_async_wait<0>();
  if (t < n) y[t] = s[4 * t];
}

KERNEL(copy_from_past_the_end_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_from_past_the_end_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
