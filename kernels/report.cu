// The report of a step: sums over the samples in f64. The host reads the finished report one step late.
//
// Math      sums = Σ samples of (loss, top-1, top-5) over all micro-batches   report = sums / mean_over
// Tensors   samples f32 [B, 3]
// Launch    one block each; begin and close are one thread.
// Bytes     12 per sample.
// Order     a thread's samples, lanes, warps, micro-batches.
#include "reduce.cuh"
#include "step.cuh"

struct ReportBeginArgs {
  ReportSums* report;
  UpdateParams* update;
};
struct ReportAddArgs {
  ReportSums* report;
  View<const float> samples;
};
struct ReportCloseArgs {
  const StepParams* params;
  const ReportSums* report;
  const UpdateParams* update;
  double mean_over;
  StepReport* out;
};

KERNEL(report_begin, 32, 1)(ARGS(ReportBeginArgs)) {
  if (threadIdx.x != 0) return;
  for (u32 i = 0; i < 3; ++i) args.report->sums[i] = 0.0;
  args.update->grad_norm = 0.0;
  args.update->skip = 0;
  args.update->signal = 0;
}

KERNEL(report_add, 256, 1)(ARGS(ReportAddArgs)) {
  double sums[3] = {};
  for (u32 row = threadIdx.x; row < args.samples.rows; row += blockDim.x) {
    const float* sample = row_of(args.samples, row);
#pragma unroll
    for (u32 i = 0; i < 3; ++i) sums[i] += static_cast<double>(sample[i]);
  }
  block_sums(sums, reinterpret_cast<double*>(smem_base()));
  if (threadIdx.x != 0) return;
  for (u32 i = 0; i < 3; ++i) args.report->sums[i] += sums[i];
}

// The finished report, for the host to fetch.
KERNEL(report_close, 32, 1)(ARGS(ReportCloseArgs)) {
  if (threadIdx.x != 0) return;
  const ReportSums& report = *args.report;
  StepReport& out = *args.out;
  out.loss = report.sums[0] / args.mean_over;
  out.top1 = report.sums[1] / args.mean_over;
  out.top5 = report.sums[2] / args.mean_over;
  out.grad_norm = args.update->grad_norm;
  out.skipped = args.update->skip;
  out.signal = args.update->signal;
  out.step = args.params->step;
}
