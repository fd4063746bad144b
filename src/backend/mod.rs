//! What a device must be able to do: about twenty fused operations over memory that is planned once.
//!
//! There is no autograd and no graph. The model ([`crate::vit`]) calls these operations in a straight line,
//! forward and then backward. Each operation is a value ([`ops`]) that a backend executes. Operands are
//! [`Mat`] handles into flat arenas, which [`Backend::allocate`] creates before the first step. A step
//! allocates nothing, and every operation may be recorded in a CUDA graph. Everything that changes between
//! steps (learning rates, seeds, the bound batch) reaches the device through [`Backend::begin_step`],
//! [`Backend::begin_micro`] and [`Backend::bind_batch`].
//!
//! Nothing here knows what a Vision Transformer is. Letters: B samples of the micro-batch, T tokens, R = B·T rows,
//! D width, H heads, Dh head size, M mlp width, C classes.
//!
//! Gradient contract: in one backward pass, exactly one operation produces each element of a parameter's
//! gradient (two operations may share a parameter through disjoint views, [`Linear::outputs`]). The operation
//! assigns the gradient in the first micro-batch of a step and adds to it in the others
//! ([`Micro::gradients`]).
//!
//! A bias gradient is the sum over the rows of the matrix that [`Backend::matmul_backward`] gets as `d_y`. An
//! operation that produces such a matrix is told where the sum goes (`d_bias`). A device may compute the sum
//! there, from values that it holds anyway, and then skips it in the product. The product must come next,
//! with `d_y` unchanged.

pub mod batch;
pub mod cost;
// Public for benches and tests of single kernels: [`select`] opens a device.
#[doc(hidden)]
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod dry_run;
pub mod mask;
pub mod memory;
pub mod operands;
pub mod ops;
pub mod options;
pub mod ranks;
pub mod rounded;
pub mod shards;
pub mod timed;
pub mod update;

pub use batch::{Erase, HostMemory, MixBox, Pixels, Slot, SlotLayout, TargetKind};
pub use cost::Cost;
pub use device::{Device, decide, planned, select};
pub use memory::{Arena, Dtype, Mat, MemoryPlan, Recompute, Storage};
pub use operands::{
    Branch, Embed, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Loss, LossKind, Mask, Norm, Normalise,
    PatchGrid, Pool, Rope, RopePairs, Stats, Write, sample_metric,
};
pub use ops::Op;
pub use options::{DeviceOptions, Kernels, Precision, Residual};
pub use ranks::{Group, Ranks};
pub use shards::Shards;
pub use update::{Factor, GroupScalars, Limits, Rule, Segment, StepReport, Update, update_bytes};

use crate::error::{Error, Result};

/// The part of the bound batch that the following operations work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Micro {
    /// First sample, as an index into the bound slot.
    pub first: usize,
    /// B: samples in the micro-batch.
    pub samples: usize,
    /// Index of the slot's first sample in the global batch; keys the masks.
    pub global_first: u64,
    /// How gradients of parameters are written: assigned by the first micro-batch of a step, added to by the others.
    pub gradients: Write,
    /// Samples over which the loss is averaged: the whole batch, so that the gradients of all micro-batches
    /// sum to the mean.
    pub mean_over: usize,
}

impl Micro {
    /// A batch of `samples` that is processed in one pass, on one rank.
    pub fn whole(samples: usize) -> Self {
        Self { first: 0, samples, global_first: 0, gradients: Write::Assign, mean_over: samples }
    }
}

/// Keys of all random numbers in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKeys {
    /// The run's seed.
    pub seed: u64,
    /// Updates done so far.
    pub step: u64,
}

/// Work that can be done in several ways, and the way that a device chose by timing.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Choice {
    /// The matrix product and the work around it.
    pub product: String,
    /// The way chosen for it.
    pub way: String,
    /// The time of each way; empty where the choice comes from a checkpoint.
    pub microseconds: std::collections::BTreeMap<String, f32>,
}

/// What a GPU says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Bytes of its memory that any process uses.
    pub memory_used: u64,
    /// Temperature in °C.
    pub celsius: u32,
    /// Clock of the multiprocessors.
    pub clock_mhz: u32,
    /// Clock of the memory.
    pub memory_clock_mhz: u32,
    /// Power draw.
    pub watts: f64,
    /// Why it runs slower than it could, if it does.
    pub throttled: Vec<&'static str>,
}

