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
        self.operand_bytes = match self.rounds {
            Rounds::All => 0,
            Rounds::AllButResidual => plan.activations.iter().map(|entry| entry.bytes).max().unwrap_or(0),
        };
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
            // Alone in front of `embed`.
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
            // On a GPU `y` holds `pre` for a moment, rounded.
            Epilogue::BiasGelu { pre: None, .. } => {
                self.inner.matmul(x, &layer_of_kernel, epilogue, y)?;
                self.stored(y);
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
    ) -> Result<()> {
        let sum = Join::Ready(join.sum());
        self.inner.layernorm_backward(d_y, &sum, norm, stats, d_sum, fresh, d_branch)?;
        self.stored_like(self.is_in_stream(join.sum()), d_sum);
        self.residual_backward(join, d_sum, d_branch)
    }

    fn residual(&mut self, join: &Join) -> Result<()> {
        self.inner.residual(join)?;
        if let Join::Branch { sum, .. } = join {
            self.joined(*sum);
        }
        Ok(())
    }

    fn residual_backward(&mut self, join: &Join, d_sum: Mat, d_branch: Mat) -> Result<()> {
        self.inner.residual_backward(join, d_sum, d_branch)?;
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
    ) -> Result<()> {
        self.inner.attention_backward(heads, qkv, o, lse, dropout, d_o, d_qkv)?;
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
mod tests {
    use super::*;
    use crate::backend::{GroupScalars, LossKind, Pixels, Rule, Segment, TargetKind};
    use crate::rng::{Domain, Stream};
    use crate::vit::config::{DropPathMode, InitScheme, NormPlace, PoolKind, Posemb, PosembJoin};
    use crate::vit::{LastBlock, Mode, ModelConfig, Vit};

    fn config() -> ModelConfig {
        ModelConfig {
            image: (8, 12),
            patch: (4, 4),
            width: 24,
            depth: 2,
            heads: 3,
            mlp: 20,
            qkv_bias: true,
            classes: 5,
            pool: PoolKind::Token,
            norm: NormPlace::Before,
            extra_tokens: 1,
            posemb: Posemb::Learned,
            posemb_join: PosembJoin::After,
            rep_size: 0,
            layer_scale: 0.0,
            gelu: Gelu::Tanh,
            ln_eps: 1e-6,
            dropout: 0.0,
            attention_dropout: 0.0,
            drop_path: 0.0,
            drop_path_mode: DropPathMode::Linear,
            init: InitScheme::Deit3,
            head_bias: 0.0,
        }
    }

    /// Every operation.
    fn models() -> [ModelConfig; 4] {
        let map = ModelConfig { pool: PoolKind::Map, extra_tokens: 0, drop_path: 0.2, ..config() };
        let representation = ModelConfig { rep_size: 7, ..config() };
        let masks = ModelConfig {
            extra_tokens: 2,
            layer_scale: 0.5,
            gelu: Gelu::Erf,
            dropout: 0.1,
            attention_dropout: 0.1,
            ..config()
        };
        [config(), map, representation, masks]
    }

    /// A model after one step of gradient descent on one batch.
    fn trained(config: ModelConfig, rounds: Rounds) -> (Rounded, Vit) {
        let (samples, image) = (3, config.image);
        let mode = (Mode::Train, Storage::CPU, LastBlock::Pruned);
        let model = Vit::new(config, Normalise::INCEPTION, samples, mode.0, mode.1, mode.2, |_| false);
        let mut b = Rounded::new(CpuBackend::new(1).unwrap(), rounds);
        let mut plan = model.plan();
        plan.set_bytes(Arena::Moment1, plan.bytes(Arena::Grads));
        b.allocate(&plan).unwrap();
        assert_eq!(b.allocated_bytes(), plan.total_bytes());
        model.init(&mut b, 1).unwrap();

        let layout = SlotLayout { samples, image, pixels: Pixels::U8, targets: TargetKind::Labels };
        let mut slot = b.new_slot(layout).unwrap();
        let mut random = Stream::new(3, Domain::Init, 99, 0);
        slot.images_u8_mut().iter_mut().for_each(|p| *p = random.next_u32() as u8);
        slot.labels_mut().copy_from_slice(&[4, 0, 2]);
        b.bind_batch(slot).unwrap();

        b.begin_step(StepKeys { seed: 7, step: 11 }).unwrap();
        b.begin_report().unwrap();
        b.begin_micro(Micro::whole(samples)).unwrap();
        let segment = |p: &crate::vit::Param| {
            let (param, grad, len) = (p.offset, p.grad_offset.unwrap(), p.padded_len());
            Segment { name: p.name.clone(), param, grad, len, group: 0, factor: None }
        };
        let segments: Vec<Segment> = model.layout.parameters().map(segment).collect();
        let update = Update {
            rule: Rule::Sgd { momentum: 0.0, nesterov: false, bf16: false },
            segments: &segments,
            groups: &[GroupScalars { lr: 0.1, decay: 0.0 }],
            t: 1,
            clip: None,
            clip_torch: false,
            ema_decay: None,
        };
        let loss = Loss { kind: LossKind::Softmax, label_smoothing: 0.1 };
        let mut body = |b: &mut dyn Backend| {
            model.forward(b, true)?;
            model.loss(b, loss)?;
            model.backward(b, true)
        };
        b.step(&mut body, Some(&update)).unwrap();
        (b, model)
    }

    fn values(b: &mut Rounded, arena: Arena) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&b.read_arena(arena).unwrap())
    }

    fn is_bf16(value: &f32) -> bool {
        half::bf16::from_f32(*value).to_f32() == *value
    }

    /// Names of the activations that hold what bf16 cannot.
    fn unrounded(b: &mut Rounded, model: &Vit) -> Vec<String> {
        let values = values(b, Arena::Activations);
        let mut rest = &values[..];
        let mut names = Vec::new();
        for entry in &model.plan().activations {
            let (held, behind) = rest.split_at(entry.bytes / 4);
            rest = behind;
            if !held.iter().all(is_bf16) {
                names.push(entry.name.clone());
            }
        }
        names
    }

    #[allow(clippy::ptr_arg, reason = "a predicate of names")]
    fn is_statistic(name: &String) -> bool {
        ["mean", "rstd", "lse", "p", "samples"].contains(&name.rsplit(' ').next().unwrap())
    }

    #[test]
    fn what_a_gpu_stores_in_bf16_is_bf16_and_statistics_are_not() {
        for config in models() {
            let (mut b, model) = trained(config, Rounds::All);
            let names = unrounded(&mut b, &model);
            assert!(names.iter().all(is_statistic), "{names:?}");
            assert!(names.len() > 4, "{names:?}");
        }
    }

    #[test]
    fn the_residual_stream_alone_can_stay_f32() {
        let names = |config: ModelConfig| {
            let (mut b, model) = trained(config, Rounds::AllButResidual);
            let mut names = unrounded(&mut b, &model);
            names.retain(|name| !is_statistic(name));
            names
        };
        let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, drop_path: 0.2, ..config() };
        let stream = ["block 0 x", "block 0 mid", "block 1 x", "block 1 mid", "x", "d_x"];
        assert_eq!(names(gap.clone()), stream);
        // By the epilogue of a product.
        assert_eq!(names(ModelConfig { drop_path: 0.0, ..gap }), stream);
        // The class tokens' part of the stream.
        let [blocks, class] =
            [["block 0 x", "block 0 mid", "block 1 x"], ["block 1 class x", "block 1 class mid", "x"]];
        assert_eq!(names(config()), [&blocks[..], &class, &["d_x", "class d_x"]].concat());
    }

    #[test]
    fn products_read_rounded_weights_and_updates_do_not() {
        for rounds in [Rounds::All, Rounds::AllButResidual] {
            let (mut b, _) = trained(config(), rounds);
            let params = values(&mut b, Arena::Params);
            assert!(!params.iter().all(is_bf16));
            let rounded: Vec<f32> = params.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
            assert_eq!(values(&mut b, Arena::Working), rounded);
            assert!(!values(&mut b, Arena::Grads).iter().all(is_bf16));
        }
    }

    #[test]
    fn another_way_to_round_is_refused_and_a_run_says_its_own() {
        assert_eq!(Rounds::parse("bf16").unwrap(), Rounds::All);
        assert_eq!(Rounds::parse("bf16-residual-f32").unwrap(), Rounds::AllButResidual);
        for word in ["f32", "BF16", "bf16 "] {
            let error = Rounds::parse(word).unwrap_err();
            assert!(error.message().contains(&format!("`VITRUM_CPU_ROUNDS={word}`")), "{error}");
        }
        let describe = |rounds| Rounded::new(CpuBackend::new(1).unwrap(), rounds).describe();
        assert!(describe(Rounds::All).ends_with("rounds to bf16 (VITRUM_CPU_ROUNDS)"));
        assert!(describe(Rounds::AllButResidual).contains("all but the residual stream"));
    }
}
