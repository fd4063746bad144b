//! Lays out one case, runs it, and compares the results.
//!
//! A [`Trial`] first collects operands, then opens the device ([`Trial::start`]), runs the operation, and
//! compares. Memory that the case did not set is poisoned: the activation arena is filled with NaN, so that
//! an unwritten output and a read outside an operand both show. At the end, every arena is compared byte for
//! byte with its initial contents, except where an output was compared, so a write to the wrong place shows
//! too.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use half::bf16;

use crate::backend::mask::BoundMask;
use crate::backend::memory::{ROW_ALIGN, TENSOR_ALIGN};
use crate::backend::{
    Arena, Backend, Dtype, InputGrad, Linear, Mask, Mat, MemoryPlan, Micro, StepKeys, Storage, Write,
};
use crate::error::Result;
use crate::fail;
use crate::rng::{Domain, Stream};

use super::{CaseResult, Make};

/// The unit roundoff of f32.
const ROUND: f64 = 1.0 / (1u64 << 24) as f64;

/// Allowed error of an f32 result of a few operations: ten times the 1e-7 that other libraries show.
pub(super) const ELEMENTWISE: f64 = 1e-6;

/// Allowed error of an f32 sum of `n` products of random sign: added one after the other, the rounding errors
/// grow with √n, and the shortest sums have a few more roundings.
pub(super) fn sum_of(n: usize) -> f64 {
    ROUND * (8.0 + 2.0 * (n as f64).sqrt())
}

pub(super) type Body = dyn Fn(&mut Trial) -> Result<()>;

/// One row of the table of cases.
pub(super) struct Case {
    /// Index of its table: a case that breaks the device ends its group.
    pub(super) group: usize,
    operation: &'static str,
    case: String,
    body: Box<Body>,
}

impl Case {
    pub(super) fn new(
        operation: &'static str,
        case: impl Into<String>,
        body: impl Fn(&mut Trial) -> Result<()> + 'static,
    ) -> Self {
        Self { group: 0, operation, case: case.into(), body: Box::new(body) }
    }

