// The descriptor of an operand leads out of shared memory.
// launch: grid 1, block 128, shared 8192, n 1024
#include "hopper.cuh"

template <bool broken>
__device__ void body(float* x, float* y, u32, const TensorMap&, const TensorMap&) {
  u32 at = shared_address(smem_base()), t = threadIdx.x;
  u32* s = reinterpret_cast<u32*>(smem_base());
  for (u32 i = t; i < 1024; i += 128) s[i] = pack_bf16(x[i % 256], 1.0f);
  fence_proxy();
  block_sync();
  float d[4] = {0, 0, 0, 0};
  settle(d);
  product_fence();
  product(d, tile(at), tile(at + (broken ? 8192 : 2048)));  // BUG out of bounds:
  product_commit();
  product_wait();
  settle(d);
  y[t] = d[0] + d[1] + d[2] + d[3];
}

BUG_KERNELS(product_past_shared_memory)
