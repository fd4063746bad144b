// The last thread runs over the end of its array.
// launch: grid 1, block 64, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x + (broken ? 1 : 0);
  if (broken ? t <= n : t < n) y[threadIdx.x] = x[t];  // BUG after the end of
}

KERNEL(past_the_end_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(past_the_end_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
