// A row address of ldmatrix that is not 16-byte aligned.
// launch: grid 1, block 32, shared 1024, n 128
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  float* s = reinterpret_cast<float*>(smem_base());
  u32 t = threadIdx.x;
  for (u32 i = t; i < 256; i += 32) s[i] = x[i % 128];
  warp_sync();
  u32 r[2];
  ldmatrix_x2(r, s + 4 * t + (broken ? 2 : 0));  // BUG not a multiple of 16
  y[t] = __uint_as_float(r[1]);
}

KERNEL(ldmatrix_misaligned_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(ldmatrix_misaligned_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
