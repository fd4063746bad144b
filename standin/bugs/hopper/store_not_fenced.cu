// A bulk store reads what threads have written without a proxy fence.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float*, u32, const TensorMap&, const TensorMap& to) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  float* s = reinterpret_cast<float*>(smem_base());
  for (u32 i = t; i < 256; i += 32) s[i] = x[i];
  if (!broken) fence_proxy();
  block_sync();
  if (t == 0) {
    store_box(to, at, 0);  // BUG proxy fence:
    wait_for_stores();
  }
}

BUG_KERNELS(store_not_fenced)
