// Attention of all tokens to all tokens, backward, in bf16 on tensor cores: one CTA owns a short head.
//
// Math      attention_gradient.cuh
// Tensors   as attention_backward.cu, without delta; T <= 256
// Design    Q, K, V and dO of the head stay in shared memory for the CTA's whole life. A warp owns 32 keys: their dK
//           and dV stay in its registers while blocks of 32 queries pass. dSᵀ of a block goes through shared memory.
//           From there all eight warps compute the block's dQ, 16 queries by 16 values each, while the next block's dSᵀ
//           is being computed: two buffers, one barrier per block. Five products, no atomics, nothing in HBM except
//           operands and results.
// Launch    grid B·H, 256 threads. Warps past the last key only help with dQ. With 7 key warps (T = 197) they cost
//           nothing, because registers are allocated to quarters of an SM.
// Shared    4·rows·2·Dh + 8·rows + 2·rows·64 bytes, rows = T rounded up to 32: 142 KB at T = 197, and 162 KB at T =
//           256, which still fits into the 163 KB of an A100.
// Bytes     16·D per token: qkv, o and dO once, d_qkv once; 4 per token and head.
//           With a bias 12·D per image.
// Order     a block's dQ sums over the keys, dK and dV over the queries, in order. Same device, same bits.
// Source    the split of the backward: Dao et al. 2022, arXiv:2205.14135.
#include "attention_gradient.cuh"

