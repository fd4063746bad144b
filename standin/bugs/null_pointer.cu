// A pointer that was never set. nvcc sees that it is null, and lets the kernel stop there.
// launch: grid 1, block 32, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  const float* from = broken ? nullptr : x;
  y[threadIdx.x] = from[threadIdx.x % 4];  // BUG a null pointer or trap:
  (void)n;
}

KERNEL(null_pointer_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(null_pointer_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
