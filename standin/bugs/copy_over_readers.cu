// A stage is filled again while slower threads still read it.
// launch: grid 1, block 64, shared 1024, n 256
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  float sum = 0;
  for (u32 round = 0; round < 2; ++round) {
    cp_async16(s + 4 * t, x + 4 * t, true);  // BUG race: or copy in flight:
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    sum += s[4 * (63 - t)];  // BUG race: or copy in flight:
    if (!broken) block_sync();
  }
  y[t] = sum;
}

KERNEL(copy_over_readers_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_over_readers_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
