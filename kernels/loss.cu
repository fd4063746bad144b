// Softmax cross-entropy and sigmoid loss on mixed and smoothed targets: loss, hits and the gradient of the logits in
// one kernel.
//
// Math      y_c = (1-s)·(λ·own_c + (1-λ)·partner_c) + s/C
//           softmax: loss = Σy·ln Σe^(z-m) + Σ y·(m - z), d = Σy·softmax(z) - y
//           sigmoid: loss = Σ softplus(z) - y·z, d = σ(z) - y;   d_logits = d·scale, scale = 1/mean_over
//           with class weights w: softmax has w·y in place of y;
//           sigmoid: loss = Σ (1 + (w-1)·y)·softplus(z) - w·y·z, d = (1 + (w-1)·y)·σ(z) - w·y
//           hits: the rank of a class with own_c ≠ 0 is the number of logits that beat it; of equal logits the first
//           class wins.
// Tensors   logits, d_logits [B, C] in T (may be the same matrix); samples f32 [B, 3]: loss, top-1, top-5
//           targets of the slot: labels i32 (-1: none), or f32 [samples, C]. Padding samples give zeros.
//           weights f32 [C]: kernels without `weighted` in their names do not read them.
// Numerics  f32 storage: sums and differences in f64, as on the CPU. bf16 storage: f32, because the logits' own
//           rounding is larger.
// Launch    one block per sample; three passes over its logits (the largest; the sums; the gradient). bf16 rows stay in
//           shared memory between the passes, so each logit is read from memory once. If a row does not fit (more than
//           48,000 classes on the smallest GPU), and in f32, the later passes read through L2.
// Bytes     4 per logit in bf16; dense targets 4 more (8 where mixed), and again from L2 for each pass; class
//           weights 4 per class, from L2 for all samples but the first.
// Order     classes of a thread, lanes, warps.
// Source    Szegedy et al. 2016 (smoothing); Beyer et al. 2020 (sigmoid loss).
#include "reduce.cuh"
#include "step.cuh"

// How the loss of a sample is computed.
struct LossTerms {
  double scale;  // of the gradient
  float smoothing;
  u32 classes;
  u32 dense;  // targets are f32 [samples, C]
  u32 first;  // index in the slot of the micro-batch's first sample
  const float* weights;  // of the classes; null where the kernel knows of none
};
template <typename T>
struct LossArgs {
  const StepParams* params;
  LossTerms terms;
  u32 staged;  // the launch has shared memory for 512 bytes and a row of bf16
  View<const T> logits;
  View<T> d_logits;
  View<float> samples;  // loss, top-1, top-5
};

// The type of sums and of differences that cancel.
template <typename T>
struct Accumulator;
template <>
struct Accumulator<float> {
  using Real = double;
};
template <>
struct Accumulator<bf16> {
  using Real = float;
};

__device__ __forceinline__ float exp_of(float x, float) {
  return exp2_approx(x * 1.4426950409f);
}
__device__ __forceinline__ float exp_of(float x, double) {
  return expf(x);
}

// ---- targets ----------------------------------------------------------------------------------------------

// The target of a sample.
template <typename Real>
struct Target {
  const float *own, *partner;    // dense rows; partner null: not mixed
  u32 own_label, partner_label;  // no class: ~0
  Real own_weight, partner_weight, floor;
};

constexpr u32 NO_CLASS = 0xffffffffu;

// A label that is not a class counts as none; the host has already refused such a batch.
__device__ __forceinline__ u32 label_of(const SlotView& slot, u32 sample, u32 classes) {
  u32 label = static_cast<u32>(static_cast<const i32*>(slot.targets)[sample]);
  return label < classes ? label : NO_CLASS;
}

template <typename Real>
__device__ __forceinline__ Target<Real> target_of(const SlotView& slot, const LossTerms& terms, u32 sample) {
  Real keep = Real(1) - static_cast<Real>(terms.smoothing);
  Real lambda = static_cast<Real>(slot.lambda[sample]);
  bool mixed = lambda != Real(1);
  Target<Real> t = {nullptr,
                    nullptr,
                    NO_CLASS,
                    NO_CLASS,
                    keep * lambda,
                    mixed ? keep * (Real(1) - lambda) : Real(0),
                    static_cast<Real>(terms.smoothing) / static_cast<Real>(terms.classes)};
  u32 partner = mixed ? slot.partner[sample] : sample;
  if (terms.dense) {
    const float* targets = static_cast<const float*>(slot.targets);
    t.own = row_of(targets, sample, terms.classes);
    if (mixed) t.partner = row_of(targets, partner, terms.classes);
  } else {
    t.own_label = label_of(slot, sample, terms.classes);
    t.partner_label = label_of(slot, partner, terms.classes);
  }
  return t;
}

