//! Emulates a GPU's bf16 without a GPU: a [`Backend`] in front of the CPU that rounds to bf16 whatever
//! [`super::cuda`] stores in bf16. `VITRUM_CPU_ROUNDS` switches it on, for experiments.
//!
//! Arithmetic stays f32. Activations and their gradients are rounded after the operation that stores them. So
//! are the weights, biases and the probe that matrix products read ([`Arena::Working`], in f32 here).
//! Statistics, probabilities of a probe's attention, gradients of parameters, master weights and moments are
//! f32, as on a GPU.
//!
//! A GPU rounds two more things, which never leave an operation and are not rounded here: probabilities and
//! their gradients inside attention, and a product that one of our kernels finishes (`dense.rs` of
//! [`super::cuda`]: erf GELU, dropout in the MLP, tanh), before that kernel reads it.

use super::cpu::CpuBackend;
use super::ops::{self, Op};
use super::options::CPU_ROUNDS;
use super::{
    Arena, Backend, Body, Dtype, Epilogue, Gelu, Group, InputGrad, Join, Linear, Mat, MemoryPlan, Micro,
    Precision, Slot, SlotLayout, StepKeys, StepReport, Storage, Update,
};
use crate::error::{Error, Result};

/// What is rounded to bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// Everything that a GPU stores in bf16.
    All,
    /// The same except the residual stream and its gradient. Matrix products that read those read rounded
    /// copies.
    AllButResidual,
}

impl Rounds {
    /// Reads `VITRUM_CPU_ROUNDS`.
    ///
    /// # Errors
    /// The variable has an unknown value.
    pub fn from_env() -> Result<Option<Rounds>> {
        let wanted = std::env::var(CPU_ROUNDS).unwrap_or_default();
        if wanted.is_empty() { Ok(None) } else { Self::parse(&wanted).map(Some) }
    }

    fn parse(word: &str) -> Result<Rounds> {
        [Rounds::All, Rounds::AllButResidual].into_iter().find(|rounds| rounds.word() == word).ok_or_else(
            || {
                Error::usage(format!("`{CPU_ROUNDS}={word}` is not a rounding mode"))
                    .hint("use `bf16` or `bf16-residual-f32`, or unset it to compute in f32")
            },
        )
    }

    fn word(self) -> &'static str {
        match self {
            Rounds::All => "bf16",
            Rounds::AllButResidual => "bf16-residual-f32",
        }
    }
}

/// See the module.
pub struct Rounded {
    inner: CpuBackend,
    rounds: Rounds,
    /// Bytes that the caller planned; the copies come on top.
    planned_bytes: usize,
    /// Every parameter.
    params: Mat,
    /// Bytes for a rounded copy of one operand in [`Arena::Workspace`].
    operand_bytes: usize,
    /// Where the unrounded residual stream and its gradient lie: matrices for which [`Rounded::joined`] was
    /// called last.
    stream: Vec<Mat>,
}

impl Rounded {
    /// The CPU backend that rounds what `rounds` says.
    pub fn new(inner: CpuBackend, rounds: Rounds) -> Self {
        let params = Mat { arena: Arena::Params, offset: 0, rows: 1, cols: 0, ld: 0, dtype: Dtype::F32 };
        Self { inner, rounds, planned_bytes: 0, params, operand_bytes: 0, stream: Vec::new() }
    }

    /// Called when an operation has stored `at`: rounds it if it is an activation.
    fn stored(&mut self, at: Mat) {
        if at.arena == Arena::Activations {
            let end = at.offset + at.span_bytes();
            self.stream.retain(|old| !(at.offset..end).contains(&old.offset));
            self.inner.round_to_bf16(at);
        }
    }

    /// Called when an operation has stored `at`, a part of the residual stream or of its gradient.
    fn joined(&mut self, at: Mat) {
        self.stored_like(self.rounds == Rounds::AllButResidual, at);
    }

    fn stored_like(&mut self, in_stream: bool, at: Mat) {
        if !in_stream {
            self.stored(at);
        } else if !self.stream.contains(&at) {
            self.stream.push(at);
        }
    }

    fn is_in_stream(&self, at: Mat) -> bool {
        let holds = |part: &Mat| (part.offset..part.offset + part.span_bytes()).contains(&at.offset);
        at.arena == Arena::Activations && self.stream.iter().any(holds)
    }

    /// The matrix as a matrix product reads it; `place` distinguishes the product's two operands.
    fn operand(&mut self, mat: Mat, place: usize) -> Mat {
        if mat.arena == Arena::Params {
            return Mat { arena: Arena::Working, ..mat };
        }
        if !self.is_in_stream(mat) {
            return mat;
        }
        self.copied(mat, place)
    }

    fn copied(&mut self, mat: Mat, place: usize) -> Mat {
        let offset = place * self.operand_bytes;
        let copy = Mat { arena: Arena::Workspace, offset, ld: mat.cols, ..mat };
        self.inner.copy_as_bf16(mat, copy);
        copy
    }

