// A variable of the host, which a card cannot reach.
// launch: grid 1, block 32, shared 0, n 32
// ptx: the compiler refuses a variable of the host in a kernel
#include "../../kernels/ptx.cuh"

static float setting = 1.0f;
float* setting_address() {
  return &setting;
}

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  y[threadIdx.x] = broken ? setting : x[threadIdx.x];  // BUG memory of the host
  (void)n;
}

KERNEL(host_memory_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(host_memory_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
