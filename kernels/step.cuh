// What changes from step to step, in device memory. A captured step is replayed with the same arguments, so its kernels
// read everything that changes from here. The host copies a new `StepParams` before each replay.
//
// Shared with the host, like the structs that kernels take (`build/contracts.rs`).
#pragma once

#include "ptx.cuh"

// A rectangle [y0, y1) × [x0, x1) of pixels; empty: none.
struct MixBox {
  u16 y0, x0, y1, x1;
};

// What is erased from a sample, after normalisation and before mixing. mode 0: zeros; 1: one normal colour; 2: a normal
// draw for each value.
struct Erase {
  MixBox cut;
  u32 seed, mode;
};

// The bound batch in device memory.
struct SlotView {
  const void* pixels;   // [samples, H, W, 3], u8, or f32 already normalised
  const void* targets;  // i32 [samples], or f32 [samples, C]
  const u32* partner;   // [samples]: which sample is mixed in
  const float* lambda;  // [samples]: the weight of the sample itself
  const MixBox* boxes;  // [samples]: cutmix
  const float* pixel_lambda;  // [samples]: the weight of the own pixels outside the box, of the partner's inside
  const Erase* erase;         // [samples]
  u32 count;            // samples that are real; the rest is padding
  u32 samples;          // samples of the slot
};

struct StepParams {
  u64 seed;  // keys of the masks
  u64 step;  // updates already done
  u64 t;     // updates including this one, from 1
  u64 signal;  // that this rank got, or 0
  SlotView slot;
};

// The rates of one parameter group: θ ← θ - lr·u - decay·θ.
struct GroupScalars {
  float lr, decay;
};

// Running sums of a step's report: loss, top-1, top-5 over the samples so far. Written and read by kernels
// only.
struct ReportSums {
  double sums[3];
};

// The report of a finished step; the host reads it one step late.
struct StepReport {
  double loss, top1, top5, grad_norm;
  u32 skipped;
  u32 signal;  // the largest of all ranks
  u64 step;
};

// What the update kernels need before they start, computed by one block: `update_prepare`.
struct UpdateParams {
  double grad_norm;          // before clipping
  float clip;                // multiplies the gradient
  u32 skip;                  // the loss or the norm is not finite: change nothing
  float correct1, correct2;  // Adam: 1/(1 - β₁^t), 1/√(1 - β₂^t)
  float keep2, add2;         // Adafactor: β of the second moment at t, and 1 - β
  u32 signal;                // the largest of all ranks
  u32 reserved;
};

// A run of elements of one group, for updates and for weights that travel: offsets in the layout of the weights, in that
// of the gradients, in the moments and in the average. A rank may have only its part of the last two.
struct UpdateChunk {
  u64 param, grad, moment, ema;
  u32 len, group;
};
