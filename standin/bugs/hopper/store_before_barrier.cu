// A bulk store reads what other threads are writing.
// launch: grid 1, block 64, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float*, u32, const TensorMap&, const TensorMap& to) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  float* s = reinterpret_cast<float*>(smem_base());
  for (u32 i = t; i < 256; i += 64) s[i] = x[i];  // BUG race:
  fence_proxy();
  if (!broken) block_sync();
  if (t == 0) {
    store_box(to, at, 0);  // BUG race: or uninitialised:
    wait_for_stores();
  }
}

BUG_KERNELS(store_before_barrier)
