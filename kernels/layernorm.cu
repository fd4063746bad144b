// LayerNorm over the last axis, with the residual add before it where the model needs one, and its backward.
//
// Math      mean = avg(x)  rstd = 1/√(avg((x - mean)²) + eps)  x̂ = (x - mean)·rstd  y = γ·x̂ + β
//           u = γ·d_y   d_sum (+)= rstd·(u - avg(u) - x̂·avg(u·x̂))   dγ = Σ_R d_y·x̂   dβ = Σ_R d_y
//           join: x = base + drop_path(layer_scale ∘ dropout(branch)) is computed and stored first, and its
//           backward gives d_branch from d_sum.
//           bias: db = Σ_R of the matrix that the next product reads as its d_y: d_branch, or d_sum without a join.
// Tensors   x d_sum base, the residual stream, [R, D] in S   y d_y branch d_branch [R, D] in T: S and T are one
//           type, or f32 and bf16   mean rstd f32 [R]   γ β layer_scale f32 [D]
//           partials f32 [blocks, 2 or 3 (γ, β, b), pitch], pitch = D rounded up to 8. d_sum is read where it is
//           added to.
// Numerics  f32, two passes over registers. In a row far from zero, the rounding error of the mean is too large
//           compared with the deviation. Both passes measure the residual of the rounded mean, avg(x - mean), and
//           subtract it. A joined sum is normalised as stored, so that the backward sees the same values. Where S is
//           wider than T and there is no join, the kernel runs with neutral factors: d_branch is d_sum in the type that
//           the next products read. db sums the values as stored.
// Launch    y in bf16, D ≤ 1280: one warp per row, 6 or 8 rows per block, the row in registers (instance N holds D in
//           (256(N-1), 256N]), blocks loop over rows. A lane owns the same columns of every row, so γ and β (forward),
//           dγ and dβ (backward) stay in its registers; the block's warps are added once. db is in shared memory, one
//           row of f32 per warp, where a lane adds to its own columns: registers would cost warps, 8 bytes of shared
//           memory per value cost a tenth of its bandwidth (an estimate).
//           y in f32 and D > 1280 use the `_wide` kernels: a warp per row that reads it several times through L1,
//           and `layernorm_gradients`, in which lanes own columns, for dγ and dβ.
// Bytes     per value of bf16: forward 4 (join 8), backward 8, or 6 if assigned (join + 2), 8R of statistics, and
//           the partials. With the stream in f32: forward 6 (join 12), backward 14, or 10 if assigned (join + 2).
// Order     rows of a warp, warps, blocks (`sum_partials`): fixed by the launch shape.
// Source    Ba et al. 2016, arXiv:1607.06450. Two-stage γ and β gradients with columns owned by lanes: Apex,
//           llm.c.
#include "reduce.cuh"
#include "residual.cuh"

// Rows that a block processes at a time.
__device__ __forceinline__ u32 rows_of_block() {
  return blockDim.x / WARP;
}

// How many of a lane's eight elements of stretch `j` exist. The choice of the instance makes all but the last stretch
// whole.
template <u32 STRETCHES>
__device__ __forceinline__ u32 held(u32 j, u32 column, u32 columns) {
  return j + 1 < STRETCHES ? VEC : valid8(column, columns);
}
__device__ __forceinline__ u32 column_of(u32 j) {
  return j * COLUMN_STRETCH + threadIdx.x % WARP * VEC;
}

// ---- forward ----------------------------------------------------------------------------------------------

struct RowStats {
  float near, rest, rstd;  // the mean is near + rest
};

// Two sums over the row give its statistics, relative to `near`, the rounded mean.
__device__ __forceinline__ RowStats row_stats(float near, float sum_off, float sum_squares, float inverse,
                                              float eps) {
  float rest = warp_sum(sum_off) * inverse;
  float variance = fmaxf(warp_sum(sum_squares) * inverse - rest * rest, 0.0f);
  return {near, rest, 1.0f / sqrtf(variance + eps)};
}

__device__ __forceinline__ void store_stats(RowStats s, float* mean, float* rstd, u32 row) {
  if (threadIdx.x % WARP == 0) {
    mean[row] = s.near + s.rest;
    rstd[row] = s.rstd;
  }
}