namespace {

constexpr u32 WARPS = 8, STRIP = 32, QUERIES = 32;

// Stores pairs of neighbouring queries of dSᵀ, as the accumulators hold them, into rows `row ..` of a tile of 32
// queries.
template <u32 N8>
__device__ __forceinline__ void keep_scores(const Accumulator<2, N8>& d_s, Tile<QUERIES> to, u32 row) {
  const u32 g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll
  for (u32 m = 0; m < 2; ++m)
#pragma unroll
    for (u32 n = 0; n < N8; ++n)
#pragma unroll
      for (u32 h = 0; h < 2; ++h)
        st4(to.chunk(row + 16 * m + 8 * h + g, n) + 4 * q,
            pack_bf16(d_s.at[m][n][2 * h], d_s.at[m][n][2 * h + 1]));
}

template <u32 DH, typename Keep>
__device__ __forceinline__ void head_backward(const AttentionBackwardArgs<bf16>& args) {
  static_assert(DH == 16 * WARPS / 2, "a block's dQ is two by four pieces of 16 by 16");
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size;
  const u32 qkv_ld = args.qkv.ld, d_o_ld = args.d_o.ld, d_qkv_ld = args.d_qkv.ld;
  const float scale = args.scale;
  const HeadPlace head(blockIdx.x, tokens, heads, head_size);
  const Keep keep(args, blockIdx.x);
  const u32 rows = ceil_div(tokens, STRIP) * STRIP, blocks = rows / QUERIES;
  const u32 width = heads * head_size, chunks = head_size / 8;

  const bf16* q = args.qkv.at + head.row * qkv_ld + head.column;
  const bf16* k = q + width;
  const bf16* v = k + width;
  const u32 o_ld = args.o.ld, lse_ld = args.lse.ld;
  const float* lse = args.lse.at;
  const bf16* o = args.o.at + head.row * o_ld + head.column;
  const bf16* d_o = args.d_o.at + head.row * d_o_ld + head.column;
  bf16* d_qkv = args.d_qkv.at + head.row * d_qkv_ld + head.column;
  const u32 tile = rows * Tile<DH>::ROW;
  const Tile<DH> keys{0}, values{tile}, queries{2 * tile}, d_out{3 * tile};
  const RowTerms terms{4 * tile};
  const auto scores = [&](u32 block) {
    return Tile<QUERIES>{4 * tile + 8 * rows + (block & 1) * rows * Tile<QUERIES>::ROW};
  };

  // The first block can start once the keys, the values and its own queries have arrived.
  const auto fetch = [&](u32 first, u32 count) {
    queries.copy_async(first, count, q + size_t(first) * qkv_ld, qkv_ld, tokens - first, chunks);
    d_out.copy_async(first, count, d_o + size_t(first) * d_o_ld, d_o_ld, tokens - first, chunks);
    cp_async_commit();
  };
  keys.copy_async(0, rows, k, qkv_ld, tokens, chunks);
  values.copy_async(0, rows, v, qkv_ld, tokens, chunks);
  fetch(0, QUERIES);
  if (blocks > 1) fetch(QUERIES, rows - QUERIES);

  for (u32 row = 8 * warp_id(); row < rows; row += 8 * WARPS) {
    const u32 query = row + (lane_id() >> 2);
    const bool exists = query < tokens;
    const u32 at = exists ? query : 0;
    const float delta = row_delta(o + size_t(at) * o_ld, d_o + size_t(at) * d_o_ld, chunks, lane_id() & 3);
    if ((lane_id() & 3) == 0) {
      terms.put(query, exists ? lse[head.index * lse_ld + query] * LOG2_E : INFINITY, exists ? delta : 0.0f);
    }
  }

  const u32 own = warp_id() * STRIP;
  const bool busy = own < rows;
  KeySums<DH, 2> sums;
  sums.clear();

  // dQ of a block whose dSᵀ all warps have written. It goes through the block's rows of Q, which are no longer read.
  const auto finish_queries = [&](u32 block) {
    const u32 m = warp_id() & 1, n = warp_id() >> 1, row = block * QUERIES + 16 * m;
    if (row >= tokens) return;
    const Tile<QUERIES> from = scores(block);
    float d_q[2][4] = {};
    const u32 steps = ceil_div(tokens, 16);
#pragma unroll 2
    for (u32 step = 0; step < steps; ++step) {
      u32 a[4], b[2][2];
      from.load_a_trans(a, 16 * step, m);
      keys.load_b_trans(b, 16 * step, n);
      mma_bf16(d_q[0], a, b[0]);
      mma_bf16(d_q[1], a, b[1]);
    }
    const u32 lane_row = lane_id() >> 2, lane_column = lane_id() & 3;
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
      for (u32 h = 0; h < 2; ++h)
        st4(queries.chunk(row + 8 * h + lane_row, 2 * n + i) + 4 * lane_column,
            pack_bf16(scale * d_q[i][2 * h], scale * d_q[i][2 * h + 1]));
    warp_sync();
    // Each group of eight lanes reads every second of eight rows, which lie in different banks; two lanes form one
    // sector.
    const u32 query = row + 2 * (lane_id() >> 1 & 3) + (lane_id() >> 3 & 1) + 8 * (lane_id() >> 4);
    const u32 chunk = 2 * n + (lane_id() & 1);
    if (query < tokens && chunk < chunks)
      st16(d_qkv + size_t(query) * d_qkv_ld + 8 * chunk, ld16(queries.chunk(query, chunk)));
  };

  for (u32 block = 0; block < blocks; ++block) {
    if (block == 0 && blocks > 1)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    block_sync();
    const u32 query = block * QUERIES;
    if (busy && is_tail(tokens - query, QUERIES))
      keep_scores(sums.template add<TAIL>(keys, values, own, queries, d_out, query, terms, keep,
                                          scale * LOG2_E, own, query, tokens),
                  scores(block), own);
    else if (busy)
      keep_scores(sums.template add<QUERIES>(keys, values, own, queries, d_out, query, terms, keep,
                                             scale * LOG2_E, own, query, tokens),
                  scores(block), own);
    if (block > 0) finish_queries(block - 1);
  }
  block_sync();
  finish_queries(blocks - 1);
  // The last dQ still reads all keys.
  block_sync();
  if (busy) {
    float k_factor[2][2], v_factor[2][2];
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) k_factor[m][h] = scale, v_factor[m][h] = keep ? keep.scale : 1.0f;
    bf16* to = d_qkv + size_t(own) * d_qkv_ld;
    store_rows<DH>(sums.d_k, k_factor, keys, own, to + width, d_qkv_ld, tokens - own, chunks);
    store_rows<DH>(sums.d_v, v_factor, values, own, to + 2 * width, d_qkv_ld, tokens - own, chunks);
  }
  if (!args.bias_parts) return;
  block_sync();
  float* bias_parts = args.bias_parts + size_t(blockIdx.x / heads) * 3 * width + head.column;
  store_row_sums<DH>(queries, rows, 0, head_size, bias_parts);
  store_row_sums<DH>(keys, rows, DH / 16, head_size, bias_parts + width);
  store_row_sums<DH>(values, rows, 0, head_size, bias_parts + 2 * width);
}

}  // namespace

HOT_KERNEL(attention_backward_head_bf16_d64, 256, 1)(ARGS(AttentionBackwardArgs<bf16>)) {
  head_backward<64, KeepAll>(args);
}
KERNEL(attention_backward_head_dropout_bf16_d64, 256, 1)(ARGS(AttentionBackwardArgs<bf16>)) {
  head_backward<64, KeepBits>(args);
}
