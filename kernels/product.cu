// A matrix product for shapes that cuBLASLt does not accept: one row, one column, odd sizes. Any size, transpose,
// alignment.
//
// Math      D = A·B [+ C]
// Tensors   a [m, k], b [k, n] in S, d, c [m, n] in T, each by its strides along both axes: a transposed matrix is one
//           with exchanged strides, and D is transposed by exchanging A and B. T is f32, or bf16 if S is. c null:
//           nothing is added; c may be d.   partials f32 [slices, n, m]
// Numerics  f32, one fma per product; D is rounded once.
// Launch    a warp owns four columns of one row, with its lanes along k (`product_along_k`), or of 32 rows, one per
//           lane (`product_along_rows`): whichever of k and the rows is contiguous in memory. If that makes too few
//           warps for the GPU, slices of k (grid y) leave partial sums, and `product_sum` adds them.
// Bytes     A and B once each if one of m and n is at most 4; else A for every four columns, through L1 and L2.
// Order     a lane's terms ascending, lanes, slices: fixed by the sizes, the same on every GPU.
#include "reduce.cuh"

struct ProductShape {
  u32 m, n, k;
  u32 a_row, a_step;     // elements from one row of A to the next, and along k
  u32 b_column, b_step;  // from one column of B to the next, and along k
  u32 d_row, d_column;
  u32 slice;             // terms of a slice of k
};
// C may be null: nothing is added. Partials are null where there is one slice.
template <typename S, typename T>
struct ProductArgs {
  ProductShape shape;
  const S* a;
  const S* b;
  const T* c;
  T* d;
  float* partials;
};
template <typename T>
struct ProductSumArgs {
  ProductShape shape;
  const float* partials;
  u32 slices;
  const T* c;
  T* d;
};

constexpr u32 PRODUCT_WARPS = 8, PRODUCT_COLUMNS = 4;

template <typename T>
__device__ __forceinline__ const T* at(const T* p, u32 index, u32 distance) {
  return p + static_cast<u64>(index) * distance;
}

// The work of a warp.
struct ProductShare {
  u32 row, column;  // first of each
  u32 begin, end;   // of k
  bool exists;
};
// `groups` of rows and of four columns, rows first.
__device__ __forceinline__ ProductShare share_of_warp(const ProductShape& s, u32 rows, u32 group) {
  const u32 warp = blockIdx.x * PRODUCT_WARPS + threadIdx.x / WARP;
  const u32 column = warp / rows * PRODUCT_COLUMNS, begin = blockIdx.y * s.slice;
  return {warp % rows * group, column, begin, min_u32(s.k, begin + s.slice), column < s.n};
}

// Writes one sum of a slice: to its partial sums, or into D.
template <typename T>
__device__ __forceinline__ void put(const ProductShape& s, u32 row, u32 column, float sum, const T* c, T* d,
                                    float* partials) {
  if (row >= s.m || column >= s.n) return;
  if (partials) {
    partials[(static_cast<u64>(blockIdx.y) * s.n + column) * s.m + row] = sum;
    return;
  }
  const u64 place = static_cast<u64>(row) * s.d_row + static_cast<u64>(column) * s.d_column;
  store1(d + place, c ? load1(c + place) + sum : sum);
}

// The columns of a warp; past the last one, the last one again, which is not stored.
template <typename S>
__device__ __forceinline__ void columns_of(const ProductShape& s, const S* b, u32 column,
                                           const S* (&columns)[PRODUCT_COLUMNS]) {
#pragma unroll
  for (u32 j = 0; j < PRODUCT_COLUMNS; ++j) columns[j] = at(b, min_u32(column + j, s.n - 1), s.b_column);
}

