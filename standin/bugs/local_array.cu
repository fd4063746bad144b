// A register array is indexed past its end.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float values[4] = {x[0], x[1], x[2], x[3]};
  u32 which = threadIdx.x % (broken ? 5 : 4);
  y[threadIdx.x] = values[which];  // BUG of a local array
  (void)n;
}

KERNEL(local_array_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(local_array_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
