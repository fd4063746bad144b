// Attention of all tokens to all tokens, backward, in bf16 on tensor cores: two kernels, any length.
//
// Math      attention_gradient.cuh
// Tensors   qkv, d_qkv: bf16 [B, T, 3, H, Dh], o, d_o: bf16 [B, T, H, Dh], rows `ld` apart, 16-byte aligned
//           lse: f32 [B·H, T] of the forward
//           delta: f32 [B·H, T], written by the first kernel, read by the second
//           All of d_qkv is written. Dh % 8 == 0, in the next larger tile; others: attention_plain.cu.
// Kernels   `queries`: a CTA owns queries, keys and values stream past: δ and dQ.
//           `keys`: a CTA owns keys, queries and dO stream past: dK and dV.
//           S and dP are computed twice, 7 products instead of 5. In exchange no gradient is added across
//           CTAs, so there are no atomics and no f32 dQ in HBM. Up to 256 tokens of Dh 64,
//           attention_backward_head.cu needs only 5.
// Numerics  f32 scores and sums, P and dS rounded to bf16 for the products; scale once, at the end.
// Launch    grid B·H·tiles; WARPS warps of 16·M16 rows each; tile t takes strips t·strips/tiles ...
// Pipeline  as attention_forward.cu: a ring of three, one barrier per block, a short last block.
// Bytes     `queries` 12·D, `keys` 12·D per token; the minimum for both together is 16·D. With a bias 12·D more per
//           tile.
// Order     every sum runs over the tokens in order, in one warp. Same device, same bits.
// Source    Dao et al. 2022, arXiv:2205.14135.
#include "attention_gradient.cuh"

namespace {

constexpr u32 STAGES = 3;

// The strips of a head that a CTA owns, and the head.
template <u32 STRIP>
struct Share {
  HeadPlace head;
  u32 first, rows;  // tokens first .. first + rows; the last strip may reach past the last token
  u32 row;          // of this warp, in the tile
  bool busy;
  u32 tile;

  __device__ __forceinline__ Share(u32 tokens, u32 heads, u32 head_size, u32 tiles)
      : head(blockIdx.x / tiles, tokens, heads, head_size) {
    const u32 strips = ceil_div(tokens, STRIP);
    tile = blockIdx.x % tiles;
    const u32 from = tile * strips / tiles, to = (tile + 1) * strips / tiles;
    first = from * STRIP, rows = (to - from) * STRIP, row = warp_id() * STRIP, busy = row < rows;
  }

  // The destination of the tile's sums of the head's dQ.
  __device__ __forceinline__ float* bias_part(float* parts, u32 heads, u32 width, u32 tiles) const {
    const size_t image = blockIdx.x / tiles / heads;
    return parts + (image * tiles + tile) * 3 * width + head.column;
  }
};

// The state of a warp for its 16·M16 queries: their terms, and their gradient from the keys so far.
template <u32 DH, u32 M16>
struct QuerySums {
  Accumulator<M16, DH / 8> d_q;
  float lse[M16][2], delta[M16][2];  // lse·log2(e); infinity past the last token

