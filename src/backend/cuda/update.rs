//! The step's report, the global norm, and the optimiser over the flat buffers (kernels/report.cu, kernels/update.cu).
//!
//! A report is closed by a kernel at the end of the step and copied to page-locked memory behind it. The copy is no part of
//! a recorded step: each report has a place of its own, so that the host may read one while the next is on its way.
//!
//! An update is three launches: sums of squares, one block that turns them into the clip factor and the constants of
//! this step, and the pass over all parameters. The host takes no part: what the kernels tell each other lies in
//! [`State`], and the tables that map runs of elements to parameter groups are made at the first update.

mod adafactor;

use std::collections::VecDeque;

use super::driver::{Address, Buffer, Event, Gpu, Pinned, Stream};
use super::launch::{Argument, launch};
use super::{Arena, Cuda};
use crate::backend::{HostMemory, Mat, Rule, Segment, StepReport, Update};
use crate::error::Result;

use adafactor::Tables;

/// What reports and updates keep on the device between launches.
#[derive(Default)]
pub(super) struct State {
    cells: Option<UpdateCells>,
    table: Option<Table>,
}

/// Sums, constants and partial norms, and finished reports on their way to the host.
struct UpdateCells {
    device: Buffer,
    norm_blocks: usize,
    /// Free places for reports.
    places: Vec<Arrival>,
    /// Reports that were not read yet, the oldest first.
    arrivals: VecDeque<Arrival>,
}

/// Where a report arrives, and when it has.
type Arrival = (Pinned, Event);

/// Reports that may wait for the host: that of the step under way, and of the one before.
const ARRIVALS: usize = 2;

/// Bytes of `ReportSums`, `UpdateCells` and `StepReport` (kernels/step.cuh), each in 64 bytes of its own.
const CELL_BYTES: u64 = 64;
/// The norm's blocks of a multiprocessor.
const NORM_BLOCKS: usize = 8;

/// `StepReport` of `kernels/step.cuh`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct RawReport {
    loss: f64,
    top1: f64,
    top5: f64,
    grad_norm: f64,
    skipped: u32,
    reserved: u32,
    step: u64,
}

impl UpdateCells {
    fn new(gpu: &Gpu) -> Result<Self> {
        let norm_blocks = NORM_BLOCKS * gpu.card().multiprocessors as usize;
        let place = |_| Ok((gpu.allocate_pinned(size_of::<RawReport>())?, gpu.new_event()?));
        Ok(Self {
            device: gpu.allocate(3 * CELL_BYTES as usize + norm_blocks * 8)?,
            norm_blocks,
            places: (0..ARRIVALS).map(place).collect::<Result<_>>()?,
            arrivals: VecDeque::new(),
        })
    }

    /// `ReportSums*`
    fn sums(&self) -> Address {
        self.device.address
    }
    /// `UpdateCells*`
    fn constants(&self) -> Address {
        self.device.address + CELL_BYTES
    }
    /// `StepReport*`
    fn report(&self) -> Address {
        self.device.address + 2 * CELL_BYTES
    }
    /// `double*`: one partial norm per block.
    fn partials(&self) -> Address {
        self.device.address + 3 * CELL_BYTES
    }
}

/// The cells, made at the first use: never while a step is being recorded, because a step runs once before that.
fn cells(cuda: &mut Cuda) -> Result<&mut UpdateCells> {
    if cuda.update.cells.is_none() {
        cuda.update.cells = Some(UpdateCells::new(&cuda.gpu)?);
    }
    Ok(cuda.update.cells.as_mut().expect("made above"))
}

// Reports ------------------------------------------------------------------------------------------------------------

/// [`crate::backend::Backend::begin_report`]
pub(super) fn begin_report(cuda: &mut Cuda) -> Result<()> {
    let (sums, constants) = addresses(cuda)?;
    launch!(cuda, "report_begin", [1, 1, 1], 32, 0, sums, constants)
}