// y of eight classes.
template <typename Real>
__device__ __forceinline__ void target8(const Target<Real>& t, u32 first, u32 n, Real (&y)[VEC]) {
  if (t.own) {
    float own[VEC], partner[VEC] = {};
    load8(t.own + first, n, own);
    if (t.partner) load8(t.partner + first, n, partner);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      y[i] = t.own_weight * static_cast<Real>(own[i]) + t.partner_weight * static_cast<Real>(partner[i]) +
             t.floor;
    }
  } else {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      y[i] = t.floor;
      if (first + i == t.own_label) y[i] += t.own_weight;
      if (first + i == t.partner_label) y[i] += t.partner_weight;
    }
  }
}

// w·y of eight classes.
template <typename Real>
__device__ __forceinline__ void weigh8(const float* weights, u32 first, u32 n, Real (&y)[VEC]) {
  float w[VEC];
  load8(weights + first, n, w);
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) y[i] *= static_cast<Real>(w[i]);
}

// ---- the row ----------------------------------------------------------------------------------------------

// The logits of one sample, divided among the block: a thread sees the same classes in every pass.
template <typename T>
struct Row {
  const T* from;
  u32 classes;

  // f(first class, valid classes, their logits) for this thread's classes, ascending.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (u32 first = threadIdx.x * VEC; first < classes; first += blockDim.x * VEC) {
      u32 n = valid8(first, classes);
      float z[VEC];
      load8(from + first, n, z);
      f(first, n, z);
    }
  }
};

constexpr u32 SCRATCH_BYTES = 512;

// Copies a row into shared memory, after the scratch: a thread waits only for its own classes.
__device__ __forceinline__ Row<bf16> stage(const bf16* logits, u32 classes) {
  bf16* to = reinterpret_cast<bf16*>(smem_base() + SCRATCH_BYTES);
  for (u32 first = threadIdx.x * VEC; first < classes; first += blockDim.x * VEC)
    cp_async16(to + first, logits + first, true);
  cp_async_commit();
  cp_async_wait<0>();
  return {to, classes};
}
// f32 rows may start anywhere, so they are not copied.
__device__ __forceinline__ Row<float> stage(const float* logits, u32 classes) {
  return {logits, classes};
}

// The true class with the highest rank.
struct Truth {
  float logit;
  u32 label;
};

__device__ __forceinline__ float lowest() {
  return as_f32(0xff800000u);
}

template <typename T, typename Real>
__device__ __forceinline__ Truth find_truth(const T* logits, const Row<T>& row, const Target<Real>& t,
                                            u8* scratch) {
  if (!t.own) {
    float logit = t.own_label == NO_CLASS ? lowest() : load1(logits + t.own_label);
    block_sync();  // the gradient may take the place of the logits
    return {logit, t.own_label};
  }
  float best = lowest();
  row.each([&](u32 first, u32 n, const float (&z)[VEC]) {
    float own[VEC];
    load8(t.own + first, n, own);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (own[i] != 0.0f) best = fmaxf(best, z[i]);
  });
  best = block_max(best, reinterpret_cast<float*>(scratch));
  u32 label = NO_CLASS;
  row.each([&](u32 first, u32 n, const float (&z)[VEC]) {
    float own[VEC];
    load8(t.own + first, n, own);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i)
      if (own[i] != 0.0f && z[i] == best) label = min_u32(label, first + i);
  });
  return {best, block_min(label, reinterpret_cast<u32*>(scratch))};
}

// How many of eight logits rank above the true class.
__device__ __forceinline__ u32 beaten_by(const Truth& truth, u32 first, u32 n, const float (&z)[VEC]) {
  u32 count = 0;
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) {
    bool ahead = z[i] > truth.logit || (z[i] == truth.logit && first + i < truth.label);
    count += i < n && ahead ? 1 : 0;
  }
  return count;
}

__device__ __forceinline__ void store_sample(float* sample, float loss, const Truth& truth, u32 ahead) {
  if (threadIdx.x != 0) return;
  bool ranked = truth.logit > lowest();  // neither -inf nor NaN nor absent
  sample[0] = loss;
  sample[1] = ranked && ahead < 1 ? 1.0f : 0.0f;
  sample[2] = ranked && ahead < 5 ? 1.0f : 0.0f;
}

// Handles a padding sample, which is ignored. True if this is one.
template <typename T>
__device__ __forceinline__ bool clear_padding(const SlotView& slot, const LossTerms& terms, T* d_logits,
                                              float* sample) {
  if (terms.first + blockIdx.x < slot.count) return false;
  float zeros[VEC] = {};
  for (u32 first = threadIdx.x * VEC; first < terms.classes; first += blockDim.x * VEC) {
    store8(d_logits + first, valid8(first, terms.classes), zeros);
  }
  if (threadIdx.x == 0) sample[0] = sample[1] = sample[2] = 0.0f;
  return true;
}

// ---- losses -----------------------------------------------------------------------------------------------

