// What is added in place to the patch embedding's matmul output: bias, extra tokens, position embedding; then dropout.
//
// Math      token t of a sample: x += bias (patch rows) or extra_token[t] (extra rows);
//           x += posemb[t - posemb_first] from posemb_first on; x = dropout(x)
//           backward: d_y = dropout'(d_x), which may overwrite d_x; S[t] = Σ_samples of it before it is
//           stored, d_extra[t] = S[t], d_posemb[t - posemb_first] = S[t], d_bias = Σ S[t] over t ≥ extra
// Tensors   x [B·T, D] in T, in place   d_x [B·T, D] in S, d_y in T: one type, or f32 and bf16
//           bias, class tokens [D], registers [E - classes, D], posemb [T - posemb_first, D] and all gradients: f32
//           partials f32 [slices, T, pitch], pitch = D rounded up to 8.
// Launch    forward: one thread per 8 values. Backward: one thread per 8 columns of a token and slice of the
//           batch; then one thread per column of a token adds the slices; `sum_partials` adds the tokens for
//           the bias.
// Bytes     per value, with the stream in bf16 or f32 (bias and positions come from L2): forward 4, 8; backward 2, 4,
//           or with dropout 4, 6.
// Order     samples within a slice, slices, tokens: each in ascending order.
// Source    Dosovitskiy et al. 2021.
#include "philox.cuh"

struct EmbedShape {
  u32 samples, tokens, width;
  u32 extra;         // extra tokens in front of the patches
  u32 classes;       // of these, class and distillation tokens; registers follow
  u32 posemb_first;  // first token with a position
};

// The factors of eight values of a token.
__device__ __forceinline__ void drop8(const Mask& mask, u32 sample, u32 token, u32 width, u32 column,
                                      float (&v)[VEC]) {
  if (mask.rate == 0.0f) return;
  float f[VEC];
  mask_factors8(mask, sample, token * width + column, f);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= f[i];
}

__device__ __forceinline__ void add8(const float* p, u32 n, float (&v)[VEC]) {
  float w[VEC];
  load8(p, n, w);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] += w[i];
}

template <typename T>
struct EmbedArgs {
  const StepParams* params;
  EmbedShape shape;
  MaskArgs dropout;
  View<T> x;
  const float* bias;
  const float* extra0;  // class and distillation token; null: not that many
  const float* extra1;
  View<const float> registers;
  View<const float> posemb;
};
// `partials` is null if no parameter is trained. d_y is written where dropout makes it differ from d_x.
template <typename S, typename T>
struct EmbedBackwardArgs {
  const StepParams* params;
  EmbedShape shape;
  MaskArgs dropout;
  View<const S> d_x;
  View<T> d_y;
  float* partials;
  u32 pitch;
};
// A gradient that is not trained is null.
struct EmbedGradientsArgs {
  EmbedShape shape;
  float* partials;
  u32 pitch, slices;
  float* d_extra0;
  float* d_extra1;
  View<float> d_registers;
  View<float> d_posemb;
  u32 add;  // to the gradients; 0: assign
};

template <typename T>
__device__ __forceinline__ void embed(const EmbedArgs<T>& args) {
  const EmbedShape& s = args.shape;
  Place at = place_of_thread(s.samples * s.tokens, s.width);
  if (at.n == 0) return;
  u32 sample = at.row / s.tokens, token = at.row % s.tokens;
  T* p = at_place(args.x, at);
  float v[VEC];
  load8(p, at.n, v);
  const float* joins = token >= s.extra     ? args.bias
                       : token >= s.classes ? row_of(args.registers, token - s.classes)
                       : token == 0         ? args.extra0
                                            : args.extra1;
  if (joins) add8(joins + at.column, at.n, v);
  if (token >= s.posemb_first) add8(row_of(args.posemb, token - s.posemb_first) + at.column, at.n, v);
  drop8(bind_mask(args.dropout, args.params), sample, token, s.width, at.column, v);
  store8(p, at.n, v);
}

// Slice blockIdx.y of gridDim.y of the batch.
template <typename S, typename T>
__device__ __forceinline__ void embed_backward(const EmbedBackwardArgs<S, T>& args) {
  const EmbedShape& s = args.shape;
  Place at = place_of_thread(s.tokens, s.width);
  if (at.n == 0) return;
  u32 token = at.row;
  u32 begin = static_cast<u32>(static_cast<u64>(s.samples) * blockIdx.y / gridDim.y);
  u32 end = static_cast<u32>(static_cast<u64>(s.samples) * (blockIdx.y + 1) / gridDim.y);
  const S* column = at_place(args.d_x, at);
  u64 per_sample = static_cast<u64>(s.tokens) * args.d_x.ld;
  float sum[VEC] = {};
  if (args.dropout.rate == 0.0f) {
#pragma unroll 4
    for (u32 sample = begin; sample < end; ++sample) {
      float v[VEC];
      load8(column + sample * per_sample, at.n, v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
    }
  } else {
    Mask mask = bind_mask(args.dropout, args.params);
    for (u32 sample = begin; sample < end; ++sample) {
      float v[VEC];
      load8(column + sample * per_sample, at.n, v);
      drop8(mask, sample, token, s.width, at.column, v);
      store8(row_of(args.d_y, sample * s.tokens + token) + at.column, at.n, v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
    }
  }
  if (!args.partials) return;
  store8(row_of(args.partials, blockIdx.y * s.tokens + token, args.pitch) + at.column, VEC, sum);
}

__device__ __forceinline__ void put(float* p, float v, u32 add) {
  *p = add ? *p + v : v;
}

#define EMBED(suffix, T)                               \
  KERNEL(embed_##suffix, 256, 4)(ARGS(EmbedArgs<T>)) { \
    embed(args);                                       \
  }
#define EMBED_BACKWARD(suffix, S, T)                                       \
  KERNEL(embed_backward_##suffix, 256, 4)(ARGS(EmbedBackwardArgs<S, T>)) { \
    embed_backward(args);                                                  \
  }

EMBED(bf16, bf16)
EMBED(f32, float)
EMBED_BACKWARD(bf16, bf16, bf16)
EMBED_BACKWARD(f32, float, float)
EMBED_BACKWARD(f32_bf16, float, bf16)

// Adds the slices of each token's column, writes the sum to the gradients (null: not trained) and leaves it in slice 0
// for the bias. One thread per column of a token.
KERNEL(embed_gradients, 256, 4)(ARGS(EmbedGradientsArgs)) {
  const EmbedShape& shape = args.shape;
  u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  u32 token = index / shape.width, column = index % shape.width;
  if (token >= shape.tokens) return;
  float* first = row_of(args.partials, token, args.pitch) + column;
  float sum = *first;
  for (u32 slice = 1; slice < args.slices; ++slice)
    sum += first[static_cast<u64>(slice) * shape.tokens * args.pitch];
  *first = sum;
  float* d_extra = token == 0 ? args.d_extra0 : args.d_extra1;
  if (token < shape.classes && d_extra) put(d_extra + column, sum, args.add);
  if (token >= shape.classes && token < shape.extra && args.d_registers.at) {
    put(row_of(args.d_registers, token - shape.classes) + column, sum, args.add);
  }
  if (token >= shape.posemb_first && args.d_posemb.at) {
    put(row_of(args.d_posemb, token - shape.posemb_first) + column, sum, args.add);
  }
}
