// What a thread reads is written by one that does not arrive before it.
// launch: grid 1, block 64, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap&, const TensorMap&) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  float* s = reinterpret_cast<float*>(smem_base()) + 16;
  if (t == 0) mbarrier_init(at, 64);
  block_sync();
  if (broken) mbarrier_arrive(at);
  s[t] = x[t];  // BUG race:
  if (!broken) mbarrier_arrive(at);
  mbarrier_wait(at, 0);
  y[t] = s[t ^ 32];  // BUG race: or uninitialised:
}

BUG_KERNELS(barrier_orders)
