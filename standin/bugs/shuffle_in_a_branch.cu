// Half a warp shuffles.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  float v = x[t];
  if (!broken || t < 16) v += shfl_xor(v, 1);  // BUG returned
  y[t] = v;
  (void)n;
}

KERNEL(shuffle_in_a_branch_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(shuffle_in_a_branch_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
