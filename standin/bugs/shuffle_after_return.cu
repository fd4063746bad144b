// A lane has returned before its warp shuffles.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  if (broken && t == 31) return;
  y[t] = shfl_xor(x[t], 1);  // BUG returned
  (void)n;
}

KERNEL(shuffle_after_return_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(shuffle_after_return_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