/// A pass of operations over a backend.
pub type Body<'a> = &'a mut dyn FnMut(&mut dyn Backend) -> Result<()>;

/// A device. It computes through [`Backend::execute`]; the other methods manage memory, batches and steps.
/// Operations panic on shapes that do not match (a bug of the caller) and return an error when the device
/// fails.
pub trait Backend: Send {
    /// One line for the header of a run: `cpu, 2 threads, avx512`.
    fn describe(&self) -> String;

    // Memory ----------------------------------------------------------------------------------------------------

    /// How this device stores activations; plans are made for it.
    fn storage(&self) -> Storage;
    /// The precision it computes in: never [`Precision::Auto`].
    fn precision(&self) -> Precision;
    /// Bytes that are free for arenas now.
    fn free_memory(&self) -> Result<usize>;
    /// Allocates every arena, zeroed. Called once, before anything else.
    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()>;
    /// Bytes held in arenas: equals [`MemoryPlan::total_bytes`].
    fn allocated_bytes(&self) -> usize;
    /// Writes `rows × cols` values (dense, row by row) into an f32 matrix; padding is left unchanged.
    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()>;
    /// Reads `rows × cols` values, dense.
    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()>;
    /// Reads an arena's raw bytes, including padding (checkpoints).
    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>>;
    /// The inverse of [`Backend::read_arena`]; the length must match.
    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()>;
    /// Memory of the host that the device copies to fast: page-locked on CUDA.
    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        Ok(Box::new(batch::PlainMemory::new(bytes)?))
    }
    /// Copies a part of an arena's raw bytes to the host: as many as `to` holds, from byte `from` on. They are
    /// there when this returns.
    fn copy_arena(&mut self, arena: Arena, from: usize, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&self.read_arena(arena)?[from..from + to.len()]);
        Ok(())
    }
    /// A checksum of an arena's raw bytes.
    fn checksum(&mut self, arena: Arena) -> Result<u64> {
        Ok(xxhash_rust::xxh3::xxh3_64(&self.read_arena(arena)?))
    }
    /// What the device says about itself now, if it says anything.
    fn health(&mut self) -> Option<Health> {
        None
    }
    /// Exchanges the weights with their EMA (to evaluate the EMA, and back). In a group, after
    /// [`Backend::gather_ema`], and back before the next step.
    fn swap_ema(&mut self) -> Result<()>;

    // Ranks -----------------------------------------------------------------------------------------------------
    //
    // A device alone, without chunks, does nothing in these methods. In a group all ranks call them, and
    // [`Backend::step`], in the same order.

    /// Becomes a member of a group, after [`Backend::allocate`] and before the first step. From now on a
    /// step's update is that of all ranks' gradients: each sums its part of them, updates its shard, and gets
    /// the others' weights. `Moment1`, `Moment2` and `Ema` then hold the shard, if the group is sharded.
    ///
    /// # Errors
    /// The device cannot work with others.
    fn join(&mut self, _group: Group) -> Result<()> {
        let device = self.describe();
        Err(Error::usage(format!("sums over ranks or chunks are not built yet on {device}")))
    }
    /// Says which signal this rank got, or 0. The next step's report has the largest of all ranks.
    fn tell_signal(&mut self, _signal: i32) {}
    /// Gradients from element `from` of [`Arena::Grads`] on are final in this micro-batch. The pass calls it
    /// with descending `from`, and with 0 at its end: in the last micro-batch of a step, sums over ranks can
    /// begin while the pass goes on.
    fn gradients_done(&mut self, _from: usize) -> Result<()> {
        Ok(())
    }
    /// Gives every rank all rows of a dense f32 matrix, of which rank r of N has filled the r-th N-th.
    fn gather_rows(&mut self, _rows: Mat) -> Result<()> {
        Ok(())
    }
    /// Gives every rank the whole EMA, for [`Backend::swap_ema`]. The gradients are lost.
    fn gather_ema(&mut self) -> Result<()> {
        Ok(())
    }

    // Choices ---------------------------------------------------------------------------------------------------

    /// The choices that the device made by timing and that affect bits, in a form that
    /// [`Backend::prefer_algorithms`] understands. Empty where the same work is always done in the same way.
    fn algorithms(&self) -> Vec<String>;
    /// The same for people: where several ways of doing the same work were timed, which one won.
    fn choices(&self) -> Vec<Choice> {
        Vec::new()
    }
    /// Adopts the choices of a checkpoint, before the first step, or says in one sentence why they do not
    /// apply here.
    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String>;

    // Batches ---------------------------------------------------------------------------------------------------

    /// A batch slot in memory that the device can copy from (page-locked on CUDA).
    fn new_slot(&self, layout: SlotLayout) -> Result<Slot>;
    /// Makes `slot` the batch of the following operations, and returns the slot that is no longer needed. A
    /// device with its own memory copies the slot while earlier steps compute.
    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>>;
    /// Returns the bound batch at the end of a run.
    fn unbind_batch(&mut self) -> Option<Slot>;

    // The step --------------------------------------------------------------------------------------------------

    /// Starts a step: masks are drawn from these keys until the next call.
    fn begin_step(&mut self, keys: StepKeys) -> Result<()>;
    /// Starts a micro-batch: operations work on these samples of the bound batch until the next call.
    fn begin_micro(&mut self, micro: Micro) -> Result<()>;
    /// Runs `body`, then the update. Callers repeat it with bodies that do the same work, so that a device
    /// may record the work once and replay it: between two calls only the bound batch, the keys of
    /// [`Backend::begin_step`], and the update's `t` and `groups` differ.
    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()>;
    /// How many steps may usefully be submitted before the report of the first is read: 0 where
    /// [`Backend::step`] returns only when its work is done.
    fn steps_ahead(&self) -> u64;
    /// Waits until all submitted work is done.
    fn synchronize(&mut self) -> Result<()>;

    // Operations ------------------------------------------------------------------------------------------------

    /// Executes or submits one operation. The methods below wrap it, with operands in the order of a formula.
    /// Models call those methods; a device implements this one.
    fn execute(&mut self, op: &Op) -> Result<()>;

    /// [`ops::Patchify`]
    fn patchify(&mut self, grid: PatchGrid, normalise: Normalise, patches: Mat) -> Result<()> {
        self.execute(&Op::Patchify(ops::Patchify { grid, normalise, patches }))
    }
    /// [`ops::Embed`]
    fn embed(&mut self, embed: &Embed, x: Mat) -> Result<()> {
        self.execute(&Op::Embed(ops::Embed { embed, x }))
    }
    /// [`ops::EmbedBackward`]
    fn embed_backward(&mut self, embed: &Embed, d_x: Mat, d_y: Mat) -> Result<()> {
        self.execute(&Op::EmbedBackward(ops::EmbedBackward { embed, d_x, d_y }))
    }
    /// [`ops::Matmul`]
    fn matmul(&mut self, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()> {
        self.execute(&Op::Matmul(ops::Matmul { x, w, epilogue, y }))
    }
    /// [`ops::MatmulBackward`]
    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
        self.execute(&Op::MatmulBackward(ops::MatmulBackward { d_y, x, w, d_x }))
    }
    /// [`ops::Gelu`]
    fn gelu(&mut self, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()> {
        self.execute(&Op::Gelu(ops::Gelu { pre, form, dropout, y }))
    }
    /// [`ops::Swiglu`]
    fn swiglu(&mut self, pre: Mat, dropout: Mask, y: Mat) -> Result<()> {
        self.execute(&Op::Swiglu(ops::Swiglu { pre, dropout, y }))
    }
    /// [`ops::SwigluBackward`]
    fn swiglu_backward(
        &mut self,
        d_y: Mat,
        pre: Mat,
        dropout: Mask,
        d_pre: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.execute(&Op::SwigluBackward(ops::SwigluBackward { d_y, pre, dropout, d_pre, d_bias }))
    }
    /// [`ops::LayerNorm`]
    fn layernorm(&mut self, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()> {
        self.execute(&Op::LayerNorm(ops::LayerNorm { join, norm, y, stats }))
    }
    /// [`ops::LayerNormBackward`]
    fn layernorm_backward(
        &mut self,
        d_y: Mat,
        join: &Join,
        norm: &Norm,
        stats: Stats,
        d_sum: Mat,
        write: Write,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.execute(&Op::LayerNormBackward(ops::LayerNormBackward {
            d_y,
            join,
            norm,
            stats,
            d_sum,
            write,
            d_branch,
            d_bias,
        }))
    }
    /// [`ops::Residual`]
    fn residual(&mut self, join: &Join) -> Result<()> {
        self.execute(&Op::Residual(ops::Residual { join }))
    }
    /// [`ops::ResidualBackward`]
    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.execute(&Op::ResidualBackward(ops::ResidualBackward { join, d_sum, d_branch, d_bias }))
    }
    /// [`ops::Rotate`]
    fn rotate(&mut self, rope: &Rope, heads: Heads, x: Mat, back: bool) -> Result<()> {
        self.execute(&Op::Rotate(ops::Rotate { rope, heads, x, back }))
    }
    /// [`ops::Attention`]
    fn attention(&mut self, heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) -> Result<()> {
        self.execute(&Op::Attention(ops::Attention { heads, qkv, o, lse, dropout }))
    }
    /// [`ops::AttentionBackward`]
    fn attention_backward(
        &mut self,
        heads: Heads,
        qkv: Mat,
        o: Mat,
        lse: Mat,
        dropout: Mask,
        d_o: Mat,
        d_qkv: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.execute(&Op::AttentionBackward(ops::AttentionBackward {
            heads,
            qkv,
            o,
            lse,
            dropout,
            d_o,
            d_qkv,
            d_bias,
        }))
    }
    /// [`ops::QueryAttention`]
    fn query_attention(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        o: Mat,
        dropout: Mask,
    ) -> Result<()> {
        self.execute(&Op::QueryAttention(ops::QueryAttention { heads, q, kv, p, o, dropout }))
    }
    /// [`ops::QueryAttentionBackward`]
    fn query_attention_backward(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        dropout: Mask,
        d_o: Mat,
        d_q: Mat,
        d_kv: Mat,
    ) -> Result<()> {
        self.execute(&Op::QueryAttentionBackward(ops::QueryAttentionBackward {
            heads,
            q,
            kv,
            p,
            dropout,
            d_o,
            d_q,
            d_kv,
        }))
    }
    /// [`ops::Pool`]
    fn pool(&mut self, pool: Pool, x: Mat, y: Mat) -> Result<()> {
        self.execute(&Op::Pool(ops::Pool { pool, x, y }))
    }
    /// [`ops::PoolBackward`]
    fn pool_backward(&mut self, pool: Pool, d_y: Mat, d_x: Mat, write: Write) -> Result<()> {
        self.execute(&Op::PoolBackward(ops::PoolBackward { pool, d_y, d_x, write }))
    }
    /// [`ops::Scale`]
    fn scale(&mut self, x: Mat, factor: f32) -> Result<()> {
        self.execute(&Op::Scale(ops::Scale { x, factor }))
    }
    /// [`ops::Loss`]
    fn loss(&mut self, loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) -> Result<()> {
        self.execute(&Op::Loss(ops::Loss { loss, logits, d_logits, samples }))
    }
    /// [`Op::BeginReport`]
    fn begin_report(&mut self) -> Result<()> {
        self.execute(&Op::BeginReport)
    }
    /// [`ops::AddToReport`]
    fn add_to_report(&mut self, samples: Mat) -> Result<()> {
        self.execute(&Op::AddToReport(ops::AddToReport { samples }))
    }
    /// [`Op::Update`]; [`Backend::step`] runs it after its body.
    fn update(&mut self, update: &Update) -> Result<()> {
        self.execute(&Op::Update(update))
    }

    // Reports ---------------------------------------------------------------------------------------------------

    /// Waits for the oldest unread report and returns it. Each [`Backend::step`] with an update leaves one.
    /// Read them in order, at most [`Backend::steps_ahead`] steps late. Without a step, the report is of the
    /// current sums.
    fn report(&mut self) -> Result<StepReport>;
}
