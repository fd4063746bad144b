// The second wait asks for the phase of the first.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap& from, const TensorMap&) {
  u32 at = shared_address(smem_base()), full = at + 4096, t = threadIdx.x;
  const float* s = reinterpret_cast<const float*>(smem_base());
  if (t == 0) mbarrier_init(full, 1);
  block_sync();
  for (u32 round = 0; round < 2; ++round) {
    if (t == 0) {
      mbarrier_expect(full, kBox);
      load_box(at + 1024 * round, from, full, 8 * round);
    }
    mbarrier_wait(full, broken ? 0 : round);
    block_sync();
    y[t] = s[256 * round + t];  // BUG copy in flight:
  }
}

BUG_KERNELS(wrong_parity)
