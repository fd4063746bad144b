// The optimiser step over the flat buffers: global norm, clip, SGD / Adam / Lion, weight decay, EMA, and the
// bf16 working copy of the weights, each value read once and written once. (Adafactor: `adafactor.cu`.)
//
// Math      g' = clip·g, clip = min(1, max/norm) (Optax) or min(1, max/(norm + 1e-6)) (PyTorch)
//           sgd   m = g' + μ·m, u = m (Nesterov: g' + μ·m)
//           adam  m = β₁·m + (1-β₁)·g', v = β₂·v + (1-β₂)·g'², u = m/(1-β₁^t) / (√v/√(1-β₂^t) + eps)
//           lion  u = sign(β₁·m + (1-β₁)·g'), m = β₂·m + (1-β₂)·g'
//           all   θ = θ - lr·u - decay·θ   ema = d·ema + (1-d)·θ   copy = bf16(θ)
// Tensors   params, ema f32 and copy bf16 share one layout; grads f32 and moments (first: f32 or bf16) share another.
//           Of several ranks, each has its part of moments and ema. `chunks` maps runs of up to 4,096 elements of one
//           group to all of them.
// Numerics  the norm in f64 over the unscaled gradient; constants that need it were rounded once, from f64, by the host
//           or by `update_prepare`. If the loss or the norm is not finite, the update is skipped: nothing is written.
// Launch    three kernels: sums of squares (persistent), one block that computes `UpdateParams`, and the update, which
//           loops over the chunks with 4 elements per thread and 16-byte accesses. The host is not involved: the clip
//           factor is read from device memory.
// Bytes     per parameter, Adam with bf16 copy: norm 4, update 4 + 8 + 8 + 8 + 2 = 30; EMA 8 more; bf16
//           moment 4 less.
// Order     the norm: a thread's elements, lanes, warps, blocks.
// Source    Kingma and Ba 2015; Loshchilov and Hutter 2019; Chen et al. 2023; Pascanu et al. 2013 (clipping).
#include "reduce.cuh"
#include "step.cuh"

// ---- norm and constants -----------------------------------------------------------------------------------

struct GradientSquaresArgs {
  const float* grads;
  u64 count;
  double* partials;
};

// `count` is a multiple of 4; padding is zero.
HOT_KERNEL(gradient_squares, 256, 4)(ARGS(GradientSquaresArgs)) {
  double sum[1] = {};
  u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 4;
#pragma unroll 4
  for (u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < args.count; i += stride) {
    vec4 bits = ld16(args.grads + i);
    double a = as_f32(bits.x), b = as_f32(bits.y), c = as_f32(bits.z), d = as_f32(bits.w);
    sum[0] += (a * a + b * b) + (c * c + d * d);
  }
  block_sums(sum, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x == 0) args.partials[blockIdx.x] = sum[0];
}

// Constants of the run.
struct UpdateConstants {
  double max_norm;  // 0: no clipping
  double beta1, beta2;
  double beta2_cap, decay_power;  // Adafactor
  u32 torch_clip;
  u32 reserved;
};
struct UpdatePrepareArgs {
  const StepParams* params;
  const ReportSums* report;
  const double* partials;  // of the norm
  const double* signals;   // one per rank of a group
  u32 count;
  u32 ranks;  // 0: there is no group
  UpdateConstants constants;
  UpdateParams* out;
};

__device__ __forceinline__ float clip_factor(const UpdateConstants& k, double norm) {
  if (k.max_norm == 0.0) return 1.0f;
  if (k.torch_clip) {
    double factor = k.max_norm / (norm + 1e-6);
    return static_cast<float>(factor < 1.0 ? factor : 1.0);
  }
  return norm < k.max_norm ? 1.0f : static_cast<float>(k.max_norm / norm);
}

