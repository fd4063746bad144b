// Attention of one learned query per head over all tokens of each image: the pooling of a MAP head.
//
// Math      p = softmax(scale·k·q)   o = Σ_t p_t·v_t
//           dp_t = dO·v_t   ds = scale·p∘(dp - Σ p·dp)   dk_t = ds_t·q   dv_t = p_t·dO   dq = Σ_images Σ_t
//           ds_t·k_t
// Tensors   q, d_q: [1, H, Dh]   kv, d_kv: [B, T, 2, H, Dh]   o, d_o: [B, H, Dh], f32 or bf16, rows `ld`
//           apart
//           p: f32 [B·H, T]   parts: f32 [B, H·Dh], scratch of the backward   Dh <= 128, any T
// Numerics  f32; expf.
// Launch    one block of 128 threads per image and head; `probe_attention_backward_query`: a thread per
//           column.
// Shared    f32 [T] and four partial rows.
// Bytes     kv once forward, kv once and d_kv once backward; the value half again for o, out of L2.
// Order     a warp sums every fourth token, the four sums in order; images in order. Same device, same bits.
// Source    Zhai et al. 2022, arXiv:2106.04560. It runs once per step, so it is plain.
#include "reduce.cuh"

namespace {

constexpr u32 WARPS = 4, MOST_VALUES = 128, PER_LANE = MOST_VALUES / WARP;

__device__ __forceinline__ u32 lane_id() {
  return threadIdx.x % WARP;
}
__device__ __forceinline__ u32 warp_id() {
  return threadIdx.x / WARP;
}

// Values lane, lane + 32, ... of a head's row.
template <typename T>
__device__ __forceinline__ void load_values(float (&v)[PER_LANE], const T* from, u32 head_size) {
#pragma unroll
  for (u32 i = 0; i < PER_LANE; ++i) {
    const u32 e = lane_id() + WARP * i;
    v[i] = e < head_size ? load1(from + e) : 0.0f;
  }
}

__device__ __forceinline__ float dot(const float (&a)[PER_LANE], const float (&b)[PER_LANE]) {
  float sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < PER_LANE; ++i) sum = fmaf(a[i], b[i], sum);
  return warp_sum(sum);
}

// The warps' rows, added in order: value `threadIdx.x`.
__device__ __forceinline__ float sum_of_warps(const float (&v)[PER_LANE], float* scratch) {
#pragma unroll
  for (u32 i = 0; i < PER_LANE; ++i) scratch[warp_id() * MOST_VALUES + lane_id() + WARP * i] = v[i];
  block_sync();
  float sum = 0.0f;
#pragma unroll
  for (u32 w = 0; w < WARPS; ++w) sum += scratch[w * MOST_VALUES + threadIdx.x];
  return sum;
}

template <typename T>
__device__ __forceinline__ void forward(const T* q, const T* kv, u32 kv_ld, float* p, u32 p_ld, T* o,
                                        u32 o_ld, float scale, u32 tokens, u32 heads, u32 head_size) {
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* weights = scratch + WARPS * MOST_VALUES;
  const u32 image = blockIdx.x / heads, column = blockIdx.x % heads * head_size;
  const T* keys = kv + size_t(image) * tokens * kv_ld + column;
  const T* values = keys + heads * head_size;

  float query[PER_LANE], row[PER_LANE];
  load_values(query, q + column, head_size);
  float most = -INFINITY;
  for (u32 t = warp_id(); t < tokens; t += WARPS) {
    load_values(row, keys + size_t(t) * kv_ld, head_size);
    const float score = dot(query, row) * scale;
    most = fmaxf(most, score);
    if (lane_id() == 0) weights[t] = score;
  }
  most = block_max(most, scratch);
  float sum = 0.0f;
  for (u32 t = threadIdx.x; t < tokens; t += blockDim.x) {
    weights[t] = expf(weights[t] - most);
    sum += weights[t];
  }
  sum = block_sum(sum, scratch);

  float out[PER_LANE] = {};
  for (u32 t = warp_id(); t < tokens; t += WARPS) {
    const float weight = weights[t] / sum;
    if (lane_id() == 0) p[size_t(blockIdx.x) * p_ld + t] = weight;
    load_values(row, values + size_t(t) * kv_ld, head_size);
#pragma unroll
    for (u32 i = 0; i < PER_LANE; ++i) out[i] = fmaf(weight, row[i], out[i]);
  }
  const float total = sum_of_warps(out, scratch);
  if (threadIdx.x < head_size) store1(o + size_t(image) * o_ld + column + threadIdx.x, total);
}

