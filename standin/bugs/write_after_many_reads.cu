// One word that every thread has read is overwritten by one of them.
// launch: grid 1, block 96, shared 16, n 96
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  if (t == 0) s[0] = x[0];
  block_sync();
  float first = s[0];  // BUG race:
  if (!broken) block_sync();
  if (t == 40) s[0] = x[1];  // BUG race:
  y[t] = first;
}

KERNEL(write_after_many_reads_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(write_after_many_reads_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
