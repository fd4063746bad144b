// Rotary positions: pairs of a head's elements turned by the angles of a patch, in place.
//
// Math      (a, b) = (a·cos - b·sin, b·cos + a·sin); backward the same with -sin
//           half: elements j and j + Dh/2 are pair j; neighbours: elements 2j and 2j + 1
// Tensors   x [B·T, H·Dh] in T: the last `patches` rows of each sample are turned
//           table f32 [patches, Dh]: cosines of the Dh/2 angles, then their sines
// Numerics  f32; x is rounded once more when it is stored.
// Launch    one thread per 8 pairs of a head, 256 threads per block. Where 16 does not divide Dh, values move one by one.
// Bytes     bf16: 4 per value of the patches' rows. The table comes from L2.
// Source    Su et al. 2021, arXiv:2104.09864.
#include "types.cuh"

template <typename T>
struct RotateArgs {
  View<T> x;
  View<const float> table;
  u32 tokens, head_size;
  u32 neighbours;  // 0: half
  float sign;      // of the sines
};

__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  float first = fmaf(a, cos, -b * sin);
  b = fmaf(b, cos, a * sin);
  a = first;
}

template <typename T>
__device__ __forceinline__ void rotate(const RotateArgs<T>& args) {
  u32 half = args.head_size / 2, patches = args.table.rows;
  u32 chunks = ceil_div(half, VEC), heads = args.x.cols / args.head_size;
  u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  u32 chunk = index % chunks, head = index / chunks % heads, row = index / chunks / heads;
  if (row >= args.x.rows / args.tokens * patches) return;
  u32 patch = row % patches, first = chunk * VEC, n = min_u32(half - first, VEC);
  u32 token = row / patches * args.tokens + args.tokens - patches + patch;
  const float* angles = row_of(args.table, patch) + first;
  float cos[VEC], sin[VEC], a[VEC], b[VEC];
  load8_anywhere(angles, n, cos);
  load8_anywhere(angles + half, n, sin);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) sin[i] *= args.sign;
  T* x = row_of(args.x, token) + head * args.head_size;
  if (args.neighbours) {
    // 2n values from the pair `first` on.
    x += 2 * first;
    u32 low = min_u32(2 * n, VEC), high = 2 * n - low;
    load8_anywhere(x, low, a);
    load8_anywhere(x + VEC, high, b);
#pragma unroll
    for (u32 i = 0; i < VEC / 2; ++i) {
      turn(a[2 * i], a[2 * i + 1], cos[i], sin[i]);
      turn(b[2 * i], b[2 * i + 1], cos[VEC / 2 + i], sin[VEC / 2 + i]);
    }
    store8_anywhere(x, low, a);
    store8_anywhere(x + VEC, high, b);
  } else {
    x += first;
    load8_anywhere(x, n, a);
    load8_anywhere(x + half, n, b);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) turn(a[i], b[i], cos[i], sin[i]);
    store8_anywhere(x, n, a);
    store8_anywhere(x + half, n, b);
  }
}

#define ROTATE(suffix, T)                               \
  KERNEL(rotate_##suffix, 256, 4)(ARGS(RotateArgs<T>)) { \
    rotate(args);                                       \
  }

ROTATE(bf16, bf16)
ROTATE(f32, float)