template <typename T>
__device__ __forceinline__ void backward(const T* q, const T* kv, u32 kv_ld, const float* p, u32 p_ld,
                                         const T* d_o, u32 d_o_ld, float* parts, T* d_kv, u32 d_kv_ld,
                                         float scale, u32 tokens, u32 heads, u32 head_size) {
  float* scratch = reinterpret_cast<float*>(smem_base());
  float* gradients = scratch + WARPS * MOST_VALUES;
  const u32 image = blockIdx.x / heads, column = blockIdx.x % heads * head_size, width = heads * head_size;
  const T* keys = kv + size_t(image) * tokens * kv_ld + column;
  T* d_keys = d_kv + size_t(image) * tokens * d_kv_ld + column;
  p += size_t(blockIdx.x) * p_ld;

  float query[PER_LANE], d_out[PER_LANE], row[PER_LANE];
  load_values(query, q + column, head_size);
  load_values(d_out, d_o + size_t(image) * d_o_ld + column, head_size);
  float mean = 0.0f;
  for (u32 t = warp_id(); t < tokens; t += WARPS) {
    load_values(row, keys + width + size_t(t) * kv_ld, head_size);
    const float d_p = dot(d_out, row);
    if (lane_id() == 0) {
      gradients[t] = d_p;
      mean = fmaf(p[t], d_p, mean);
    }
  }
  mean = block_sum(mean, scratch);

  float d_query[PER_LANE] = {};
  for (u32 t = warp_id(); t < tokens; t += WARPS) {
    const float weight = p[t], d_score = weight * (gradients[t] - mean) * scale;
    load_values(row, keys + size_t(t) * kv_ld, head_size);
#pragma unroll
    for (u32 i = 0; i < PER_LANE; ++i) {
      d_query[i] = fmaf(d_score, row[i], d_query[i]);
      const u32 e = lane_id() + WARP * i;
      if (e < head_size) {
        store1(d_keys + size_t(t) * d_kv_ld + e, d_score * query[i]);
        store1(d_keys + size_t(t) * d_kv_ld + width + e, weight * d_out[i]);
      }
    }
  }
  const float total = sum_of_warps(d_query, scratch);
  if (threadIdx.x < head_size) parts[size_t(image) * width + column + threadIdx.x] = total;
}

template <typename T>
__device__ __forceinline__ void sum_images(const float* parts, T* d_q, u32 images, u32 width) {
  const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float sum = 0.0f;
#pragma unroll 8
  for (u32 image = 0; image < images; ++image) sum += parts[size_t(image) * width + column];
  store1(d_q + column, sum);
}

}  // namespace

#define PROBE(suffix, T)                                                                                    \
  KERNEL(probe_attention_##suffix, 128, 4)                                                                  \
  (const T* q, const T* kv, u32 kv_ld, float* p, u32 p_ld, T* o, u32 o_ld, float scale, u32 tokens,         \
   u32 heads, u32 head_size) {                                                                              \
    forward<T>(q, kv, kv_ld, p, p_ld, o, o_ld, scale, tokens, heads, head_size);                            \
  }                                                                                                         \
  KERNEL(probe_attention_backward_##suffix, 128, 4)                                                         \
  (const T* q, const T* kv, u32 kv_ld, const float* p, u32 p_ld, const T* d_o, u32 d_o_ld, float* parts,    \
   T* d_kv, u32 d_kv_ld, float scale, u32 tokens, u32 heads, u32 head_size) {                               \
    backward<T>(q, kv, kv_ld, p, p_ld, d_o, d_o_ld, parts, d_kv, d_kv_ld, scale, tokens, heads, head_size); \
  }                                                                                                         \
  KERNEL(probe_attention_backward_query_##suffix, 128, 1)                                                   \
  (const float* parts, T* d_q, u32 images, u32 width) {                                                     \
    sum_images<T>(parts, d_q, images, width);                                                               \
  }

PROBE(f32, float)
PROBE(bf16, bf16)
