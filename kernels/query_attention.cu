// Attention of one query per head and image over all tokens of the image: the class token's query, or one learned query
// that all images share (a MAP head).
//
// Math      p = softmax(scale·k·q)   w = dropout(p)   o = Σ_t w_t·v_t
//           g_t = dO·v_t   ds = scale·(w∘g - p·Σ w∘g)   dk_t = ds_t·q   dv_t = w_t·dO   dq = Σ_t ds_t·k_t,
//           and over the images that share it
// Tensors   q, d_q: [B, H, Dh], or [1, H, Dh] for all (q_ld 0)   kv, d_kv: [B, T, 2, H, Dh]
//           o, d_o: [B, H, Dh]; f32 or bf16, rows `ld` apart   p: f32 [B·H, T], before dropout
//           parts: f32 [slices, H·Dh], scratch of a shared query's gradient   Dh <= 128, any T
// Dropout   element head·T·T + t of the sample, as for the first token's query in the other attention kernels
// Numerics  f32; expf.
// Design    `lanes` neighbouring lanes own a token, eight values of its head each: one 16-byte access in bf16, together
//           whole sectors. A thread loads four tokens before it uses the first. WHOLE: heads and rows consist of such
//           accesses; other shapes go value by value.
// Launch    one block of 128 threads per image and head. The backward of a shared query has one block per slice and
//           head, and every slice takes each `slices`-th image; `query_attention_backward_query` has a thread per
//           column.
// Shared    four partial rows, and f32 [T] (forward), [2, T] (backward).
// Bytes     kv once forward, kv once and d_kv once backward: 4·D and 8·D per token in bf16; p is f32, once.
// Order     a group of lanes sums every n-th token, then the groups of a warp, the warps in order, images in the order
//           of their slices. Same device, same bits.
// Source    Zhai et al. 2022, arXiv:2106.04560.
#include "philox.cuh"
#include "reduce.cuh"

namespace {

constexpr u32 THREADS = 128, WARPS = THREADS / WARP, MOST_VALUES = 128;
// Tokens that a thread loads before it uses the first.
constexpr u32 AHEAD = 4;

// Which tokens, and which eight values of the head, a thread owns.
struct Share {
  u32 lanes;   // of a token: a power of two, 16 at most
  u32 value;   // the lane's first
  u32 n;       // how many of the eight exist
  u32 first;   // the thread's first token
  u32 stride;  // from one of its tokens to the next
};
__device__ __forceinline__ Share share_of_thread(u32 head_size) {
  u32 lanes = 1;
  while (lanes * VEC < head_size) lanes *= 2;
  const u32 value = threadIdx.x % lanes * VEC;
  return {lanes, value, valid8(value, head_size), threadIdx.x / lanes, THREADS / lanes};
}

// Rounds in which every thread of the block takes part, AHEAD tokens each.
__device__ __forceinline__ u32 rounds_of(const Share& share, u32 tokens) {
  return ceil_div(tokens, share.stride * AHEAD);
}

// Eight neighbouring values, of which `n` exist.
template <bool WHOLE>
__device__ __forceinline__ Raw8<float> fetch_values(const float* p, u32 n) {
  return fetch8_stream(p, n);
}
template <bool WHOLE>
__device__ __forceinline__ Raw8<bf16> fetch_values(const bf16* p, u32 n) {
  if constexpr (WHOLE) {
    return fetch8_stream(p, n);
  } else {
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 lo = 2 * i < n ? p[2 * i].bits : 0, hi = 2 * i + 1 < n ? p[2 * i + 1].bits : 0;
      pairs[i] = lo | hi << 16;
    }
    return {{pairs[0], pairs[1], pairs[2], pairs[3]}};
  }
}

template <bool WHOLE, typename T>
__device__ __forceinline__ void load_values(const T* p, u32 n, float (&v)[VEC]) {
  unpack8(fetch_values<WHOLE>(p, n), v);
}

template <bool WHOLE, typename T>
__device__ __forceinline__ void store_values(T* p, u32 n, const float (&v)[VEC]) {
  if constexpr (WHOLE) {
    if (n > 0) store8(p, VEC, v);
  } else {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (i < n) store1(p + i, v[i]);
  }
}

// The thread's values of AHEAD tokens of one round; nothing past the last token is read.
template <bool WHOLE, typename T>
__device__ __forceinline__ void fetch_round(Raw8<T> (&raw)[AHEAD], const Share& share, u32 round,
                                            const T* rows, u32 ld, u32 tokens) {
#pragma unroll
  for (u32 i = 0; i < AHEAD; ++i) {
    const u32 t = share.first + (round * AHEAD + i) * share.stride;
    raw[i] = fetch_values<WHOLE>(rows + size_t(t) * ld + share.value, t < tokens ? share.n : 0);
  }
}

