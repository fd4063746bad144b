// Elementwise operations around a matmul that no cuBLASLt epilogue covers: bias, residual, GELU with dropout, tanh,
// scaling.
//
// Math      gelu(x) = x·w(x).  tanh form: w = ½(1 + tanh t) = 1/(1 + e^(-2t)), t = √(2/π)(x + 0.044715 x³)
//           erf form: w = Φ(x) = ½ erfc(-x/√2).   quick form: w = σ(1.702 x).   gelu' = w + x·w'
//           bias_gelu: pre = z + b, y = dropout(gelu(pre)); without a bias z is already pre.
//           gelu_backward: d = dropout'(d)·gelu'(pre)
//           bias_tanh: y = tanh(z + b)   tanh_backward: d = d·(1 - y²)
// Tensors   matrices [R, C] in T, each with its own row stride; outputs may overwrite inputs of the same shape. bias
//           f32 [C]
// Numerics  f32. y is computed from pre as stored, because the backward reads that. All forms keep their relative
//           accuracy far on the negative side: nothing is subtracted from 1.
// Launch    one thread per 8 values, 256 threads per block.
// Bytes     per value of bf16: bias_gelu 6 (4 if it has no bias or does not store pre), gelu_backward 6, bias_residual
//           6, bias_tanh, bias and scale 4.
// Source    Hendrycks and Gimpel 2016 (GELU); Srivastava et al. 2014 (dropout).
#include "philox.cuh"

// The forms, with the host's numbers; 1 is the erf form.
constexpr u32 GELU_TANH = 0;
constexpr u32 GELU_QUICK = 2;

constexpr float TWO_SQRT_2_OVER_PI = 1.5957691216f;
constexpr float CUBIC = 0.044715f;

__device__ __forceinline__ float tanh_weight(float x) {
  return rcp_approx(1.0f + expf(-TWO_SQRT_2_OVER_PI * x * fmaf(CUBIC, x * x, 1.0f)));
}
__device__ __forceinline__ float erf_weight(float x) {
  return 0.5f * erfcf(-0.70710678f * x);
}

__device__ __forceinline__ float quick_weight(float x) {
  return rcp_approx(1.0f + expf(-1.702f * x));
}

__device__ __forceinline__ float gelu(float x, u32 form) {
  if (form == GELU_QUICK) return x * quick_weight(x);
  return x * (form == GELU_TANH ? tanh_weight(x) : erf_weight(x));
}
__device__ __forceinline__ float gelu_slope(float x, u32 form) {
  if (form == GELU_TANH) {
    float w = tanh_weight(x);
    float two_slope = TWO_SQRT_2_OVER_PI * fmaf(3.0f * CUBIC, x * x, 1.0f);
    return fmaf(x * w * (1.0f - w), two_slope, w);
  }
  if (form == GELU_QUICK) {
    float w = quick_weight(x);
    return fmaf(x * w * (1.0f - w), 1.702f, w);
  }
  float bell = 0.39894228f * expf(-0.5f * x * x);
  return fmaf(x, bell, erf_weight(x));
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

__device__ __forceinline__ void add_bias(const float* bias, const Place& at, float (&v)[VEC]) {
  float b[VEC];
  load8(bias + at.column, at.n, b);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] += b[i];
}

template <typename T>
struct BiasArgs {
  const float* bias;
  View<T> y;
};
template <typename T>
struct BiasResidualArgs {
  View<const T> z;
  const float* bias;
  View<const T> residual;
  View<T> y;
};
template <typename T>
struct BiasGeluArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 rows_per_sample;
  u32 form;
  View<const T> z;
  const float* bias;  // null: z is already pre
  View<T> pre;        // null: not stored
  View<T> y;
};
template <typename T>
struct GeluBackwardArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 rows_per_sample;
  u32 form;
  View<T> d;
  View<const T> pre;
};
template <typename T>
struct BiasTanhArgs {
  View<const T> z;
  const float* bias;
  View<T> y;
};
template <typename T>
struct TanhBackwardArgs {
  View<T> d;
  View<const T> y;
};
template <typename T>
struct ScaleArgs {
  View<T> x;
  float factor;
};

