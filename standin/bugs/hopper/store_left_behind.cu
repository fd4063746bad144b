// A thread returns while its bulk store is under way.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float*, u32, const TensorMap&, const TensorMap& to) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  float* s = reinterpret_cast<float*>(smem_base());
  for (u32 i = t; i < 256; i += 32) s[i] = x[i];
  fence_proxy();
  block_sync();
  if (t == 0) {
    store_box(to, at, 0);
    if (!broken) wait_for_stores();
  }
  // BUG bulk stores in flight
}

BUG_KERNELS(store_left_behind)
