// An index below zero.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  i32 t = static_cast<i32>(threadIdx.x) - (broken ? 1 : 0);
  y[t] = x[threadIdx.x];  // BUG bytes before an allocation
  (void)n;
}

KERNEL(before_the_start_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(before_the_start_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
