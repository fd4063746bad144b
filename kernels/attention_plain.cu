// Attention of all tokens to all tokens for every shape: f32, and bf16 heads that tensor cores cannot take.
//
// Math      attention_forward.cu, attention_gradient.cuh
// Tensors   qkv, d_qkv: [B, T, 3, H, Dh], o, d_o: [B, T, H, Dh], f32 or bf16, rows `ld` apart, any alignment
//           lse, delta: f32 [B·H, T]   Dh <= 128, any T
// Numerics  IEEE f32 throughout: products by fma, expf, logf; P and dS are not rounded to bf16. Sums over the
//           values of a head in four interleaved parts.
// Design    128 threads own 32 rows and process 32 others at a time, all in shared memory as f32. Thread (y, x)
//           computes scores of rows y + 8·i with columns x and x + 16, then sums values 4·x .. 4·x + 3 (and 64 further)
//           of the same rows. Scores are exchanged through shared memory, within a half warp.
// Shared    tiles of 32 rows, a row padded to an odd number of 16-byte chunks: no bank conflicts. 55 KB
//           (forward) and 77 KB (backward) at Dh 128.
// Launch    grid B·H·ceil(T / 32).
// Order     every sum runs over the tokens in order. Same device, same bits.
#include "attention_tile.cuh"

namespace {

constexpr u32 ROWS = 32, SCORE_ROW = 36;

// 32 rows of one head, f32. Values past Dh, up to a multiple of four, and rows past the last token are zero.
struct PlainTile {
  float* at;
  u32 row;  // floats from one row to the next

  __device__ __forceinline__ PlainTile(u32 number, u32 head_size) : row(4 * (ceil_div(head_size, 4) | 1)) {
    at = reinterpret_cast<float*>(smem_base()) + number * ROWS * row;
  }

  template <typename T>
  __device__ __forceinline__ void load(const T* from, u32 ld, u32 valid, u32 head_size) const {
    const u32 padded = ceil_div(head_size, 4) * 4;
    for (u32 r = warp_id(); r < ROWS; r += 4)
      for (u32 e = lane_id(); e < padded; e += 32)
        at[r * row + e] = r < valid && e < head_size ? load1(from + size_t(r) * ld + e) : 0.0f;
  }

  __device__ __forceinline__ vec4 chunk(u32 r, u32 c) const {
    return ld16(at + r * row + 4 * c);
  }
};

struct ScoreTile {
  float* at;

  __device__ __forceinline__ ScoreTile(const PlainTile& last, u32 number)
      : at(last.at + ROWS * last.row + number * ROWS * SCORE_ROW) {
  }
};

__device__ __forceinline__ u32 thread_y() {
  return threadIdx.x / 16;
}
__device__ __forceinline__ u32 thread_x() {
  return threadIdx.x % 16;
}

// Reduces over the sixteen threads of a row.
__device__ __forceinline__ float row_sum(float v) {
  for (u32 mask = 8; mask > 0; mask /= 2) v += shfl_xor(v, mask);
  return v;
}
__device__ __forceinline__ float row_max(float v) {
  for (u32 mask = 8; mask > 0; mask /= 2) v = fmaxf(v, shfl_xor(v, mask));
  return v;
}

// scores[i][j] = left row y + 8·i times right row x + 16·j.
__device__ __forceinline__ void products(float (&scores)[4][2], const PlainTile& left, const PlainTile& right,
                                         u32 head_size) {
  float parts[4][2][4] = {};
  for (u32 c = 0; c < ceil_div(head_size, 4); ++c) {
    vec4 b[2];
#pragma unroll
    for (u32 j = 0; j < 2; ++j) b[j] = right.chunk(thread_x() + 16 * j, c);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const vec4 a = left.chunk(thread_y() + 8 * i, c);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        parts[i][j][0] = fmaf(as_f32(a.x), as_f32(b[j].x), parts[i][j][0]);
        parts[i][j][1] = fmaf(as_f32(a.y), as_f32(b[j].y), parts[i][j][1]);
        parts[i][j][2] = fmaf(as_f32(a.z), as_f32(b[j].z), parts[i][j][2]);
        parts[i][j][3] = fmaf(as_f32(a.w), as_f32(b[j].w), parts[i][j][3]);
      }
    }
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i)
#pragma unroll
    for (u32 j = 0; j < 2; ++j)
      scores[i][j] = (parts[i][j][0] + parts[i][j][1]) + (parts[i][j][2] + parts[i][j][3]);
}

