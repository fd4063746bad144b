// Pooling: one vector per sample from its tokens, and the gradient back to the tokens.
//
// Math      y = 1/(last - first)·Σ x[t], t in [first, last): a token is a mean over one row.
//           d_x[t] (+)= d_y/(last - first) inside, and 0 outside (only where nothing is added to)
// Tensors   x, d_x [B·T, D] in S, y, d_y [B, D] in T: one type, or f32 and bf16
// Launch    one thread per 8 columns: of a sample (forward, loops over its tokens), of a row (backward).
// Bytes     bf16: forward 2 per value of the pooled tokens; backward 2 per value of all tokens if assigned, else 4 per
//           value of the pooled tokens.
// Order     tokens ascending.
#include "types.cuh"

struct PoolShape {
  u32 samples, tokens, width;
  u32 first, last;
};

template <typename S, typename T>
struct PoolArgs {
  PoolShape shape;
  View<const S> x;
  View<T> y;
};
template <typename S, typename T>
struct PoolBackwardArgs {
  PoolShape shape;
  View<const T> d_y;
  View<S> d_x;
  u32 add;  // to d_x; 0: assign
};

template <typename S, typename T>
__device__ __forceinline__ void pool(const PoolArgs<S, T>& args) {
  const PoolShape& s = args.shape;
  Place at = place_of_thread(s.samples, s.width);
  if (at.n == 0) return;
  const S* column = row_of(args.x, at.row * s.tokens) + at.column;
  float sum[VEC] = {};
#pragma unroll 4
  for (u32 token = s.first; token < s.last; ++token) {
    float v[VEC];
    load8(row_of(column, token, args.x.ld), at.n, v);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
  }
  float count = static_cast<float>(s.last - s.first);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) sum[i] /= count;
  store8(at_place(args.y, at), at.n, sum);
}

template <typename S, typename T>
__device__ __forceinline__ void pool_backward(const PoolBackwardArgs<S, T>& args) {
  const PoolShape& s = args.shape;
  Place at = place_of_thread(s.samples * s.tokens, s.width);
  if (at.n == 0) return;
  u32 sample = at.row / s.tokens, token = at.row % s.tokens;
  bool inside = token >= s.first && token < s.last;
  if (!inside && args.add) return;
  S* p = at_place(args.d_x, at);
  float v[VEC], d[VEC];
  load8(p, args.add ? at.n : 0, v);
  load8(row_of(args.d_y, sample) + at.column, inside ? at.n : 0, d);
  float share = 1.0f / static_cast<float>(s.last - s.first);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = fmaf(share, d[i], v[i]);
  store8(p, at.n, v);
}

#define POOL(suffix, S, T)                                               \
  KERNEL(pool_##suffix, 256, 4)(ARGS(PoolArgs<S, T>)) {                  \
    pool(args);                                                          \
  }                                                                      \
  KERNEL(pool_backward_##suffix, 256, 4)(ARGS(PoolBackwardArgs<S, T>)) { \
    pool_backward(args);                                                 \
  }

POOL(bf16, bf16, bf16)
POOL(f32, float, float)
POOL(f32_bf16, float, bf16)