// Where a thread works in `m`.
template <typename T>
__device__ __forceinline__ Place place_in(const View<T>& m) {
  return place_of_thread(m.rows, m.cols);
}

template <typename T>
__device__ __forceinline__ void bias(const BiasArgs<T>& args) {
  Place at = place_in(args.y);
  if (at.n == 0) return;
  T* p = at_place(args.y, at);
  float v[VEC];
  load8(p, at.n, v);
  add_bias(args.bias, at, v);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_residual(const BiasResidualArgs<T>& args) {
  Place at = place_in(args.y);
  if (at.n == 0) return;
  float v[VEC], r[VEC];
  load8(at_place(args.z, at), at.n, v);
  load8(at_place(args.residual, at), at.n, r);
  add_bias(args.bias, at, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] += r[i];
  store8(at_place(args.y, at), at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_gelu(const BiasGeluArgs<T>& args) {
  Place at = place_in(args.y);
  if (at.n == 0) return;
  float v[VEC];
  load8(at_place(args.z, at), at.n, v);
  if (args.bias) {
    add_bias(args.bias, at, v);
    round8<T>(v);
    if (args.pre.at) store8(at_place(args.pre, at), at.n, v);
  }
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = gelu(v[i], args.form);
  drop8(args.dropout, args.params, args.rows_per_sample, args.y.cols, at, v);
  store8(at_place(args.y, at), at.n, v);
}

template <typename T>
__device__ __forceinline__ void gelu_backward(const GeluBackwardArgs<T>& args) {
  Place at = place_in(args.d);
  if (at.n == 0) return;
  T* p = at_place(args.d, at);
  float v[VEC], x[VEC];
  load8(p, at.n, v);
  load8(at_place(args.pre, at), at.n, x);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= gelu_slope(x[i], args.form);
  drop8(args.dropout, args.params, args.rows_per_sample, args.d.cols, at, v);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_tanh(const BiasTanhArgs<T>& args) {
  Place at = place_in(args.y);
  if (at.n == 0) return;
  float v[VEC];
  load8(at_place(args.z, at), at.n, v);
  add_bias(args.bias, at, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = tanhf(v[i]);
  store8(at_place(args.y, at), at.n, v);
}

template <typename T>
__device__ __forceinline__ void tanh_backward(const TanhBackwardArgs<T>& args) {
  Place at = place_in(args.d);
  if (at.n == 0) return;
  T* p = at_place(args.d, at);
  float v[VEC], x[VEC];
  load8(p, at.n, v);
  load8(at_place(args.y, at), at.n, x);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= fmaf(-x[i], x[i], 1.0f);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void scale(const ScaleArgs<T>& args) {
  Place at = place_in(args.x);
  if (at.n == 0) return;
  T* p = at_place(args.x, at);
  float v[VEC];
  load8(p, at.n, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= args.factor;
  store8(p, at.n, v);
}

#define ACTIVATION(suffix, T)                                         \
  KERNEL(bias_##suffix, 256, 4)(ARGS(BiasArgs<T>)) {                  \
    bias(args);                                                       \
  }                                                                   \
  KERNEL(bias_residual_##suffix, 256, 4)(ARGS(BiasResidualArgs<T>)) { \
    bias_residual(args);                                              \
  }                                                                   \
  KERNEL(bias_gelu_##suffix, 256, 4)(ARGS(BiasGeluArgs<T>)) {         \
    bias_gelu(args);                                                  \
  }                                                                   \
  KERNEL(gelu_backward_##suffix, 256, 3)(ARGS(GeluBackwardArgs<T>)) { \
    gelu_backward(args);                                              \
  }                                                                   \
  KERNEL(bias_tanh_##suffix, 256, 4)(ARGS(BiasTanhArgs<T>)) {         \
    bias_tanh(args);                                                  \
  }                                                                   \
  KERNEL(tanh_backward_##suffix, 256, 4)(ARGS(TanhBackwardArgs<T>)) { \
    tanh_backward(args);                                              \
  }                                                                   \
  KERNEL(scale_##suffix, 256, 4)(ARGS(ScaleArgs<T>)) {                \
    scale(args);                                                      \
  }

ACTIVATION(bf16, bf16)
ACTIVATION(f32, float)
