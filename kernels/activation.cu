// Elementwise operations around a matmul that no cuBLASLt epilogue covers: bias, residual, GELU with dropout, tanh,
// scaling.
//
// Math      gelu(x) = x·w(x).  tanh form: w = ½(1 + tanh t) = 1/(1 + e^(-2t)), t = √(2/π)(x + 0.044715 x³)
//           erf form: w = Φ(x) = ½ erfc(-x/√2).   gelu' = w + x·w'
//           bias_gelu: pre = z + b, y = dropout(gelu(pre)); without a bias z is already pre.
//           gelu_backward: d = dropout'(d)·gelu'(pre)
//           bias_tanh: y = tanh(z + b)   tanh_backward: d = d·(1 - y²)
// Tensors   matrices [R, C] in T, each with its own row stride; outputs may overwrite inputs of the same shape. bias
//           f32 [C]
// Numerics  f32. y is computed from pre as stored, because the backward reads that. Both forms keep their relative
//           accuracy far on the negative side: nothing is subtracted from 1.
// Launch    one thread per 8 values, 256 threads per block.
// Bytes     per value of bf16: bias_gelu 6 (4 if it has no bias or does not store pre), gelu_backward 6, bias_residual
//           6, bias_tanh, bias and scale 4.
// Source    Hendrycks and Gimpel 2016 (GELU); Srivastava et al. 2014 (dropout).
#include "philox.cuh"

// The two forms, with the host's numbers.
constexpr u32 GELU_TANH = 0;

constexpr float TWO_SQRT_2_OVER_PI = 1.5957691216f;
constexpr float CUBIC = 0.044715f;

__device__ __forceinline__ float tanh_weight(float x) {
  return rcp_approx(1.0f + expf(-TWO_SQRT_2_OVER_PI * x * fmaf(CUBIC, x * x, 1.0f)));
}
__device__ __forceinline__ float erf_weight(float x) {
  return 0.5f * erfcf(-0.70710678f * x);
}