  // Adds KEYS keys, rows 0 .. of `keys` and `values`. Queries are rows `own ..` of `queries` and `d_out`;
  // `query` and `key` are the tokens of the first of each.
  template <u32 KEYS, typename Keep>
  __device__ __forceinline__ void add(Tile<DH> queries, Tile<DH> d_out, u32 own, Tile<DH> keys,
                                      Tile<DH> values, Keep keep, float to_log2, u32 query, u32 key,
                                      u32 tokens) {
    const u32 lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
    Accumulator<M16, KEYS / 8> p, d_s;
    p.clear();
    add_products<DH>(p, queries, own, keys, 0);
    d_s.clear();
    add_products<DH>(d_s, d_out, own, values, 0);
    const bool ragged = key + KEYS > tokens;
#pragma unroll
    for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (u32 m = 0; m < M16; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
          const u32 column = key + 8 * n;
          u32 kept = 0;
          if (keep && column < tokens)
            kept =
                keep.word(query + 16 * m + 8 * h + lane_row, column, tokens) >> (column % 32 + lane_column);
#pragma unroll
          for (u32 i = 0; i < 2; ++i) {
            const float weight = exp2_approx(p.at[m][n][2 * h + i] * to_log2 - lse[m][h]);
            float& gradient = d_s.at[m][n][2 * h + i];
            if (keep) gradient = kept >> i & 1 ? gradient * keep.scale : 0.0f;
            gradient = weight * (gradient - delta[m][h]);
            if (ragged && column + lane_column + i >= tokens) gradient = 0.0f;
          }
        }
    add_weighted<DH>(d_q, d_s, keys, 0);
  }
};

template <u32 DH, u32 KEYS, u32 M16, u32 WARPS, typename Keep>
__device__ __forceinline__ void queries_backward(const AttentionBackwardArgs<bf16>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, tiles = args.tiles;
  const u32 qkv_ld = args.qkv.ld, d_o_ld = args.d_o.ld, d_qkv_ld = args.d_qkv.ld;
  const float scale = args.scale;
  constexpr u32 STRIP = 16 * M16;
  const Share<STRIP> share(tokens, heads, head_size, tiles);
  const HeadPlace& head = share.head;
  const Keep keep(args, blockIdx.x / tiles);
  const u32 width = heads * head_size, chunks = head_size / 8, first = share.first, row = share.row;

  const bf16* q = args.qkv.at + head.row * qkv_ld + head.column;
  const bf16* k = q + width;
  const bf16* v = k + width;
  const bf16* o = args.o.at + head.row * args.o.ld + head.column;
  const bf16* d_o = args.d_o.at + head.row * d_o_ld + head.column;
  const Tile<DH> queries{0}, d_out{WARPS * STRIP * Tile<DH>::ROW};
  const auto keys = [](u32 stage) { return Tile<DH>{2 * (WARPS * STRIP + stage * KEYS) * Tile<DH>::ROW}; };
  const auto values = [](u32 stage) {
    return Tile<DH>{(2 * (WARPS * STRIP + stage * KEYS) + KEYS) * Tile<DH>::ROW};
  };

  const u32 blocks = ceil_div(tokens, KEYS);
  const auto fetch = [&](u32 block, u32 stage) {
    if (block < blocks) {
      const u32 key = block * KEYS, rows = is_tail(tokens - key, KEYS) ? TAIL : KEYS;
      keys(stage).copy_async(0, rows, k + size_t(key) * qkv_ld, qkv_ld, tokens - key, chunks);
      values(stage).copy_async(0, rows, v + size_t(key) * qkv_ld, qkv_ld, tokens - key, chunks);
    }
    cp_async_commit();
  };
  queries.copy_async(0, share.rows, q + size_t(first) * qkv_ld, qkv_ld, tokens - first, chunks);
  d_out.copy_async(0, share.rows, d_o + size_t(first) * d_o_ld, d_o_ld, tokens - first, chunks);
  fetch(0, 0);
  fetch(1, 1);

  QuerySums<DH, M16> sums;
  sums.d_q.clear();
#pragma unroll
  for (u32 m = 0; m < M16; ++m)
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      const u32 query = first + row + 16 * m + 8 * h + (lane_id() >> 2);
      const bool exists = share.busy && query < tokens;
      const u32 at = exists ? query : 0;
      const float sum =
          row_delta(o + size_t(at) * args.o.ld, d_o + size_t(at) * d_o_ld, chunks, lane_id() & 3);
      sums.delta[m][h] = exists ? sum : 0.0f;
      sums.lse[m][h] = exists ? args.lse.at[head.index * args.lse.ld + query] * LOG2_E : INFINITY;
      if (exists && (lane_id() & 3) == 0) args.delta.at[head.index * args.delta.ld + query] = sum;
    }

  u32 stage = 0, next = 2;
  for (u32 block = 0; block < blocks; ++block) {
    cp_async_wait<1>();
    block_sync();
    fetch(block + 2, next);
    const u32 key = block * KEYS;
    if (share.busy && is_tail(tokens - key, KEYS))
      sums.template add<TAIL>(queries, d_out, row, keys(stage), values(stage), keep, scale * LOG2_E,
                              first + row, key, tokens);
    else if (share.busy)
      sums.template add<KEYS>(queries, d_out, row, keys(stage), values(stage), keep, scale * LOG2_E,
                              first + row, key, tokens);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    next = next == STAGES - 1 ? 0 : next + 1;
  }
  // Only this warp reads its own queries.
  if (share.busy) {
    float factor[M16][2];
#pragma unroll
    for (u32 m = 0; m < M16; ++m) factor[m][0] = factor[m][1] = scale;
    bf16* to = args.d_qkv.at + (head.row + first + row) * d_qkv_ld + head.column;
    store_rows<DH>(sums.d_q, factor, queries, row, to, d_qkv_ld, tokens - first - row, chunks);
  }
  if (!args.bias_parts) return;
  block_sync();
  store_row_sums<DH>(queries, share.rows, 0, head_size,
                     share.bias_part(args.bias_parts, heads, width, tiles));
}

