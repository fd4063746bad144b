// Two groups wait for each other at two named barriers.
// launch: grid 1, block 64, shared 0, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  named_sync(broken && t >= 32 ? 2 : 1, 64);  // BUG deadlock:
  y[t] = x[t];
  (void)n;
}

KERNEL(deadlock_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(deadlock_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
