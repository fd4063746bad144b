// Attention of all tokens to all tokens, forward, in bf16 on tensor cores.
//
// Math      P = softmax(scale·Q·Kᵀ)   O = keep(P)·V   lse = ln Σ_j e^(scale·s_j), of each head of each image
// Tensors   qkv: bf16 [B, T, 3, H, Dh], o: bf16 [B, T, H, Dh], rows `ld` apart and 16-byte aligned
//           lse: f32 [B·H, T]   keep: attention_keep.cu, null without dropout
//           Dh % 8 == 0. A head runs in the next larger tile (32, 64, 80, 128), its missing values zero;
//           other sizes and unaligned rows: attention_plain.cu.
// Numerics  Scores, softmax and sums in f32, base 2 with scale·log2(e) folded into one fma; P is rounded to
//           bf16 for P·V, unnormalised and at most 1; O is divided by its sum once, before it is rounded.
// Launch    grid B·H·tiles: the tiles of a head are neighbours, so that the second finds K and V in L2. A warp owns
//           16·M16 queries; tile t of a head takes strips t·strips/tiles .. (t+1)·strips/tiles, at most WARPS.
// Pipeline  K and V arrive in blocks of KEYS through a ring of three, two blocks ahead of the products; one barrier per
//           block. Two CTAs share an SM: one loads while the other computes. The rest of the last block is often small
//           (197 = 3·64 + 5): up to TAIL keys have their own shorter path.
// Bytes     8·D per token (qkv read once from HBM, o written once) and 4 per token and head.
// Order     a row's sums run over the keys in order, in one warp. Same device, same bits.
// Source    Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
#include "attention_tile.cuh"

namespace {

constexpr u32 STAGES = 3;

// The state of a warp for its 16·M16 queries after the keys so far.
template <u32 DH, u32 M16>
struct QuerySums {
  Accumulator<M16, DH / 8> out;
  float most[M16][2], sum[M16][2];  // largest score, and this lane's share of Σ e^(scale·(s - most))

  __device__ __forceinline__ void clear() {
    out.clear();
#pragma unroll
    for (u32 m = 0; m < M16; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) most[m][h] = -INFINITY, sum[m][h] = 0.0f;
  }