// γ and β of eight columns: read from memory (L1) each time, or held by the lane, whose columns are the same in every
// row.
struct AffineInMemory {
  const float *gamma, *beta;
  __device__ __forceinline__ void get(u32, u32 column, u32 n, float (&g)[VEC], float (&b)[VEC]) const {
    load8(gamma + column, n, g);
    load8(beta + column, n, b);
  }
};
template <u32 STRETCHES>
struct AffineInRegisters {
  float g[STRETCHES][VEC], b[STRETCHES][VEC];
  __device__ __forceinline__ AffineInRegisters(const float* gamma, const float* beta, u32 columns) {
#pragma unroll
    for (u32 j = 0; j < STRETCHES; ++j) {
      u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
      load8(gamma + column, n, g[j]);
      load8(beta + column, n, b[j]);
    }
  }
  __device__ __forceinline__ void get(u32 j, u32, u32, float (&g)[VEC], float (&b)[VEC]) const {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) g[i] = this->g[j][i], b[i] = this->b[j][i];
  }
};

template <typename T, typename Affine>
__device__ __forceinline__ void store_normalised(const float (&x)[VEC], RowStats s, const Affine& affine,
                                                 u32 j, T* y_row, u32 column, u32 n) {
  float g[VEC], b[VEC], v[VEC];
  affine.get(j, column, n, g, b);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = fmaf((x[i] - s.near - s.rest) * s.rstd, g[i], b[i]);
  store8(y_row + column, n, v);
}

// Normalises a row held in registers.
template <u32 STRETCHES, typename Affine>
__device__ __forceinline__ void normalise_row(const float (&x)[STRETCHES][VEC], const Affine& affine,
                                              float eps, bf16* y, float* mean, float* rstd, u32 row,
                                              u32 columns) {
  float inverse = 1.0f / static_cast<float>(columns);
  float total = 0.0f;
#pragma unroll
  for (u32 j = 0; j < STRETCHES; ++j)
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) total += x[j][i];
  float near = warp_sum(total) * inverse;

  float off_sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (u32 j = 0; j < STRETCHES; ++j) {
    u32 n = held<STRETCHES>(j, column_of(j), columns);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      float off = i < n ? x[j][i] - near : 0.0f;
      off_sum += off;
      squares = fmaf(off, off, squares);
    }
  }
  RowStats stats = row_stats(near, off_sum, squares, inverse, eps);
  store_stats(stats, mean, rstd, row);
#pragma unroll
  for (u32 j = 0; j < STRETCHES; ++j) {
    u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
    if (n > 0) store_normalised(x[j], stats, affine, j, y, column, n);
  }
}

template <u32 STRETCHES, typename T>
__device__ __forceinline__ void fetch_row(const T* x, u32 columns, Raw8<T> (&raw)[STRETCHES]) {
#pragma unroll
  for (u32 j = 0; j < STRETCHES; ++j) {
    u32 column = column_of(j);
    raw[j] = fetch8_stream(x + column, held<STRETCHES>(j, column, columns));
  }
}

template <typename S, typename T>
struct LayerNormArgs {
  View<const S> x;
  const float* gamma;
  const float* beta;
  float eps;
  View<T> y;
  float* mean;
  float* rstd;
};
template <typename S>
struct LayerNormJoinArgs {
  const StepParams* params;
  BranchArgs branch_args;
  View<const S> base;
  View<const bf16> branch;
  View<S> sum;
  const float* gamma;
  const float* beta;
  float eps;
  View<bf16> y;
  float* mean;
  float* rstd;
};