    pub(super) fn operation(&self) -> &'static str {
        self.operation
    }

    pub(super) fn title(&self) -> String {
        format!("{}: {}", self.operation, self.case)
    }

    /// Runs it on a device from `make` that stores data as `storage` says.
    pub(super) fn run(&self, make: &Make, storage: Storage) -> CaseResult {
        let mut trial = Trial::new(make, storage);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            (self.body)(&mut trial)?;
            trial.nothing_else_changed()
        }));
        let trouble = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(e.message().to_string()),
            Err(panic) => Some(format!("panic: {}", panic_message(&*panic))),
        };
        let result =
            |error, tolerance, passed, note| CaseResult { error, tolerance, passed, ..self.failed(note) };
        let worst = trial.checks.iter().max_by(|a, b| a.excess().total_cmp(&b.excess()));
        match (worst, trouble) {
            (Some(c), trouble) => {
                let note = trouble.clone().unwrap_or_else(|| c.note.clone());
                result(c.error, c.tolerance, trouble.is_none() && c.passes(), note)
            }
            (None, Some(trouble)) => self.failed(trouble),
            (None, None) => self.failed("the case compares nothing".into()),
        }
    }

    /// The result where there is nothing to compare.
    pub(super) fn failed(&self, note: String) -> CaseResult {
        CaseResult {
            operation: self.operation.into(),
            case: self.case.clone(),
            error: f64::INFINITY,
            tolerance: 0.0,
            passed: false,
            note,
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

/// A matrix of the case: where it lies, and its initial values, dense, as the device sees them.
#[derive(Clone)]
pub(super) struct Operand {
    pub(super) mat: Mat,
    pub(super) values: Vec<f64>,
}

impl Operand {
    pub(super) fn row(&self, r: usize) -> &[f64] {
        &self.values[r * self.mat.cols..][..self.mat.cols]
    }

    /// A part of it, with its values.
    pub(super) fn view(&self, mat: Mat) -> Operand {
        let first = (mat.offset - self.mat.offset) / mat.dtype.bytes();
        let at = |r: usize, c: usize| {
            let place = first + r * mat.ld + c;
            self.row(place / self.mat.ld)[place % self.mat.ld]
        };
        let values = (0..mat.rows).flat_map(|r| (0..mat.cols).map(move |c| at(r, c))).collect();
        Operand { mat, values }
    }
}

/// One comparison.
struct Check {
    error: f64,
    tolerance: f64,
    note: String,
}

impl Check {
    fn passes(&self) -> bool {
        self.error <= self.tolerance
    }

    fn excess(&self) -> f64 {
        match self.error <= self.tolerance {
            true if self.tolerance == 0.0 => 0.0,
            true => self.error / self.tolerance,
            false => 1.0 + self.error,
        }
    }
}

/// A case in progress.
pub(super) struct Trial<'a> {
    make: &'a Make<'a>,
    plan: MemoryPlan,
    /// f32 operands, in the order in which they were placed.
    writes: Vec<(Mat, Vec<f32>)>,
    /// The contents of every arena when the operation starts.
    images: Vec<(Arena, Vec<u8>)>,
    /// What the operation may change.
    outputs: Vec<Mat>,
    backend: Option<Box<dyn Backend>>,
    keys: StepKeys,
    micro: Micro,
    draws: u64,
    checks: Vec<Check>,
}

/// Relative error that rounding operands and results to bf16 may cause: two roundings of at most 2^-8 each.
const BF16_TOLERANCE: f64 = 8e-3;

/// Fewer values say nothing about how they were rounded.
const ENOUGH_VALUES: f64 = 256.0;

/// Whether values stored in bf16 were rounded to nearest: then their errors have no direction. Cut off, they are
/// nearer to zero by 2.7e-3 on average, which [`BF16_TOLERANCE`] would allow. None where they are too few to
/// tell, or not in bf16.
fn check_rounding(name: &str, got: &[f64], expected: &[f64]) -> Option<Check> {
    if got.iter().any(|v| !v.is_finite() || bf16::from_f64(*v).to_f64() != *v) {
        return None;
    }
    // Equal values have equal errors: each counts once.
    let along = expected.iter().zip(got).map(|(exact, got)| (exact.abs(), got * exact.signum()));
    let mut values: Vec<(f64, f64)> = along.collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    values.dedup_by_key(|(exact, _)| *exact);
    let exact: f64 = values.iter().map(|(exact, _)| exact).sum();
    let stored: f64 = values.iter().map(|(_, stored)| stored).sum();
    // As many values of one size would say as much; and values that are stored alike have errors alike.
    let count = exact * exact / values.iter().map(|(exact, _)| exact * exact).sum::<f64>();
    let different: HashSet<u64> = values.iter().map(|(_, stored)| stored.to_bits()).collect();
    let count = count.min(different.len() as f64);
    if count.is_nan() || count < ENOUGH_VALUES {
        return None;
    }
    let shift = (stored - exact) / exact;
    // A single error is 1.6e-3 of its value.
    let tolerance = 6e-4 + 1e-2 / count.sqrt();
    let note =
        format!("{name}: values in bf16 are off by {shift:+.1e} on average, as if not rounded to nearest");
    Some(Check { error: shift.abs(), tolerance, note })
}

/// Bytes of a NaN that no arithmetic produces.
const POISON: [u8; 4] = 0x7fc5_a5a5u32.to_le_bytes();

impl<'a> Trial<'a> {
    fn new(make: &'a Make<'a>, storage: Storage) -> Self {
        Self {
            make,
            plan: MemoryPlan::new(storage),
            writes: Vec::new(),
            images: Vec::new(),
            outputs: Vec::new(),
            backend: None,
            keys: StepKeys { seed: 0x5eed_0000_0007, step: 3 },
            micro: Micro { first: 0, samples: 1, global_first: 0, gradients: Write::Assign, mean_over: 1 },
            draws: 0,
            checks: Vec::new(),
        }
    }

    // Operands --------------------------------------------------------------------------------------------------

    /// Standard normal values times `scale`, rounded to bf16 so that a device of any precision gets the same inputs.
    pub(super) fn normal(&mut self, n: usize, scale: f64) -> Vec<f64> {
        let mut stream = self.stream();
        (0..n).map(|_| bf16::from_f64(scale * stream.normal()).to_f64()).collect()
    }

    /// A stream of draws that is unique within this case.
    pub(super) fn stream(&mut self) -> Stream {
        self.draws += 1;
        Stream::new(0, Domain::Init, self.draws, 0)
    }

    /// f32 statistics or metrics with given values.
    pub(super) fn statistics(&mut self, rows: usize, cols: usize, values: Vec<f64>) -> Operand {
        let mat = self.plan.statistics("statistics", rows, cols);
        self.plan.statistics("guard", 1, TENSOR_ALIGN / 4);
        self.place(mat, values)
    }

    /// f32 statistics or metrics that the operation must fill: initially NaN.
    pub(super) fn statistics_output(&mut self, rows: usize, cols: usize) -> Operand {
        self.statistics(rows, cols, vec![f64::NAN; rows * cols])
    }

    /// An activation with given values, in the device's type.
    pub(super) fn given(&mut self, rows: usize, cols: usize, values: Vec<f64>) -> Operand {
        self.activation(rows, cols, cols, values)
    }

    /// A dense activation with normal values.
    pub(super) fn input(&mut self, rows: usize, cols: usize, scale: f64) -> Operand {
        let values = self.normal(rows * cols, scale);
        self.given(rows, cols, values)
    }

    /// [`Trial::input`], with a gap after every row if `gap`.
    pub(super) fn input_with_gap(&mut self, rows: usize, cols: usize, scale: f64, gap: bool) -> Operand {
        let values = self.normal(rows * cols, scale);
        self.activation(rows, cols, leading(cols, gap), values)
    }

    /// A dense activation that the operation must fill: initially NaN.
    pub(super) fn output(&mut self, rows: usize, cols: usize) -> Operand {
        self.output_with_gap(rows, cols, false)
    }

    pub(super) fn output_with_gap(&mut self, rows: usize, cols: usize, gap: bool) -> Operand {
        self.activation(rows, cols, leading(cols, gap), vec![f64::NAN; rows * cols])
    }

    /// The same in the type of the residual stream.
    pub(super) fn stream_given(&mut self, rows: usize, cols: usize, values: Vec<f64>) -> Operand {
        let room = self.plan.stream("operand", rows, cols);
        self.guarded(room, cols, values)
    }

    pub(super) fn stream_input(&mut self, rows: usize, cols: usize, gap: bool) -> Operand {
        let values = self.normal(rows * cols, 1.0);
        let room = self.plan.stream("operand", rows, leading(cols, gap));
        self.guarded(room, cols, values)
    }

    pub(super) fn stream_output(&mut self, rows: usize, cols: usize, gap: bool) -> Operand {
        let room = self.plan.stream("operand", rows, leading(cols, gap));
        self.guarded(room, cols, vec![f64::NAN; rows * cols])
    }

    fn activation(&mut self, rows: usize, cols: usize, ld: usize, values: Vec<f64>) -> Operand {
        let room = self.plan.activation("operand", rows, ld);
        self.guarded(room, cols, values)
    }

    fn guarded(&mut self, room: Mat, cols: usize, values: Vec<f64>) -> Operand {
        // A guard, so that a write past the end hits poison and not the next operand.
        self.plan.statistics("guard", 1, TENSOR_ALIGN / 4);
        self.place(Mat { cols, ..room }, values)
    }

    /// A parameter with normal values around `mean`; rows are padded with zeros, as in the model.
    pub(super) fn param(&mut self, rows: usize, cols: usize, mean: f64, scale: f64) -> Operand {
        let values =
            self.normal(rows * cols, scale).iter().map(|x| bf16::from_f64(mean + x).to_f64()).collect();
        let mat = self.padded(Arena::Params, rows, cols);
        self.place(mat, values)
    }

    /// The gradient of a parameter: NaN, or values to add to if the micro-batch accumulates.
    pub(super) fn grad(&mut self, of: &Operand, accumulate: bool) -> Operand {
        let n = of.values.len();
        let values = if accumulate { self.normal(n, 1.0) } else { vec![f64::NAN; n] };
        let mat = self.padded(Arena::Grads, of.mat.rows, of.mat.cols);
        self.place(mat, values)
    }

    /// A dense layer `[out, in]`; `trained` says whether weight and bias have gradients.
    pub(super) fn linear(&mut self, out: usize, input: usize, trained: [bool; 2], accumulate: bool) -> Dense {
        let weight = self.param(out, input, 0.0, 1.0 / (input as f64).sqrt());
        let bias = self.param(1, out, 0.0, 0.5);
        let d_weight = trained[0].then(|| self.grad(&weight, accumulate));
        let d_bias = trained[1].then(|| self.grad(&bias, accumulate));
        Dense { weight, bias, d_weight, d_bias }
    }

    pub(super) fn storage(&self) -> Storage {
        self.plan.storage()
    }

    fn padded(&mut self, arena: Arena, rows: usize, cols: usize) -> Mat {
        let ld = if rows == 1 { cols } else { cols.next_multiple_of(ROW_ALIGN) };
        let offset = self.plan.bytes(arena);
        self.plan.set_bytes(arena, offset + (rows * ld * 4).next_multiple_of(TENSOR_ALIGN));
        Mat { arena, offset, rows, cols, ld, dtype: Dtype::F32 }
    }

    fn place(&mut self, mat: Mat, values: Vec<f64>) -> Operand {
        assert_eq!(values.len(), mat.rows * mat.cols, "{mat}: one value per element");
        let stored: Vec<f32> = match mat.dtype {
            Dtype::F32 => values.iter().map(|v| *v as f32).collect(),
            Dtype::Bf16 => values.iter().map(|v| bf16::from_f64(*v).to_f32()).collect(),
        };
        let values = stored.iter().map(|v| f64::from(*v)).collect();
        self.writes.push((mat, stored));
        Operand { mat, values }
    }

    /// Sets a whole arena from bytes.
    pub(super) fn arena(&mut self, arena: Arena, bytes: Vec<u8>) {
        self.plan.set_bytes(arena, bytes.len());
        self.images.push((arena, bytes));
    }

    /// Makes an arena of this size, zeroed, that the case does not look at.
    pub(super) fn reserve(&mut self, arena: Arena, bytes: usize) {
        self.plan.set_bytes(arena, bytes);
    }

    // Running ---------------------------------------------------------------------------------------------------

    /// The keys and the micro-batch of the case; call before [`Trial::mask`] and [`Trial::start`].
    pub(super) fn micro(&mut self, micro: Micro) {
        self.micro = micro;
    }

    /// `samples` samples in the middle of a larger batch.
    pub(super) fn samples(&mut self, samples: usize, accumulate: bool) {
        self.micro(Micro {
            first: 2,
            samples,
            global_first: 40,
            gradients: Write::add_if(accumulate),
            mean_over: samples + 3,
        });
    }

    pub(super) fn mask(&self, mask: Mask) -> BoundMask {
        BoundMask::new(mask, self.keys, self.micro)
    }

    /// The device before anything is allocated.
    pub(super) fn open(&self) -> Result<Box<dyn Backend>> {
        (self.make)()
    }

    /// Opens the device, fills its arenas and begins the step.
    pub(super) fn start(&mut self) -> Result<&mut dyn Backend> {
        let mut backend = self.open()?;
        backend.allocate(&self.plan)?;
        for arena in Arena::ALL {
            if self.images.iter().all(|(given, _)| *given != arena) {
                let mut image = vec![0; self.plan.bytes(arena)];
                if arena == Arena::Activations {
                    image.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&POISON));
                }
                self.images.push((arena, image));
            }
        }
        for (arena, image) in &self.images {
            backend.write_arena(*arena, image)?;
        }
        for (mat, values) in &self.writes {
            backend.write(*mat, values)?;
            let (_, image) =
                self.images.iter_mut().find(|(arena, _)| *arena == mat.arena).expect("all are there");
            for (r, row) in values.chunks_exact(mat.cols).enumerate() {
                let size = mat.dtype.bytes();
                let at = mat.offset + r * mat.ld * size;
                let to = &mut image[at..at + size * mat.cols];
                match mat.dtype {
                    Dtype::F32 => to.copy_from_slice(bytemuck::cast_slice(row)),
                    Dtype::Bf16 => {
                        let row: Vec<bf16> = row.iter().map(|v| bf16::from_f32(*v)).collect();
                        to.copy_from_slice(bytemuck::cast_slice(&row));
                    }
                }
            }
        }
        backend.begin_step(self.keys)?;
        backend.begin_micro(self.micro)?;
        Ok(&mut **self.backend.insert(backend))
    }

    pub(super) fn backend(&mut self) -> &mut dyn Backend {
        &mut **self.backend.as_mut().expect("the case has started")
    }

    // Judging ---------------------------------------------------------------------------------------------------

    /// Compares an output with the expected values.
    pub(super) fn compare(
        &mut self,
        name: &str,
        output: &Operand,
        expected: &[f64],
        tolerance: f64,
    ) -> Result<()> {
        let got = self.take(output)?;
        self.judge(name, &got, expected, output.mat.cols, self.tolerance(output, tolerance));
        Ok(())
    }

    /// [`Trial::compare`] row by row, for rows of different sizes. A row's norm is taken to be at least
    /// `floor`: where larger values cancel, the error has their size.
    pub(super) fn compare_rows(
        &mut self,
        name: &str,
        output: &Operand,
        expected: &[f64],
        floor: f64,
        tolerance: f64,
    ) -> Result<()> {
        let got = self.take(output)?;
        let (cols, tolerance) = (output.mat.cols, self.tolerance(output, tolerance));
        for (r, (got, expected)) in got.chunks(cols).zip(expected.chunks(cols)).enumerate() {
            self.judge_above(&format!("{name} row {r}"), got, expected, cols, floor, tolerance);
        }
        Ok(())
    }

    /// The tolerance for an output's storage: a bf16 value is rounded once more, and then read by later work.
    pub(super) fn tolerance(&self, output: &Operand, exact: f64) -> f64 {
        let rounded = output.mat.dtype == Dtype::Bf16;
        if rounded { exact.max(BF16_TOLERANCE) } else { exact }
    }

    /// The current values of an output that the operation was allowed to change.
    pub(super) fn take(&mut self, output: &Operand) -> Result<Vec<f64>> {
        let mut got = vec![0.0; output.values.len()];
        self.backend().read(output.mat, &mut got)?;
        self.outputs.push(output.mat);
        Ok(got.into_iter().map(f64::from).collect())
    }

    /// Compares values with float64.
    pub(super) fn judge(&mut self, name: &str, got: &[f64], expected: &[f64], cols: usize, tolerance: f64) {
        self.judge_above(name, got, expected, cols, 0.0, tolerance);
    }

    fn judge_above(
        &mut self,
        name: &str,
        got: &[f64],
        expected: &[f64],
        cols: usize,
        floor: f64,
        tolerance: f64,
    ) {
        assert_eq!(got.len(), expected.len(), "{name}: one expected value per element");
        let size = expected.iter().map(|e| e * e).sum::<f64>().sqrt().max(floor);
        let largest = expected.iter().fold(floor, |a, e| a.max(e.abs()));
        let (mut distance, mut worst, mut at) = (0.0, 0.0, 0);
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            // Two equal infinities have distance 0; any other non-finite difference is infinite.
            let difference = if got == expected { 0.0 } else { (got - expected).abs() };
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            distance += difference * difference;
            if difference > worst {
                (worst, at) = (difference, i);
            }
        }
        let distance = distance.sqrt();
        let error = match size {
            0.0 => worst,
            _ if distance.is_finite() => (distance / size).max(0.1 * worst / largest),
            _ => f64::INFINITY,
        };
        let mut note = name.to_string();
        if error > tolerance {
            let (r, c, cols) = (at / cols.max(1), at % cols.max(1), cols);
            note += &format!(
                ": error {error:.1e}, tolerance {tolerance:.1e}; of {} rows of {cols}, element [{r}, {c}] is {} and should be {}",
                got.len() / cols.max(1),
                got[at],
                expected[at]
            );
        }
        self.checks.push(Check { error, tolerance, note });
        if tolerance >= BF16_TOLERANCE {
            self.checks.extend(check_rounding(name, got, expected));
        }
    }

    /// A fact that holds or does not.
    pub(super) fn expect(&mut self, what: &str, holds: bool) {
        let note = if holds { what.to_string() } else { format!("does not hold: {what}") };
        self.checks.push(Check { error: f64::from(u8::from(!holds)), tolerance: 0.0, note });
    }

    /// The bytes of an arena, for cases that gave them.
    pub(super) fn arena_now(&mut self, arena: Arena) -> Result<Vec<u8>> {
        self.backend().read_arena(arena)
    }

    /// The whole arena may have changed: the case looks at it itself.
    pub(super) fn may_change(&mut self, arena: Arena) {
        let cols = self.plan.bytes(arena) / 2;
        self.outputs.push(Mat { arena, offset: 0, rows: 1, cols, ld: cols, dtype: Dtype::Bf16 });
    }

    /// Fails if a byte outside the outputs has another value than at the start.
    fn nothing_else_changed(&mut self) -> Result<()> {
        for (arena, mut image) in std::mem::take(&mut self.images) {
            let mut now = self.backend().read_arena(arena)?;
            if now.len() != image.len() {
                fail!("{arena:?} has {} bytes instead of {}", now.len(), image.len());
            }
            for mat in self.outputs.iter().filter(|mat| mat.arena == arena) {
                for r in 0..mat.rows {
                    let size = mat.dtype.bytes();
                    let row = mat.offset + r * mat.ld * size..mat.offset + (r * mat.ld + mat.cols) * size;
                    now[row.clone()].fill(0);
                    image[row].fill(0);
                }
            }
            if let Some(at) = (0..now.len()).find(|i| now[*i] != image[*i]) {
                let mat =
                    self.writes.iter().map(|(mat, _)| mat).rfind(|m| m.arena == arena && m.offset <= at);
                let place = mat.map(|mat| format!(" (in or after {mat})")).unwrap_or_default();
                fail!("byte {at} of {arena:?} was changed{place}, which the operation must leave unchanged");
            }
        }
        Ok(())
    }
}

