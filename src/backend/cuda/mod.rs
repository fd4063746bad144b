//! The backend for an NVIDIA GPU. Every operation of [`Backend`] runs as our own kernels and cuBLASLt
//! products; a step is one CUDA graph.
//!
//! This file owns the device memory, the bound batch, and how a step is recorded and replayed. Each group of
//! operations has a file that turns handles into launches; the kernels are in `kernels/`. [`driver`] wraps
//! the CUDA driver in safe functions, [`device`] holds an opened GPU, [`blas`] chooses and runs matrix
//! products, [`libraries`] finds out whether there is a driver to run on.
//!
//! Nothing here depends on the stand-in GPU, except that it brings its own kernels: tests run this same code
//! on it.

mod api;
mod attention;
mod bias;
mod blas;
mod dense;
pub mod device;
pub mod driver;
mod head;
pub mod images;
mod launch;
pub mod libraries;
pub mod nccl;
mod norm;
mod nvml;
pub mod peers;
mod product;
mod query_attention;
mod race;
mod reduce;
mod rotate;
mod stem;
mod step_params;
mod sums;
pub mod time;
mod update;
mod ways;

use super::{
    Arena, Backend, Body, Choice, Device, DeviceOptions, Dtype, Group, Health, HostMemory, Mat, MemoryPlan,
    Micro, Op, Precision, Recompute, Residual, Slot, SlotLayout, StepKeys, StepReport, Storage, Update,
    Write, memory,
};
use crate::error::{Error, Result};

pub(in crate::backend) use update::update_bytes;

use bias::BiasSums;
use blas::Blas;
use driver::{Address, Buffer, Event, Gpu, Graph, Stream};
use launch::{Args, Kernel, View};
use nvml::Nvml;
use step_params::StepParamsRing;
use ways::Ways;

/// Rows of activations are padded to this many elements: 16 bytes in bf16, which vector loads and cuBLASLt want.
const ROW_ALIGN: usize = 8;
/// The workspace: cuBLASLt's part for split products, then scratch for the kernels of one operation, then the
/// params of the step, of reports and of updates.
const WORKSPACE: usize = UPDATE_PARAMS + update::PARAMS_BYTES;
const BLAS_WORKSPACE: usize = 256 << 20;
const SCRATCH: usize = 32 << 20;
const STEP_PARAMS: usize = BLAS_WORKSPACE + SCRATCH;
const UPDATE_PARAMS: usize = (STEP_PARAMS + step_params::BYTES).next_multiple_of(memory::TENSOR_ALIGN);

/// A GPU as a device.
pub struct Cuda {
    gpu: Gpu,
    blas: Blas,
    ways: Ways,
    precision: Precision,
    options: DeviceOptions,
    arenas: Vec<Buffer>,
    step_params: StepParamsRing,
    batch: BoundBatch,
    keys: StepKeys,
    micro: Micro,
    bias_sums: BiasSums,
    update: update::State,
    /// The work with other ranks, and with chunks.
    reduction: Option<reduce::Reduction>,
    /// Classes of the last loss: labels of later batches are checked when they are bound.
    classes: Option<usize>,
    /// Recorded work: a training step, an evaluation pass.
    recorded: [Recorded; 2],
    /// The management library, once it was looked for.
    nvml: Option<Option<Nvml>>,
}

// SAFETY: the driver's handles may be used from any thread on which the context is current, one thread at a
// time: every entry point makes it current, and `&mut self` keeps threads apart.
unsafe impl Send for Cuda {}

/// The state of a kind of work: run once without recording (which loads kernels and chooses algorithms), then
/// recorded.
enum Recorded {
    Never,
    Warm,
    Graph(Graph),
}

/// The two halves of [`Arena::Batches`]: the step reads one while the other is filled.
struct BoundBatch {
    slot: Option<Slot>,
    current: usize,
    /// The copy into a half is done.
    filled: [Event; 2],
    /// The last step that reads a half is done.
    read: [Event; 2],
}