// AHEAD rows are being loaded while one is processed: with narrow rows, memory would otherwise be idle between
// requests.
template <u32 STRETCHES, u32 AHEAD, typename S>
__device__ __forceinline__ void layernorm(const LayerNormArgs<S, bf16>& args) {
  u32 rows = args.y.rows, columns = args.y.cols;
  u32 stride = gridDim.x * rows_of_block();
  u32 row = blockIdx.x * rows_of_block() + threadIdx.x / WARP;
  AffineInRegisters<STRETCHES> affine(args.gamma, args.beta, columns);
  Raw8<S> raw[AHEAD][STRETCHES];
#pragma unroll
  for (u32 a = 0; a < AHEAD; ++a)
    if (row + a * stride < rows) fetch_row(row_of(args.x, row + a * stride), columns, raw[a]);
  while (row < rows) {
#pragma unroll
    for (u32 a = 0; a < AHEAD; ++a, row += stride) {
      if (row >= rows) break;
      float v[STRETCHES][VEC];
#pragma unroll
      for (u32 j = 0; j < STRETCHES; ++j) unpack8(raw[a][j], v[j]);
      u32 next = row + AHEAD * stride;
      if (next < rows) fetch_row(row_of(args.x, next), columns, raw[a]);
      normalise_row(v, affine, args.eps, row_of(args.y, row), args.mean, args.rstd, row, columns);
    }
  }
}

template <u32 STRETCHES, typename S>
__device__ __forceinline__ void layernorm_join(const LayerNormJoinArgs<S>& args) {
  u32 rows = args.y.rows, columns = args.y.cols;
  Branch b = bind_branch(args.branch_args, args.params, columns);
  u32 stride = gridDim.x * rows_of_block();
  for (u32 row = blockIdx.x * rows_of_block() + threadIdx.x / WARP; row < rows; row += stride) {
    const S* base_row = row_of(args.base, row);
    const bf16* branch_row = row_of(args.branch, row);
    S* sum_row = row_of(args.sum, row);
    Raw8<S> bases[STRETCHES];
    Raw8<bf16> branches[STRETCHES];
#pragma unroll
    for (u32 j = 0; j < STRETCHES; ++j) {
      u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
      bases[j] = fetch8(base_row + column, n);
      branches[j] = fetch8(branch_row + column, n);
    }
    float path = path_factor(b, row);
    float v[STRETCHES][VEC];
#pragma unroll
    for (u32 j = 0; j < STRETCHES; ++j) {
      u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
      float add[VEC], f[VEC];
      unpack8(bases[j], v[j]);
      unpack8(branches[j], add);
      branch_factors(b, row, column, n, path, f);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) v[j][i] = fmaf(add[i], f[i], v[j][i]);
      round8<S>(v[j]);
      if (n > 0) store8(sum_row + column, n, v[j]);
    }
    normalise_row(v, AffineInMemory{args.gamma, args.beta}, args.eps, row_of(args.y, row), args.mean,
                  args.rstd, row, columns);
  }
}