/// A leading dimension for rows of `cols`.
fn leading(cols: usize, gap: bool) -> usize {
    if gap { (cols + 1).next_multiple_of(ROW_ALIGN) + ROW_ALIGN } else { cols }
}

/// A dense layer's operands.
pub(super) struct Dense {
    pub(super) weight: Operand,
    pub(super) bias: Operand,
    pub(super) d_weight: Option<Operand>,
    pub(super) d_bias: Option<Operand>,
}

impl Dense {
    /// [`Linear::outputs`]
    pub(super) fn outputs(&self, first: usize, count: usize) -> Dense {
        let part = self.handles().outputs(first, count);
        let view = |of: &Option<Operand>, mat| of.as_ref().zip(mat).map(|(of, mat)| of.view(mat));
        Dense {
            weight: self.weight.view(part.weight),
            bias: self.bias.view(part.bias),
            d_weight: view(&self.d_weight, part.d_weight),
            d_bias: view(&self.d_bias, part.d_bias),
        }
    }

    pub(super) fn handles(&self) -> Linear {
        Linear {
            weight: self.weight.mat,
            bias: self.bias.mat,
            d_weight: self.d_weight.as_ref().map(|d| d.mat),
            d_bias: self.d_bias.as_ref().map(|d| d.mat),
        }
    }
}

