// What several ranks do with gradients besides sending them: sums of two parts, the squares for the norm, and the way
// of the weights through the memory of the gradients.
//
// Math      add    out = a + b
//           squares[i] = Σ g² over block i, and the rank's own signal beside them
//           weights_to_grads  g = θ;  grads_to_weights  θ = g, copy = bf16(θ);  swap_with_grads  θ ⇄ g, copy = bf16(θ)
// Tensors   f32, of any length that is a multiple of 4. `chunks` is the table of `update.cu`: runs of up to 4,096 elements
//           with their places in the layouts of weights and gradients.
// Numerics  squares are f64.
// Launch    add: 4 elements per thread, and a row of blocks for each pair of parts. squares: one block for each 16,384
//           gradients. The others loop over the chunks, 4 elements per thread.
// Bytes     add 12 per element; squares 4; the way of the weights 8, with their copy 10, exchanged 18.
// Order     squares: a thread's elements, lanes, warps. It does not depend on the GPU, so that ranks may differ.
#include "reduce.cuh"
#include "step.cuh"

// ---- sums -------------------------------------------------------------------------------------------------

struct AddArgs {
  const float* a;
  const float* b;
  float* out;
  u64 count;   // a multiple of 4
  u64 stride;  // elements from one pair to the next, in `a`, `b` and `out`
};

KERNEL(add_pairs, 256, 4)(ARGS(AddArgs)) {
  u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= args.count) return;
  i += static_cast<u64>(blockIdx.y) * args.stride;
  vec4 a = ld16(args.a + i), b = ld16(args.b + i);
  st16(args.out + i, {as_u32(as_f32(a.x) + as_f32(b.x)), as_u32(as_f32(a.y) + as_f32(b.y)),
                      as_u32(as_f32(a.z) + as_f32(b.z)), as_u32(as_f32(a.w) + as_f32(b.w))});
}

struct SquaresOfBlocksArgs {
  const StepParams* params;
  const float* grads;
  double* squares;  // one per block
  double* signal;   // this rank's own
};

constexpr u32 SQUARES_BLOCK = 16384;

KERNEL(squares_of_blocks, 256, 4)(ARGS(SquaresOfBlocksArgs)) {
  double sum[1] = {};
  const float* grads = args.grads + static_cast<u64>(blockIdx.x) * SQUARES_BLOCK;
#pragma unroll 4
  for (u32 i = threadIdx.x * 4; i < SQUARES_BLOCK; i += blockDim.x * 4) {
    vec4 bits = ld16(grads + i);
    double a = as_f32(bits.x), b = as_f32(bits.y), c = as_f32(bits.z), d = as_f32(bits.w);
    sum[0] += (a * a + b * b) + (c * c + d * d);
  }
  block_sums(sum, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x != 0) return;
  args.squares[blockIdx.x] = sum[0];
  if (blockIdx.x == 0) *args.signal = static_cast<double>(args.params->signal);
}

// ---- weights ----------------------------------------------------------------------------------------------

struct WeightsArgs {
  float* weights;
  float* grads;
  bf16* copy;  // null: none
  const UpdateChunk* chunks;
  u32 count;
};

template <bool READS_GRADS, bool WRITES_GRADS>
__device__ __forceinline__ void move_weights(const WeightsArgs& args) {
  for (u32 index = blockIdx.x; index < args.count; index += gridDim.x) {
    UpdateChunk chunk = args.chunks[index];
    for (u32 at = threadIdx.x; at < chunk.len; at += blockDim.x) {
      u64 param = chunk.param + at, grad = chunk.grad + at;
      float g = READS_GRADS ? args.grads[grad] : 0.0f;
      if (WRITES_GRADS) args.grads[grad] = args.weights[param];
      if (READS_GRADS) {
        args.weights[param] = g;
        if (args.copy) store1(args.copy + param, g);
      }
    }
  }
}

KERNEL(weights_to_grads, 256, 4)(ARGS(WeightsArgs)) {
  move_weights<false, true>(args);
}
KERNEL(grads_to_weights, 256, 4)(ARGS(WeightsArgs)) {
  move_weights<true, false>(args);
}
KERNEL(swap_with_grads, 256, 4)(ARGS(WeightsArgs)) {
  move_weights<true, true>(args);
}
