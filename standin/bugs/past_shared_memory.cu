// More shared memory is used than the launch asked for.
// launch: grid 1, block 64, shared 256, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  s[t + (broken ? 1 : 0)] = x[t];  // BUG bytes of shared memory
  y[t] = x[t];
}

KERNEL(past_shared_memory_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(past_shared_memory_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
