// Rows of one attention head in shared memory, and the fragments that tensor cores load from them.
//
// Layout    A tile holds rows of DH bf16 values in 16-byte chunks. Chunk c of row r is stored at chunk index c ^
//           swizzle(r) of its row. So the eight rows of one ldmatrix phase are in different banks, and so are eight
//           neighbouring chunks of a 16-byte copy. No row is padded; with 80 values (160 bytes), flipping one bit is
//           enough.
// Fragments mma.m16n8k16, lane l, g = l / 4, q = l % 4: an accumulator holds rows g and g + 8, columns 2q and
//           2q + 1. Two accumulators side by side, rounded to bf16, are the A operand of the next product:
//           probabilities never leave the registers.
// Ragged    Rows past the last token and chunks past the head's values are filled with zeros during the copy: a tile
//           never holds another image's values.
#pragma once

#include "types.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ u32 lane_id() {
  return threadIdx.x & 31;
}
__device__ __forceinline__ u32 warp_id() {
  return threadIdx.x >> 5;
}

// A last block with at most this many rows is computed as this many, not as a whole block.
constexpr u32 TAIL = 16;
__device__ __forceinline__ bool is_tail(u32 left, u32 block) {
  return left <= TAIL && block > TAIL;
}

template <u32 DH>
struct Tile {
  static_assert(DH == 32 || DH == 64 || DH == 80 || DH == 128, "a swizzle is known for these widths");
  static constexpr u32 CHUNKS = DH / 8;
  static constexpr u32 ROW = 2 * DH;

  u32 start;  // bytes from the start of shared memory, a multiple of 16

  __device__ static __forceinline__ u32 swizzle(u32 row) {
    if constexpr (DH == 32) return (row >> 1) & 3;
    if constexpr (DH == 80) return (row >> 2) & 1;
    return row & 7;
  }

  __device__ __forceinline__ uint8_t* chunk(u32 row, u32 chunk) const {
    return smem_base() + start + row * ROW + ((chunk ^ swizzle(row)) << 4);
  }

  // Starts the copy of rows `first .. first + rows` from `from`, of which `valid` exist with `chunks` chunks each. All
  // threads of the block take part; the copies belong to the caller's next committed group.
  __device__ __forceinline__ void copy_async(u32 first, u32 rows, const bf16* from, u32 ld, u32 valid,
                                             u32 chunks) const {
    for (u32 i = threadIdx.x; i < rows * CHUNKS; i += blockDim.x) {
      const u32 row = i / CHUNKS, c = i % CHUNKS;
      const bool exists = row < valid && c < chunks;
      cp_async16(chunk(first + row, c), exists ? from + size_t(row) * ld + c * 8 : from, exists);
    }
  }

  // Lane l names row l % 16 and chunk l / 16 of a block of 16 rows and two chunks. `row` is a multiple of 16.
  __device__ __forceinline__ const uint8_t* along(u32 row, u32 pair) const {
    const u32 r = lane_id() & 15;
    return smem_base() + start + row * ROW + r * ROW + (((2 * pair) ^ (lane_id() >> 4) ^ swizzle(r)) << 4);
  }

  // The same block, with the two middle 8x8 matrices exchanged.
  __device__ __forceinline__ const uint8_t* across(u32 row, u32 pair) const {
    const u32 r = (lane_id() & 7) + ((lane_id() >> 4) << 3);
    return smem_base() + start + row * ROW + r * ROW +
           (((2 * pair) ^ ((lane_id() >> 3) & 1) ^ swizzle(r)) << 4);
  }

  // A operand: rows row .. row + 16 are M, values 16·k16 .. are K.
  __device__ __forceinline__ void load_a(u32 (&a)[4], u32 row, u32 k16) const {
    ldmatrix_x4(a, along(row, k16));
  }
  // A operand of the transposed tile: values are M, rows are K.
  __device__ __forceinline__ void load_a_trans(u32 (&a)[4], u32 row, u32 m16) const {
    ldmatrix_x4_trans(a, across(row, m16));
  }
  // B operands of two neighbouring n8 blocks: rows are N, values are K.
  __device__ __forceinline__ void load_b(u32 (&b)[2][2], u32 row, u32 k16) const {
    u32 r[4];
    ldmatrix_x4(r, across(row, k16));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }
  // B operands of two neighbouring n8 blocks: rows are K, values are N.
  __device__ __forceinline__ void load_b_trans(u32 (&b)[2][2], u32 row, u32 n16) const {
    u32 r[4];
    ldmatrix_x4_trans(r, along(row, n16));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }
};

// Accumulators of 16·M16 rows and 8·N8 columns, as the lanes of a warp hold them.
template <u32 M16, u32 N8>
struct Accumulator {
  float at[M16][N8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 m = 0; m < M16; ++m)
#pragma unroll
      for (u32 n = 0; n < N8; ++n)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) at[m][n][i] = 0.0f;
  }

  // Columns 16·k .. 16·k + 16 of strip m, rounded to bf16, as an A operand.
  __device__ __forceinline__ void as_a(u32 (&a)[4], u32 m, u32 k) const {
    a[0] = pack_bf16(at[m][2 * k][0], at[m][2 * k][1]);
    a[1] = pack_bf16(at[m][2 * k][2], at[m][2 * k][3]);
    a[2] = pack_bf16(at[m][2 * k + 1][0], at[m][2 * k + 1][1]);
    a[3] = pack_bf16(at[m][2 * k + 1][2], at[m][2 * k + 1][3]);
  }
};