template <typename T, bool WEIGHTED>
__device__ __forceinline__ void softmax_loss(const LossArgs<T>& args) {
  using Real = typename Accumulator<T>::Real;
  const LossTerms& terms = args.terms;
  SlotView slot = args.params->slot;
  T* d_row = row_of(args.d_logits, blockIdx.x);
  float* sample = row_of(args.samples, blockIdx.x);
  if (clear_padding(slot, terms, d_row, sample)) return;
  u8* scratch = smem_base();
  const T* z_row = row_of(args.logits, blockIdx.x);
  Row<T> row = args.staged ? stage(z_row, terms.classes) : Row<T>{z_row, terms.classes};
  Target<Real> target = target_of<Real>(slot, terms, terms.first + blockIdx.x);
  Truth truth = find_truth(z_row, row, target, scratch);

  float largest = lowest();
  row.each([&](u32, u32 n, const float (&z)[VEC]) {
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) largest = i < n ? fmaxf(largest, z[i]) : largest;
  });
  largest = block_max(largest, reinterpret_cast<float*>(scratch));

  // Σe^(z-m), Σy, Σy·(m - z)
  Real sums[3] = {};
  u32 ahead = 0;
  row.each([&](u32 first, u32 n, const float (&z)[VEC]) {
    Real y[VEC];
    target8(target, first, n, y);
    if constexpr (WEIGHTED) weigh8(terms.weights, first, n, y);
    ahead += beaten_by(truth, first, n, z);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      if (i >= n) continue;
      sums[0] += static_cast<Real>(exp_of(z[i] - largest, Real()));
      sums[1] += y[i];
      if (y[i] != Real(0)) sums[2] += y[i] * (static_cast<Real>(largest) - static_cast<Real>(z[i]));
    }
  });
  block_sums(sums, reinterpret_cast<Real*>(scratch));
  ahead = block_sum(ahead, reinterpret_cast<u32*>(scratch));

  Real ratio = sums[1] / sums[0], scale = static_cast<Real>(terms.scale);
  row.each([&](u32 first, u32 n, const float (&z)[VEC]) {
    Real y[VEC];
    float d[VEC];
    target8(target, first, n, y);
    if constexpr (WEIGHTED) weigh8(terms.weights, first, n, y);
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      d[i] = static_cast<float>(scale * (static_cast<Real>(exp_of(z[i] - largest, Real())) * ratio - y[i]));
    }
    store8(d_row + first, n, d);
  });
  store_sample(sample, static_cast<float>(sums[1] * log(sums[0]) + sums[2]), truth, ahead);
}

template <typename T, bool WEIGHTED>
__device__ __forceinline__ void sigmoid_loss(const LossArgs<T>& args) {
  using Real = typename Accumulator<T>::Real;
  const LossTerms& terms = args.terms;
  SlotView slot = args.params->slot;
  T* d_row = row_of(args.d_logits, blockIdx.x);
  float* sample = row_of(args.samples, blockIdx.x);
  if (clear_padding(slot, terms, d_row, sample)) return;
  u8* scratch = smem_base();
  const T* z_row = row_of(args.logits, blockIdx.x);
  Row<T> row = args.staged ? stage(z_row, terms.classes) : Row<T>{z_row, terms.classes};
  Target<Real> target = target_of<Real>(slot, terms, terms.first + blockIdx.x);
  Truth truth = find_truth(z_row, row, target, scratch);

  Real sums[1] = {}, scale = static_cast<Real>(terms.scale);
  u32 ahead = 0;
  row.each([&](u32 first, u32 n, const float (&z)[VEC]) {
    Real y[VEC];
    float d[VEC];
    target8(target, first, n, y);
    ahead += beaten_by(truth, first, n, z);
    [[maybe_unused]] Real both[VEC];  // 1 + (w-1)·y
    if constexpr (WEIGHTED) {
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) both[i] = Real(1) - y[i];
      weigh8(terms.weights, first, n, y);
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) both[i] += y[i];
    }
#pragma unroll
    for (u32 i = 0; i < VEC; ++i) {
      Real small = static_cast<Real>(exp_of(-fabsf(z[i]), Real()));
      Real chance = (z[i] >= 0.0f ? Real(1) : small) / (Real(1) + small);
      Real loss = static_cast<Real>(fmaxf(z[i], 0.0f)) + log1p(small);
      if constexpr (WEIGHTED) {
        chance *= both[i];
        loss *= both[i];
      }
      if (y[i] != Real(0)) loss -= y[i] * static_cast<Real>(z[i]);
      if (i < n) sums[0] += loss;
      d[i] = static_cast<float>(scale * (chance - y[i]));
    }
    store8(d_row + first, n, d);
  });
  block_sums(sums, reinterpret_cast<Real*>(scratch));
  ahead = block_sum(ahead, reinterpret_cast<u32*>(scratch));
  store_sample(sample, static_cast<float>(sums[0]), truth, ahead);
}

#define LOSS(suffix, T, weighted, threads, blocks)                        \
  HOT_KERNEL(loss_softmax_##suffix, threads, blocks)(ARGS(LossArgs<T>)) { \
    softmax_loss<T, weighted>(args);                                      \
  }                                                                       \
  HOT_KERNEL(loss_sigmoid_##suffix, threads, blocks)(ARGS(LossArgs<T>)) { \
    sigmoid_loss<T, weighted>(args);                                      \
  }

LOSS(bf16, bf16, false, 512, 2)
LOSS(f32, float, false, 256, 2)
LOSS(weighted_bf16, bf16, true, 512, 2)
LOSS(weighted_f32, float, true, 256, 2)