// Any width: the row is read three times, once from memory.
template <typename S, typename T>
__device__ __forceinline__ void layernorm_wide(const LayerNormArgs<S, T>& args) {
  u32 rows = args.y.rows, columns = args.y.cols;
  float inverse = 1.0f / static_cast<float>(columns);
  for (u32 row = blockIdx.x * rows_of_block() + threadIdx.x / WARP; row < rows;
       row += gridDim.x * rows_of_block()) {
    const S* in = row_of(args.x, row);
    T* out = row_of(args.y, row);
    float total = 0.0f, v[VEC];
    for (u32 column = column_of(0); column < columns; column += COLUMN_STRETCH) {
      load8(in + column, valid8(column, columns), v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) total += v[i];
    }
    float near = warp_sum(total) * inverse;
    float off_sum = 0.0f, squares = 0.0f;
    for (u32 column = column_of(0); column < columns; column += COLUMN_STRETCH) {
      u32 n = valid8(column, columns);
      load8(in + column, n, v);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) {
        float off = i < n ? v[i] - near : 0.0f;
        off_sum += off;
        squares = fmaf(off, off, squares);
      }
    }
    RowStats stats = row_stats(near, off_sum, squares, inverse, args.eps);
    store_stats(stats, args.mean, args.rstd, row);
    for (u32 column = column_of(0); column < columns; column += COLUMN_STRETCH) {
      u32 n = valid8(column, columns);
      load8(in + column, n, v);
      store_normalised(v, stats, AffineInMemory{args.gamma, args.beta}, 0, out, column, n);
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------------------

// Values that the gradients of a row's elements share.
struct RowGrad {
  float mean, rest, rstd, avg_u, avg_ux;
};

__device__ __forceinline__ float hat(const RowGrad& g, float x) {
  return (x - g.mean - g.rest) * g.rstd;
}
__device__ __forceinline__ float d_x(const RowGrad& g, float x, float u) {
  return g.rstd * fmaf(-hat(g, x), g.avg_ux, u - g.avg_u);
}

// Three sums over the row: x - mean, u, u·(x - mean).
__device__ __forceinline__ RowGrad row_grad(float mean, float rstd, float off, float u, float u_off,
                                            float inverse) {
  float rest = warp_sum(off) * inverse;
  float avg_u = warp_sum(u) * inverse;
  float avg_u_off = warp_sum(u_off) * inverse;
  return {mean, rest, rstd, avg_u, (avg_u_off - avg_u * rest) * rstd};
}

// The bias sums of each warp's rows, in shared memory. A lane touches only its own columns.
template <u32 STRETCHES>
struct BiasSums {
  static constexpr u32 ROW = STRETCHES * COLUMN_STRETCH;
  float* mine;  // the lane's columns

  __device__ __forceinline__ void clear() {
    mine = reinterpret_cast<float*>(smem_base()) + threadIdx.x / WARP * ROW + threadIdx.x % WARP * 4;
#pragma unroll
    for (u32 j = 0; j < 2 * STRETCHES; ++j) st16(mine + j * COLUMN_HALF, {0, 0, 0, 0});
  }
  // Adds eight values of stretch `j`, as stored; columns past the last are dropped at the end.
  __device__ __forceinline__ void add(u32 j, vec4 packed) const {
    add4(mine + j * COLUMN_STRETCH, packed.x, packed.y);
    add4(mine + j * COLUMN_STRETCH + COLUMN_HALF, packed.z, packed.w);
  }
  __device__ __forceinline__ static void add4(float* to, u32 a, u32 b) {
    vec4 sum = ld16(to);
    st16(to, {as_u32(as_f32(sum.x) + bf16_lo(a)), as_u32(as_f32(sum.y) + bf16_hi(a)),
              as_u32(as_f32(sum.z) + bf16_lo(b)), as_u32(as_f32(sum.w) + bf16_hi(b))});
  }
  // Writes the block's sums; after that the memory is free.
  __device__ __forceinline__ void store(float* out, u32 columns) const {
    const float* all = reinterpret_cast<const float*>(smem_base());
    block_sync();
    for (u32 j = 0; j < STRETCHES; ++j)
      add_up_warps(all + j * COLUMN_STRETCH, ROW, out, j * COLUMN_STRETCH, columns);
    block_sync();
  }
};

// The destination of the values that the next product reads.
template <bool JOIN, typename S>
__device__ __forceinline__ auto* handed_on(S* d_sum, bf16* d_branch) {
  if constexpr (JOIN)
    return d_branch;
  else
    return d_sum;
}

// `params`, `branch_args` and `d_branch` are read where there is a branch. `partials` is null if nothing is trained.
template <typename S>
struct LayerNormBackwardArgs {
  const StepParams* params;
  BranchArgs branch_args;
  View<const bf16> d_y;
  View<const S> x;
  const float* gamma;
  const float* mean;
  const float* rstd;
  View<S> d_sum;
  u32 add;  // to d_sum; 0: assign
  View<bf16> d_branch;
  float* partials;
  u32 pitch;
};
template <typename S, typename T>
struct LayerNormWideBackwardArgs {
  View<const T> d_y;
  View<const S> x;
  const float* gamma;
  const float* mean;
  const float* rstd;
  View<S> d_sum;
  u32 add;  // to d_sum; 0: assign
  float* rests;
};
template <typename S, typename T>
struct LayerNormGradientsArgs {
  View<const T> d_y;
  View<const S> x;
  const float* mean;
  const float* rstd;
  const float* rests;
  float* partials;
  u32 pitch;
};

// JOIN: `d_branch` gets its share of d_sum, rounded as stored; a trained LayerScale uses `residual_scale_backward`
// instead. BIAS: a product with a trained bias reads d_branch, or d_sum.
template <u32 STRETCHES, bool JOIN, bool BIAS, typename S>
__device__ __forceinline__ void layernorm_backward(const LayerNormBackwardArgs<S>& args) {
  u32 rows = args.d_y.rows, columns = args.d_y.cols, pitch = args.pitch;
  // Three stretches of f32 would not fit next to the rest.
  constexpr bool SUMS_EARLY = STRETCHES * sizeof(Raw8<S>) <= 80;
  // With the sums there are no registers for the bound branch: it is bound again for each row.
  constexpr bool BOUND_ONCE = JOIN && !BIAS;
  Branch branch = {};
  if constexpr (BOUND_ONCE) branch = bind_branch(args.branch_args, args.params, columns);
  BiasSums<STRETCHES> d_bias;
  if constexpr (BIAS) d_bias.clear();
  float inverse = 1.0f / static_cast<float>(columns);
  float d_gamma[STRETCHES][VEC] = {}, d_beta[STRETCHES][VEC] = {};
  for (u32 row = blockIdx.x * rows_of_block() + threadIdx.x / WARP; row < rows;
       row += gridDim.x * rows_of_block()) {
    const S* x_row = row_of(args.x, row);
    const bf16* d_y_row = row_of(args.d_y, row);
    S* d_sum_row = row_of(args.d_sum, row);
    Raw8<S> xs[STRETCHES], sums[STRETCHES];
    Raw8<bf16> ds[STRETCHES];
    fetch_row(x_row, columns, xs);
    fetch_row(d_y_row, columns, ds);
    float row_mean = args.mean[row], row_rstd = args.rstd[row];

    float off_sum = 0.0f, u_sum = 0.0f, u_off_sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < STRETCHES; ++j) {
      u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
      float v[VEC], d[VEC], g[VEC];
      unpack8(xs[j], v);
      unpack8(ds[j], d);
      load8(args.gamma + column, n, g);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) {
        float off = i < n ? v[i] - row_mean : 0.0f, u = d[i] * g[i];
        off_sum += off;
        u_sum += u;
        u_off_sum = fmaf(u, off, u_off_sum);
      }
    }
    // In flight during the warp sums; earlier they would only occupy registers.
    if (SUMS_EARLY) {
#pragma unroll
      for (u32 j = 0; j < STRETCHES; ++j) {
        u32 column = column_of(j);
        sums[j] = fetch8(d_sum_row + column, args.add ? held<STRETCHES>(j, column, columns) : 0);
      }
    }
    RowGrad grad = row_grad(row_mean, row_rstd, off_sum, u_sum, u_off_sum, inverse);
    if constexpr (JOIN && !BOUND_ONCE) branch = bind_branch(args.branch_args, args.params, columns);
    float path = JOIN ? path_factor(branch, row) : 1.0f;

#pragma unroll
    for (u32 j = 0; j < STRETCHES; ++j) {
      forget_unpacked(xs[j]);
      forget_unpacked(ds[j]);
      u32 column = column_of(j), n = held<STRETCHES>(j, column, columns);
      float v[VEC], d[VEC], g[VEC], s[VEC];
      unpack8(xs[j], v);
      unpack8(ds[j], d);
      if (!SUMS_EARLY) sums[j] = fetch8(d_sum_row + column, args.add ? n : 0);
      unpack8(sums[j], s);
      load8(args.gamma + column, n, g);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) {
        s[i] += d_x(grad, v[i], d[i] * g[i]);
        d_gamma[j][i] = fmaf(d[i], hat(grad, v[i]), d_gamma[j][i]);
        d_beta[j][i] += d[i];
      }
      if constexpr (JOIN) {
        if (n > 0) store8(d_sum_row + column, n, s);
        float f[VEC];
        branch_factors(branch, row, column, n, path, f);
        round8<S>(s);
#pragma unroll
        for (u32 i = 0; i < VEC; ++i) s[i] *= f[i];
      }
      auto* to = handed_on<JOIN>(d_sum_row, row_of(args.d_branch, row)) + column;
      if constexpr (BIAS) {
        vec4 packed = pack8(s);
        store8_packed(to, n, packed);
        d_bias.add(j, packed);
      } else if (n > 0) {
        store8(to, n, s);
      }
    }
  }
  if (!args.partials) return;
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* mine = args.partials + static_cast<u64>(blockIdx.x) * (BIAS ? 3 : 2) * pitch;
  if constexpr (BIAS) d_bias.store(mine + 2 * pitch, columns);
