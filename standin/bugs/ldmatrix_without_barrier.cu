// ldmatrix reads rows that other lanes have just written.
// launch: grid 1, block 32, shared 512, n 128
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  for (u32 i = t; i < 128; i += 32) s[i] = 0.0f;
  warp_sync();
  for (u32 i = t; i < 128; i += 32) s[i] = x[i];  // BUG race:
  if (!broken) warp_sync();
  u32 r[4];
  ldmatrix_x4(r, s + 4 * t);  // BUG race:
  y[t] = __uint_as_float(r[3]);
}

KERNEL(ldmatrix_without_barrier_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(ldmatrix_without_barrier_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