KERNEL(update_prepare, 256, 1)(ARGS(UpdatePrepareArgs)) {
  const UpdateConstants& k = args.constants;
  double sum[1] = {};
  for (u32 i = threadIdx.x; i < args.count; i += blockDim.x) sum[0] += args.partials[i];
  block_sums(sum, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x != 0) return;
  double norm = sqrt(sum[0]), loss = args.report->sums[0], t = static_cast<double>(args.params->t);
  // x - x is 0 for every finite number and NaN for the others.
  bool finite = norm - norm == 0.0 && loss - loss == 0.0;
  UpdateParams* out = args.out;
  out->grad_norm = norm;
  out->skip = finite ? 0 : 1;
  out->clip = clip_factor(k, norm);
  double signal = 0.0;
  for (u32 i = 0; i < args.ranks; ++i) signal = signal < args.signals[i] ? args.signals[i] : signal;
  out->signal = static_cast<u32>(signal);
  out->correct1 = static_cast<float>(1.0 / (1.0 - pow(k.beta1, t)));
  out->correct2 = static_cast<float>(1.0 / sqrt(1.0 - pow(k.beta2, t)));
  double keep2 = 1.0 - pow(t, -k.decay_power);
  keep2 = keep2 < k.beta2_cap ? keep2 : k.beta2_cap;
  out->keep2 = static_cast<float>(keep2);
  out->add2 = static_cast<float>(1.0 - keep2);
}

// ---- rules ------------------------------------------------------------------------------------------------

// The constants of a rule, rounded from f64 once; those that multiply a bf16 moment are bf16 numbers, as in JAX.
struct RuleConstants {
  float keep1, add1;  // sgd: momentum; adam, lion: β₁, 1 - β₁
  float keep2, add2;
  float eps;
  u32 nesterov;
};

// (g, m, v) → u; m and v become the values to store.
struct Sgd {
  static constexpr bool HAS_V = false;
  RuleConstants k;
  __device__ __forceinline__ float operator()(const UpdateParams&, float g, float& m, float&) const {
    m = g + k.keep1 * m;
    return k.nesterov ? g + k.keep1 * m : m;
  }
};
struct Adam {
  static constexpr bool HAS_V = true;
  RuleConstants k;
  __device__ __forceinline__ float operator()(const UpdateParams& c, float g, float& m, float& v) const {
    m = k.keep1 * m + k.add1 * g;
    v = k.keep2 * v + k.add2 * (g * g);
    return m * c.correct1 / (sqrtf(v) * c.correct2 + k.eps);
  }
};
struct Lion {
  static constexpr bool HAS_V = false;
  RuleConstants k;
  __device__ __forceinline__ float operator()(const UpdateParams&, float g, float& m, float&) const {
    float direction = k.keep1 * m + k.add1 * g;
    m = k.keep2 * m + k.add2 * g;
    // Padding must stay zero: the sign of 0 is 0.
    return direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
  }
};

// ---- the pass ---------------------------------------------------------------------------------------------

struct UpdateBuffers {
  float* params;
  const float* grads;
  void* moment1;
  float* moment2;  // null for rules without
  float* ema;      // null: none
  bf16* copy;      // null: none
  float ema_keep, ema_add;
};
struct UpdateArgs {
  const UpdateParams* update;
  UpdateBuffers buffers;
  const UpdateChunk* chunks;
  u32 count;
  const GroupScalars* groups;
  RuleConstants rule;
};

constexpr u32 QUAD = 4;

__device__ __forceinline__ void load4(const float* p, u32 n, float (&v)[QUAD]) {
  if (n == QUAD && is_aligned16(p)) {
    vec4 b = ld16(p);
    v[0] = as_f32(b.x), v[1] = as_f32(b.y), v[2] = as_f32(b.z), v[3] = as_f32(b.w);
    return;
  }
#pragma unroll
  for (u32 i = 0; i < QUAD; ++i) v[i] = i < n ? p[i] : 0.0f;
}
__device__ __forceinline__ void store4(float* p, u32 n, const float (&v)[QUAD]) {
  if (n == QUAD && is_aligned16(p)) {
    st16(p, {as_u32(v[0]), as_u32(v[1]), as_u32(v[2]), as_u32(v[3])});
    return;
  }
#pragma unroll
  for (u32 i = 0; i < QUAD; ++i)
    if (i < n) p[i] = v[i];
}
__device__ __forceinline__ bool is_aligned8(const void* p) {
  return (reinterpret_cast<u64>(p) & 7) == 0;
}
__device__ __forceinline__ void load4(const bf16* p, u32 n, float (&v)[QUAD]) {
  if (n == QUAD && is_aligned8(p)) {
    vec2 b = ld8(p);
    v[0] = bf16_lo(b.x), v[1] = bf16_hi(b.x), v[2] = bf16_lo(b.y), v[3] = bf16_hi(b.y);
    return;
  }
#pragma unroll
  for (u32 i = 0; i < QUAD; ++i) v[i] = i < n ? load1(p + i) : 0.0f;
}
__device__ __forceinline__ void store4(bf16* p, u32 n, const float (&v)[QUAD]) {
  if (n == QUAD && is_aligned8(p)) {
    st8(p, {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])});
    return;
  }
