// A block reads what another one writes in the same launch.
// launch: grid 2, block 32, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 i = blockIdx.x * 32 + threadIdx.x;
  x[i] = 2.0f;  // BUG race between blocks:
  y[i] = x[broken ? 63 - i : i];  // BUG race between blocks:
}

KERNEL(read_across_blocks_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(read_across_blocks_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
