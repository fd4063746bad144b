// Only one warp reaches the barrier.
// launch: grid 1, block 64, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  if (!broken || t < 32) block_sync();  // BUG returned
  y[t] = x[t];
  (void)n;
}

KERNEL(barrier_in_a_branch_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(barrier_in_a_branch_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
