// What is added in place to the patch embedding's matmul output: bias, extra tokens, position embedding; then dropout.
//
// Math      token t of a sample: x += bias (patch rows) or extra_token[t] (extra rows);
//           x += posemb[t - posemb_first] from posemb_first on; x = dropout(x)
//           backward: d_y = dropout'(d_x), which may overwrite d_x; S[t] = Σ_samples of it before it is
//           stored, d_extra[t] = S[t], d_posemb[t - posemb_first] = S[t], d_bias = Σ S[t] over t ≥ extra
// Tensors   x [B·T, D] in T, in place   d_x [B·T, D] in S, d_y in T: one type, or f32 and bf16
//           bias, extra tokens [D], posemb [T - posemb_first, D] and all gradients: f32
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
__device__ __forceinline__ void embed(const StepParams* params, const EmbedShape& s, MaskArgs dropout, T* x,
                                      u32 ld, const float* bias, const float* extra0, const float* extra1,
                                      const float* posemb, u32 posemb_ld) {
  Place at = place_of_thread(s.samples * s.tokens, s.width);
  if (at.n == 0) return;
  u32 sample = at.row / s.tokens, token = at.row % s.tokens;
  T* p = row_of(x, at.row, ld) + at.column;
  float v[VEC];
  load8(p, at.n, v);
  const float* joins = token >= s.extra ? bias : token == 0 ? extra0 : extra1;
  if (joins) add8(joins + at.column, at.n, v);
  if (token >= s.posemb_first) add8(row_of(posemb, token - s.posemb_first, posemb_ld) + at.column, at.n, v);
  drop8(bind_mask(dropout, params), sample, token, s.width, at.column, v);
  store8(p, at.n, v);
}

// Slice blockIdx.y of gridDim.y of the batch. `partials` is null if no parameter is trained. d_y is written where
// dropout makes it differ from d_x.
template <typename S, typename T>
__device__ __forceinline__ void embed_backward(const StepParams* params, const EmbedShape& s, MaskArgs dropout,
                                               const S* d_x, u32 ld, T* d_y, u32 ld_dy, float* partials,
                                               u32 pitch) {
  Place at = place_of_thread(s.tokens, s.width);
  if (at.n == 0) return;
  u32 token = at.row;
  u32 begin = static_cast<u32>(static_cast<u64>(s.samples) * blockIdx.y / gridDim.y);
  u32 end = static_cast<u32>(static_cast<u64>(s.samples) * (blockIdx.y + 1) / gridDim.y);
  const S* column = row_of(d_x, token, ld) + at.column;
  u64 per_sample = static_cast<u64>(s.tokens) * ld;
  float sum[VEC] = {};
  if (dropout.rate == 0.0f) {
#pragma unroll 4
    for (u32 sample = begin; sample < end; ++sample) {
      float v[VEC];
      load8(column + sample * per_sample, at.n, v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
    }
  } else {
    Mask mask = bind_mask(dropout, params);
    for (u32 sample = begin; sample < end; ++sample) {
      float v[VEC];
      load8(column + sample * per_sample, at.n, v);
      drop8(mask, sample, token, s.width, at.column, v);
      store8(row_of(d_y, sample * s.tokens + token, ld_dy) + at.column, at.n, v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
    }
  }
  if (partials) store8(row_of(partials, blockIdx.y * s.tokens + token, pitch) + at.column, VEC, sum);
}

__device__ __forceinline__ void put(float* p, float v, u32 accumulate) {
  *p = accumulate ? *p + v : v;
}

#define EMBED(suffix, T)                                                                                   \
  KERNEL(embed_##suffix, 256, 4)(const StepParams* params, EmbedShape shape, MaskArgs dropout, T* x, u32 ld, \
                                 const float* bias, const float* extra0, const float* extra1,              \
                                 const float* posemb, u32 posemb_ld) {                                     \
    embed<T>(params, shape, dropout, x, ld, bias, extra0, extra1, posemb, posemb_ld);                       \
  }
#define EMBED_BACKWARD(suffix, S, T)                                                                      \
  KERNEL(embed_backward_##suffix, 256, 4)(const StepParams* params, EmbedShape shape, MaskArgs dropout,     \
                                          const S* d_x, u32 ld, T* d_y, u32 ld_dy, float* partials,       \
                                          u32 pitch) {                                                    \
    embed_backward(params, shape, dropout, d_x, ld, d_y, ld_dy, partials, pitch);                          \
  }

EMBED(bf16, bf16)
EMBED(f32, float)
EMBED_BACKWARD(bf16, bf16, bf16)
EMBED_BACKWARD(f32, float, float)
EMBED_BACKWARD(f32_bf16, float, bf16)

// Adds the slices of each token's column, writes the sum to the gradients (null: not trained) and leaves it in slice 0
// for the bias. One thread per column of a token.
KERNEL(embed_gradients, 256, 4)(EmbedShape shape, float* partials, u32 pitch, u32 slices, float* d_extra0,
                                float* d_extra1, float* d_posemb, u32 posemb_ld, u32 accumulate) {
  u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  u32 token = index / shape.width, column = index % shape.width;
  if (token >= shape.tokens) return;
  float* first = row_of(partials, token, pitch) + column;
  float sum = *first;
  for (u32 slice = 1; slice < slices; ++slice) sum += first[static_cast<u64>(slice) * shape.tokens * pitch];
  *first = sum;
  float* d_extra = token == 0 ? d_extra0 : d_extra1;
  if (token < shape.extra && d_extra) put(d_extra + column, sum, accumulate);
  if (token >= shape.posemb_first && d_posemb) {
    put(row_of(d_posemb, token - shape.posemb_first, posemb_ld) + column, sum, accumulate);
  }
}