impl Cuda {
    /// Opens GPU `ordinal` of the visible ones.
    ///
    /// # Errors
    /// No driver, too old a driver, no such GPU, too old a GPU, a missing CUDA library, no kernels in this
    /// build.
    pub fn open(ordinal: usize, options: &DeviceOptions) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        gpu.check_launches(options.check_launches);
        attention::hopper::check_gpu(gpu.properties(), options.kernels)?;
        let precision = match options.precision {
            Precision::Auto => Precision::Bf16,
            other => other,
        };
        let step_params = StepParamsRing::new(&gpu)?;
        let event = || gpu.new_event();
        Ok(Self {
            blas: Blas::new(&gpu, precision, options.deterministic)?,
            ways: Ways::default(),
            precision,
            options: *options,
            arenas: Vec::new(),
            step_params,
            batch: BoundBatch {
                slot: None,
                current: 0,
                filled: [event()?, event()?],
                read: [event()?, event()?],
            },
            keys: StepKeys { seed: 0, step: 0 },
            micro: Micro { first: 0, samples: 0, global_first: 0, gradients: Write::Assign, mean_over: 1 },
            bias_sums: BiasSums::default(),
            update: update::State::new(&gpu)?,
            reduction: None,
            classes: None,
            recorded: [Recorded::Never, Recorded::Never],
            nvml: None,
            gpu,
        })
    }

    /// The GPU's properties.
    pub fn properties(&self) -> &device::DeviceProperties {
        self.gpu.properties()
    }

    /// `cublasLtGetVersion`
    pub fn cublaslt_version(&self) -> usize {
        self.blas.version()
    }

    /// How a GPU stores activations and the residual stream in a precision.
    pub fn storage_of(precision: Precision, residual: Residual) -> Storage {
        let (activations, residual) = match (precision, residual) {
            (Precision::F32 | Precision::Tf32, _) => (Dtype::F32, Dtype::F32),
            (Precision::Bf16 | Precision::Auto, Residual::F32) => (Dtype::Bf16, Dtype::F32),
            (Precision::Bf16 | Precision::Auto, _) => (Dtype::Bf16, Dtype::Bf16),
        };
        Storage {
            activations,
            residual,
            row_align: ROW_ALIGN,
            workspace: WORKSPACE,
            recompute: Recompute::None,
        }
    }

    /// The address of a matrix's first element.
    fn at(&self, mat: Mat) -> Address {
        let arena = &self.arenas[mat.arena as usize];
        assert!(mat.offset + mat.span_bytes() <= arena.bytes, "{mat} lies outside its arena");
        arena.address + mat.offset as u64
    }

    fn at_or_null(&self, mat: Option<Mat>) -> Address {
        mat.map_or(0, |mat| self.at(mat))
    }

    /// A matrix as kernels take it.
    fn view(&self, mat: Mat) -> View {
        View::new(self.at(mat), mat)
    }

    fn view_or_none(&self, mat: Option<Mat>) -> View {
        mat.map_or(View::NONE, |mat| self.view(mat))
    }

    /// Starts a kernel on the compute stream.
    fn launch<A: Args>(&self, kernel: Kernel<A>, grid: [u32; 3], shared: u32, args: &A) -> Result<()> {
        // SAFETY: addresses come from `Cuda::at` and `Cuda::scratch`, which check that they lie in an arena, and
        // from the step's own cells of the workspace; arenas are freed after the streams are idle. Each operation
        // asserts the shapes that its kernels rely on.
        unsafe { self.gpu.launch(kernel, grid, shared, args) }
    }

    /// The same on any stream.
    fn launch_on<A: Args>(
        &self,
        stream: Stream,
        kernel: Kernel<A>,
        grid: [u32; 3],
        shared: u32,
        args: &A,
    ) -> Result<()> {
        // SAFETY: as in `launch`.
        unsafe { self.gpu.launch_on(stream, kernel, grid, shared, args) }
    }

    /// A matrix as a matrix product reads it: parameters from their bf16 copy, where there is one.
    fn operand(&self, mat: Mat) -> Mat {
        if mat.arena == Arena::Params && self.storage().has_working_copy() {
            return Mat { arena: Arena::Working, offset: mat.offset / 2, dtype: Dtype::Bf16, ..mat };
        }
        mat
    }

    fn arena(&self, arena: Arena) -> &Buffer {
        &self.arenas[arena as usize]
    }

    /// Scratch for partial sums of one operation.
    fn scratch(&self, bytes: usize) -> Address {
        assert!(bytes <= SCRATCH, "an operation asks for {bytes} bytes of scratch");
        self.arena(Arena::Workspace).address + BLAS_WORKSPACE as u64
    }

    /// Writes the bf16 copy of the weights again.
    fn refresh_working_copy(&mut self) -> Result<()> {
        let working = self.arena(Arena::Working);
        if working.bytes == 0 {
            return Ok(());
        }
        update::cast_to_bf16(self, self.arena(Arena::Params).address, working.address, working.bytes / 2)
    }

    /// Memory for a batch. If the batch is larger than planned, allocates a larger arena once nothing uses
    /// the old one.
    fn room_for_batch(&mut self, bytes: usize, place: usize) -> Result<Address> {
        let bytes = bytes.next_multiple_of(memory::TENSOR_ALIGN);
        if self.arena(Arena::Batches).bytes < 2 * bytes {
            self.gpu.synchronize(Stream::Copy)?;
            self.gpu.synchronize(Stream::Compute)?;
            self.arenas[Arena::Batches as usize] = self.gpu.allocate(2 * bytes)?;
        }
        let arena = self.arena(Arena::Batches);
        Ok(arena.address + (place * (arena.bytes / 2)) as u64)
    }

    /// The work of a step, in a form that can be recorded.
    fn work(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        let Some(update) = update else { return Ok(()) };
        update::update(self, update)?;
        update::close_report(self)
    }

    /// Does the work of a step: the first time launch by launch, which loads kernels and chooses algorithms;
    /// then records it; then replays it.
    fn run(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        let kind = usize::from(update.is_none());
        if !self.options.graph || self.options.check_launches {
            return self.work(body, update);
        }
        match &self.recorded[kind] {
            Recorded::Never => {
                self.recorded[kind] = Recorded::Warm;
                return self.work(body, update);
            }
            Recorded::Warm => {
                // All shapes are known now. A run that is killed later finds its algorithms again.
                self.blas.save();
                let gpu = self.gpu.clone();
                let graph = gpu.capture(|| self.work(body, update))?;
                self.recorded[kind] = Recorded::Graph(graph);
            }
            Recorded::Graph(_) => {}
        }
        let Recorded::Graph(graph) = &self.recorded[kind] else { unreachable!("recorded above") };
        self.gpu.replay(graph)
    }
}

