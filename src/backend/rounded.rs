//! What a GPU's bf16 does to a run, without the GPU: a [`Backend`] in front of the CPU that rounds to bf16 what
//! [`super::cuda`] stores in bf16. `VITRUM_CPU_ROUNDS` switches it on, for experiments.
//!
//! Arithmetic stays f32. Rounded are activations and their gradients behind the operation that stores them, and the
//! weights, biases and the probe that matrix products read ([`Arena::Working`], in f32 here). Statistics, probabilities of
//! a probe's attention, gradients of parameters, master weights and moments are f32, as on a GPU.
//!
//! Two things a GPU rounds besides and this does not, because they never leave an operation: probabilities and their
//! gradients inside attention, and a product that an own kernel finishes ([`super::cuda`]'s `dense.rs`: erf GELU, dropout
//! in the MLP, tanh) before that kernel reads it.

use super::cpu::CpuBackend;
use super::{
    Arena, Backend, Body, Dtype, Embed, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Loss, Mask, Mat,
    MemoryPlan, Micro, Norm, Normalise, PatchGrid, Pool, Precision, Slot, SlotLayout, Stats, StepKeys,
    StepReport, Storage, Update,
};
use crate::error::{Error, Result};

/// Where the environment asks for it.
pub const VARIABLE: &str = "VITRUM_CPU_ROUNDS";

/// What is rounded to bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// All that a GPU stores in bf16.
    All,
    /// The same without the residual stream and its gradient. Matrix products that read them read rounded copies.
    AllButResidual,
}

impl Rounds {
    /// What `VITRUM_CPU_ROUNDS` asks for.
    ///
    /// # Errors
    /// It asks for something else.
    pub fn from_env() -> Result<Option<Rounds>> {
        let wanted = std::env::var(VARIABLE).unwrap_or_default();
        if wanted.is_empty() { Ok(None) } else { Self::parse(&wanted).map(Some) }
    }

