// Only the even words of shared memory were written.
// launch: grid 1, block 32, shared 128, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  if (!broken || t % 2 == 0) s[t] = x[t];
  warp_sync();
  y[t] = s[t ^ 1];  // BUG uninitialised:
}

KERNEL(uninitialised_shared_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(uninitialised_shared_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