impl Drop for Cuda {
    /// Pending copies use page-locked memory that is freed with `self`.
    fn drop(&mut self) {
        if nccl::has_failed() {
            return;
        }
        for stream in [Stream::Copy, Stream::Compute, Stream::Communication] {
            let _ = self.gpu.synchronize(stream);
        }
    }
}

impl Backend for Cuda {
    fn describe(&self) -> String {
        let properties = self.gpu.properties();
        let Storage { activations, residual, .. } = self.storage();
        let stream = if residual == activations { "" } else { ", residual stream in f32" };
        let precision = format!("{:?}", self.precision).to_lowercase() + stream;
        let (major, minor) = properties.capability;
        let device = Device::Cuda(properties.ordinal);
        format!("{device}, {} (sm_{major}{minor}), {precision}", properties.name)
    }

    // Memory ----------------------------------------------------------------------------------------------------

    fn storage(&self) -> Storage {
        Self::storage_of(self.precision, self.options.residual)
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn free_memory(&self) -> Result<usize> {
        self.gpu.make_current()?;
        Ok(self.gpu.memory()?.0)
    }

    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.gpu.make_current()?;
        let (free, total) = self.gpu.memory()?;
        let needed = plan.total_bytes();
        if needed > free {
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            return Err(Error::new(format!(
                "the run needs {:.2} GiB, and {:.2} of {:.2} GiB are free on {}",
                gib(needed),
                gib(free),
                gib(total),
                self.gpu.properties().name
            ))
            .hint("set a smaller `train.micro_batch`; `vitrum plan` says what takes the memory"));
        }
        self.arenas.clear();
        for index in 0..Arena::COUNT {
            let bytes = plan.bytes_at(index);
            // Workspace contents do not persist between operations.
            let is_workspace = index == Arena::Workspace as usize;
            self.arenas.push(if is_workspace { self.gpu.reserve(bytes) } else { self.gpu.allocate(bytes) }?);
        }
        let workspace = self.arena(Arena::Workspace).address;
        self.gpu.fill(workspace + STEP_PARAMS as u64, 0, WORKSPACE - STEP_PARAMS)?;
        self.recorded = [Recorded::Never, Recorded::Never];
        self.reduction = None;
        self.step_params.place(workspace + STEP_PARAMS as u64);
        self.update.place(workspace + UPDATE_PARAMS as u64);
        self.gpu.synchronize(Stream::Compute)
    }