#pragma unroll
  for (u32 j = 0; j < STRETCHES; ++j) {
    store_column_sums(d_gamma[j], scratch, mine, j * COLUMN_STRETCH, columns);
    store_column_sums(d_beta[j], scratch, mine + pitch, j * COLUMN_STRETCH, columns);
  }
}

// Any width: d_sum only, and the residual of each row's rounded mean, for `layernorm_gradients`.
template <typename S, typename T>
__device__ __forceinline__ void layernorm_backward_wide(const LayerNormWideBackwardArgs<S, T>& args) {
  u32 rows = args.d_y.rows, columns = args.d_y.cols;
  float inverse = 1.0f / static_cast<float>(columns);
  for (u32 row = blockIdx.x * rows_of_block() + threadIdx.x / WARP; row < rows;
       row += gridDim.x * rows_of_block()) {
    const S* x_row = row_of(args.x, row);
    const T* d_y_row = row_of(args.d_y, row);
    S* d_sum_row = row_of(args.d_sum, row);
    float row_mean = args.mean[row], v[VEC], d[VEC], g[VEC], s[VEC];
    float off_sum = 0.0f, u_sum = 0.0f, u_off_sum = 0.0f;
    for (u32 column = column_of(0); column < columns; column += COLUMN_STRETCH) {
      u32 n = valid8(column, columns);
      load8(x_row + column, n, v);
      load8(d_y_row + column, n, d);
      load8(args.gamma + column, n, g);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) {
        float off = i < n ? v[i] - row_mean : 0.0f, u = d[i] * g[i];
        off_sum += off;
        u_sum += u;
        u_off_sum = fmaf(u, off, u_off_sum);
      }
    }
    RowGrad grad = row_grad(row_mean, args.rstd[row], off_sum, u_sum, u_off_sum, inverse);
    if (threadIdx.x % WARP == 0 && args.rests) args.rests[row] = grad.rest;
    for (u32 column = column_of(0); column < columns; column += COLUMN_STRETCH) {
      u32 n = valid8(column, columns);
      load8(x_row + column, n, v);
      load8(d_y_row + column, n, d);
      load8(args.gamma + column, n, g);
      load8(d_sum_row + column, args.add ? n : 0, s);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) s[i] += d_x(grad, v[i], d[i] * g[i]);
      store8(d_sum_row + column, n, s);
    }
  }
}