// Sums over the lanes of a token: all of them get the sum.
__device__ __forceinline__ float dot(const Share& share, const float (&a)[VEC], const float (&b)[VEC]) {
  float sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) sum = fmaf(a[i], b[i], sum);
  for (u32 mask = share.lanes / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  return sum;
}

// products[t] = x·row t, for all tokens. The caller synchronises before it reads products of other threads.
template <bool WHOLE, typename T>
__device__ __forceinline__ void products(float* out, const Share& share, const float (&x)[VEC], const T* rows,
                                         u32 ld, u32 tokens) {
  for (u32 round = 0; round < rounds_of(share, tokens); ++round) {
    Raw8<T> raw[AHEAD];
    fetch_round<WHOLE>(raw, share, round, rows, ld, tokens);
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      const u32 t = share.first + (round * AHEAD + i) * share.stride;
      float row[VEC];
      unpack8(raw[i], row);
      const float product = dot(share, x, row);
      if (share.value == 0 && t < tokens) out[t] = product;
    }
  }
}

// The block's sum of every thread's values: thread `threadIdx.x` returns value `threadIdx.x` of the head.
__device__ __forceinline__ float sum_of_block(const Share& share, float (&v)[VEC], float* scratch) {
  for (u32 mask = share.lanes; mask < WARP; mask *= 2) {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) v[i] += shfl_xor(v[i], mask);
  }
  float* mine = scratch + threadIdx.x / WARP * MOST_VALUES + share.value;
  if (threadIdx.x % WARP < share.lanes) {
    st16(mine, {as_u32(v[0]), as_u32(v[1]), as_u32(v[2]), as_u32(v[3])});
    st16(mine + 4, {as_u32(v[4]), as_u32(v[5]), as_u32(v[6]), as_u32(v[7])});
  }
  block_sync();
  float sum = 0.0f;
  if (threadIdx.x < share.lanes * VEC) {
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) sum += scratch[w * MOST_VALUES + threadIdx.x];
  }
  return sum;
}

}  // namespace

// `whole`: heads, rows and tensors consist of whole 16-byte accesses. q.ld is 0 where images share the query.
template <typename T>
struct QueryAttentionArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 whole;
  View<const T> q;
  View<const T> kv;
  View<float> p;
  View<T> o;
  float scale;
  u32 tokens, heads, head_size;
};
// `parts`: partial sums of a shared query's gradient, or null.
template <typename T>
struct QueryAttentionBackwardArgs {
  const StepParams* params;
  MaskArgs dropout;
  u32 whole;
  View<const T> q;
  View<const T> kv;
  View<const float> p;
  View<const T> d_o;
  View<T> d_q;
  float* parts;
  View<T> d_kv;
  float scale;
  u32 images, tokens, heads, head_size;
};
template <typename T>
struct SharedQueryArgs {
  const float* parts;
  View<T> d_q;
  u32 slices;
};

namespace {

template <bool WHOLE, typename T>
__device__ __forceinline__ void forward(const QueryAttentionArgs<T>& args) {
  const Mask mask = bind_mask(args.dropout, args.params);
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, kv_ld = args.kv.ld;
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* weights = scratch + WARPS * MOST_VALUES;
  const Share share = share_of_thread(head_size);
  const u32 image = blockIdx.x / heads, head = blockIdx.x % heads, column = head * head_size;
  const T* keys = args.kv.at + size_t(image) * tokens * kv_ld + column;
  const T* values = keys + heads * head_size;
  float* p = args.p.at + size_t(blockIdx.x) * args.p.ld;

  float query[VEC];
  load_values<WHOLE>(row_of(args.q, image) + column + share.value, share.n, query);
  products<WHOLE>(weights, share, query, keys, kv_ld, tokens);
  block_sync();

  float most = -INFINITY;
  for (u32 t = threadIdx.x; t < tokens; t += THREADS) most = fmaxf(most, weights[t]);
  most = block_max(most, scratch);
  float sum = 0.0f;
  for (u32 t = threadIdx.x; t < tokens; t += THREADS) {
    weights[t] = expf((weights[t] - most) * args.scale);
    sum += weights[t];
  }
  sum = block_sum(sum, scratch);
  for (u32 t = threadIdx.x; t < tokens; t += THREADS) {
    const float probability = weights[t] / sum;
    p[t] = probability;
    weights[t] = probability;
    if (mask.rate > 0.0f) weights[t] *= mask_factor(mask, image, head * tokens * tokens + t);
  }
  block_sync();

  float out[VEC] = {};
  for (u32 round = 0; round < rounds_of(share, tokens); ++round) {
    Raw8<T> raw[AHEAD];
    fetch_round<WHOLE>(raw, share, round, values, kv_ld, tokens);
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      const u32 t = share.first + (round * AHEAD + i) * share.stride;
      const float weight = t < tokens ? weights[t] : 0.0f;
      float row[VEC];
      unpack8(raw[i], row);
#pragma unroll
      for (u32 e = 0; e < VEC; ++e) out[e] = fmaf(weight, row[e], out[e]);
    }
  }
  const float total = sum_of_block(share, out, scratch);
  if (threadIdx.x < head_size) store1(row_of(args.o, image) + column + threadIdx.x, total);
}

