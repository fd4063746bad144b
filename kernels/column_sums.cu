// Sums over the rows of a matrix: bias gradients, and the last stage of every gradient that is such a sum.
//
// Math      column_sums: partials[b, c] = Σ over the rows of block b of x[r, c]
//           sum_partials: out[c] (+)= Σ_b partials[b, c]
// Tensors   x [R, C] in T   partials f32 [blocks, sums, pitch], pitch = C rounded up to 8   out f32 [C]
// Launch    column_sums: grid (stretches of 256 columns, slices of rows), one warp per row, a lane owns 8
//           columns for all its rows; 8 KiB of shared memory once at the end. sum_partials: 32 columns per
//           block, eight warps share the partials.
// Bytes     2 per value in bf16; the partials are slices·C·8, a few percent.
// Order     rows of a warp, warps, slices (eight interleaved runs of them, then those): fixed by the launch
//           shape.
#include "reduce.cuh"

template <typename T>
struct ColumnSumsArgs {
  View<const T> x;
  float* partials;
  u32 pitch;
};
struct SumPartialsArgs {
  const float* partials;
  u32 count, stride, pitch, columns;
  float* out[3];  // destinations of up to three sums; null: not needed
  u32 add;        // to out; 0: assign
};

template <typename T>
__device__ __forceinline__ void column_sums(const ColumnSumsArgs<T>& args) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first = blockIdx.x * COLUMN_STRETCH;
  u32 column = first + lane * VEC, n = valid8(column, args.x.cols);
  float sum[VEC] = {};
#pragma unroll 4
  for (u32 row = blockIdx.y * COLUMN_WARPS + warp; row < args.x.rows; row += gridDim.y * COLUMN_WARPS) {
    float v[VEC];
    load8_stream(row_of(args.x, row) + column, n, v);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) sum[i] += v[i];
  }
  float* scratch = reinterpret_cast<float*>(smem_base());
  store_column_sums(sum, scratch, row_of(args.partials, blockIdx.y, args.pitch), first, args.x.cols);
}

KERNEL(column_sums_bf16, 256, 4)(ARGS(ColumnSumsArgs<bf16>)) {
  column_sums(args);
}
KERNEL(column_sums_f32, 256, 4)(ARGS(ColumnSumsArgs<float>)) {
  column_sums(args);
}

// Sum number blockIdx.y: `count` partials, `stride` elements apart; the sums of a partial are `pitch` elements apart.
KERNEL(sum_partials, 256, 4)(ARGS(SumPartialsArgs)) {
  float* out = blockIdx.y == 0 ? args.out[0] : blockIdx.y == 1 ? args.out[1] : args.out[2];
  if (!out) return;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 column = blockIdx.x * WARP + lane;
  float* scratch = reinterpret_cast<float*>(smem_base());
  const float* mine = row_of(args.partials, blockIdx.y, args.pitch) + column;
  float sum = 0.0f;
  if (column < args.columns) {
#pragma unroll 4
    for (u32 p = warp; p < args.count; p += COLUMN_WARPS) sum += mine[static_cast<u64>(p) * args.stride];
  }
  scratch[threadIdx.x] = sum;
  block_sync();
  if (warp == 0 && column < args.columns) {
    float total = scratch[lane];
    for (u32 w = 1; w < COLUMN_WARPS; ++w) total += scratch[w * WARP + lane];
    out[column] = args.add ? out[column] + total : total;
  }
}