// A thread's values 4·x + 64·j .. of rows y + 8·i.
struct PlainSums {
  float at[4][2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
      for (u32 j = 0; j < 2; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) at[i][j][e] = 0.0f;
  }

  // Adds weights·values over 32 rows of `values`.
  __device__ __forceinline__ void add(ScoreTile weights, const PlainTile& values, u32 head_size) {
    for (u32 c = 0; c < ROWS / 4; ++c) {
      vec4 w[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) w[i] = ld16(weights.at + (thread_y() + 8 * i) * SCORE_ROW + 4 * c);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        if (4 * thread_x() + 64 * j >= head_size) continue;
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
          const vec4 v = values.chunk(4 * c + r, thread_x() + 16 * j);
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const float weight = as_f32(r == 0 ? w[i].x : r == 1 ? w[i].y : r == 2 ? w[i].z : w[i].w);
            at[i][j][0] = fmaf(weight, as_f32(v.x), at[i][j][0]);
            at[i][j][1] = fmaf(weight, as_f32(v.y), at[i][j][1]);
            at[i][j][2] = fmaf(weight, as_f32(v.z), at[i][j][2]);
            at[i][j][3] = fmaf(weight, as_f32(v.w), at[i][j][3]);
          }
        }
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(T* to, u32 ld, u32 valid, u32 head_size,
                                        const float (&factor)[4]) const {
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
      for (u32 j = 0; j < 2; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          const u32 row = thread_y() + 8 * i, column = 4 * thread_x() + 64 * j + e;
          if (row < valid && column < head_size)
            store1(to + size_t(row) * ld + column, factor[i] * at[i][j][e]);
        }
  }
};

__device__ __forceinline__ void put_scores(ScoreTile to, const float (&scores)[4][2]) {
#pragma unroll
  for (u32 i = 0; i < 4; ++i)
#pragma unroll
    for (u32 j = 0; j < 2; ++j) to.at[(thread_y() + 8 * i) * SCORE_ROW + thread_x() + 16 * j] = scores[i][j];
}

template <typename T>
__device__ __forceinline__ void forward(const AttentionArgs<T>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, qkv_ld = args.qkv.ld;
  const float scale = args.scale;
  const u32 tiles = args.tiles, first = blockIdx.x % tiles * ROWS, width = heads * head_size;
  const HeadPlace head(blockIdx.x / tiles, tokens, heads, head_size);
  const KeepBits keep(args, blockIdx.x / tiles);
  const T* q = args.qkv.at + head.row * qkv_ld + head.column;
  const PlainTile queries(0, head_size), keys(1, head_size), values(2, head_size);
  const ScoreTile weights(values, 0);
  queries.load(q + size_t(first) * qkv_ld, qkv_ld, tokens - first, head_size);

  PlainSums out;
  out.clear();
  float most[4], sum[4];
  for (u32 i = 0; i < 4; ++i) most[i] = -INFINITY, sum[i] = 0.0f;
  for (u32 key = 0; key < tokens; key += ROWS) {
    block_sync();
    keys.load(q + width + size_t(key) * qkv_ld, qkv_ld, tokens - key, head_size);
    values.load(q + 2 * width + size_t(key) * qkv_ld, qkv_ld, tokens - key, head_size);
    block_sync();
    float p[4][2];
    products(p, queries, keys, head_size);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      float top = most[i];
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        p[i][j] = key + thread_x() + 16 * j < tokens ? p[i][j] * scale : -INFINITY;
        top = fmaxf(top, p[i][j]);
      }
      top = row_max(top);
      const float correction = expf(most[i] - top);
      most[i] = top;
      float add = 0.0f;
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        p[i][j] = expf(p[i][j] - top);
        add += p[i][j];
      }
      sum[i] = sum[i] * correction + row_sum(add);
