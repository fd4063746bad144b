//! Adafactor (Shazeer and Stern 2018) as in big_vision: the second moment is stored as row and column means.
//!
//! With G = g² + 1e-30 and β = min(cap, 1 - t^-power), a factored tensor keeps `R ← β·R + (1-β)·mean_cols G`
//! and `C ← β·C + (1-β)·mean_rows G`, and `u = g·(R / mean_rows R)^-½·C^-½`. Any other tensor keeps all of
//! `V`, and `u = g·V^-½`. The axes come with the segment ([`Factor`]): they are JAX's, mapped to our memory
//! by strides.
//!
//! One tensor is one job: one thread sums its statistics in f64, in memory order. Tensors run in parallel.

use super::{Carver, Compute, Ema, Job, Moment, Streams, moved, on_isa};
use crate::backend::{Factor, GroupScalars, Rule, Update};

/// Constants of one update.
#[derive(Clone, Copy)]
struct Constants {
    /// Multiplies the gradient.
    clip: f32,
    /// β of the second moment, and 1 - β.
    keep2: f32,
    add2: f32,
    /// The same for the momentum.
    keep1: f32,
    add1: f32,
    clip_rms: Option<f64>,
    ema: Option<Ema>,
}

/// Prevents division by zero where the gradient is zero.
const TINY: f64 = 1e-30;

/// Updates every tensor.
pub(super) fn apply<M: Moment>(
    c: &Compute,
    update: &Update,
    clip: f32,
    streams: Streams<M>,
    ema: Option<Ema>,
) {
    let Rule::Adafactor { momentum, beta2_cap, decay_power, clip_rms, .. } = update.rule else {
        unreachable!("the other rules are elementwise")
    };
    let beta2 = beta2_cap.min(1.0 - (update.t as f64).powf(-decay_power));
    let constants = Constants {
        clip,
        keep2: beta2 as f32,
        add2: (1.0 - beta2) as f32,
        keep1: M::constant(momentum),
        add1: (1.0 - momentum) as f32,
        clip_rms,
        ema,
    };
    let isa = c.isa;
    c.for_each_item(tensors(update, streams), |tensor| on_isa(isa, AdafactorOnTensor { constants, tensor }));
}

/// One tensor's slice of every buffer.
struct Tensor<'a, M> {
    theta: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [M],
    state: &'a mut [f32],
    ema: Option<&'a mut [f32]>,
    factor: Factor,
    scalars: GroupScalars,
}

fn tensors<'a, M>(update: &Update, streams: Streams<'a, M>) -> Vec<Tensor<'a, M>> {
    let mut params = Carver::new(streams.params);
    let mut moment1 = Carver::new(streams.moment1);
    let mut moment2 = Carver::new(streams.moment2);
    let mut ema = streams.ema.map(Carver::new);
    let tensor = |s: &crate::backend::Segment| {
        let factor = s.factor.unwrap_or_else(|| panic!("{}: Adafactor needs its axes", s.name));
        Tensor {
            theta: params.take(s.param, s.len),
            grad: &streams.grads[s.grad..s.grad + s.len],
            m: moment1.take(s.grad, s.len),
            state: moment2.take(factor.state, factor.state_len()),
            ema: ema.as_mut().map(|ema| ema.take(s.param, s.len)),
            factor,
            scalars: update.groups[s.group],
        }
    };
    update.segments.iter().map(tensor).collect()
}

struct AdafactorOnTensor<'a, M> {
    constants: Constants,
    tensor: Tensor<'a, M>,
}

impl<M: Moment> Job for AdafactorOnTensor<'_, M> {
    #[inline(always)]
    fn run(self) {
        if self.tensor.factor.factored {
            factored(self.constants, self.tensor);
        } else {
            full(self.constants, self.tensor);
        }
    }
}

