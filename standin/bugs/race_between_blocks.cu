// Two blocks write the same element.
// launch: grid 2, block 32, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 i = (broken ? 0 : blockIdx.x * 32) + threadIdx.x;
  y[i] = x[i];  // BUG race between blocks:
}

KERNEL(race_between_blocks_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(race_between_blocks_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