template <u32 DH, u32 QUERIES, u32 M16, u32 WARPS, typename Keep>
__device__ __forceinline__ void keys_backward(const AttentionBackwardArgs<bf16>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, tiles = args.tiles;
  const u32 qkv_ld = args.qkv.ld, d_o_ld = args.d_o.ld, d_qkv_ld = args.d_qkv.ld;
  const float scale = args.scale;
  const float *lse = args.lse.at, *delta = args.delta.at;
  const u32 lse_ld = args.lse.ld, delta_ld = args.delta.ld;
  constexpr u32 STRIP = 16 * M16;
  const Share<STRIP> share(tokens, heads, head_size, tiles);
  const HeadPlace& head = share.head;
  const Keep keep(args, blockIdx.x / tiles);
  const u32 width = heads * head_size, chunks = head_size / 8, first = share.first, row = share.row;

  const bf16* q = args.qkv.at + head.row * qkv_ld + head.column;
  const bf16* k = q + width;
  const bf16* v = k + width;
  const bf16* d_o = args.d_o.at + head.row * d_o_ld + head.column;
  const Tile<DH> keys{0}, values{WARPS * STRIP * Tile<DH>::ROW};
  const auto queries = [](u32 stage) {
    return Tile<DH>{2 * (WARPS * STRIP + stage * QUERIES) * Tile<DH>::ROW};
  };
  const auto d_out = [](u32 stage) {
    return Tile<DH>{(2 * (WARPS * STRIP + stage * QUERIES) + QUERIES) * Tile<DH>::ROW};
  };
  const RowTerms terms{2 * (WARPS * STRIP + STAGES * QUERIES) * Tile<DH>::ROW};

  const u32 blocks = ceil_div(tokens, QUERIES);
  const auto fetch = [&](u32 block, u32 stage) {
    if (block < blocks) {
      const u32 query = block * QUERIES, rows = is_tail(tokens - query, QUERIES) ? TAIL : QUERIES;
      queries(stage).copy_async(0, rows, q + size_t(query) * qkv_ld, qkv_ld, tokens - query, chunks);
      d_out(stage).copy_async(0, rows, d_o + size_t(query) * d_o_ld, d_o_ld, tokens - query, chunks);
    }
    cp_async_commit();
  };
  keys.copy_async(0, share.rows, k + size_t(first) * qkv_ld, qkv_ld, tokens - first, chunks);
  values.copy_async(0, share.rows, v + size_t(first) * qkv_ld, qkv_ld, tokens - first, chunks);
  fetch(0, 0);
  fetch(1, 1);
  for (u32 query = threadIdx.x; query < blocks * QUERIES; query += blockDim.x) {
    const bool exists = query < tokens;
    terms.put(query, exists ? lse[head.index * lse_ld + query] * LOG2_E : INFINITY,
              exists ? delta[head.index * delta_ld + query] : 0.0f);
  }

  KeySums<DH, M16> sums;
  sums.clear();
  u32 stage = 0, next = 2;
  for (u32 block = 0; block < blocks; ++block) {
    cp_async_wait<1>();
    block_sync();
    fetch(block + 2, next);
    const u32 query = block * QUERIES;
    if (share.busy && is_tail(tokens - query, QUERIES))
      sums.template add<TAIL>(keys, values, row, queries(stage), d_out(stage), 0, terms, keep, scale * LOG2_E,
                              first + row, query, tokens);
    else if (share.busy)
      sums.template add<QUERIES>(keys, values, row, queries(stage), d_out(stage), 0, terms, keep,
                                 scale * LOG2_E, first + row, query, tokens);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    next = next == STAGES - 1 ? 0 : next + 1;
  }
  // Only this warp reads its own keys and values.
  if (share.busy) {
    float k_factor[M16][2], v_factor[M16][2];
#pragma unroll
    for (u32 m = 0; m < M16; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) k_factor[m][h] = scale, v_factor[m][h] = keep ? keep.scale : 1.0f;
    bf16* to = args.d_qkv.at + (head.row + first + row) * d_qkv_ld + head.column;
    store_rows<DH>(sums.d_k, k_factor, keys, row, to + width, d_qkv_ld, tokens - first - row, chunks);
    store_rows<DH>(sums.d_v, v_factor, values, row, to + 2 * width, d_qkv_ld, tokens - first - row, chunks);
  }
  if (!args.bias_parts) return;
  block_sync();
  float* sums_of_keys = share.bias_part(args.bias_parts, heads, width, tiles) + width;
  store_row_sums<DH>(keys, share.rows, 0, head_size, sums_of_keys);
  store_row_sums<DH>(values, share.rows, DH / 16, head_size, sums_of_keys + width);
}

}  // namespace

#define BACKWARD(owner, head, width, block, m16, warps, ctas)                \
  HOT_KERNEL(attention_backward_##owner##_bf16_##head, 32 * warps,           \
             ctas)(ARGS(AttentionBackwardArgs<bf16>)) {                      \
    owner##_backward<width, block, m16, warps, KeepAll>(args);               \
  }                                                                          \
  KERNEL(attention_backward_##owner##_dropout_bf16_##head, 32 * warps, ctas) \
  (ARGS(AttentionBackwardArgs<bf16>)) {                                      \
    owner##_backward<width, block, m16, warps, KeepBits>(args);              \
  }

BACKWARD(queries, d32, 32, 32, 2, 4, 2)
BACKWARD(queries, d64, 64, 32, 2, 4, 2)
BACKWARD(queries, d80, 80, 32, 2, 4, 2)
BACKWARD(queries, d128, 128, 16, 1, 8, 1)

BACKWARD(keys, d32, 32, 32, 2, 4, 2)
BACKWARD(keys, d64, 64, 32, 2, 4, 2)
BACKWARD(keys, d80, 80, 16, 2, 4, 2)
BACKWARD(keys, d128, 128, 16, 1, 8, 1)