    /// A layer whose weight, and whose bias where the product adds it, are read as bf16.
    fn layer(&mut self, w: &Linear) -> Linear {
        Linear { weight: self.operand(w.weight, 0), bias: self.operand(w.bias, 0), ..*w }
    }

    /// Rounds the copy of the weights again.
    fn refresh(&mut self, at: Mat) {
        self.inner.copy_as_bf16(at, Mat { arena: Arena::Working, ..at });
    }

    /// Rounds the results of an operation that the CPU backend executes as it is.
    fn round_results(&mut self, op: &Op) {
        match *op {
            Op::Patchify(op) => self.stored(op.patches),
            // Addends are read in f32.
            Op::Embed(op) => self.joined(op.x),
            Op::EmbedBackward(op) => self.joined(op.d_y),
            Op::Gelu(op) => self.stored(op.y),
            Op::Swiglu(op) => self.stored(op.y),
            Op::SwigluBackward(op) => self.stored(op.d_pre),
            Op::Rotate(op) => self.stored(op.x),
            Op::Residual(ops::Residual { join: Join::Branch { sum, .. } }) => self.joined(*sum),
            Op::ResidualBackward(ops::ResidualBackward { join: Join::Branch { .. }, d_branch, .. }) => {
                self.stored(d_branch);
            }
            // The stream and its gradient are unchanged.
            Op::Residual(_) | Op::ResidualBackward(_) => {}
            Op::Attention(op) => self.stored(op.o),
            Op::AttentionBackward(op) => self.stored(op.d_qkv),
            Op::QueryAttention(op) => self.stored(op.o),
            Op::QueryAttentionBackward(op) => {
                self.stored(op.d_q);
                self.stored(op.d_kv);
            }
            // Rows of the stream, or their mean, still belong to the stream.
            Op::Pool(op) => self.stored_like(self.is_in_stream(op.x), op.y),
            Op::PoolBackward(op) => self.stored_like(self.is_in_stream(op.d_y), op.d_x),
            Op::Scale(op) => self.stored(op.x),
            Op::Loss(op) => self.stored(op.d_logits),
            Op::BeginReport | Op::AddToReport(_) => {}
            Op::Update(_) => self.refresh(self.params),
            Op::Matmul(_) | Op::MatmulBackward(_) | Op::LayerNorm(_) | Op::LayerNormBackward(_) => {
                unreachable!("{} rounds its own results", op.name())
            }
        }
    }

    fn run_matmul(&mut self, op: &ops::Matmul) -> Result<()> {
        let ops::Matmul { x, w, epilogue, y } = *op;
        let (x, layer) = (self.operand(x, 0), self.layer(w));
        // The layer for products that one of our kernels finishes.
        let layer_of_kernel = Linear { bias: w.bias, ..layer };
        match epilogue {
            // The result is added to the stream; a plain product is followed by `embed`.
            Epilogue::None | Epilogue::BiasResidual(_) => {
                let in_stream = match epilogue {
                    Epilogue::BiasResidual(residual) => self.is_in_stream(residual),
                    _ => self.rounds == Rounds::AllButResidual,
                };
                // A product adds a bias of its output's type.
                self.inner.matmul(x, if in_stream { &layer_of_kernel } else { &layer }, epilogue, y)?;
                self.stored_like(in_stream, y);
            }
            Epilogue::Bias => {
                self.inner.matmul(x, &layer, epilogue, y)?;
                self.stored(y);
            }
            // Fused: the GELU reads the unrounded value.
            Epilogue::BiasGelu { pre, form: Gelu::Tanh, dropout } if dropout.rate == 0.0 => {
                self.inner.matmul(x, &layer, epilogue, y)?;
                pre.into_iter().for_each(|pre| self.stored(pre));
                self.stored(y);
            }
            Epilogue::BiasGelu { pre: Some(pre), form, dropout } => {
                self.inner.matmul(x, &layer_of_kernel, Epilogue::Bias, pre)?;
                self.stored(pre);
                self.gelu(pre, form, dropout, y)?;
            }
            // `y` holds it for a moment, as on a GPU.
            Epilogue::BiasGelu { pre: None, form, dropout } => {
                self.inner.matmul(x, &layer_of_kernel, Epilogue::Bias, y)?;
                let pre = self.copied(y, 0);
                self.gelu(pre, form, dropout, y)?;
            }
            Epilogue::BiasTanh => {
                self.inner.matmul(x, &layer_of_kernel, epilogue, y)?;
                self.stored(y);
            }
        }
        Ok(())
    }

    fn run_matmul_backward(&mut self, op: &ops::MatmulBackward) -> Result<()> {
        let (d_y, x, w) = (self.operand(op.d_y, 0), self.operand(op.x, 1), self.layer(op.w));
        self.inner.matmul_backward(d_y, x, &w, op.d_x)?;
        match op.d_x {
            InputGrad::None => {}
            InputGrad::Plain(d) | InputGrad::Add(d) => self.stored(d),
            InputGrad::Gelu { d_pre: d, .. } | InputGrad::Tanh { d, .. } => self.stored(d),
        }
        Ok(())
    }