#[inline(always)]
fn factored<M: Moment>(k: Constants, t: Tensor<M>) {
    let f = t.factor;
    let outer = f.outer[0] * f.outer[1];
    let lines = Lines::new(&f);

    let mut row_sums = vec![0.0f64; outer * f.rows];
    let mut col_sums = vec![0.0f64; outer * f.cols];
    lines.for_each(|at, row, col| match lines.kind {
        LineKind::Cols => {
            let cols = &mut col_sums[col..col + lines.len];
            row_sums[row] += add_squares(&t.grad[at..at + lines.len], k.clip, cols);
        }
        LineKind::Rows => {
            let rows = &mut row_sums[row..row + lines.len];
            col_sums[col] += add_squares(&t.grad[at..at + lines.len], k.clip, rows);
        }
        LineKind::Strided => lines.each_element(at, row, col, |at, row, col| {
            let square = f64::from(t.grad[at] * k.clip).powi(2);
            row_sums[row] += square;
            col_sums[col] += square;
        }),
    });

    let (rows, cols) = t.state.split_at_mut(outer * f.rows);
    average(rows, &row_sums, f.cols, k);
    average(cols, &col_sums, f.rows, k);
    let mut row_factors = vec![0.0f32; rows.len()];
    for (rows, factors) in rows.chunks(f.rows).zip(row_factors.chunks_mut(f.rows)) {
        let mean = rows.iter().copied().map(f64::from).sum::<f64>() / f.rows as f64;
        for (factor, row) in factors.iter_mut().zip(rows) {
            *factor = (f64::from(*row) / mean).powf(-0.5) as f32;
        }
    }
    let col_factors: Vec<f32> = cols.iter().map(|c| f64::from(*c).powf(-0.5) as f32).collect();

    let scale = k.clip
        * rms_factor(k.clip_rms, f.len(), || {
            let mut sum = 0.0;
            lines.for_each(|at, row, col| {
                lines.each_element(at, row, col, |at, row, col| {
                    let u = t.grad[at] * k.clip * row_factors[row] * col_factors[col];
                    sum += f64::from(u).powi(2);
                });
            });
            sum
        });

    let mut ema = t.ema;
    lines.for_each(|at, row, col| {
        if let LineKind::Strided = lines.kind {
            lines.each_element(at, row, col, |at, row, col| {
                let factor = scale * row_factors[row];
                let (theta, grad) = (&mut t.theta[at..at + 1], &t.grad[at..at + 1]);
                step(k, t.scalars, theta, grad, &mut t.m[at..at + 1], factor, &col_factors[col..col + 1]);
            });
        } else {
            let line = at..at + lines.len;
            let (factor, factors) = match lines.kind {
                LineKind::Cols => (scale * row_factors[row], &col_factors[col..col + lines.len]),
                _ => (scale * col_factors[col], &row_factors[row..row + lines.len]),
            };
            let (theta, grad) = (&mut t.theta[line.clone()], &t.grad[line.clone()]);
            step(k, t.scalars, theta, grad, &mut t.m[line], factor, factors);
        }
        if let (Some(decay), Some(ema)) = (k.ema, ema.as_deref_mut()) {
            lines.each_element(at, row, col, |at, _, _| {
                decay.step(&mut ema[at..at + 1], &t.theta[at..at + 1])
            });
        }
    });
}

#[inline(always)]
fn full<M: Moment>(k: Constants, t: Tensor<M>) {
    let f = t.factor;
    let rows = |row: usize| row * f.row_stride..row * f.row_stride + f.cols;
    let mut sum = 0.0;
    for (row, v) in t.state.chunks_mut(f.cols).enumerate() {
        for (v, g) in v.iter_mut().zip(&t.grad[rows(row)]) {
            let g = g * k.clip;
            *v = k.keep2 * *v + k.add2 * (g * g + TINY as f32);
            sum += f64::from(g / v.sqrt()).powi(2);
        }
    }
    let scale = k.clip * rms_factor(k.clip_rms, f.len(), || sum);
    let mut ema = t.ema;
    for (row, v) in t.state.chunks(f.cols).enumerate() {
        let (theta, grad, m) = (&mut t.theta[rows(row)], &t.grad[rows(row)], &mut t.m[rows(row)]);
        let factors: Vec<f32> = v.iter().map(|v| 1.0 / v.sqrt()).collect();
        step(k, t.scalars, theta, grad, m, scale, &factors);
        if let (Some(decay), Some(ema)) = (k.ema, ema.as_deref_mut()) {
            decay.step(&mut ema[rows(row)], theta);
        }
    }
}

/// Momentum and weights of one line, whose update is `g·factor·factors`.
#[inline(always)]
fn step<M: Moment>(
    k: Constants,
    scalars: GroupScalars,
    theta: &mut [f32],
    grad: &[f32],
    m: &mut [M],
    factor: f32,
    factors: &[f32],
) {
    let n = theta.len();
    let (grad, m, factors) = (&grad[..n], &mut m[..n], &factors[..n]);
    for i in 0..n {
        let u = grad[i] * factor * factors[i];
        let new_m = k.keep1 * m[i].load() + k.add1 * u;
        m[i] = M::store(new_m);
        theta[i] = moved(theta[i], new_m, scalars);
    }
}

