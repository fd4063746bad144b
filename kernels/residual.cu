// The residual add with everything that may modify the branch, and its backward.
//
// Math      sum = base + drop_path(layer_scale ∘ dropout(branch))
//           d_branch = factors·layer_scale·d_sum   d_layer_scale[c] = Σ_R factors·branch·d_sum
//           bias: db[c] = Σ_R d_branch as stored, which the next product reads as its d_y
// Tensors   base, sum, d_sum, the residual stream, [R, D] in S   branch, d_branch [R, D] in T: S and T are
//           one type, or f32 and bf16; sum may be base, d_branch may be d_sum of the same type
//           layer_scale f32 [D]; partials f32 [slices, 1 or 2 (layer_scale, b), pitch]
// Launch    elementwise kernels: one thread per 8 values. `residual_scale_backward`: grid (stretches of 256 columns,
//           slices of rows), a lane owns 8 columns; `sum_partials` completes the sum.
// Bytes     forward 6 per value in bf16, backward 4, with the LayerScale gradient 6. With the stream in f32: 10,
//           6, 8.
// Order     rows of a warp, warps, slices.
// Source    Srivastava et al. 2014 (dropout); Huang et al. 2016 (drop-path); Touvron et al. 2021
//           (LayerScale).
#include "reduce.cuh"
#include "residual.cuh"

template <typename S, typename T>
struct ResidualArgs {
  const StepParams* params;
  BranchArgs branch_args;
  View<const S> base;
  View<const T> branch;
  View<S> sum;
};
template <typename S, typename T>
struct ResidualBackwardArgs {
  const StepParams* params;
  BranchArgs branch_args;
  View<const S> d_sum;
  View<T> d_branch;
};
template <typename S, typename T>
struct ResidualScaleBackwardArgs {
  const StepParams* params;
  BranchArgs branch_args;
  View<const T> branch;
  View<const S> d_sum;
  View<T> d_branch;
  float* partials;
  u32 pitch;
};

template <typename S, typename T>
__device__ __forceinline__ void residual(const ResidualArgs<S, T>& args) {
  u32 rows = args.sum.rows, columns = args.sum.cols;
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  float v[VEC], x[VEC], f[VEC];
  load8(at_place(args.base, at), at.n, v);
  load8(at_place(args.branch, at), at.n, x);
  Branch b = bind_branch(args.branch_args, args.params, columns);
  branch_factors(b, at.row, at.column, at.n, path_factor(b, at.row), f);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = fmaf(x[i], f[i], v[i]);
  store8(at_place(args.sum, at), at.n, v);
}

template <typename S, typename T>
__device__ __forceinline__ void residual_backward(const ResidualBackwardArgs<S, T>& args) {
  u32 rows = args.d_sum.rows, columns = args.d_sum.cols;
  Place at = place_of_thread(rows, columns);
  if (at.n == 0) return;
  float d[VEC], f[VEC];
  load8(at_place(args.d_sum, at), at.n, d);
  Branch b = bind_branch(args.branch_args, args.params, columns);
  branch_factors(b, at.row, at.column, at.n, path_factor(b, at.row), f);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) d[i] *= f[i];
  store8(at_place(args.d_branch, at), at.n, d);
}

// Also computes the LayerScale's gradient, and if BIAS, that of the bias whose product reads d_branch.
template <bool BIAS, typename S, typename T>
__device__ __forceinline__ void residual_scale_backward(const ResidualScaleBackwardArgs<S, T>& args) {
  u32 rows = args.d_sum.rows, columns = args.d_sum.cols, pitch = args.pitch;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first = blockIdx.x * COLUMN_STRETCH;
  u32 column = first + lane * VEC, n = valid8(column, columns);
  Branch b = bind_branch(args.branch_args, args.params, columns);
  float scale[VEC], total[VEC] = {}, d_bias[VEC] = {};
  load8(args.branch_args.layer_scale + column, n, scale);
  for (u32 row = blockIdx.y * COLUMN_WARPS + warp; row < rows; row += gridDim.y * COLUMN_WARPS) {
    float d[VEC], x[VEC], f[VEC];
    load8(row_of(args.d_sum, row) + column, n, d);
    load8(row_of(args.branch, row) + column, n, x);
    mask_factors(b, row, column, path_factor(b, row), f);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      d[i] *= f[i];
      total[i] = fmaf(x[i], d[i], total[i]);
      d[i] *= scale[i];
    }
    store8(row_of(args.d_branch, row) + column, n, d);
    if constexpr (BIAS) {
      round8<T>(d);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) d_bias[i] += d[i];
    }
  }
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* mine = row_of(args.partials, blockIdx.y, (BIAS ? 2 : 1) * pitch);
  store_column_sums(total, scratch, mine, first, columns);
  if constexpr (BIAS) store_column_sums(d_bias, scratch, mine + pitch, first, columns);
}

#define RESIDUAL(suffix, S, T)                                                   \
  KERNEL(residual_##suffix, 256, 4)(ARGS(ResidualArgs<S, T>)) {                  \
    residual(args);                                                              \
  }                                                                              \
  KERNEL(residual_backward_##suffix, 256, 4)(ARGS(ResidualBackwardArgs<S, T>)) { \
    residual_backward(args);                                                     \
  }                                                                              \
  RESIDUAL_SCALE(scale_backward, suffix, S, T, false)

#define RESIDUAL_SCALE(kind, suffix, S, T, bias)                                      \
  KERNEL(residual_##kind##_##suffix, 256, 2)(ARGS(ResidualScaleBackwardArgs<S, T>)) { \
    residual_scale_backward<bias>(args);                                              \
  }

RESIDUAL(bf16, bf16, bf16)
RESIDUAL(f32, float, float)
RESIDUAL(f32_bf16, float, bf16)
RESIDUAL_SCALE(scale_backward_bias, bf16, bf16, bf16, true)
RESIDUAL_SCALE(scale_backward_bias, f32_bf16, float, bf16, true)
