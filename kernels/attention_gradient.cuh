// Shared by the backward kernels of attention: probabilities from lse, and the two ways to own them.
//
// Math      P = e^(scale·Q·Kᵀ - lse)   dP = keep(dO·Vᵀ)   δ = rowsum(dO∘O)   dS = P∘(dP - δ)
//           dV = keep(P)ᵀ·dO   dQ = scale·dS·K   dK = scale·dSᵀ·Q
//           bias: the sums over the tokens of dQ, dK and dV as they are stored, if a bias is trained
// Owners    A warp that owns queries computes P and dS as rows and sums dQ. A warp that owns keys computes Pᵀ and dSᵀ
//           and sums dK and dV. In both cases the accumulators of scores are the A operand of the sums: probabilities
//           do not go through shared memory.
// Bias      Gradients reach memory via their rows in shared memory. There, their sums are one more product, a row of
//           ones times the rows: two mma for 16 rows of 16 values.
//           bias_parts: f32 [B·tiles, 3, H, Dh], a row of sums per CTA of a head; null: not needed
// Ragged    P is set to 0 for keys and queries past the last token. Their tile rows are zero, but e^(0 - lse) may be
//           infinite, and infinity times zero is not zero.
#pragma once

#include "attention_tile.cuh"

// lse·log2(e) and δ of all queries of a head in shared memory, in pairs; infinity and 0 past the last token.
struct RowTerms {
  u32 start;  // bytes from the start of shared memory

  __device__ __forceinline__ void put(u32 query, float lse, float delta) const {
    st8(smem_base() + start + 8 * query, {as_u32(lse), as_u32(delta)});
  }
  // Both terms of an even query and the next.
  __device__ __forceinline__ vec4 pair(u32 query) const {
    return ld16(smem_base() + start + 8 * query);
  }
};

// The sums of a warp that owns 16·M16 keys.
template <u32 DH, u32 M16>
struct KeySums {
  Accumulator<M16, DH / 8> d_k, d_v;

  __device__ __forceinline__ void clear() {
    d_k.clear(), d_v.clear();
  }

  // Adds the contribution of QUERIES queries. Keys are rows `own ..` of `keys` and `values`, queries are rows `from ..`
  // of `queries` and `d_out`. `key` and `query` are the tokens of the first of each. Returns dSᵀ.
  template <u32 QUERIES, typename Keep>
  __device__ __forceinline__ Accumulator<M16, QUERIES / 8> add(Tile<DH> keys, Tile<DH> values, u32 own,
                                                               Tile<DH> queries, Tile<DH> d_out, u32 from,
                                                               RowTerms terms, Keep keep, float to_log2,
                                                               u32 key, u32 query, u32 tokens) {
    const u32 lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
    Accumulator<M16, QUERIES / 8> p, d_s;
    p.clear();
    add_products<DH>(p, keys, own, queries, from);
    d_s.clear();
    add_products<DH>(d_s, values, own, d_out, from);
#pragma unroll
    for (u32 n = 0; n < QUERIES / 8; ++n) {
      const vec4 pair = terms.pair(query + 8 * n + lane_column);
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        const u32 column = query + 8 * n + lane_column + i;
        const float lse = as_f32(i == 0 ? pair.x : pair.z);
        const float delta = as_f32(i == 0 ? pair.y : pair.w);
        const u32 kept = keep ? keep.word(column, key, tokens) >> (key % 32 + lane_row) : 0;
#pragma unroll
        for (u32 m = 0; m < M16; ++m)
#pragma unroll
          for (u32 h = 0; h < 2; ++h) {
            float& weight = p.at[m][n][2 * h + i];
            float& gradient = d_s.at[m][n][2 * h + i];
            weight = exp2_approx(weight * to_log2 - lse);
            if (keep) {
              const bool here = kept >> (16 * m + 8 * h) & 1;
              gradient = weight * ((here ? gradient * keep.scale : 0.0f) - delta);
              weight = here ? weight : 0.0f;
            } else {
              gradient = weight * (gradient - delta);
            }
          }
      }
    }
    // Only the strip that contains the last token pays for this.
    if (key + 16 * M16 > tokens) {
#pragma unroll
      for (u32 m = 0; m < M16; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
          if (key + 16 * m + 8 * h + lane_row >= tokens)
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; ++n)
#pragma unroll
              for (u32 i = 2 * h; i < 2 * h + 2; ++i) p.at[m][n][i] = d_s.at[m][n][i] = 0.0f;
    }
    add_weighted<DH>(d_v, p, d_out, from);
    add_weighted<DH>(d_k, d_s, queries, from);
    return d_s;
  }
};

// to[c] = Σ over the first `rows` (a multiple of 16) of a tile's column c, in order. Warps divide the columns, starting
// with warp `first`. The rows must be zero past the last token.
template <u32 DH>
__device__ __forceinline__ void store_row_sums(Tile<DH> tile, u32 rows, u32 first, u32 head_size, float* to) {
  constexpr u32 ONES = 0x3f803f80;  // two of them in bf16
  const u32 ones[4] = {ONES, ONES, ONES, ONES}, warps = blockDim.x / 32;
  for (u32 n = (warp_id() + warps - first) % warps; n < DH / 16; n += warps) {
    float sums[2][4] = {};
    for (u32 row = 0; row < rows; row += 16) {
      u32 b[2][2];
      tile.load_b_trans(b, row, n);
      mma_bf16(sums[0], ones, b[0]);
      mma_bf16(sums[1], ones, b[1]);
    }
    // All rows of the result are equal; four lanes hold the first.
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 column = 16 * n + 8 * i + 2 * lane_id();
      if (lane_id() < 4 && column < head_size) st8(to + column, {as_u32(sums[i][0]), as_u32(sums[i][1])});
    }
  }
}

// δ = Σ dO·O of a row of one head, over the four lanes that share the row. `quarter` is the lane's number among them.
__device__ __forceinline__ float row_delta(const bf16* o, const bf16* d_o, u32 chunks, u32 quarter) {
  float delta = 0.0f;
  for (u32 c = quarter; c < chunks; c += 4) {
    const vec4 a = ld16(o + 8 * c), b = ld16(d_o + 8 * c);
    delta += bf16_lo(a.x) * bf16_lo(b.x) + bf16_hi(a.x) * bf16_hi(b.x);
    delta += bf16_lo(a.y) * bf16_lo(b.y) + bf16_hi(a.y) * bf16_hi(b.y);
    delta += bf16_lo(a.z) * bf16_lo(b.z) + bf16_hi(a.z) * bf16_hi(b.z);
    delta += bf16_lo(a.w) * bf16_lo(b.w) + bf16_hi(a.w) * bf16_hi(b.w);
  }
  delta += shfl_xor(delta, 1);
  return delta + shfl_xor(delta, 2);
}
