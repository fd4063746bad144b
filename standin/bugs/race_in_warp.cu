// A neighbour of the same warp is read from shared memory without warp_sync.
// launch: grid 1, block 32, shared 128, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  s[t] = 0.0f;
  block_sync();
  s[t] = x[t];  // BUG race:
  if (!broken) warp_sync();
  y[t] = s[t ^ 1];  // BUG race:
}

KERNEL(race_in_warp_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(race_in_warp_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
