//! The step's report, the global norm, and the optimiser over the flat buffers (kernels/report.cu, kernels/update.cu).
//!
//! The last kernel of a step closes the report; after it, a copy sends the report to page-locked memory. The
//! copy is not part of a recorded step: each report has its own destination, so the host may read one while
//! the next is being copied.
//!
//! An update is three launches: sums of squares; one block that turns them into the clip factor and the
//! constants of this step; and the pass over all parameters. The host takes no part. The kernels exchange
//! values through [`State`]; the tables that map runs of elements to parameter groups are made at the first
//! update.

mod adafactor;

use std::collections::VecDeque;

use super::driver::{Address, Buffer, Event, Gpu, Pinned, Stream};
use super::launch::{
    CastArgs, GradientSquaresArgs, ReportAddArgs, ReportBeginArgs, ReportCloseArgs, RuleConstants,
    StepReport as RawReport, SwapEmaArgs, UpdateArgs, UpdateBuffers, UpdateChunk, UpdateConstants,
    UpdatePrepareArgs, kernel,
};
use super::{Arena, Cuda};
use crate::backend::shards::Piece;
use crate::backend::{HostMemory, Rule, Segment, Shards, StepReport, Update, ops};
use crate::error::Result;

use adafactor::Tables;

/// What reports and updates keep between launches.
pub(super) struct State {
    /// Sums, constants, the closed report and partial norms: [`PARAMS_BYTES`] of device memory.
    params: Address,
    /// Free buffers for reports.
    places: Vec<Arrival>,
    /// Unread reports, oldest first.
    arrivals: VecDeque<Arrival>,
    table: Option<Table>,
}

/// A report's destination, and the event of its arrival.
type Arrival = (Pinned, Event);

/// Reports that may wait for the host: those of the current step and of the one before.
const ARRIVALS: usize = 2;

/// Bytes for each of `ReportSums`, `UpdateParams` and `StepReport` (kernels/step.cuh), which are padded to 64
/// bytes.
const CELL_BYTES: u64 = 64;
/// Blocks of the norm, per multiprocessor and in total.
const NORM_BLOCKS: usize = 8;
const MOST_NORM_BLOCKS: usize = 4096;
/// Device memory of [`State::params`].
pub(super) const PARAMS_BYTES: usize = 3 * CELL_BYTES as usize + MOST_NORM_BLOCKS * 8;

impl State {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let place = |_| Ok((gpu.allocate_pinned(size_of::<RawReport>())?, gpu.new_event()?));
        let places = (0..ARRIVALS).map(place).collect::<Result<_>>()?;
        Ok(Self { params: 0, places, arrivals: VecDeque::new(), table: None })
    }

    /// Assigns the params [`PARAMS_BYTES`] bytes of device memory.
    pub(super) fn place(&mut self, params: Address) {
        self.params = params;
    }

    /// `ReportSums*`
    fn sums(&self) -> Address {
        self.params
    }
    /// `UpdateParams*`
    fn constants(&self) -> Address {
        self.params + CELL_BYTES
    }
    /// `StepReport*`
    fn report(&self) -> Address {
        self.params + 2 * CELL_BYTES
    }
    /// `double*`: one partial norm per block.
    fn partials(&self) -> Address {
        self.params + 3 * CELL_BYTES
    }
}

// Reports ------------------------------------------------------------------------------------------------------------

pub(super) fn begin_report(cuda: &mut Cuda) -> Result<()> {
    let args = ReportBeginArgs { report: cuda.update.sums(), update: cuda.update.constants() };
    cuda.launch(kernel!("report_begin"), [1, 1, 1], 0, &args)
}

pub(super) fn add_to_report(cuda: &mut Cuda, op: &ops::AddToReport) -> Result<()> {
    let args = ReportAddArgs { report: cuda.update.sums(), samples: cuda.view(op.samples) };
    cuda.launch(kernel!("report_add"), [1, 1, 1], 8 * 3 * 8, &args)
}

/// Finishes the report from the current sums: the last kernel of a step.
pub(super) fn close_report(cuda: &mut Cuda) -> Result<()> {
    let args = ReportCloseArgs {
        params: cuda.step_params.address(),
        report: cuda.update.sums(),
        update: cuda.update.constants(),
        mean_over: cuda.micro.mean_over as f64,
        out: cuda.update.report(),
    };
    cuda.launch(kernel!("report_close"), [1, 1, 1], 0, &args)
}