__device__ __forceinline__ float gelu(float x, u32 form) {
  return x * (form == GELU_TANH ? tanh_weight(x) : erf_weight(x));
}
__device__ __forceinline__ float gelu_slope(float x, u32 form) {
  if (form == GELU_TANH) {
    float w = tanh_weight(x);
    float two_slope = TWO_SQRT_2_OVER_PI * fmaf(3.0f * CUBIC, x * x, 1.0f);
    return fmaf(x * w * (1.0f - w), two_slope, w);
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

template <typename T>
__device__ __forceinline__ void add_bias(const float* bias, const Place& at, float (&v)[VEC]) {
  float b[VEC];
  load8(bias + at.column, at.n, b);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] += b[i];
}

template <typename T>
__device__ __forceinline__ void bias(const float* bias, T* y, u32 ld, u32 rows, u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  T* p = row_of(y, at.row, ld) + at.column;
  float v[VEC];
  load8(p, at.n, v);
  add_bias<T>(bias, at, v);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_residual(const T* z, u32 ld_z, const float* bias, const T* residual,
                                              u32 ld_residual, T* y, u32 ld_y, u32 rows, u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  float v[VEC], r[VEC];
  load8(row_of(z, at.row, ld_z) + at.column, at.n, v);
  load8(row_of(residual, at.row, ld_residual) + at.column, at.n, r);
  add_bias<T>(bias, at, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] += r[i];
  store8(row_of(y, at.row, ld_y) + at.column, at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_gelu(const StepParams* params, MaskArgs dropout, u32 rows_per_sample,
                                          const T* z, u32 ld_z, const float* bias, u32 form, T* pre,
                                          u32 ld_pre, T* y, u32 ld_y, u32 rows, u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  float v[VEC];
  load8(row_of(z, at.row, ld_z) + at.column, at.n, v);
  if (bias) {
    add_bias<T>(bias, at, v);
    round8<T>(v);
    if (pre) store8(row_of(pre, at.row, ld_pre) + at.column, at.n, v);
  }
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = gelu(v[i], form);
  drop8(dropout, params, rows_per_sample, columns, at, v);
  store8(row_of(y, at.row, ld_y) + at.column, at.n, v);
}

template <typename T>
__device__ __forceinline__ void gelu_backward(const StepParams* params, MaskArgs dropout, u32 rows_per_sample,
                                              T* d, u32 ld_d, const T* pre, u32 ld_pre, u32 form, u32 rows,
                                              u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  T* p = row_of(d, at.row, ld_d) + at.column;
  float v[VEC], x[VEC];
  load8(p, at.n, v);
  load8(row_of(pre, at.row, ld_pre) + at.column, at.n, x);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= gelu_slope(x[i], form);
  drop8(dropout, params, rows_per_sample, columns, at, v);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void bias_tanh(const T* z, u32 ld_z, const float* bias, T* y, u32 ld_y, u32 rows,
                                          u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  float v[VEC];
  load8(row_of(z, at.row, ld_z) + at.column, at.n, v);
  add_bias<T>(bias, at, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = tanhf(v[i]);
  store8(row_of(y, at.row, ld_y) + at.column, at.n, v);
}

template <typename T>
__device__ __forceinline__ void tanh_backward(T* d, u32 ld_d, const T* y, u32 ld_y, u32 rows, u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  T* p = row_of(d, at.row, ld_d) + at.column;
  float v[VEC], x[VEC];
  load8(p, at.n, v);
  load8(row_of(y, at.row, ld_y) + at.column, at.n, x);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= fmaf(-x[i], x[i], 1.0f);
  store8(p, at.n, v);
}

template <typename T>
__device__ __forceinline__ void scale(T* x, u32 ld, float factor, u32 rows, u32 columns) {
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  T* p = row_of(x, at.row, ld) + at.column;
  float v[VEC];
  load8(p, at.n, v);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] *= factor;
  store8(p, at.n, v);
}

#define ACTIVATION(suffix, T)                                                                                \
  KERNEL(bias_##suffix, 256, 4)(const float* b, T* y, u32 ld, u32 rows, u32 columns) {                       \
    bias<T>(b, y, ld, rows, columns);                                                                        \
  }                                                                                                          \
  KERNEL(bias_residual_##suffix, 256, 4)(const T* z, u32 ld_z, const float* b, const T* residual,            \
                                         u32 ld_residual, T* y, u32 ld_y, u32 rows, u32 columns) {           \
    bias_residual<T>(z, ld_z, b, residual, ld_residual, y, ld_y, rows, columns);                             \
  }                                                                                                          \
  KERNEL(bias_gelu_##suffix, 256, 4)(const StepParams* params, MaskArgs mask, u32 rows_per_sample, const T* z, \
                                     u32 ld_z, const float* b, u32 form, T* pre, u32 ld_pre, T* y, u32 ld_y, \
                                     u32 rows, u32 columns) {                                                \
    bias_gelu<T>(params, mask, rows_per_sample, z, ld_z, b, form, pre, ld_pre, y, ld_y, rows, columns);       \
  }                                                                                                          \
  KERNEL(gelu_backward_##suffix, 256, 3)(const StepParams* params, MaskArgs mask, u32 rows_per_sample, T* d,   \
                                         u32 ld_d, const T* pre, u32 ld_pre, u32 form, u32 rows,             \
                                         u32 columns) {                                                      \
    gelu_backward<T>(params, mask, rows_per_sample, d, ld_d, pre, ld_pre, form, rows, columns);               \
  }                                                                                                          \
  KERNEL(bias_tanh_##suffix, 256, 4)(const T* z, u32 ld_z, const float* b, T* y, u32 ld_y, u32 rows,         \
                                     u32 columns) {                                                          \
    bias_tanh<T>(z, ld_z, b, y, ld_y, rows, columns);                                                        \
  }                                                                                                          \
  KERNEL(tanh_backward_##suffix, 256, 4)(T * d, u32 ld_d, const T* y, u32 ld_y, u32 rows, u32 columns) {     \
    tanh_backward<T>(d, ld_d, y, ld_y, rows, columns);                                                       \
  }                                                                                                          \
  KERNEL(scale_##suffix, 256, 4)(T * x, u32 ld, float factor, u32 rows, u32 columns) {                       \
    scale<T>(x, ld, factor, rows, columns);                                                                  \
  }

ACTIVATION(bf16, bf16)
ACTIVATION(f32, float)
