// More threads arrive at an mbarrier than it was made for.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap&, const TensorMap&) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  if (t == 0) mbarrier_init(at, broken ? 16 : 32);
  block_sync();
  mbarrier_arrive(at);   // BUG whose phase lacks
  mbarrier_wait(at, 0);  // BUG deadlock:
  y[t] = x[t];
}

BUG_KERNELS(barrier_of_too_many)