/// Sends the closed report to the host, after all submitted work.
pub(super) fn send_report(cuda: &mut Cuda) -> Result<()> {
    let (gpu, state) = (&cuda.gpu, &mut cuda.update);
    let (mut memory, arrived) = state.places.pop().expect("the reports of two steps were not read");
    // SAFETY: the memory is kept in `arrivals` and read after its event.
    let sent = unsafe { gpu.download_async(state.report(), memory.bytes_mut(), Stream::Compute) };
    let sent = sent.and_then(|()| gpu.record_event(&arrived, Stream::Compute));
    state.arrivals.push_back((memory, arrived));
    sent
}

/// [`crate::backend::Backend::report`]
pub(super) fn report(cuda: &mut Cuda) -> Result<StepReport> {
    if cuda.update.arrivals.is_empty() {
        close_report(cuda)?;
        send_report(cuda)?;
    }
    let (memory, arrived) = cuda.update.arrivals.pop_front().expect("sent above");
    // A rank that is gone must not be waited for.
    let comm = cuda.reduction.as_ref().and_then(|reduction| reduction.comm());
    let waited = comm.map_or_else(|| arrived.synchronize(), |comm| comm.wait(&arrived));
    let raw: RawReport = bytemuck::pod_read_unaligned(&memory.bytes()[..size_of::<RawReport>()]);
    cuda.update.places.push((memory, arrived));
    waited?;
    Ok(StepReport {
        loss: raw.loss,
        top1: raw.top1,
        top5: raw.top5,
        grad_norm: raw.grad_norm,
        skipped: raw.skipped != 0,
        signal: raw.signal as i32,
    })
}

// Updates ------------------------------------------------------------------------------------------------------------

/// The tables in [`Arena::Update`], and the segments that they were made for.
struct Table {
    segments: Vec<Segment>,
    kind: TableKind,
}

enum TableKind {
    /// The number of `UpdateChunk`s.
    Chunks(usize),
    Tensors(Tables),
}

/// Elements per chunk: four rounds of a block.
const CHUNK: usize = 4096;
/// Blocks of the update per multiprocessor.
const UPDATE_BLOCKS: usize = 8;

pub(super) fn chunks(segments: &[Segment], pieces: &[Piece]) -> Vec<UpdateChunk> {
    let of = |piece: &Piece| {
        let Piece { segment, param, grad, moment, ema, len } = *piece;
        let group = segments[segment].group as u32;
        (0..len).step_by(CHUNK).map(move |start| UpdateChunk {
            param: (param + start) as u64,
            grad: (grad + start) as u64,
            moment: (moment + start) as u64,
            ema: (ema + start) as u64,
            len: CHUNK.min(len - start) as u32,
            group,
        })
    };
    pieces.iter().flat_map(of).collect()
}

/// Bytes of [`Arena::Update`]. A rank with a shard has a table of its pieces, of which there may be one more for
/// each tensor and bucket than the shard's length says, and one of everything.
pub(in crate::backend) fn update_bytes(rule: Rule, segments: &[Segment], shards: Option<&Shards>) -> usize {
    let whole = || size_of_val(chunks(segments, &Piece::whole(segments)).as_slice());
    match (rule, shards) {
        (Rule::Adafactor { .. }, _) => Tables::new(segments).bytes(),
        (_, Some(shards)) => most_own_chunks(segments, shards) * size_of::<UpdateChunk>() + whole(),
        _ => whole(),
    }
}

/// The most chunks that any rank's shard has.
pub(super) fn most_own_chunks(segments: &[Segment], shards: &Shards) -> usize {
    shards.shard().div_ceil(CHUNK) + segments.len() + 2 * shards.buckets()
}

impl Table {
    /// Fills the arena. If the plan did not include an optimiser, allocates the arena now.
    fn new(cuda: &mut Cuda, update: &Update) -> Result<Self> {
        let bytes = update_bytes(update.rule, update.segments, None);
        if cuda.arena(Arena::Update).bytes < bytes {
            cuda.arenas[Arena::Update as usize] = cuda.gpu.allocate(bytes)?;
        }
        let (gpu, at) = (&cuda.gpu, cuda.arena(Arena::Update).address);
        let kind = if let Rule::Adafactor { .. } = update.rule {
            let mut tables = Tables::new(update.segments);
            tables.place(gpu, at)?;
            TableKind::Tensors(tables)
        } else {
            let chunks = chunks(update.segments, &Piece::whole(update.segments));
            gpu.upload(at, bytemuck::cast_slice(&chunks))?;
            TableKind::Chunks(chunks.len())
        };
        Ok(Self { segments: update.segments.to_vec(), kind })
    }
}