// dγ and dβ of any width: partials of slice blockIdx.y of the rows.
template <typename S, typename T>
__device__ __forceinline__ void layernorm_gradients(const LayerNormGradientsArgs<S, T>& args) {
  u32 rows = args.d_y.rows, columns = args.d_y.cols, pitch = args.pitch;
  u32 first = blockIdx.x * COLUMN_STRETCH;
  u32 column = first + threadIdx.x % WARP * VEC, n = valid8(column, columns);
  float d_gamma[VEC] = {}, d_beta[VEC] = {};
  for (u32 row = blockIdx.y * COLUMN_WARPS + threadIdx.x / WARP; row < rows;
       row += gridDim.y * COLUMN_WARPS) {
    float v[VEC], d[VEC];
    load8(row_of(args.x, row) + column, n, v);
    load8(row_of(args.d_y, row) + column, n, d);
    RowGrad grad = {args.mean[row], args.rests[row], args.rstd[row], 0.0f, 0.0f};
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      d_gamma[i] = fmaf(d[i], hat(grad, v[i]), d_gamma[i]);
      d_beta[i] += d[i];
    }
  }
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* mine = args.partials + static_cast<u64>(blockIdx.y) * 2 * pitch;
  store_column_sums(d_gamma, scratch, mine, first, columns);
  store_column_sums(d_beta, scratch, mine + pitch, first, columns);
}

// ---- entry points -----------------------------------------------------------------------------------------