    fn allocated_bytes(&self) -> usize {
        self.arenas.iter().map(|arena| arena.bytes).sum()
    }

    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "write: {} values into {at}", values.len());
        let bytes = encode(at, values);
        if at.ld == at.cols || at.rows <= 1 {
            self.gpu.upload(self.at(at), &bytes)?;
        } else {
            // Rows with gaps: the gaps are read and written back.
            let mut image = vec![0; at.span_bytes()];
            self.gpu.download(self.at(at), &mut image)?;
            let (row, pitch) = (at.cols * at.dtype.bytes(), at.ld * at.dtype.bytes());
            for (to, from) in image.chunks_mut(pitch).zip(bytes.chunks(row.max(1))) {
                to[..row].copy_from_slice(from);
            }
            self.gpu.upload(self.at(at), &image)?;
        }
        if at.arena == Arena::Params && self.storage().has_working_copy() {
            let copy = self.operand(at);
            return self.write(copy, values);
        }
        Ok(())
    }

    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "read: {at} into {} values", values.len());
        let mut image = vec![0; at.span_bytes()];
        self.gpu.download(self.at(at), &mut image)?;
        let pitch = at.ld * at.dtype.bytes();
        for (to, from) in values.chunks_mut(at.cols.max(1)).zip(image.chunks(pitch.max(1))) {
            decode(at.dtype, &from[..at.cols * at.dtype.bytes()], to);
        }
        Ok(())
    }

    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.arena(arena).bytes];
        self.gpu.download(self.arena(arena).address, &mut bytes)?;
        Ok(bytes)
    }

    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        self.gpu.make_current()?;
        Ok(Box::new(self.gpu.allocate_pinned(bytes)?))
    }

    fn copy_arena(&mut self, arena: Arena, from: usize, to: &mut [u8]) -> Result<()> {
        let arena = self.arena(arena);
        assert!(from + to.len() <= arena.bytes, "copy_arena: {from} and {} of {}", to.len(), arena.bytes);
        self.gpu.download(arena.address + from as u64, to)
    }

    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        assert_eq!(self.arena(arena).bytes, bytes.len(), "write_arena: {arena:?} has another size");
        self.gpu.upload(self.arena(arena).address, bytes)?;
        if arena == Arena::Params {
            self.refresh_working_copy()?;
        }
        self.gpu.synchronize(Stream::Compute)
    }

    fn health(&mut self) -> Option<Health> {
        let ordinal = self.gpu.properties().ordinal;
        self.nvml.get_or_insert_with(|| Nvml::open(ordinal)).as_ref().map(Nvml::health)
    }

    fn swap_ema(&mut self) -> Result<()> {
        if reduce::swap_ema(self)? {
            return Ok(());
        }
        let (params, ema) = (self.arena(Arena::Params), self.arena(Arena::Ema));
        assert_eq!(params.bytes, ema.bytes, "weights and EMA differ in size");
        update::swap(self, params.address, ema.address, params.bytes / 4)?;
        self.refresh_working_copy()
    }

    // Ranks -----------------------------------------------------------------------------------------------------

    fn join(&mut self, group: Group) -> Result<()> {
        reduce::join(self, group)
    }

    fn tell_signal(&mut self, signal: i32) {
        self.step_params.set_signal(signal);
    }

    fn gradients_done(&mut self, from: usize) -> Result<()> {
        reduce::with(self, |reduction, cuda| reduction.advance(cuda, from))
    }

    fn gather_rows(&mut self, rows: Mat) -> Result<()> {
        reduce::with(self, |reduction, cuda| reduction.gather_rows(cuda, rows))
    }

    fn gather_ema(&mut self) -> Result<()> {
        reduce::with(self, |reduction, cuda| reduction.gather_ema(cuda))
    }

    // Choices ---------------------------------------------------------------------------------------------------

    fn algorithms(&self) -> Vec<String> {
        self.blas.algorithms()
    }

    fn choices(&self) -> Vec<Choice> {
        ways::choices(self)
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        self.blas.prefer(algorithms)
    }

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.gpu.make_current()?;
        Ok(Slot::new(Box::new(self.gpu.allocate_pinned(layout.bytes())?), layout))
    }

    /// Starts the copy alongside the current step and returns. The copy waits for the step before that one,
    /// which read the same half, and the next step waits for the copy. Returns the slot that was bound
    /// before; its copy has finished.
    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        self.gpu.make_current()?;
        self.classes.map_or(Ok(()), |classes| head::check_labels(&slot, classes))?;
        let bytes = slot.layout().bytes();
        let (before, place) = (self.batch.current, 1 - self.batch.current);
        let room = self.room_for_batch(bytes, place)?;
        // The old half is free once the work submitted so far is done; later work does not matter.
        self.gpu.record_event(&self.batch.read[before], Stream::Compute)?;
        self.gpu.wait_event(Stream::Copy, &self.batch.read[place])?;
        // SAFETY: the slot is kept in `self.batch`, and given back after the copy's event.
        unsafe { self.gpu.upload_async(room, slot.memory(), Stream::Copy)? };
        self.gpu.record_event(&self.batch.filled[place], Stream::Copy)?;
        self.gpu.wait_event(Stream::Compute, &self.batch.filled[place])?;
        self.step_params.bind(&slot, room);
        self.step_params.send(&self.gpu)?;
        self.batch.current = place;
        let free = self.batch.slot.replace(slot);
        if free.is_some() {
            self.batch.filled[before].synchronize()?;
        }
        Ok(free)
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        // A slot goes back only when no copy reads it.
        let _ = self.gpu.synchronize(Stream::Copy);
        self.batch.slot.take()
    }

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        self.gpu.make_current()?;
        self.keys = keys;
        self.step_params.set_keys(keys);
        self.step_params.send(&self.gpu)
    }

    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        assert!(micro.samples > 0 && micro.mean_over > 0, "a micro-batch without samples");
        self.micro = micro;
        self.bias_sums.begin();
        Ok(())
    }

    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        self.gpu.make_current()?;
        if let Some(update) = update {
            self.step_params.set_rates(update);
            self.reduction.iter_mut().for_each(|reduction| reduction.forget_ema());
        }
        self.step_params.send(&self.gpu)?;
        self.run(body, update)?;
        update.map_or(Ok(()), |_| update::send_report(self))
    }

    fn steps_ahead(&self) -> u64 {
        1
    }

    fn synchronize(&mut self) -> Result<()> {
        self.gpu.make_current()?;
        self.gpu.synchronize(Stream::Compute)
    }

    // Operations and reports ------------------------------------------------------------------------------------

    fn execute(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Patchify(op) => stem::patchify(self, op),
            Op::Embed(op) => stem::embed(self, op),
            Op::EmbedBackward(op) => stem::embed_backward(self, op),
            Op::Matmul(op) => dense::matmul(self, op),
            Op::MatmulBackward(op) => dense::matmul_backward(self, op),
            Op::Gelu(op) => dense::gelu(self, op),
            Op::Swiglu(op) => dense::swiglu(self, op),
            Op::SwigluBackward(op) => dense::swiglu_backward(self, op),
            Op::LayerNorm(op) => norm::layernorm(self, op),
            Op::LayerNormBackward(op) => norm::layernorm_backward(self, op),
            Op::Residual(op) => norm::residual(self, op),
            Op::ResidualBackward(op) => norm::residual_backward(self, op),
            Op::Rotate(op) => rotate::rotate(self, op),
            Op::Attention(op) => attention::attention(self, op),
            Op::AttentionBackward(op) => attention::attention_backward(self, op),
            Op::QueryAttention(op) => query_attention::query_attention(self, op),
            Op::QueryAttentionBackward(op) => query_attention::query_attention_backward(self, op),
            Op::Pool(op) => head::pool(self, op),
            Op::PoolBackward(op) => head::pool_backward(self, op),
            Op::Scale(op) => head::scale(self, op),
            Op::Loss(op) => head::loss(self, op),
            Op::BeginReport => update::begin_report(self),
            Op::AddToReport(op) => update::add_to_report(self, op),
            Op::Update(update) => {
                // Outside a step, the rates have not been sent yet.
                self.step_params.set_rates(update);
                self.step_params.send(&self.gpu)?;
                update::update(self, update)
            }
        }
    }

    fn report(&mut self) -> Result<StepReport> {
        update::report(self)
    }
}

/// Values as bytes of the matrix's type, dense.
fn encode(at: Mat, values: &[f32]) -> Vec<u8> {
    match at.dtype {
        Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
        Dtype::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

/// The inverse of [`encode`].
fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::F32 => values.copy_from_slice(&bytemuck::pod_collect_to_vec::<u8, f32>(bytes)),
        Dtype::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = half::bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}
