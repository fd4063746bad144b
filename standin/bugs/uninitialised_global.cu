// A result is added to before it was ever written.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32 t = threadIdx.x;
  y[t] = x[t] + (broken ? y[t] : 0.0f);  // BUG uninitialised:
  (void)n;
}

KERNEL(uninitialised_global_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(uninitialised_global_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
