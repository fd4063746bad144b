// Adafactor in big_vision's form: a second moment stored as row and column means, and the update from it.
//
// Math      G = (clip·g)² + 1e-30   β = min(cap, 1 - t^-power)
//           factored: R = β·R + (1-β)·mean_cols G, C = β·C + (1-β)·mean_rows G, u = g·(R/mean R)^-½·C^-½
//           in full: V = β·V + (1-β)·G, u = g·V^-½
//           u is divided by max(1, rms(u)/clip_rms);   m = μ·m + (1-μ)·u   θ = θ - lr·m - decay·θ
// Tensors   a tensor is [outer, rows, cols] by strides over the flat buffers, cut into tiles of 64 × 64. The host makes
//           the tables `tensors` and `tiles` once. State f32: [outer, rows] and then [outer, cols], or the whole
//           tensor. Scratch: f64 partial sums of each tile's rows and columns, f32 factors, f64 sums of squares per
//           tile, f32 scales.
// Numerics  sums in f64. Elements are f32; the global clip factor is applied to g before anything else.
// Launch    statistics (tile by tile) → factors (one block per tensor) → with clip_rms: squares (tiles),
//           scales (tensors) → update (tiles). 256 threads: 64 along the axis that is contiguous in memory, 4
//           across.
// Bytes     per parameter: gradient 4 in each of statistics, squares and update (the norm took 4 before), θ
//           8, m 8 or 4, copy 2.
// Order     a tile's rows and columns ascending, tiles ascending; nothing is added in an order that depends
//           on timing.
// Source    Shazeer and Stern 2018; Zhai et al. 2022 (the form, with a bf16 first moment); Optax
//           `scale_by_factored_rms`.
#include "reduce.cuh"
#include "step.cuh"

constexpr u32 TILE = 64;
// Rows and columns of the tile in shared memory start in different banks.
constexpr u32 TILE_PITCH = TILE + 1;
// Prevents division by zero where the gradient is zero.
constexpr double TINY = 1e-30;

struct AdafactorTensor {
  u64 param, grad, state;  // first elements: weights, gradients and first moments, second moments
  u64 row_sums, col_sums;  // in the f64 scratch: [col_tiles, outers·rows], [row_tiles, outers·cols]
  u64 factors;             // in the f32 scratch: [outers·rows], [outers·cols]
  u32 outers, outer1;      // outer index = o0·outer1 + o1
  u32 rows, cols;
  u32 outer_stride0, outer_stride1, row_stride, col_stride;
  u32 row_tiles, col_tiles;
  u32 first_tile, tiles;
  u32 group, factored;
};
struct AdafactorTile {
  u32 tensor, outer;
  u32 row, col;  // first
};

// The flat buffers, and the scratch of one update.
struct AdafactorBuffers {
  float* params;
  const float* grads;
  void* moment1;
  float* moment2;
  float* ema;    // null: none
  bf16* copy;    // null: none
  double* sums;  // rows and columns of tiles
  float* factors;
  double* squares;  // [tiles]
  float* scales;    // [tensors]; null: no clip_rms
  float ema_keep, ema_add;
  float keep1, add1;  // μ, 1 - μ
};
struct AdafactorArgs {
  const UpdateParams* update;
  AdafactorBuffers buffers;
  const AdafactorTensor* tensors;
  const AdafactorTile* tiles;
  const GroupScalars* groups;
  double clip_rms;
};

// ---- tiles ------------------------------------------------------------------------------------------------

// One element of a tensor.
struct Element {
  u64 offset;  // from the tensor's first element
  u64 state;   // of a tensor kept in full
  u32 row, col;
  u32 row_factor, col_factor;  // from the tensor's first factor
};

