// Pooling: one vector per sample from its tokens, and the gradient back to the tokens.
//
// Math      y = 1/(last - first)·Σ x[t], t in [first, last): a token is a mean over one row.
//           d_x[t] (+)= d_y/(last - first) inside, and 0 outside (only where `fresh`)
// Tensors   x, d_x [B·T, D], y, d_y [B, D], all in T
// Launch    one thread per 8 columns: of a sample (forward, loops over its tokens), of a row (backward).
// Bytes     bf16: forward 2 per value of the pooled tokens; backward 2 per value of all tokens if fresh, else 4 per
//           value of the pooled tokens.
// Order     tokens ascending.
#include "types.cuh"

struct PoolShape {
  u32 samples, tokens, width;
  u32 first, last;
};

template <typename T>
__device__ __forceinline__ void pool(const PoolShape& s, const T* x, u32 ld_x, T* y, u32 ld_y) {
  Place at = place_of_thread(s.samples, s.width);
  if (at.n == 0) return;
  const T* column = row_of(x, at.row * s.tokens, ld_x) + at.column;
  float sum[VEC] = {};
#pragma unroll 4
  for (u32 token = s.first; token < s.last; ++token) {
    float v[VEC];
    load8(row_of(column, token, ld_x), at.n, v);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
  }
  float count = static_cast<float>(s.last - s.first);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) sum[i] /= count;
  store8(row_of(y, at.row, ld_y) + at.column, at.n, sum);
}

template <typename T>
__device__ __forceinline__ void pool_backward(const PoolShape& s, const T* d_y, u32 ld_y, T* d_x, u32 ld_x,
                                              u32 fresh) {
  Place at = place_of_thread(s.samples * s.tokens, s.width);
  if (at.n == 0) return;
  u32 sample = at.row / s.tokens, token = at.row % s.tokens;
  bool inside = token >= s.first && token < s.last;
  if (!inside && !fresh) return;
  T* p = row_of(d_x, at.row, ld_x) + at.column;
  float v[VEC], d[VEC];
  load8(p, fresh ? 0 : at.n, v);
  load8(row_of(d_y, sample, ld_y) + at.column, inside ? at.n : 0, d);
  float share = 1.0f / static_cast<float>(s.last - s.first);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = fmaf(share, d[i], v[i]);
  store8(p, at.n, v);
}

#define POOL(suffix, T)                                                                             \
  KERNEL(pool_##suffix, 256, 4)(PoolShape shape, const T* x, u32 ld_x, T* y, u32 ld_y) {            \
    pool<T>(shape, x, ld_x, y, ld_y);                                                               \
  }                                                                                                 \
  KERNEL(pool_backward_##suffix, 256, 4)(PoolShape shape, const T* d_y, u32 ld_y, T* d_x, u32 ld_x, \
                                         u32 fresh) {                                               \
    pool_backward<T>(shape, d_y, ld_y, d_x, ld_x, fresh);                                           \
  }

POOL(bf16, bf16)
POOL(f32, float)
