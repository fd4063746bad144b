// A 16-byte load from the second element of a row.
// launch: grid 1, block 1, shared 0, n 32
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  vec4 v = ld16(x + (broken ? 1 : 4));  // BUG misaligned:
  st16(y, v);
  (void)n;
}

KERNEL(misaligned_vector_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(misaligned_vector_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