template <typename S, typename T>
__device__ __forceinline__ void product_along_k(const ProductArgs<S, T>& args) {
  const ProductShape& s = args.shape;
  const ProductShare share = share_of_warp(s, s.m, 1);
  if (!share.exists) return;
  const u32 lane = threadIdx.x % WARP;
  const S* row = at(args.a, share.row, s.a_row);
  const S* columns[PRODUCT_COLUMNS];
  columns_of(s, args.b, share.column, columns);
  float sums[PRODUCT_COLUMNS] = {};
  const u32 first = share.begin + lane;
  u64 from_a = static_cast<u64>(first) * s.a_step, from_b = static_cast<u64>(first) * s.b_step;
  const u64 ahead_a = static_cast<u64>(WARP) * s.a_step, ahead_b = static_cast<u64>(WARP) * s.b_step;
#pragma unroll 4
  for (u32 step = first; step < share.end; step += WARP, from_a += ahead_a, from_b += ahead_b) {
    const float x = load1(row + from_a);
#pragma unroll
    for (u32 j = 0; j < PRODUCT_COLUMNS; ++j) sums[j] = fmaf(x, load1(columns[j] + from_b), sums[j]);
  }
#pragma unroll
  for (u32 j = 0; j < PRODUCT_COLUMNS; ++j) {
    sums[j] = warp_sum(sums[j]);
    if (lane == j) put(s, share.row, share.column + j, sums[j], args.c, args.d, args.partials);
  }
}

template <typename S, typename T>
__device__ __forceinline__ void product_along_rows(const ProductArgs<S, T>& args) {
  const ProductShape& s = args.shape;
  const ProductShare share = share_of_warp(s, ceil_div(s.m, WARP), WARP);
  if (!share.exists) return;
  const u32 row = share.row + threadIdx.x % WARP;
  const S* mine = at(args.a, min_u32(row, s.m - 1), s.a_row);
  const S* columns[PRODUCT_COLUMNS];
  columns_of(s, args.b, share.column, columns);
  float sums[PRODUCT_COLUMNS] = {};
  u64 from_a = static_cast<u64>(share.begin) * s.a_step, from_b = static_cast<u64>(share.begin) * s.b_step;
#pragma unroll 8
  for (u32 step = share.begin; step < share.end; ++step, from_a += s.a_step, from_b += s.b_step) {
    const float x = load1(mine + from_a);
#pragma unroll
    for (u32 j = 0; j < PRODUCT_COLUMNS; ++j) sums[j] = fmaf(x, load1(columns[j] + from_b), sums[j]);
  }
#pragma unroll
  for (u32 j = 0; j < PRODUCT_COLUMNS; ++j)
    put(s, row, share.column + j, sums[j], args.c, args.d, args.partials);
}

// D from the partial sums of all slices. One thread per element.
template <typename T>
__device__ __forceinline__ void product_sum(const ProductSumArgs<T>& args) {
  const ProductShape& s = args.shape;
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x, elements = s.m * s.n;
  if (index >= elements) return;
  float sum = 0.0f;
#pragma unroll 8
  for (u32 slice = 0; slice < args.slices; ++slice)
    sum += args.partials[static_cast<u64>(slice) * elements + index];
  put(s, index % s.m, index / s.m, sum, args.c, args.d, nullptr);
}

#define PRODUCT(suffix, S, T)                                                \
  HOT_KERNEL(product_along_k_##suffix, 256, 4)(ARGS(ProductArgs<S, T>)) {    \
    product_along_k(args);                                                   \
  }                                                                          \
  HOT_KERNEL(product_along_rows_##suffix, 256, 3)(ARGS(ProductArgs<S, T>)) { \
    product_along_rows(args);                                                \
  }
#define PRODUCT_SUM(suffix, T)                                    \
  KERNEL(product_sum_##suffix, 256, 4)(ARGS(ProductSumArgs<T>)) { \
    product_sum(args);                                            \
  }

PRODUCT(f32, float, float)
PRODUCT(bf16_f32, bf16, float)
PRODUCT(bf16, bf16, bf16)
PRODUCT_SUM(f32, float)
PRODUCT_SUM(bf16, bf16)