/// The length of the table of chunks.
pub(super) fn own_chunks(cuda: &Cuda) -> usize {
    match cuda.update.table.as_ref().map(|table| &table.kind) {
        Some(TableKind::Chunks(count)) => *count,
        _ => 0,
    }
}

/// Uses a table that is in [`Arena::Update`] already.
pub(super) fn set_table(cuda: &mut Cuda, segments: &[Segment], count: usize) {
    cuda.update.table = Some(Table { segments: segments.to_vec(), kind: TableKind::Chunks(count) });
}

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
        cuda.update.table = Some(Table::new(cuda, update)?);
    }
    let cuda = &*cuda;
    match &cuda.reduction {
        None => prepare(cuda, update)?,
        Some(reduction) => reduction.prepare(cuda, update)?,
    }
    let Table { kind, .. } = cuda.update.table.as_ref().expect("made above");
    let (table, count) = match kind {
        TableKind::Chunks(count) => (cuda.arena(Arena::Update).address, *count),
        TableKind::Tensors(tables) => {
            let (buffers, rule) = (update_buffers(cuda, update), rule_constants(&update.rule));
            return tables.update(cuda, update, cuda.update.constants(), buffers, rule);
        }
    };
    if count > 0 {
        pass(cuda, update, table, count)?;
    }
    cuda.reduction.as_ref().map_or(Ok(()), |reduction| reduction.give_weights(cuda))
}

/// The pass over all chunks of a table.
fn pass(cuda: &Cuda, update: &Update, table: Address, count: usize) -> Result<()> {
    let kernel = match update.rule {
        Rule::Sgd { bf16: false, .. } => kernel!("update_sgd_f32"),
        Rule::Sgd { .. } => kernel!("update_sgd_bf16"),
        Rule::Adam { bf16: false, .. } => kernel!("update_adam_f32"),
        Rule::Adam { .. } => kernel!("update_adam_bf16"),
        Rule::Lion { bf16: false, .. } => kernel!("update_lion_f32"),
        Rule::Lion { .. } => kernel!("update_lion_bf16"),
        Rule::Adafactor { .. } => unreachable!("it walks tensors"),
    };
    let blocks = count.min(UPDATE_BLOCKS * cuda.properties().multiprocessors as usize) as u32;
    let args = UpdateArgs {
        update: cuda.update.constants(),
        buffers: update_buffers(cuda, update),
        chunks: table,
        count: count as u32,
        groups: cuda.step_params.rates(),
        rule: rule_constants(&update.rule),
    };
    cuda.launch(kernel, [blocks, 1, 1], 0, &args)
}

/// Computes the norm, the clip factor, whether to skip, and the constants that depend on t.
fn prepare(cuda: &Cuda, update: &Update) -> Result<()> {
    let most = MOST_NORM_BLOCKS.min(NORM_BLOCKS * cuda.properties().multiprocessors as usize);
    let grads = cuda.arena(Arena::Grads);
    let count = grads.bytes / 4;
    let blocks = count.div_ceil(4 * 256).clamp(1, most) as u32;
    let partials = cuda.update.partials();
    let args = GradientSquaresArgs { grads: grads.address, count: count as u64, partials };
    cuda.launch(kernel!("gradient_squares"), [blocks, 1, 1], 8 * 8, &args)?;
    decide(cuda, update, (partials, blocks as usize), (0, 0))
}

/// From parts of the squares' sum to the norm, the clip factor, whether to skip, and the largest signal.
pub(super) fn decide(
    cuda: &Cuda,
    update: &Update,
    (partials, count): (Address, usize),
    (signals, ranks): (Address, usize),
) -> Result<()> {
    let args = UpdatePrepareArgs {
        params: cuda.step_params.address(),
        report: cuda.update.sums(),
        partials,
        signals,
        count: count as u32,
        ranks: ranks as u32,
        constants: update_constants(update),
        out: cuda.update.constants(),
    };
    cuda.launch(kernel!("update_prepare"), [1, 1, 1], 8 * 8, &args)
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
    let args = CastArgs { weights, copy, count: count as u64 };
    cuda.launch(kernel!("cast_bf16"), flat_grid(count), 0, &args)
}

/// Exchanges `count` weights with their EMA.
pub(super) fn swap(cuda: &Cuda, weights: Address, ema: Address, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let args = SwapEmaArgs { weights, ema, count: count as u64 };
    cuda.launch(kernel!("swap_ema"), flat_grid(count), 0, &args)
}