// Instance N holds rows of up to 256·N values. Blocks per multiprocessor: as many as the registers of the row allow.
#define LAYERNORM_BACKWARD(kind, suffix, S, N, threads, blocks, join, bias)                        \
  HOT_KERNEL(layernorm_##kind##_##suffix##_##N, threads, blocks)(ARGS(LayerNormBackwardArgs<S>)) { \
    layernorm_backward<N, join, bias>(args);                                                       \
  }

#define LAYERNORM(suffix, S, N, ahead, forward_threads, forward_blocks, join_threads, join_blocks,      \
                  backward_threads, backward_blocks)                                                    \
  HOT_KERNEL(layernorm_##suffix##_##N, forward_threads, forward_blocks)(ARGS(LayerNormArgs<S, bf16>)) { \
    layernorm<N, ahead>(args);                                                                          \
  }                                                                                                     \
  HOT_KERNEL(layernorm_join_##suffix##_##N, join_threads, join_blocks)(ARGS(LayerNormJoinArgs<S>)) {    \
    layernorm_join<N>(args);                                                                            \
  }                                                                                                     \
  LAYERNORM_BACKWARD(backward, suffix, S, N, backward_threads, backward_blocks, false, false)           \
  LAYERNORM_BACKWARD(backward_join, suffix, S, N, backward_threads, backward_blocks, true, false)       \
  LAYERNORM_BACKWARD(backward_join_bias, suffix, S, N, backward_threads, backward_blocks, true, true)

// Where a row does not leave enough registers for 256 threads, blocks of 192 fit more rows on a multiprocessor; the
// same where a second prefetched row takes the registers.
LAYERNORM(bf16, bf16, 1, 2, 256, 4, 256, 4, 256, 3)
LAYERNORM(bf16, bf16, 2, 2, 192, 3, 256, 3, 256, 2)
LAYERNORM(bf16, bf16, 3, 1, 256, 2, 256, 2, 192, 2)
LAYERNORM(bf16, bf16, 4, 1, 192, 2, 256, 2, 256, 1)
LAYERNORM(bf16, bf16, 5, 1, 192, 2, 256, 2, 256, 1)
// A prefetched row of f32 takes twice the registers.
LAYERNORM(f32_bf16, float, 1, 2, 256, 3, 256, 3, 192, 3)
LAYERNORM(f32_bf16, float, 2, 1, 192, 3, 256, 3, 192, 2)
LAYERNORM(f32_bf16, float, 3, 1, 256, 2, 256, 2, 192, 2)
LAYERNORM(f32_bf16, float, 4, 1, 192, 2, 256, 2, 256, 1)
LAYERNORM(f32_bf16, float, 5, 1, 256, 1, 192, 2, 256, 1)

// With the sums but without a branch: only for a stream that products can read.
LAYERNORM_BACKWARD(backward_bias, bf16, bf16, 1, 256, 3, false, true)
LAYERNORM_BACKWARD(backward_bias, bf16, bf16, 2, 256, 2, false, true)
LAYERNORM_BACKWARD(backward_bias, bf16, bf16, 3, 192, 2, false, true)
LAYERNORM_BACKWARD(backward_bias, bf16, bf16, 4, 256, 1, false, true)
LAYERNORM_BACKWARD(backward_bias, bf16, bf16, 5, 256, 1, false, true)

#define LAYERNORM_WIDE(suffix, S, T)                                                          \
  KERNEL(layernorm_##suffix##_wide, 256, 4)(ARGS(LayerNormArgs<S, T>)) {                      \
    layernorm_wide(args);                                                                     \
  }                                                                                           \
  KERNEL(layernorm_backward_##suffix##_wide, 256, 4)(ARGS(LayerNormWideBackwardArgs<S, T>)) { \
    layernorm_backward_wide(args);                                                            \
  }                                                                                           \
  KERNEL(layernorm_gradients_##suffix, 256, 4)(ARGS(LayerNormGradientsArgs<S, T>)) {          \
    layernorm_gradients(args);                                                                \
  }

LAYERNORM_WIDE(bf16, bf16, bf16)
LAYERNORM_WIDE(f32, float, float)
LAYERNORM_WIDE(f32_bf16, float, bf16)