// scores += left·rightᵀ over DH: rows `left_row ..` of `left` against rows `right_row ..` of `right`.
template <u32 DH, u32 M16, u32 N8>
__device__ __forceinline__ void add_products(Accumulator<M16, N8>& scores, Tile<DH> left, u32 left_row,
                                             Tile<DH> right, u32 right_row) {
#pragma unroll
  for (u32 k = 0; k < DH / 16; ++k) {
    u32 a[M16][4];
#pragma unroll
    for (u32 m = 0; m < M16; ++m) left.load_a(a[m], left_row + 16 * m, k);
#pragma unroll
    for (u32 n = 0; n < N8 / 2; ++n) {
      u32 b[2][2];
      right.load_b(b, right_row + 16 * n, k);
#pragma unroll
      for (u32 m = 0; m < M16; ++m) {
        mma_bf16(scores.at[m][2 * n], a[m], b[0]);
        mma_bf16(scores.at[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

// sums += weights·values: column j of `weights`, rounded to bf16, belongs to row `row + j` of `values`.
template <u32 DH, u32 M16, u32 N8>
__device__ __forceinline__ void add_weighted(Accumulator<M16, DH / 8>& sums,
                                             const Accumulator<M16, N8>& weights, Tile<DH> values, u32 row) {
#pragma unroll
  for (u32 k = 0; k < N8 / 2; ++k) {
    u32 a[M16][4];
#pragma unroll
    for (u32 m = 0; m < M16; ++m) weights.as_a(a[m], m, k);
#pragma unroll
    for (u32 n = 0; n < DH / 16; ++n) {
      u32 b[2][2];
      values.load_b_trans(b, row + 16 * k, n);
#pragma unroll
      for (u32 m = 0; m < M16; ++m) {
        mma_bf16(sums.at[m][2 * n], a[m], b[0]);
        mma_bf16(sums.at[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

// Rounds a warp's accumulators into rows `row ..` of a tile that only this warp still uses, then copies the first
// `valid` of them to `to`, 16 bytes per lane. `factor[m][h]` scales row 16·m + 8·h + l / 4.
template <u32 DH, u32 M16>
__device__ __forceinline__ void store_rows(const Accumulator<M16, DH / 8>& sums,
                                           const float (&factor)[M16][2], Tile<DH> tile, u32 row, bf16* to,
                                           u32 ld, u32 valid, u32 chunks) {
  const u32 g = lane_id() >> 2, q = lane_id() & 3;
  warp_sync();
#pragma unroll
  for (u32 m = 0; m < M16; ++m)
#pragma unroll
    for (u32 n = 0; n < DH / 8; ++n)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float f = factor[m][h];
        st4(tile.chunk(row + 16 * m + 8 * h + g, n) + 4 * q,
            pack_bf16(f * sums.at[m][n][2 * h], f * sums.at[m][n][2 * h + 1]));
      }
  warp_sync();
  for (u32 i = lane_id(); i < 16 * M16 * Tile<DH>::CHUNKS; i += 32) {
    const u32 r = i / Tile<DH>::CHUNKS, c = i % Tile<DH>::CHUNKS;
    if (r < valid && c < chunks) st16(to + size_t(r) * ld + 8 * c, ld16(tile.chunk(row + r, c)));
  }
}

// The location of one head of one image: its first row, and its first column in Q and O.
struct HeadPlace {
  size_t row;
  u32 column;
  size_t index;  // image·H + head: its row in lse

  __device__ __forceinline__ HeadPlace(u32 number, u32 tokens, u32 heads, u32 head_size)
      : row(size_t(number / heads) * tokens), column(number % heads * head_size), index(number) {
  }
};

// `keep`: which probabilities dropout keeps (`attention_keep`), or null. `tiles`: blocks that share the rows of a head.
template <typename T>
struct AttentionArgs {
  View<const T> qkv;
  View<T> o;
  View<float> lse;
  const u32* keep;
  float keep_scale, scale;
  u32 tokens, heads, head_size, tiles;
};
// `delta` has no rows where one block owns a head. `bias_parts` is null where no bias is trained.
template <typename T>
struct AttentionBackwardArgs {
  View<const T> qkv;
  View<const T> o;
  View<const float> lse;
  View<float> delta;
  const u32* keep;
  float keep_scale, scale;
  View<const T> d_o;
  View<T> d_qkv;
  float* bias_parts;
  u32 tokens, heads, head_size, tiles;
};

// Dropout of a head's probabilities: one bit per query and key, set where the probability is kept.
struct KeepBits {
  const u32* words;  // [T, ceil_div(T, 32)] of the head, or null: everything is kept
  float scale;       // 1 / (1 - rate)

  // `head`: image·H + head.
  template <typename Args>
  __device__ __forceinline__ KeepBits(const Args& args, u32 head) : words(args.keep), scale(args.keep_scale) {
    if (words) words += size_t(head) * args.tokens * ceil_div(args.tokens, 32);
  }
  __device__ __forceinline__ explicit operator bool() const {
    return words != nullptr;
  }
  // Bits of keys 32·(key / 32) .. of a query; queries past the last token read the last one's.
  __device__ __forceinline__ u32 word(u32 query, u32 key, u32 tokens) const {
    const u32 row = query < tokens ? query : tokens - 1;
    return words[row * ceil_div(tokens, 32) + key / 32];
  }
};

// The same without dropout. Hot kernels are compiled for both, so that no loop tests for dropout.
struct KeepAll {
  static constexpr float scale = 1.0f;

  template <typename Args>
  __device__ __forceinline__ KeepAll(const Args&, u32) {
  }
  __device__ __forceinline__ explicit constexpr operator bool() const {
    return false;
  }
  __device__ __forceinline__ constexpr u32 word(u32, u32, u32) const {
    return ~0u;
  }
};