/// [`crate::backend::Backend::add_to_report`]
pub(super) fn add_to_report(cuda: &mut Cuda, samples: Mat) -> Result<()> {
    let (sums, _) = addresses(cuda)?;
    let (at, ld, rows) = (cuda.at(samples), samples.ld as u32, samples.rows as u32);
    launch!(cuda, "report_add", [1, 1, 1], 256, 8 * 3 * 8, sums, at, ld, rows)
}

/// `ReportSums*` and `UpdateCells*`.
fn addresses(cuda: &mut Cuda) -> Result<(Address, Address)> {
    let cells = cells(cuda)?;
    Ok((cells.sums(), cells.constants()))
}

/// Finishes the report of the sums as they are: the last kernel of a step.
pub(super) fn close_report(cuda: &mut Cuda) -> Result<()> {
    let (sums, constants) = addresses(cuda)?;
    let out = cells(cuda)?.report();
    let mean_over = cuda.micro.mean_over as f64;
    launch!(cuda, "report_close", [1, 1, 1], 32, 0, cuda.cells.address(), sums, constants, mean_over, out)
}

/// Sends the closed report to the host, behind what was asked for so far.
pub(super) fn send_report(cuda: &mut Cuda) -> Result<()> {
    let gpu = cuda.gpu.clone();
    let cells = cells(cuda)?;
    let (mut memory, arrived) = cells.places.pop().expect("the reports of two steps were not read");
    let sent = gpu
        .download_async(cells.report(), memory.bytes_mut(), Stream::Compute)
        .and_then(|()| gpu.record_event(&arrived, Stream::Compute));
    cells.arrivals.push_back((memory, arrived));
    sent
}

/// [`crate::backend::Backend::report`]
pub(super) fn report(cuda: &mut Cuda) -> Result<StepReport> {
    if cells(cuda)?.arrivals.is_empty() {
        close_report(cuda)?;
        send_report(cuda)?;
    }
    let cells = cells(cuda)?;
    let (memory, arrived) = cells.arrivals.pop_front().expect("sent above");
    let waited = arrived.synchronize();
    let raw: RawReport = bytemuck::pod_read_unaligned(&memory.bytes()[..size_of::<RawReport>()]);
    cells.places.push((memory, arrived));
    waited?;
    Ok(StepReport {
        loss: raw.loss,
        top1: raw.top1,
        top5: raw.top5,
        grad_norm: raw.grad_norm,
        skipped: raw.skipped != 0,
    })
}

// Updates ------------------------------------------------------------------------------------------------------------

/// What the update walks, for the segments that it was made for.
struct Table {
    segments: Vec<Segment>,
    kind: TableKind,
}

enum TableKind {
    /// `UpdateChunk`s.
    Chunks {
        table: Buffer,
        count: usize,
    },
    Tensors(Tables),
}

/// `UpdateChunk` of `kernels/update.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct UpdateChunk {
    param: u64,
    grad: u64,
    len: u32,
    group: u32,
}

const _: () = assert!(size_of::<UpdateChunk>() == 24 && size_of::<RawReport>() == 48);

/// Elements of a chunk: four rounds of a block.
const CHUNK: usize = 4096;
/// The update's blocks of a multiprocessor.
const UPDATE_BLOCKS: usize = 8;

fn chunks(segments: &[Segment]) -> Vec<UpdateChunk> {
    let of = |s: &Segment| {
        let (param, grad, len, group) = (s.param, s.grad, s.len, s.group as u32);
        (0..len).step_by(CHUNK).map(move |start| UpdateChunk {
            param: (param + start) as u64,
            grad: (grad + start) as u64,
            len: CHUNK.min(len - start) as u32,
            group,
        })
    };
    segments.iter().flat_map(of).collect()
}

/// A table on the device; never empty, because an address of nothing is none.
fn upload_table<T: bytemuck::Pod>(gpu: &Gpu, table: &[T]) -> Result<Buffer> {
    let buffer = gpu.allocate(size_of_val(table).max(16))?;
    gpu.upload(buffer.address, bytemuck::cast_slice(table))?;
    Ok(buffer)
}

