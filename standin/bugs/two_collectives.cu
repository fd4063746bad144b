// Lanes of one warp meet at different collectives.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  float v = x[t];
  if (broken && t < 16) {
    warp_sync();  // BUG of its warp wait at
  } else {
    v += shfl_xor(v, 16);  // BUG of its warp wait at
  }
  y[t] = v;
  (void)n;
}

KERNEL(two_collectives_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(two_collectives_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
