// A shuffle in a block whose size is no must be a multiple of 32.
// launch: grid 1, block 48, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  float v = x[t];
  if (broken || t < 32) v = shfl_xor(v, 1);  // BUG must be a multiple of 32
  y[t] = v;
  (void)n;
}

KERNEL(ragged_warp_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(ragged_warp_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