    fn parse(word: &str) -> Result<Rounds> {
        [Rounds::All, Rounds::AllButResidual].into_iter().find(|rounds| rounds.word() == word).ok_or_else(
            || {
                Error::usage(format!("`{VARIABLE}={word}` is no way to round"))
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
    /// What the caller has planned; the copies come on top.
    planned_bytes: usize,
    /// Every parameter.
    params: Mat,
    /// Bytes for a rounded copy of one operand in [`Arena::Workspace`].
    operand_bytes: usize,
    /// Where the residual stream and its gradient lie unrounded: matrices that [`Rounded::joined`] was called for last.
    stream: Vec<Mat>,
}

impl Rounded {
    pub fn new(inner: CpuBackend, rounds: Rounds) -> Self {
        let params = Mat { arena: Arena::Params, offset: 0, rows: 1, cols: 0, ld: 0, dtype: Dtype::F32 };
        Self { inner, rounds, planned_bytes: 0, params, operand_bytes: 0, stream: Vec::new() }
    }

    /// An operation has stored `at`, in bf16 if that is an activation.
    fn stored(&mut self, at: Mat) {
        if at.arena == Arena::Activations {
            let end = at.offset + at.span_bytes();
            self.stream.retain(|old| !(at.offset..end).contains(&old.offset));
            self.inner.round_to_bf16(at);
        }
    }

    /// An operation has stored `at`, a part of the residual stream or of its gradient.
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

    /// A matrix as a matrix product reads it; `place` tells its two operands apart.
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

    /// A layer whose product, and whose bias where the product adds it, are read as bf16.
    fn layer(&mut self, w: &Linear) -> Linear {
        Linear { weight: self.operand(w.weight, 0), bias: self.operand(w.bias, 0), ..*w }
    }

    /// Rounds the copy of the weights anew.
    fn refresh(&mut self, at: Mat) {
        self.inner.copy_as_bf16(at, Mat { arena: Arena::Working, ..at });
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

    // Choices ---------------------------------------------------------------------------------------------------

    /// The rounding, which decides bits and is no part of a recipe.
    fn algorithms(&self) -> Vec<String> {
        vec![format!("{VARIABLE}={}", self.rounds.word())]
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        let own = self.algorithms();
        if algorithms == own {
            return Ok(());
        }
        let was = algorithms.first().filter(|word| word.starts_with(VARIABLE));
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

    // Patch embedding -------------------------------------------------------------------------------------------

    fn patchify(&mut self, grid: PatchGrid, normalise: Normalise, patches: Mat) -> Result<()> {
        self.inner.patchify(grid, normalise, patches)?;
        self.stored(patches);
        Ok(())
    }

    /// What is added is read in f32.
    fn embed(&mut self, embed: &Embed, x: Mat) -> Result<()> {
        self.inner.embed(embed, x)?;
        self.joined(x);
        Ok(())
    }

    fn embed_backward(&mut self, embed: &Embed, d_x: Mat, d_y: Mat) -> Result<()> {
        self.inner.embed_backward(embed, d_x, d_y)?;
        self.joined(d_y);
        Ok(())
    }

    // Dense layers ----------------------------------------------------------------------------------------------

    fn matmul(&mut self, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()> {
        let (x, layer) = (self.operand(x, 0), self.layer(w));
        // What an own kernel behind the product reads.
        let layer_of_kernel = Linear { bias: w.bias, ..layer };
        match epilogue {
            // What is added to the stream; alone in front of `embed`.
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
            // Fused: the GELU is that of the value before it is rounded.
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
            // `y` holds it for a moment, on a GPU as well.
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

    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
        let (d_y, x, layer) = (self.operand(d_y, 0), self.operand(x, 1), self.layer(w));
        self.inner.matmul_backward(d_y, x, &layer, d_x)?;
        match d_x {
            InputGrad::None => {}
            InputGrad::Plain(d) | InputGrad::Add(d) => self.stored(d),
            InputGrad::Gelu { d_pre: d, .. } | InputGrad::Tanh { d, .. } => self.stored(d),
        }
        Ok(())
    }

    fn gelu(&mut self, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()> {
        self.inner.gelu(pre, form, dropout, y)?;
        self.stored(y);
        Ok(())
    }

    // LayerNorm and the residual stream -------------------------------------------------------------------------

    /// A sum is normalised as it was stored.
    fn layernorm(&mut self, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()> {
        self.residual(join)?;
        self.inner.layernorm(&Join::Ready(join.sum()), norm, y, stats)?;
        self.stored(y);
        Ok(())
    }

    /// A branch gets its share of `d_sum` as that was stored.
    fn layernorm_backward(
        &mut self,
        d_y: Mat,
        join: &Join,
        norm: &Norm,
        stats: Stats,
        d_sum: Mat,
        fresh: bool,
        d_branch: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        let sum = Join::Ready(join.sum());
        self.inner.layernorm_backward(d_y, &sum, norm, stats, d_sum, fresh, d_branch, None)?;
        self.stored_like(self.is_in_stream(join.sum()), d_sum);
        self.residual_backward(join, d_sum, d_branch, None)
    }

    fn residual(&mut self, join: &Join) -> Result<()> {
        self.inner.residual(join)?;
        if let Join::Branch { sum, .. } = join {
            self.joined(*sum);
        }
        Ok(())
    }

    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        self.inner.residual_backward(join, d_sum, d_branch, None)?;
        if let Join::Branch { .. } = join {
            self.stored(d_branch);
        }
        Ok(())
    }

    // Attention -------------------------------------------------------------------------------------------------

    fn attention(&mut self, heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) -> Result<()> {
        self.inner.attention(heads, qkv, o, lse, dropout)?;
        self.stored(o);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        heads: Heads,
        qkv: Mat,
        o: Mat,
        lse: Mat,
        dropout: Mask,
        d_o: Mat,
        d_qkv: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        self.inner.attention_backward(heads, qkv, o, lse, dropout, d_o, d_qkv, None)?;
        self.stored(d_qkv);
        Ok(())
    }

    fn probe_attention(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        o: Mat,
        dropout: Mask,
    ) -> Result<()> {
        self.inner.probe_attention(heads, q, kv, p, o, dropout)?;
        self.stored(o);
        Ok(())
    }

    fn probe_attention_backward(
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
        self.inner.probe_attention_backward(heads, q, kv, p, dropout, d_o, d_q, d_kv)?;
        self.stored(d_q);
        self.stored(d_kv);
        Ok(())
    }

    // Head ------------------------------------------------------------------------------------------------------

    /// Rows of the stream, or their mean, are the stream's still.
    fn pool(&mut self, pool: Pool, x: Mat, y: Mat) -> Result<()> {
        self.inner.pool(pool, x, y)?;
        self.stored_like(self.is_in_stream(x), y);
        Ok(())
    }

    fn pool_backward(&mut self, pool: Pool, d_y: Mat, d_x: Mat, fresh: bool) -> Result<()> {
        self.inner.pool_backward(pool, d_y, d_x, fresh)?;
        self.stored_like(self.is_in_stream(d_y), d_x);
        Ok(())
    }

    fn scale(&mut self, x: Mat, factor: f32) -> Result<()> {
        self.inner.scale(x, factor)?;
        self.stored(x);
        Ok(())
    }

    fn loss(&mut self, loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) -> Result<()> {
        self.inner.loss(loss, logits, d_logits, samples)?;
        self.stored(d_logits);
        Ok(())
    }

    // Update ----------------------------------------------------------------------------------------------------

    fn begin_report(&mut self) -> Result<()> {
        self.inner.begin_report()
    }

    fn add_to_report(&mut self, samples: Mat) -> Result<()> {
        self.inner.add_to_report(samples)
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        self.inner.update(update)?;
        self.refresh(self.params);
        Ok(())
    }

    fn report(&mut self) -> Result<StepReport> {
        self.inner.report()
    }
}

#[cfg(test)]
mod tests;