/// The product that reads, as its `d_y`, a matrix which the operation under test makes; only its bias is
/// trained. The device may make the bias gradient in the operation or in the product.
pub(super) struct Product {
    x: Operand,
    layer: Dense,
}

impl Product {
    /// After a matrix `[rows, cols]`.
    pub(super) fn behind(t: &mut Trial, rows: usize, cols: usize, accumulate: bool) -> Self {
        Self { x: t.input(rows, 8, 1.0), layer: t.linear(cols, 8, [false, true], accumulate) }
    }

    fn gradient(&self) -> &Operand {
        self.layer.d_bias.as_ref().expect("the bias is trained")
    }

    /// The gradient's destination, as the operation gets it.
    pub(super) fn d_bias(&self) -> Mat {
        self.gradient().mat
    }

    /// Runs the product, and compares the bias gradient with the sum of `d_y` as it was stored.
    pub(super) fn check(&self, t: &mut Trial, d_y: &Operand, accumulate: bool) -> Result<()> {
        t.backend().matmul_backward(d_y.mat, self.x.mat, &self.layer.handles(), InputGrad::None)?;
        let mut sums = vec![0.0; d_y.mat.cols];
        for row in t.take(d_y)?.chunks(d_y.mat.cols) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        let expected = accumulated(self.gradient(), accumulate, &sums);
        // Tensor cores truncate where rounding would keep half of the error.
        let tolerance = 2.0 * sum_of(d_y.mat.rows) + ELEMENTWISE;
        t.compare("d_bias", self.gradient(), &expected, tolerance)
    }
}

/// The expected gradient: `start + sum` if the micro-batch accumulates, else `sum`.
pub(super) fn accumulated(grad: &Operand, accumulate: bool, sum: &[f64]) -> Vec<f64> {
    grad.values.iter().zip(sum).map(|(start, sum)| if accumulate { start + sum } else { *sum }).collect()
}