// Calls f with this thread's elements of a tile.
template <typename F>
__device__ __forceinline__ void each_element(const AdafactorTensor& t, const AdafactorTile& tile, F f) {
  u32 fast = threadIdx.x % TILE, slow_step = blockDim.x / TILE;
  bool along_cols = t.col_stride <= t.row_stride;
  u64 outer = static_cast<u64>(tile.outer / t.outer1) * t.outer_stride0 +
              static_cast<u64>(tile.outer % t.outer1) * t.outer_stride1;
  for (u32 slow = threadIdx.x / TILE; slow < TILE; slow += slow_step) {
    u32 row = tile.row + (along_cols ? slow : fast), col = tile.col + (along_cols ? fast : slow);
    if (row >= t.rows || col >= t.cols) continue;
    u64 offset = outer + static_cast<u64>(row) * t.row_stride + static_cast<u64>(col) * t.col_stride;
    u32 row_factor = tile.outer * t.rows + row;
    f(Element{offset, static_cast<u64>(row_factor) * t.cols + col, row, col, row_factor,
              t.outers * t.rows + tile.outer * t.cols + col});
  }
}

// ---- kernels ----------------------------------------------------------------------------------------------

// Factored: the sums of squares of the tile's rows and columns. In full: the new second moments.
KERNEL(adafactor_statistics, 256, 4)(ARGS(AdafactorArgs)) {
  const AdafactorBuffers& b = args.buffers;
  UpdateParams c = *args.update;
  if (c.skip) return;
  AdafactorTile tile = args.tiles[blockIdx.x];
  AdafactorTensor t = args.tensors[tile.tensor];
  const float* grad = b.grads + t.grad;
  if (!t.factored) {
    float* state = b.moment2 + t.state;
    each_element(t, tile, [&](const Element& e) {
      float g = grad[e.offset] * c.clip;
      state[e.state] = c.keep2 * state[e.state] + c.add2 * (g * g + static_cast<float>(TINY));
    });
    return;
  }
  float* values = reinterpret_cast<float*>(smem_base());  // [TILE, TILE_PITCH]
  for (u32 i = threadIdx.x; i < TILE * TILE_PITCH; i += blockDim.x) values[i] = 0.0f;
  block_sync();
  each_element(t, tile, [&](const Element& e) {
    values[(e.row - tile.row) * TILE_PITCH + e.col - tile.col] = grad[e.offset] * c.clip;
  });
  block_sync();
  if (threadIdx.x >= 2 * TILE) return;
  u32 line = threadIdx.x % TILE;
  bool is_row = threadIdx.x < TILE;
  const float* first = values + line * (is_row ? TILE_PITCH : 1);
  double sum = 0.0;
  for (u32 i = 0; i < TILE; ++i) {
    double g = first[i * (is_row ? 1 : TILE_PITCH)];
    sum += g * g;
  }
  u32 row = tile.row + line, col = tile.col + line;
  if (is_row && row < t.rows) {
    b.sums[t.row_sums + static_cast<u64>(tile.col / TILE) * t.outers * t.rows + tile.outer * t.rows + row] =
        sum;
  }
  if (!is_row && col < t.cols) {
    b.sums[t.col_sums + static_cast<u64>(tile.row / TILE) * t.outers * t.cols + tile.outer * t.cols + col] =
        sum;
  }
}

// Computes and stores the new mean of one row or column: β·s + (1-β)·(Σ partials/n + 1e-30).
__device__ __forceinline__ float new_mean(const UpdateParams& c, float* state, const double* partials,
                                          u32 count, u32 stride, u32 n) {
  double sum = 0.0;
  for (u32 i = 0; i < count; ++i) sum += partials[static_cast<u64>(i) * stride];
  float mean = c.keep2 * *state + c.add2 * static_cast<float>(sum / static_cast<double>(n) + TINY);
  *state = mean;
  return mean;
}