impl Table {
    fn new(gpu: &Gpu, update: &Update) -> Result<Self> {
        let kind = if let Rule::Adafactor { .. } = update.rule {
            TableKind::Tensors(Tables::new(gpu, update.segments)?)
        } else {
            let chunks = chunks(update.segments);
            TableKind::Chunks { table: upload_table(gpu, &chunks)?, count: chunks.len() }
        };
        Ok(Self { segments: update.segments.to_vec(), kind })
    }
}

/// `UpdateConstants` of `kernels/update.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct UpdateConstants {
    max_norm: f64,
    beta1: f64,
    beta2: f64,
    beta2_cap: f64,
    decay_power: f64,
    torch_clip: u32,
    reserved: u32,
}

// SAFETY: five f64 and two words.
unsafe impl Argument for UpdateConstants {}
const _: () = assert!(size_of::<UpdateConstants>() == 48);

/// `RuleConstants` of `kernels/update.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RuleConstants {
    keep1: f32,
    add1: f32,
    keep2: f32,
    add2: f32,
    eps: f32,
    nesterov: u32,
}

// SAFETY: six words.
unsafe impl Argument for RuleConstants {}

/// `UpdateBuffers` of `kernels/update.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct UpdateBuffers {
    params: Address,
    grads: Address,
    moment1: Address,
    moment2: Address,
    ema: Address,
    copy: Address,
    ema_keep: f32,
    ema_add: f32,
}

// SAFETY: six addresses and two words.
unsafe impl Argument for UpdateBuffers {}
const _: () = assert!(size_of::<UpdateBuffers>() == 56);

/// A constant that multiplies the stored first moment: JAX converts it to the moment's type first.
fn beside_moment(value: f64, bf16: bool) -> f32 {
    if bf16 { half::bf16::from_f64(value).to_f32() } else { value as f32 }
}

fn rule_constants(rule: &Rule) -> RuleConstants {
    let none = RuleConstants { keep1: 0.0, add1: 0.0, keep2: 0.0, add2: 0.0, eps: 0.0, nesterov: 0 };
    match *rule {
        Rule::Sgd { momentum, nesterov, bf16 } => {
            RuleConstants { keep1: beside_moment(momentum, bf16), nesterov: u32::from(nesterov), ..none }
        }
        Rule::Adam { beta1, beta2, eps, bf16 } => RuleConstants {
            keep1: beside_moment(beta1, bf16),
            add1: (1.0 - beta1) as f32,
            keep2: beta2 as f32,
            add2: (1.0 - beta2) as f32,
            eps: eps as f32,
            ..none
        },
        Rule::Lion { beta1, beta2, bf16 } => RuleConstants {
            keep1: beside_moment(beta1, bf16),
            add1: (1.0 - beta1) as f32,
            keep2: beside_moment(beta2, bf16),
            add2: (1.0 - beta2) as f32,
            ..none
        },
        Rule::Adafactor { momentum, bf16, .. } => {
            RuleConstants { keep1: beside_moment(momentum, bf16), add1: (1.0 - momentum) as f32, ..none }
        }
    }
}

fn update_constants(update: &Update) -> UpdateConstants {
    let (mut beta1, mut beta2, mut beta2_cap, mut decay_power) = (0.0, 0.0, 0.0, 0.0);
    match update.rule {
        Rule::Adam { beta1: first, beta2: second, .. } => (beta1, beta2) = (first, second),
        Rule::Adafactor { beta2_cap: cap, decay_power: power, .. } => (beta2_cap, decay_power) = (cap, power),
        Rule::Sgd { .. } | Rule::Lion { .. } => {}
    }
    let max_norm = update.clip.map_or(0.0, f64::from);
    let torch_clip = u32::from(update.clip_torch);
    UpdateConstants { max_norm, beta1, beta2, beta2_cap, decay_power, torch_clip, reserved: 0 }
}