#pragma unroll
      for (u32 j = 0; j < 2; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) out.at[i][j][e] *= correction;
      if (keep) {
        const u32 kept = keep.word(first + thread_y() + 8 * i, key, tokens);
#pragma unroll
        for (u32 j = 0; j < 2; ++j)
          if (!(kept >> (thread_x() + 16 * j) & 1)) p[i][j] = 0.0f;
      }
    }
    put_scores(weights, p);
    warp_sync();
    out.add(weights, values, head_size);
  }

  float factor[4];
  for (u32 i = 0; i < 4; ++i) {
    factor[i] = (keep ? keep.scale : 1.0f) / sum[i];
    const u32 query = first + thread_y() + 8 * i;
    if (thread_x() == 0 && query < tokens)
      args.lse.at[head.index * args.lse.ld + query] = most[i] + logf(sum[i]);
  }
  T* to = args.o.at + (head.row + first) * args.o.ld + head.column;
  out.store(to, args.o.ld, tokens - first, head_size, factor);
}

template <typename T>
__device__ __forceinline__ void queries_backward(const AttentionBackwardArgs<T>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size;
  const u32 qkv_ld = args.qkv.ld, d_o_ld = args.d_o.ld, d_qkv_ld = args.d_qkv.ld;
  const float scale = args.scale;
  const u32 tiles = args.tiles, first = blockIdx.x % tiles * ROWS, width = heads * head_size;
  const HeadPlace head(blockIdx.x / tiles, tokens, heads, head_size);
  const KeepBits keep(args, blockIdx.x / tiles);
  const T* q = args.qkv.at + head.row * qkv_ld + head.column;
  const T* o = args.o.at + head.row * args.o.ld + head.column;
  const T* d_o = args.d_o.at + head.row * d_o_ld + head.column;
  const PlainTile queries(0, head_size), d_out(1, head_size), keys(2, head_size), values(3, head_size);
  const ScoreTile weights(values, 0);
  queries.load(q + size_t(first) * qkv_ld, qkv_ld, tokens - first, head_size);
  d_out.load(d_o + size_t(first) * d_o_ld, d_o_ld, tokens - first, head_size);

  float own_lse[4], own_delta[4];
  for (u32 i = 0; i < 4; ++i) {
    const u32 query = first + thread_y() + 8 * i;
    float sum = 0.0f;
    if (query < tokens)
      for (u32 e = thread_x(); e < head_size; e += 16)
        sum = fmaf(load1(o + size_t(query) * args.o.ld + e), load1(d_o + size_t(query) * d_o_ld + e), sum);
    own_delta[i] = row_sum(sum);
    own_lse[i] = query < tokens ? args.lse.at[head.index * args.lse.ld + query] : INFINITY;
    if (thread_x() == 0 && query < tokens) args.delta.at[head.index * args.delta.ld + query] = own_delta[i];
  }

  PlainSums d_q;
  d_q.clear();
  for (u32 key = 0; key < tokens; key += ROWS) {
    block_sync();
    keys.load(q + width + size_t(key) * qkv_ld, qkv_ld, tokens - key, head_size);
    values.load(q + 2 * width + size_t(key) * qkv_ld, qkv_ld, tokens - key, head_size);
    block_sync();
    float p[4][2], d_s[4][2];
    products(p, queries, keys, head_size);
    products(d_s, d_out, values, head_size);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 kept = keep ? keep.word(first + thread_y() + 8 * i, key, tokens) : 0;
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        if (keep) d_s[i][j] = kept >> (thread_x() + 16 * j) & 1 ? d_s[i][j] * keep.scale : 0.0f;
        const float weight = expf(p[i][j] * scale - own_lse[i]);
        d_s[i][j] = key + thread_x() + 16 * j < tokens ? weight * (d_s[i][j] - own_delta[i]) : 0.0f;
      }
    }
    put_scores(weights, d_s);
    warp_sync();
    d_q.add(weights, keys, head_size);
  }
  const float factor[4] = {scale, scale, scale, scale};
  T* to = args.d_qkv.at + (head.row + first) * d_qkv_ld + head.column;
  d_q.store(to, d_qkv_ld, tokens - first, head_size, factor);
}

