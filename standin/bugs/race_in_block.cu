// A neighbour of another warp is read from shared memory without a barrier.
// launch: grid 1, block 64, shared 256, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  s[t] = 0.0f;
  block_sync();
  s[t] = x[t];  // BUG race:
  if (!broken) block_sync();
  y[t] = s[(t + 32) % 64];  // BUG race:
}

KERNEL(race_in_block_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(race_in_block_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
