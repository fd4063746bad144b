// An mbarrier is used that was never initialised.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap&, const TensorMap&) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  if (t == 0 && !broken) mbarrier_init(at, 32);
  block_sync();
  mbarrier_arrive(at);  // BUG no mbarrier
  mbarrier_wait(at, 0);
  y[t] = x[t];
}

BUG_KERNELS(barrier_not_made)