template <typename T>
__device__ __forceinline__ void keys_backward(const AttentionBackwardArgs<T>& args) {
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size;
  const u32 qkv_ld = args.qkv.ld, d_o_ld = args.d_o.ld, d_qkv_ld = args.d_qkv.ld;
  const float scale = args.scale;
  const u32 tiles = args.tiles, first = blockIdx.x % tiles * ROWS, width = heads * head_size;
  const HeadPlace head(blockIdx.x / tiles, tokens, heads, head_size);
  const KeepBits keep(args, blockIdx.x / tiles);
  const T* q = args.qkv.at + head.row * qkv_ld + head.column;
  const T* d_o = args.d_o.at + head.row * d_o_ld + head.column;
  const PlainTile keys(0, head_size), values(1, head_size), queries(2, head_size), d_out(3, head_size);
  const ScoreTile weights(d_out, 0), gradients(d_out, 1);
  keys.load(q + width + size_t(first) * qkv_ld, qkv_ld, tokens - first, head_size);
  values.load(q + 2 * width + size_t(first) * qkv_ld, qkv_ld, tokens - first, head_size);

  PlainSums d_k, d_v;
  d_k.clear(), d_v.clear();
  for (u32 query = 0; query < tokens; query += ROWS) {
    block_sync();
    queries.load(q + size_t(query) * qkv_ld, qkv_ld, tokens - query, head_size);
    d_out.load(d_o + size_t(query) * d_o_ld, d_o_ld, tokens - query, head_size);
    block_sync();
    float p[4][2], d_s[4][2];
    products(p, keys, queries, head_size);
    products(d_s, values, d_out, head_size);
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      const u32 column = query + thread_x() + 16 * j;
      const bool exists = column < tokens;
      const float its_lse = exists ? args.lse.at[head.index * args.lse.ld + column] : INFINITY;
      const float its_delta = exists ? args.delta.at[head.index * args.delta.ld + column] : 0.0f;
      const u32 kept = keep ? keep.word(column, first, tokens) : 0;
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const float weight = expf(p[i][j] * scale - its_lse);
        const bool here = !keep || (kept >> (thread_y() + 8 * i) & 1);
        p[i][j] = here ? weight : 0.0f;
        d_s[i][j] = weight * ((here ? (keep ? keep.scale : 1.0f) * d_s[i][j] : 0.0f) - its_delta);
      }
    }
    put_scores(weights, p);
    put_scores(gradients, d_s);
    warp_sync();
    d_v.add(weights, d_out, head_size);
    d_k.add(gradients, queries, head_size);
  }
  float factor[4] = {scale, scale, scale, scale};
  T* to = args.d_qkv.at + (head.row + first) * d_qkv_ld + head.column;
  d_k.store(to + width, d_qkv_ld, tokens - first, head_size, factor);
  for (u32 i = 0; i < 4; ++i) factor[i] = keep ? keep.scale : 1.0f;
  d_v.store(to + 2 * width, d_qkv_ld, tokens - first, head_size, factor);
}

}  // namespace

#define PLAIN(suffix, T)                                                                \
  KERNEL(attention_forward_##suffix, 128, 2)(ARGS(AttentionArgs<T>)) {                  \
    forward(args);                                                                      \
  }                                                                                     \
  KERNEL(attention_backward_queries_##suffix, 128, 2)(ARGS(AttentionBackwardArgs<T>)) { \
    queries_backward(args);                                                             \
  }                                                                                     \
  KERNEL(attention_backward_keys_##suffix, 128, 2)(ARGS(AttentionBackwardArgs<T>)) {    \
    keys_backward(args);                                                                \
  }

PLAIN(f32, float)
PLAIN(bf16, bf16)
