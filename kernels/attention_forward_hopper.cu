// Attention, forward, on Hopper's own instructions: bf16, heads of 64 values, at most 208 tokens, no dropout.
//
// Math      as attention_forward.cu: S = scale·Q·Kᵀ  P = softmax(S) over keys  O = P·V  lse = log Σ exp(S)
// Layout    as there, by tensor maps: qkv {64 values, T tokens, 3·H, B}, o {64, T, H, B}. A map ends with the image's
//           last token: what lies after it is read as zeros and never written.
// Threads   Three warpgroups. The first loads Q, K and V of one head after the other, two ahead; the others compute,
//           each the strips of 64 queries w, w + 2. A block takes every gridDim.x-th head.
// Scores    of a strip with all keys in registers, 104 per thread: the softmax sees whole rows. P becomes the first
//           operand of the second product without leaving its registers.
// O         leaves through the rows of Q that its warp has finished with. Other warps of the warpgroup may still read
//           Q until they have met at the warpgroup's barrier.
// Bytes     as there: 4·D per token and lse.
// Order     every row is summed by four threads in one order. Same device, same bits.
// Source    Shah et al. 2024, arXiv:2407.08608 (warpgroups that load and compute).
#include "attention_tile.cuh"

#ifndef VITRUM_STANDIN
#include "hopper.cuh"

namespace {

constexpr u32 ROWS = 208;  // of a box: queries, keys
constexpr u32 TILE_BYTES = ROWS * 128;
constexpr u32 STAGE_BYTES = 3 * TILE_BYTES;  // Q, K, V
constexpr u32 STAGES = 2;
constexpr u32 BARRIERS = STAGES * STAGE_BYTES;  // after the stages: full and empty of each
constexpr u32 CONSUMERS = 8;                    // warps that compute

struct AttentionHopperArgs {
  TensorMap qkv, o;
  View<float> lse;
  float scale;
  u32 tokens, heads, all_heads;  // all_heads: B·H
};

__device__ __forceinline__ u32 full(u32 base, u32 stage) {
  return base + BARRIERS + 8 * stage;
}
__device__ __forceinline__ u32 empty(u32 base, u32 stage) {
  return base + BARRIERS + 8 * (STAGES + stage);
}

// One thread: loads every head of the block, as soon as its stage is free.
__device__ __forceinline__ void load_heads(const AttentionHopperArgs& args, u32 base) {
  u32 round = 0;
  for (u32 head = blockIdx.x; head < args.all_heads; head += gridDim.x, ++round) {
    const u32 stage = round % STAGES, at = base + stage * STAGE_BYTES;
    if (round >= STAGES) mbarrier_wait(empty(base, stage), (round / STAGES - 1) & 1);
    mbarrier_expect(full(base, stage), STAGE_BYTES);
    const u32 image = head / args.heads, of_image = head % args.heads;
#pragma unroll
    for (u32 which = 0; which < 3; ++which)
      load_box(at + which * TILE_BYTES, args.qkv, full(base, stage), 0, which * args.heads + of_image, image);
  }
}

// The softmax of a warp's 16 rows, of which this thread has a quarter of two. `s` are scores, and then e^(s - most); the
// pairs of those are the first operand of P·V. `most` and `sum` of a row are known to its four threads.
struct Softmax {
  float most[2], sum[2];

  __device__ __forceinline__ void make(float (&s)[104], u32 (&p)[13][4], float to_log2, u32 tokens) {
    const u32 column = 2 * (lane_id() & 3);
    most[0] = most[1] = -INFINITY;
#pragma unroll
    for (u32 j = 0; j < 26; ++j) {
      if (8 * j + 8 > tokens) {
#pragma unroll
        for (u32 e = 0; e < 2; ++e)
          if (8 * j + column + e >= tokens) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
      }
#pragma unroll
      for (u32 e = 0; e < 4; ++e) most[e >> 1] = fmaxf(most[e >> 1], s[4 * j + e]);
    }
    float shift[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      most[h] = fmaxf(most[h], shfl_xor(most[h], 1));
      most[h] = fmaxf(most[h], shfl_xor(most[h], 2));
      shift[h] = -most[h] * to_log2;
      sum[h] = 0.0f;
    }
#pragma unroll
    for (u32 j = 0; j < 26; ++j) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        s[4 * j + e] = exp2_approx(fmaf(s[4 * j + e], to_log2, shift[e >> 1]));
        sum[e >> 1] += s[4 * j + e];
      }
      p[j >> 1][2 * (j & 1)] = pack_bf16(s[4 * j], s[4 * j + 1]);
      p[j >> 1][2 * (j & 1) + 1] = pack_bf16(s[4 * j + 2], s[4 * j + 3]);
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      sum[h] += shfl_xor(sum[h], 1);
      sum[h] += shfl_xor(sum[h], 2);
    }
  }
};

