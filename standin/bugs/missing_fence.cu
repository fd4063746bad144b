// The last block to arrive adds up the others' results, which no fence has published.
// launch: grid 4, block 32, shared 4, n 64
#include "../../kernels/ptx.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32 n) {
  u32* last = reinterpret_cast<u32*>(smem_base());
  u32* arrived = reinterpret_cast<u32*>(x) + 63;
  u32 t = threadIdx.x;
  if (t == 0) {
    y[blockIdx.x] = static_cast<float>(blockIdx.x);
    if (!broken) fence_device();
    *last = atomic_add(arrived, 1) % 4 == 3;
  }
  block_sync();
  if (*last && t == 0) {
    float sum = 0;
    for (u32 b = 0; b < 4; ++b) sum += y[b];  // BUG race between blocks:
    y[8] = sum;
  }
}

KERNEL(missing_fence_broken, 1024, 1)(float* x, float* y, u32 n) {
  body<true>(x, y, n);
}
KERNEL(missing_fence_mended, 1024, 1)(float* x, float* y, u32 n) {
  body<false>(x, y, n);
}