fn update_buffers(cuda: &Cuda, update: &Update) -> UpdateBuffers {
    let at = |arena| match cuda.arena(arena) {
        Buffer { bytes: 0, .. } => 0,
        buffer => buffer.address,
    };
    let decay = update.ema_decay.unwrap_or(0.0);
    UpdateBuffers {
        params: at(Arena::Params),
        grads: at(Arena::Grads),
        moment1: at(Arena::Moment1),
        moment2: at(Arena::Moment2),
        ema: if update.ema_decay.is_some() { at(Arena::Ema) } else { 0 },
        copy: at(Arena::Working),
        ema_keep: decay as f32,
        ema_add: (1.0 - decay) as f32,
    }
}

/// [`crate::backend::Backend::update`]
pub(super) fn update(cuda: &mut Cuda, update: &Update) -> Result<()> {
    if cuda.update.table.as_ref().is_none_or(|table| table.segments != update.segments) {
        cuda.update.table = Some(Table::new(&cuda.gpu, update)?);
    }
    let (sums, constants) = addresses(cuda)?;
    prepare(cuda, update, sums, constants)?;
    let cuda = &*cuda;
    let buffers = update_buffers(cuda, update);
    let rule = rule_constants(&update.rule);
    let Table { kind, .. } = cuda.update.table.as_ref().expect("made above");
    let (table, count) = match kind {
        TableKind::Chunks { table, count } => (table.address, *count),
        TableKind::Tensors(tables) => return tables.update(cuda, update, constants, buffers, rule),
    };
    if count == 0 {
        return Ok(());
    }
    let kernel = match update.rule {
        Rule::Sgd { bf16: false, .. } => "update_sgd_f32",
        Rule::Sgd { .. } => "update_sgd_bf16",
        Rule::Adam { bf16: false, .. } => "update_adam_f32",
        Rule::Adam { .. } => "update_adam_bf16",
        Rule::Lion { bf16: false, .. } => "update_lion_f32",
        Rule::Lion { .. } => "update_lion_bf16",
        Rule::Adafactor { .. } => unreachable!("it walks tensors"),
    };
    let blocks = count.min(UPDATE_BLOCKS * cuda.card().multiprocessors as usize) as u32;
    let (count, rates) = (count as u32, cuda.cells.rates());
    launch!(cuda, kernel, [blocks, 1, 1], 256, 0, constants, buffers, table, count, rates, rule)
}

/// The norm, the clip factor, whether to skip, and the constants that depend on t.
fn prepare(cuda: &Cuda, update: &Update, sums: Address, constants: Address) -> Result<()> {
    let cells = cuda.update.cells.as_ref().expect("made by the caller");
    let grads = cuda.arena(Arena::Grads);
    let count = grads.bytes / 4;
    let blocks = count.div_ceil(4 * 256).clamp(1, cells.norm_blocks) as u32;
    let partials = cells.partials();
    launch!(cuda, "gradient_squares", [blocks, 1, 1], 256, 8 * 8, grads.address, count as u64, partials)?;
    launch!(
        cuda,
        "update_prepare",
        [1, 1, 1],
        256,
        8 * 8,
        cuda.cells.address(),
        sums,
        partials,
        blocks,
        update_constants(update),
        constants,
    )
}

// Copies of the weights ----------------------------------------------------------------------------------------------

/// Blocks of 256 threads for four elements per thread.
fn flat_grid(count: usize) -> [u32; 3] {
    [count.div_ceil(4 * 256) as u32, 1, 1]
}

/// Writes `count` weights as bf16.
pub(super) fn cast_to_bf16(cuda: &Cuda, weights: Address, copy: Address, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    launch!(cuda, "cast_bf16", flat_grid(count), 256, 0, weights, copy, count as u64)
}

/// Exchanges `count` weights with their EMA.
pub(super) fn swap(cuda: &Cuda, weights: Address, ema: Address, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let no_copy: Address = 0;
    launch!(cuda, "swap_ema", flat_grid(count), 256, 0, weights, ema, no_copy, count as u64)
}
