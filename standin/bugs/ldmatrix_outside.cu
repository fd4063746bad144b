// A row address of ldmatrix beyond shared memory.
// launch: grid 1, block 32, shared 512, n 128
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  for (u32 i = t; i < 128; i += 32) s[i] = x[i];
  warp_sync();
  u32 r[4];
  ldmatrix_x4(r, s + 4 * (broken ? t + 1 : t));  // BUG ldmatrix row outside
  y[t] = __uint_as_float(r[0]);
}

KERNEL(ldmatrix_outside_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(ldmatrix_outside_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
