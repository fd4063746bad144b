// The box of a tensor goes to an address that is no multiple of 128.
// launch: grid 1, block 32, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap& from, const TensorMap&) {
  u32 at = shared_address(smem_base()), full = at + 4096, t = threadIdx.x;
  const float* s = reinterpret_cast<const float*>(smem_base());
  if (t == 0) mbarrier_init(full, 1);
  block_sync();
  if (t == 0) {
    mbarrier_expect(full, kBox);
    load_box(at + (broken ? 64 : 0), from, full, 0);  // BUG multiple of 128
  }
  mbarrier_wait(full, 0);
  y[t] = s[t];
}

BUG_KERNELS(load_misaligned)
