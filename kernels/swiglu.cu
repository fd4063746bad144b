// The gate of a SwiGLU, and its gradient.
//
// Math      pre = [g | u]: y = dropout(silu(g) ∘ u), silu(g) = g·σ(g)
//           backward: d = dropout'(d_y), d_u = d·silu(g), d_g = d·u·σ(g)·(1 + g·(1 - σ(g))), d_pre = [d_g | d_u]
// Tensors   y, d_y [R, M], pre, d_pre [R, 2M], all in T, each with its own row stride
// Numerics  f32.
// Launch    one thread per 8 values of y, 256 threads per block. Where 8 does not divide M, the second half of a row of
//           pre is not aligned to 16 bytes: its values move one by one.
// Bytes     per value of y in bf16: forward 6, backward 10.
// Source    Shazeer 2020, arXiv:2002.05202.
#include "philox.cuh"

template <typename T>
struct SwigluArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 rows_per_sample;
  View<const T> pre;
  View<T> y;
};
template <typename T>
struct SwigluBackwardArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 rows_per_sample;
  View<const T> d_y;
  View<const T> pre;
  View<T> d_pre;
};

__device__ __forceinline__ float sigmoid(float x) {
  return rcp_approx(1.0f + expf(-x));
}

// The factors of eight values of row `row`; a sample has `rows_per_sample` rows.
__device__ __forceinline__ void drop8(MaskArgs args, const StepParams* params, u32 rows_per_sample, u32 columns,
                                      const Place& at, float (&v)[VEC]) {
  if (args.rate == 0.0f) return;
  float f[VEC];
  Mask mask = bind_mask(args, params);
  mask_factors8(mask, at.row / rows_per_sample, at.row % rows_per_sample * columns + at.column, f);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= f[i];
}

template <typename T>
__device__ __forceinline__ void swiglu(const SwigluArgs<T>& args) {
  Place at = place_of_thread(args.y.rows, args.y.cols);
  if (at.n == 0) return;
  const T* p = at_place(args.pre, at);
  float g[VEC], u[VEC];
  load8(p, at.n, g);
  load8_anywhere(p + args.y.cols, at.n, u);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) u[i] *= g[i] * sigmoid(g[i]);
  drop8(args.dropout, args.params, args.rows_per_sample, args.y.cols, at, u);
  store8(at_place(args.y, at), at.n, u);
}

template <typename T>
__device__ __forceinline__ void swiglu_backward(const SwigluBackwardArgs<T>& args) {
  Place at = place_of_thread(args.d_y.rows, args.d_y.cols);
  if (at.n == 0) return;
  const T* p = at_place(args.pre, at);
  float g[VEC], u[VEC], d[VEC];
  load8(p, at.n, g);
  load8_anywhere(p + args.d_y.cols, at.n, u);
  load8(at_place(args.d_y, at), at.n, d);
  drop8(args.dropout, args.params, args.rows_per_sample, args.d_y.cols, at, d);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) {
    float w = sigmoid(g[i]);
    float silu = g[i] * w;
    g[i] = d[i] * u[i] * fmaf(silu, 1.0f - w, w);
    u[i] = d[i] * silu;
  }
  T* to = at_place(args.d_pre, at);
  store8(to, at.n, g);
  store8_anywhere(to + args.d_y.cols, at.n, u);
}

#define SWIGLU(suffix, T)                                                 \
  KERNEL(swiglu_##suffix, 256, 4)(ARGS(SwigluArgs<T>)) {                  \
    swiglu(args);                                                         \
  }                                                                       \
  KERNEL(swiglu_backward_##suffix, 256, 4)(ARGS(SwigluBackwardArgs<T>)) { \
    swiglu_backward(args);                                                \
  }

SWIGLU(bf16, bf16)
SWIGLU(f32, float)
