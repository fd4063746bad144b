// Threads of a block hand values on through global memory without a barrier.
// launch: grid 1, block 64, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  y[t] = 0.0f;
  block_sync();
  y[t] = x[t];  // BUG race:
  if (!broken) block_sync();
  float other = y[63 - t];  // BUG race:
  if (!broken) block_sync();
  y[t] = other;  // BUG race:
}

KERNEL(race_in_global_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(race_in_global_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