    /// LayerNorm normalises the sum as it was stored.
    fn run_layernorm(&mut self, op: &ops::LayerNorm) -> Result<()> {
        self.residual(op.join)?;
        self.inner.layernorm(&Join::Ready(op.join.sum()), op.norm, op.y, op.stats)?;
        self.stored(op.y);
        Ok(())
    }

    /// A branch gets its share of `d_sum` as it was stored.
    fn run_layernorm_backward(&mut self, op: &ops::LayerNormBackward) -> Result<()> {
        let sum = Join::Ready(op.join.sum());
        let alone = ops::LayerNormBackward { join: &sum, d_bias: None, ..*op };
        self.inner.execute(&Op::LayerNormBackward(alone))?;
        self.stored_like(self.is_in_stream(op.join.sum()), op.d_sum);
        self.execute(&Op::ResidualBackward(op.residual()))
    }
}

impl Backend for Rounded {
    fn describe(&self) -> String {
        let what = match self.rounds {
            Rounds::All => "rounds to bf16",
            Rounds::AllButResidual => "rounds to bf16 all but the residual stream",
        };
        format!("{}, {what} (VITRUM_CPU_ROUNDS)", self.inner.describe())
    }

    // Memory ----------------------------------------------------------------------------------------------------

    fn storage(&self) -> Storage {
        self.inner.storage()
    }

    fn precision(&self) -> Precision {
        self.inner.precision()
    }

    fn free_memory(&self) -> Result<usize> {
        self.inner.free_memory()
    }

    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.planned_bytes = plan.total_bytes();
        let bytes = plan.bytes(Arena::Params);
        self.params = Mat { cols: bytes / 4, ld: bytes / 4, ..self.params };
        self.stream.clear();
        self.operand_bytes = plan.activations.iter().map(|entry| entry.bytes).max().unwrap_or(0);
        let mut plan = plan.clone();
        plan.set_bytes(Arena::Working, bytes);
        plan.set_bytes(Arena::Workspace, 2 * self.operand_bytes);
        self.inner.allocate(&plan)
    }

    fn allocated_bytes(&self) -> usize {
        self.planned_bytes
    }

    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        self.inner.write(at, values)?;
        if at.arena == Arena::Params {
            self.refresh(at);
        }
        Ok(())
    }

    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        self.inner.read(at, values)
    }

    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        self.inner.read_arena(arena)
    }

    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        self.inner.write_arena(arena, bytes)?;
        if arena == Arena::Params {
            self.refresh(self.params);
        }
        Ok(())
    }

    fn swap_ema(&mut self) -> Result<()> {
        self.inner.swap_ema()?;
        self.refresh(self.params);
        Ok(())
    }

    // Ranks -----------------------------------------------------------------------------------------------------

    fn join(&mut self, group: Group) -> Result<()> {
        self.inner.join(group)
    }

    fn tell_signal(&mut self, signal: i32) {
        self.inner.tell_signal(signal);
    }

    fn gradients_done(&mut self, from: usize) -> Result<()> {
        self.inner.gradients_done(from)
    }

    fn gather_rows(&mut self, rows: Mat) -> Result<()> {
        self.inner.gather_rows(rows)
    }

    fn gather_ema(&mut self) -> Result<()> {
        self.inner.gather_ema()
    }

    // Choices ---------------------------------------------------------------------------------------------------

    /// The rounding: it affects bits and is not in the recipe.
    fn algorithms(&self) -> Vec<String> {
        vec![format!("{CPU_ROUNDS}={}", self.rounds.word())]
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        let own = self.algorithms();
        if algorithms == own {
            return Ok(());
        }
        let was = algorithms.first().filter(|word| word.starts_with(CPU_ROUNDS));
        Err(format!(
            "this is a run with {}, after one {}",
            own[0],
            was.map_or("without".into(), |was| format!("with {was}"))
        ))
    }

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.inner.new_slot(layout)
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        self.inner.bind_batch(slot)
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        self.inner.unbind_batch()
    }

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        self.inner.begin_step(keys)
    }

    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        self.inner.begin_micro(micro)
    }

    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }

    fn steps_ahead(&self) -> u64 {
        self.inner.steps_ahead()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }

    // Operations and reports ------------------------------------------------------------------------------------

    fn execute(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Matmul(op) => self.run_matmul(op),
            Op::MatmulBackward(op) => self.run_matmul_backward(op),
            Op::LayerNorm(op) => self.run_layernorm(op),
            Op::LayerNormBackward(op) => self.run_layernorm_backward(op),
            _ => {
                self.inner.execute(op)?;
                self.round_results(op);
                Ok(())
            }
        }
    }

    fn report(&mut self) -> Result<StepReport> {
        self.inner.report()
    }
}

#[cfg(test)]
mod tests;