/// `1 / max(1, rms(u) / threshold)` (Optax `clip_by_block_rms`); `sum` gives Σu².
#[inline(always)]
fn rms_factor(threshold: Option<f64>, len: usize, sum: impl FnOnce() -> f64) -> f32 {
    let Some(threshold) = threshold else { return 1.0 };
    (1.0 / ((sum() / len as f64).sqrt() / threshold).max(1.0)) as f32
}

/// Adds the squares of a line to `sums`, and returns their total.
#[inline(always)]
fn add_squares(grad: &[f32], clip: f32, sums: &mut [f64]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (blocks, rest) = grad.as_chunks::<8>();
    let (sum_blocks, sum_rest) = sums.as_chunks_mut::<8>();
    for (block, sums) in blocks.iter().zip(sum_blocks) {
        for i in 0..8 {
            let g = f64::from(block[i] * clip);
            sums[i] += g * g;
            lanes[i] += g * g;
        }
    }
    for (i, (g, sum)) in rest.iter().zip(sum_rest).enumerate() {
        let g = f64::from(g * clip);
        *sum += g * g;
        lanes[i] += g * g;
    }
    lanes.iter().sum()
}

/// `s ← β·s + (1-β)·(sum/n + 1e-30)`
fn average(state: &mut [f32], sums: &[f64], n: usize, k: Constants) {
    for (s, sum) in state.iter_mut().zip(sums) {
        *s = k.keep2 * *s + k.add2 * (sum / n as f64 + TINY) as f32;
    }
}

/// A factored tensor as lines along its innermost axis in memory.
struct Lines {
    /// The three outer axes, then the line itself.
    axes: [LineAxis; 4],
    len: usize,
    kind: LineKind,
}

/// One axis: its length, and its strides in memory, in the row and in the column statistics.
#[derive(Clone, Copy)]
struct LineAxis {
    len: usize,
    memory: usize,
    row: usize,
    col: usize,
}

/// The axis along which a line runs.
#[derive(Clone, Copy)]
enum LineKind {
    /// Neighbours in memory, along the columns' axis.
    Cols,
    /// Neighbours in memory, along the rows' axis.
    Rows,
    /// Anything else (a patch kernel's channels): element by element.
    Strided,
}

impl Lines {
    fn new(f: &Factor) -> Lines {
        let axis = |len, memory, row, col| LineAxis { len, memory, row, col };
        let mut axes = [
            axis(f.outer[0], f.outer_stride[0], f.outer[1] * f.rows, f.outer[1] * f.cols),
            axis(f.outer[1], f.outer_stride[1], f.rows, f.cols),
            axis(f.rows, f.row_stride, 1, 0),
            axis(f.cols, f.col_stride, 0, 1),
        ];
        // Memory order; axes of one element go outermost, whatever their stride.
        axes.sort_by_key(|a| std::cmp::Reverse(if a.len > 1 { a.memory } else { usize::MAX }));
        let line = axes[3];
        let kind = match (line.memory, line.row, line.col) {
            (1, 0, 1) => LineKind::Cols,
            (1, 1, 0) => LineKind::Rows,
            _ => LineKind::Strided,
        };
        Lines { axes, len: line.len, kind }
    }

    /// Calls `job` with the first element of every line: its offset in memory, in the row and in the column
    /// statistics.
    #[inline(always)]
    fn for_each(&self, mut job: impl FnMut(usize, usize, usize)) {
        let [a, b, c, _] = self.axes;
        for i in 0..a.len {
            for j in 0..b.len {
                for k in 0..c.len {
                    job(
                        i * a.memory + j * b.memory + k * c.memory,
                        i * a.row + j * b.row + k * c.row,
                        i * a.col + j * b.col + k * c.col,
                    );
                }
            }
        }
    }

    /// Calls `job` with every element of the line that starts there.
    #[inline(always)]
    fn each_element(&self, at: usize, row: usize, col: usize, mut job: impl FnMut(usize, usize, usize)) {
        let line = self.axes[3];
        for i in 0..line.len {
            job(at + i * line.memory, row + i * line.row, col + i * line.col);
        }
    }
}