  // Adds KEYS keys, rows 0 .. of `keys` and `values`. Queries are rows `own ..` of `queries`; `query` and `key` are the
  // tokens of the first query and key.
  template <u32 KEYS, typename Keep>
  __device__ __forceinline__ void add(Tile<DH> queries, u32 own, Tile<DH> keys, Tile<DH> values, Keep keep,
                                      float to_log2, u32 query, u32 key, u32 tokens) {
    const u32 lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
    Accumulator<M16, KEYS / 8> p;
    p.clear();
    add_products<DH>(p, queries, own, keys, 0);
    if (key + KEYS > tokens) {
#pragma unroll
      for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
          if (key + 8 * n + lane_column + i >= tokens)
#pragma unroll
            for (u32 m = 0; m < M16; ++m) p.at[m][n][i] = p.at[m][n][2 + i] = -INFINITY;
    }
#pragma unroll
    for (u32 m = 0; m < M16; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        float top = most[m][h];
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(p.at[m][n][2 * h], p.at[m][n][2 * h + 1]));
        top = fmaxf(top, shfl_xor(top, 1));
        top = fmaxf(top, shfl_xor(top, 2));
        const float correction = exp2_approx((most[m][h] - top) * to_log2), shift = -top * to_log2;
        most[m][h] = top;
        float add = 0.0f;
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (u32 i = 2 * h; i < 2 * h + 2; ++i) {
            p.at[m][n][i] = exp2_approx(p.at[m][n][i] * to_log2 + shift);
            add += p.at[m][n][i];
          }
        sum[m][h] = sum[m][h] * correction + add;
#pragma unroll
        for (u32 n = 0; n < DH / 8; ++n) {
          out.at[m][n][2 * h] *= correction;
          out.at[m][n][2 * h + 1] *= correction;
        }
      }
    if (keep) {
#pragma unroll
      for (u32 m = 0; m < M16; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
          for (u32 n = 0; n < KEYS / 8; ++n) {
            const u32 column = key + 8 * n;
            if (column >= tokens) continue;
            const u32 word =
                keep.word(query + 16 * m + 8 * h + lane_row, column, tokens) >> (column % 32 + lane_column);
            if (!(word & 1)) p.at[m][n][2 * h] = 0.0f;
            if (!(word & 2)) p.at[m][n][2 * h + 1] = 0.0f;
          }
    }
    add_weighted<DH>(out, p, values, 0);
  }
};

template <u32 DH, u32 KEYS, u32 M16, u32 WARPS, typename Keep>
__device__ __forceinline__ void forward(const AttentionArgs<bf16>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, tiles = args.tiles;
  const u32 qkv_ld = args.qkv.ld;
  const float scale = args.scale;
  constexpr u32 STRIP = 16 * M16;
  const HeadPlace head(blockIdx.x / tiles, tokens, heads, head_size);
  const Keep keep(args, blockIdx.x / tiles);
  const u32 tile = blockIdx.x % tiles, strips = ceil_div(tokens, STRIP);
  const u32 first_strip = tile * strips / tiles, tile_strips = (tile + 1) * strips / tiles - first_strip;
  const u32 first = first_strip * STRIP;
  const u32 width = heads * head_size, chunks = head_size / 8;

  const bf16* q = args.qkv.at + head.row * qkv_ld + head.column;
  const bf16* k = q + width;
  const bf16* v = k + width;
  const Tile<DH> queries{0};
  const auto keys = [](u32 stage) { return Tile<DH>{(WARPS * STRIP + 2 * stage * KEYS) * Tile<DH>::ROW}; };
  const auto values = [](u32 stage) {
    return Tile<DH>{(WARPS * STRIP + (2 * stage + 1) * KEYS) * Tile<DH>::ROW};
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
  queries.copy_async(0, tile_strips * STRIP, q + size_t(first) * qkv_ld, qkv_ld, tokens - first, chunks);
  fetch(0, 0);
  fetch(1, 1);

  const u32 row = warp_id() * STRIP;  // of the tile
  const bool busy = warp_id() < tile_strips;
  QuerySums<DH, M16> sums;
  sums.clear();
  u32 stage = 0, next = 2;
  for (u32 block = 0; block < blocks; ++block) {
    cp_async_wait<1>();
    block_sync();
    // The barrier also means that the previous block's stage is free.
    fetch(block + 2, next);
    const u32 key = block * KEYS;
    if (busy && is_tail(tokens - key, KEYS))
      sums.template add<TAIL>(queries, row, keys(stage), values(stage), keep, scale * LOG2_E, first + row,
                              key, tokens);
    else if (busy)
      sums.template add<KEYS>(queries, row, keys(stage), values(stage), keep, scale * LOG2_E, first + row,
                              key, tokens);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    next = next == STAGES - 1 ? 0 : next + 1;
  }
  if (!busy) return;

  float factor[M16][2];
#pragma unroll
  for (u32 m = 0; m < M16; ++m)
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      float total = sums.sum[m][h];
      total += shfl_xor(total, 1);
      total += shfl_xor(total, 2);
      factor[m][h] = (keep ? keep.scale : 1.0f) / total;
      const u32 query = first + row + 16 * m + 8 * h + (lane_id() >> 2);
      if ((lane_id() & 3) == 0 && query < tokens)
        args.lse.at[head.index * args.lse.ld + query] = sums.most[m][h] * scale + log2_approx(total) * LN_2;
    }
  const u32 valid = tokens - first - row;
  bf16* to = args.o.at + (head.row + first + row) * args.o.ld + head.column;
  store_rows<DH>(sums.out, factor, queries, row, to, args.o.ld, valid, chunks);
}

}  // namespace

#define FORWARD(head, width, block, m16, warps, ctas)                                          \
  HOT_KERNEL(attention_forward_bf16_##head, 32 * warps, ctas)(ARGS(AttentionArgs<bf16>)) {     \
    forward<width, block, m16, warps, KeepAll>(args);                                          \
  }                                                                                            \
  KERNEL(attention_forward_dropout_bf16_##head, 32 * warps, ctas)(ARGS(AttentionArgs<bf16>)) { \
    forward<width, block, m16, warps, KeepBits>(args);                                         \
  }

// Wider heads hold more sums, and so fewer scores at a time.
FORWARD(d32, 32, 64, 2, 4, 2)
FORWARD(d64, 64, 64, 2, 4, 2)
FORWARD(d80, 80, 32, 2, 4, 2)
FORWARD(d128, 128, 32, 2, 4, 2)