// Means and factors of tensor blockIdx.x.
KERNEL(adafactor_factors, 256, 2)(ARGS(AdafactorArgs)) {
  const AdafactorBuffers& b = args.buffers;
  UpdateParams c = *args.update;
  AdafactorTensor t = args.tensors[blockIdx.x];
  if (c.skip || !t.factored) return;
  u32 all_rows = t.outers * t.rows, all_cols = t.outers * t.cols;
  float *row_state = b.moment2 + t.state, *col_state = row_state + all_rows;
  float *row_factors = b.factors + t.factors, *col_factors = row_factors + all_rows;
  double* scratch = reinterpret_cast<double*>(smem_base());
  for (u32 outer = 0; outer < t.outers; ++outer) {
    double sum[1] = {};
    for (u32 row = threadIdx.x; row < t.rows; row += blockDim.x) {
      u32 at = outer * t.rows + row;
      sum[0] += new_mean(c, row_state + at, b.sums + t.row_sums + at, t.col_tiles, all_rows, t.cols);
    }
    block_sums(sum, scratch);
    double mean = sum[0] / static_cast<double>(t.rows);
    for (u32 row = threadIdx.x; row < t.rows; row += blockDim.x) {
      u32 at = outer * t.rows + row;
      row_factors[at] = static_cast<float>(1.0 / sqrt(static_cast<double>(row_state[at]) / mean));
    }
  }
  for (u32 at = threadIdx.x; at < all_cols; at += blockDim.x) {
    float mean = new_mean(c, col_state + at, b.sums + t.col_sums + at, t.row_tiles, all_cols, t.rows);
    col_factors[at] = static_cast<float>(1.0 / sqrt(static_cast<double>(mean)));
  }
}

// The factor of g, without the tensor's scale.
__device__ __forceinline__ float direction(const AdafactorBuffers& b, const AdafactorTensor& t,
                                           const Element& e) {
  if (!t.factored) return 1.0f / sqrtf(b.moment2[t.state + e.state]);
  const float* factors = b.factors + t.factors;
  return factors[e.row_factor] * factors[e.col_factor];
}

// Σu² of each tile.
KERNEL(adafactor_squares, 256, 4)(ARGS(AdafactorArgs)) {
  const AdafactorBuffers& b = args.buffers;
  UpdateParams c = *args.update;
  if (c.skip) return;
  AdafactorTile tile = args.tiles[blockIdx.x];
  AdafactorTensor t = args.tensors[tile.tensor];
  double sum[1] = {};
  each_element(t, tile, [&](const Element& e) {
    double u = b.grads[t.grad + e.offset] * c.clip * direction(b, t, e);
    sum[0] += u * u;
  });
  block_sums(sum, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x == 0) b.squares[blockIdx.x] = sum[0];
}

// 1 / max(1, rms(u)/clip_rms) of tensor blockIdx.x.
KERNEL(adafactor_scales, 256, 4)(ARGS(AdafactorArgs)) {
  const AdafactorBuffers& b = args.buffers;
  if (args.update->skip) return;
  AdafactorTensor t = args.tensors[blockIdx.x];
  double sum[1] = {};
  for (u32 i = threadIdx.x; i < t.tiles; i += blockDim.x) sum[0] += b.squares[t.first_tile + i];
  block_sums(sum, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x != 0) return;
  double excess = sqrt(sum[0] / (static_cast<double>(t.outers) * t.rows * t.cols)) / args.clip_rms;
  b.scales[blockIdx.x] = static_cast<float>(1.0 / (excess > 1.0 ? excess : 1.0));
}

template <typename M>
__device__ __forceinline__ void adafactor_update(const AdafactorArgs& args) {
  const AdafactorBuffers& b = args.buffers;
  UpdateParams c = *args.update;
  if (c.skip) return;
  AdafactorTile tile = args.tiles[blockIdx.x];
  AdafactorTensor t = args.tensors[tile.tensor];
  GroupScalars rates = args.groups[t.group];
  float scale = b.scales ? c.clip * b.scales[tile.tensor] : c.clip;
  M* moment1 = static_cast<M*>(b.moment1) + t.grad;
  each_element(t, tile, [&](const Element& e) {
    float u = b.grads[t.grad + e.offset] * scale * direction(b, t, e);
    float m = b.keep1 * load1(moment1 + e.offset) + b.add1 * u;
    store1(moment1 + e.offset, m);
    u64 param = t.param + e.offset;
    float theta = b.params[param];
    theta = theta - rates.lr * m - rates.decay * theta;
    b.params[param] = theta;
    if (b.copy) store1(b.copy + param, theta);
    if (b.ema) b.ema[param] = b.ema_keep * b.ema[param] + b.ema_add * theta;
  });
}

KERNEL(adafactor_update_f32, 256, 4)(ARGS(AdafactorArgs)) {
  adafactor_update<float>(args);
}
KERNEL(adafactor_update_bf16, 256, 4)(ARGS(AdafactorArgs)) {
  adafactor_update<bf16>(args);
}