#pragma unroll
  for (u32 i = 0; i < QUAD; ++i)
    if (i < n) store1(p + i, v[i]);
}

template <typename Rule, typename M>
__device__ __forceinline__ void update(const UpdateArgs& args) {
  UpdateParams c = *args.update;
  if (c.skip) return;
  const UpdateBuffers& b = args.buffers;
  const Rule rule{args.rule};
  M* moment1 = static_cast<M*>(b.moment1);
  for (u32 index = blockIdx.x; index < args.count; index += gridDim.x) {
    UpdateChunk chunk = args.chunks[index];
    GroupScalars rates = args.groups[chunk.group];
    for (u32 at = threadIdx.x * QUAD; at < chunk.len; at += blockDim.x * QUAD) {
      u32 n = min_u32(QUAD, chunk.len - at);
      u64 param = chunk.param + at, grad = chunk.grad + at, moment = chunk.moment + at, ema = chunk.ema + at;
      float theta[QUAD], g[QUAD], m[QUAD], v[QUAD] = {}, e[QUAD];
      load4(b.params + param, n, theta);
      load4(b.grads + grad, n, g);
      load4(moment1 + moment, n, m);
      if (Rule::HAS_V) load4(b.moment2 + moment, n, v);
      if (b.ema) load4(b.ema + ema, n, e);
#pragma unroll
      for (u32 i = 0; i < QUAD; ++i) {
        float u = rule(c, g[i] * c.clip, m[i], v[i]);
        theta[i] = theta[i] - rates.lr * u - rates.decay * theta[i];
      }
      store4(b.params + param, n, theta);
      store4(moment1 + moment, n, m);
      if (Rule::HAS_V) store4(b.moment2 + moment, n, v);
      if (b.copy) store4(b.copy + param, n, theta);
      if (b.ema) {
#pragma unroll
        for (u32 i = 0; i < QUAD; ++i) e[i] = b.ema_keep * e[i] + b.ema_add * theta[i];
        store4(b.ema + ema, n, e);
      }
    }
  }
}

// Kernels are named by the rule and by the type of the stored first moment.
#define UPDATE(name, Rule, M)                  \
  HOT_KERNEL(name, 256, 4)(ARGS(UpdateArgs)) { \
    update<Rule, M>(args);                     \
  }

UPDATE(update_sgd_f32, Sgd, float)
UPDATE(update_sgd_bf16, Sgd, bf16)
UPDATE(update_adam_f32, Adam, float)
UPDATE(update_adam_bf16, Adam, bf16)
UPDATE(update_lion_f32, Lion, float)
UPDATE(update_lion_bf16, Lion, bf16)

// ---- copies of the weights --------------------------------------------------------------------------------

struct CastArgs {
  const float* weights;
  bf16* copy;
  u64 count;  // a multiple of 4
};
struct SwapEmaArgs {
  float* weights;
  float* ema;
  u64 count;  // a multiple of 4
};

// copy = bf16(weights): once at the start, and whenever the host has written weights.
KERNEL(cast_bf16, 256, 4)(ARGS(CastArgs)) {
  u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
  if (i >= args.count) return;
  float v[QUAD];
  load4(args.weights + i, QUAD, v);
  store4(args.copy + i, QUAD, v);
}

// Exchanges weights and EMA.
KERNEL(swap_ema, 256, 4)(ARGS(SwapEmaArgs)) {
  u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
  if (i >= args.count) return;
  float w[QUAD], e[QUAD];
  load4(args.weights + i, QUAD, w);
  load4(args.ema + i, QUAD, e);
  store4(args.weights + i, QUAD, e);
  store4(args.ema + i, QUAD, w);
}