// One strip of 64 queries of the head in the stage at `at`.
__device__ __forceinline__ void compute_strip(const AttentionHopperArgs& args, u32 at, u32 strip, u32 head) {
  const u32 keys = at + TILE_BYTES, values = at + 2 * TILE_BYTES;
  float s[104];
  product_fence();
#pragma unroll
  for (u32 k = 0; k < 4; ++k)
    product_64x208(s, swizzled_tile(at + strip * 64 * 128 + 32 * k), swizzled_tile(keys + 32 * k), k > 0);
  product_commit();
  product_wait();
  settle(s);

  const u32 row = 64 * strip + 16 * (warp_id() & 3), g = lane_id() >> 2, q = lane_id() & 3;
  // A warp past the last token has nothing to do but its part of the products.
  const bool busy = row < args.tokens;
  u32 p[13][4] = {};
  Softmax softmax;
  if (busy) softmax.make(s, p, args.scale * LOG2_E, args.tokens);
  float o[32];
  product_fence();
#pragma unroll
  for (u32 k = 0; k < 13; ++k) product_64x64(o, p[k], swizzled_tile(values + 16 * 128 * k), k > 0);
  product_commit();
  product_wait();
  settle(o);
  // All warps of the warpgroup have finished with Q.
  warpgroup_sync(warp_id() >> 2);
  if (!busy) return;

  float factor[2];
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    factor[h] = 1.0f / softmax.sum[h];
    const u32 query = row + 8 * h + g;
    if (q == 0 && query < args.tokens)
      row_of(args.lse, head)[query] = softmax.most[h] * args.scale + log2_approx(softmax.sum[h]) * LN_2;
  }
  u8* rows_of_q = smem_base() + (at - shared_address(smem_base()));
#pragma unroll
  for (u32 j = 0; j < 8; ++j)
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
      st4(rows_of_q + (row + 8 * h + g) * 128 + ((j ^ g) << 4) + 4 * q,
          pack_bf16(o[4 * j + 2 * h] * factor[h], o[4 * j + 2 * h + 1] * factor[h]));
  fence_proxy();
  warp_sync();
  if (lane_id() == 0) store_box(args.o, at + row * 128, row, head % args.heads, head / args.heads);
}

__device__ __forceinline__ void compute_heads(const AttentionHopperArgs& args, u32 base) {
  const u32 group = warp_id() / 4 - 1;
  u32 round = 0;
  for (u32 head = blockIdx.x; head < args.all_heads; head += gridDim.x, ++round) {
    const u32 stage = round % STAGES, at = base + stage * STAGE_BYTES;
    mbarrier_wait(full(base, stage), (round / STAGES) & 1);
#pragma unroll 1
    for (u32 strip = group; 64 * strip < args.tokens; strip += 2) compute_strip(args, at, strip, head);
    // The stage is free when every warp has finished, and O has left it.
    if (lane_id() == 0) {
      stores_have_read();
      mbarrier_arrive(empty(base, stage));
    }
  }
}

}  // namespace

HOT_KERNEL(attention_forward_hopper_bf16_d64, 384, 1)(ARGS(AttentionHopperArgs)) {
  const u32 base = shared_address(smem_base());
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(full(base, stage), 1);
      mbarrier_init(empty(base, stage), CONSUMERS);
    }
    mbarrier_init_fence();
  }
  block_sync();
  if (warp_id() < 4) {
    keep_registers<24>();
    if (threadIdx.x == 0) load_heads(args, base);
  } else {
    take_registers<240>();
    compute_heads(args, base);
  }
}
#endif
