// The second round overwrites what slower threads still read.
// launch: grid 1, block 64, shared 256, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  float sum = 0;
  for (u32 round = 0; round < 2; ++round) {
    s[t] = x[t] + static_cast<float>(round);  // BUG race:
    block_sync();
    sum += s[63 - t];  // BUG race:
    if (!broken) block_sync();
  }
  y[t] = sum;
}

KERNEL(write_after_read_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(write_after_read_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