template <bool WHOLE, typename T>
__device__ __forceinline__ void backward(const QueryAttentionBackwardArgs<T>& args) {
  const Mask mask = bind_mask(args.dropout, args.params);
  const u32 tokens = args.tokens, heads = args.heads, head_size = args.head_size, kv_ld = args.kv.ld;
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* weights = scratch + WARPS * MOST_VALUES;
  float* gradients = weights + tokens;
  const Share share = share_of_thread(head_size);
  const u32 slice = blockIdx.x / heads, slices = gridDim.x / heads;
  const u32 head = blockIdx.x % heads, column = head * head_size, width = heads * head_size;

  float d_query[VEC] = {};
  for (u32 image = slice; image < args.images; image += slices) {
    const T* keys = args.kv.at + size_t(image) * tokens * kv_ld + column;
    T* d_keys = args.d_kv.at + size_t(image) * tokens * args.d_kv.ld + column + share.value;
    const float* probabilities = row_of(args.p, image * heads + head);
    float query[VEC], d_out[VEC];
    load_values<WHOLE>(row_of(args.q, image) + column + share.value, share.n, query);
    load_values<WHOLE>(row_of(args.d_o, image) + column + share.value, share.n, d_out);

    products<WHOLE>(gradients, share, d_out, keys + width, kv_ld, tokens);
    block_sync();
    float mean = 0.0f;
    for (u32 t = threadIdx.x; t < tokens; t += THREADS) {
      float weight = probabilities[t];
      if (mask.rate > 0.0f) weight *= mask_factor(mask, image, head * tokens * tokens + t);
      weights[t] = weight;
      mean = fmaf(weight, gradients[t], mean);
    }
    mean = block_sum(mean, scratch);
    for (u32 t = threadIdx.x; t < tokens; t += THREADS)
      gradients[t] = args.scale * (weights[t] * gradients[t] - probabilities[t] * mean);
    block_sync();

    for (u32 round = 0; round < rounds_of(share, tokens); ++round) {
      Raw8<T> raw[AHEAD];
      fetch_round<WHOLE>(raw, share, round, keys, kv_ld, tokens);
#pragma unroll
      for (u32 i = 0; i < AHEAD; ++i) {
        const u32 t = share.first + (round * AHEAD + i) * share.stride;
        if (t >= tokens) continue;
        const float weight = weights[t], d_score = gradients[t];
        float row[VEC], d_key[VEC], d_value[VEC];
        unpack8(raw[i], row);
#pragma unroll
        for (u32 e = 0; e < VEC; ++e) {
          d_query[e] = fmaf(d_score, row[e], d_query[e]);
          d_key[e] = d_score * query[e];
          d_value[e] = weight * d_out[e];
        }
        T* to = d_keys + size_t(t) * args.d_kv.ld;
        store_values<WHOLE>(to, share.n, d_key);
        store_values<WHOLE>(to + width, share.n, d_value);
      }
    }
    // One lane of a token writes the next image's product to a place that all of them have just read. The shuffles in
    // `dot` bring the lanes together but do not order their accesses.
    warp_sync();
  }
  const float total = sum_of_block(share, d_query, scratch);
  if (threadIdx.x >= head_size) return;
  if (args.parts != nullptr) {
    args.parts[size_t(slice) * width + column + threadIdx.x] = total;
  } else {
    store1(row_of(args.d_q, slice) + column + threadIdx.x, total);
  }
}

template <typename T>
__device__ __forceinline__ void sum_slices(const SharedQueryArgs<T>& args) {
  const u32 width = args.d_q.cols;
  const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float sum = 0.0f;
#pragma unroll 8
  for (u32 slice = 0; slice < args.slices; ++slice) sum += args.parts[size_t(slice) * width + column];
  store1(args.d_q.at + column, sum);
}

}  // namespace

#define QUERY_ATTENTION(suffix, T)                                                             \
  HOT_KERNEL(query_attention_##suffix, 128, 4)(ARGS(QueryAttentionArgs<T>)) {                  \
    if (args.whole) forward<true>(args);                                                       \
    else forward<false>(args);                                                                 \
  }                                                                                            \
  HOT_KERNEL(query_attention_backward_##suffix, 128, 4)(ARGS(QueryAttentionBackwardArgs<T>)) { \
    if (args.whole) backward<true>(args);                                                      \
    else backward<false>(args);                                                                \
  }                                                                                            \
  KERNEL(query_attention_backward_query_##suffix, 128, 1)(ARGS(SharedQueryArgs<T>)) {          \
    sum_slices(args);                                                                          \
  }

QUERY_ATTENTION(f32, float)
QUERY_ATTENTION(bf16, bf16)
