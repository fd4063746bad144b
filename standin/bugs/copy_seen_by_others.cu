// A thread waits for its own copies and reads those of another.
// launch: grid 1, block 64, shared 1024, n 256
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  cp_async16(s + 4 * t, x + 4 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) block_sync();
  y[t] = s[4 * (63 - t)];  // BUG race: or copy in flight: or uninitialised:
}

KERNEL(copy_seen_by_others_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(copy_seen_by_others_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
