// A named barrier expects more threads than ever come.
// launch: grid 1, block 96, shared 0, n 96
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  if (t < 64) named_sync(1, broken ? 96 : 64);  // BUG returned
  y[t] = x[t];
  (void)n;
}

KERNEL(named_barrier_count_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(named_barrier_count_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
