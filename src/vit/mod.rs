//! The Vision Transformer, written once over any backend.
//!
//! [`config`] describes the architecture, [`params`] lays out its tensors, [`graph`] and [`block`] name every
//! buffer of a pass. [`forward`] and [`backward`] are straight lists of backend operations; each line of one
//! can be read beside its counterpart in the other. Nothing here names a device, and nothing allocates after
//! [`Vit::new`].

#![forbid(unsafe_code)]

mod backward;
// The buffers of a pass. `Vit` runs passes; a user of the library needs none of its buffers.
#[doc(hidden)]
pub mod block;
pub mod config;
mod forward;
#[doc(hidden)]
pub mod graph;
pub(crate) mod names;
pub mod params;
mod recompute;
pub mod rope;

pub use config::ModelConfig;
pub use params::{Param, ParamLayout};

use crate::backend::{Arena, Backend, Loss, Mat, MemoryPlan, Normalise, Storage};
use crate::error::Result;
use graph::Graph;

/// Whether activations are kept for a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every block keeps the activations that its backward needs, from the first trainable block on.
    Train,
    /// All blocks share one set of buffers; there are no gradients.
    Infer,
}

/// How much of the last block is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LastBlock {
    /// All tokens.
    Whole,
    /// Only the class token, if nothing else is read after the block
    /// ([`ModelConfig::reads_class_token_alone`]); all tokens in other models. The function, the masks and
    /// the parameters are the same.
    #[default]
    Pruned,
}

/// A model bound to buffers: only handles, no memory. Evaluation uses the same buffers as training, without
/// masks.
pub struct Vit {
    /// The architecture.
    pub config: ModelConfig,
    /// Where each tensor lies.
    pub layout: ParamLayout,
    /// Whether there are buffers for a backward pass.
    pub mode: Mode,
    /// The most samples that one pass takes.
    pub micro_batch: usize,
    /// What happens to u8 pixels first.
    pub normalise: Normalise,
    /// Only the class token goes through the end of the last block.
    pub pruned: bool,
    /// The class weights of the training loss, f32 `[1, C]`, if it uses any.
    pub class_weights: Option<Mat>,
    /// [`Vit::sample_metrics`] of the whole batch, of all ranks, where there are several: `[B, 3]`.
    pub all_samples: Option<Mat>,
    train: Graph,
    eval: Graph,
    plan: MemoryPlan,
}

impl Vit {
    /// Lays out parameters and activations for passes of `micro_batch` samples on a device with this
    /// `storage`. `frozen` parameters get no gradient.
    pub fn new(
        config: ModelConfig,
        normalise: Normalise,
        micro_batch: usize,
        mode: Mode,
        storage: Storage,
        last_block: LastBlock,
        frozen: impl Fn(&Param) -> bool,
    ) -> Self {
        let layout = ParamLayout::new(&config, |p| mode == Mode::Infer || frozen(p));
        let mut plan = MemoryPlan::new(storage);
        plan.set_bytes(Arena::Params, layout.param_elements * 4);
        plan.set_bytes(Arena::Grads, layout.grad_elements * 4);
        let pruned = last_block == LastBlock::Pruned && config.reads_class_token_alone();
        let train = Graph::new(&config, &layout, micro_batch, mode, pruned, &mut plan);
        let eval = train.without_masks();
        Self {
            config,
            layout,
            mode,
            micro_batch,
            normalise,
            pruned,
            class_weights: None,
            all_samples: None,
            train,
            eval,
            plan,
        }
    }

    /// The same model with a buffer for class weights after all others, so that no other buffer moves. The
    /// weights belong to the run and not to the model, so they are among the activations and are never stored
    /// in a file.
    pub fn with_class_weights(mut self) -> Self {
        self.class_weights = Some(self.plan.statistics("class weights", 1, self.config.classes));
        self
    }

    /// The same model with a buffer for the metrics of a batch of all ranks, after all others.
    pub fn with_samples_of_all_ranks(mut self, batch: usize) -> Self {
        self.all_samples = Some(self.plan.statistics("samples of all ranks", batch, 3));
        self
    }

    /// Parameters, gradients and activations. The trainer adds the optimiser's arenas.
    pub fn plan(&self) -> MemoryPlan {
        self.plan.clone()
    }

    /// Floating-point operations that are computed for one image: matrix products only, 2 per multiply-add;
    /// training counts as three forward passes. Never more than the model's count in papers,
    /// [`ModelConfig::forward_macs`].
    pub fn flops_done(&self, train: bool) -> u64 {
        let pruned = if self.pruned { self.config.pruned_macs() } else { 0 };
        let forward = 2 * (self.config.forward_macs() - pruned);
        if train { 3 * forward } else { forward }
    }

    /// Fills a fresh parameter arena with the initial values of `config.init`.
    pub fn init(&self, b: &mut dyn Backend, seed: u64) -> Result<()> {
        for (index, param) in self.layout.params.iter().enumerate() {
            b.write(param.mat(), &params::initial_values(&self.config, param, index, seed))?;
        }
        Ok(())
    }

    /// Fills the tensors that are not parameters (tables of positions, zeros for missing biases), for weights
    /// from a file.
    pub fn init_tables(&self, b: &mut dyn Backend) -> Result<()> {
        for (index, param) in self.layout.params.iter().enumerate().filter(|(_, p)| !p.is_parameter()) {
            b.write(param.mat(), &params::initial_values(&self.config, param, index, 0))?;
        }
        Ok(())
    }

    /// Computes the logits of the bound micro-batch, with the masks of training or without.
    pub fn forward(&self, b: &mut dyn Backend, masks: bool) -> Result<()> {
        forward::forward(b, if masks { &self.train } else { &self.eval }, self.normalise)
    }

    /// Computes per-sample losses and metrics, and the gradient of the logits. Adds them to the report.
    pub fn loss(&self, b: &mut dyn Backend, loss: Loss) -> Result<()> {
        let h = &self.train.head;
        b.loss(loss, h.logits, h.d_logits, h.samples)?;
        b.add_to_report(h.samples)
    }

    /// The same with the metrics in `samples`, a part of [`Vit::all_samples`], and not added to the report.
    pub fn loss_of(&self, b: &mut dyn Backend, loss: Loss, samples: Mat) -> Result<()> {
        b.loss(loss, self.train.head.logits, self.train.head.d_logits, samples)
    }

    /// Computes the gradients of all trained parameters from the logits' gradient. `masks` as in the forward
    /// pass.
    pub fn backward(&self, b: &mut dyn Backend, masks: bool) -> Result<()> {
        assert_eq!(
            self.mode,
            Mode::Train,
            "a model laid out for inference keeps nothing for a backward pass"
        );
        backward::backward(b, if masks { &self.train } else { &self.eval })
    }

    /// `[B, C]`
    pub fn logits(&self) -> Mat {
        self.train.head.logits
    }

    /// Loss, top-1, top-5 of each sample: `[B, 3]`.
    pub fn sample_metrics(&self) -> Mat {
        self.train.head.samples
    }

    /// The head's input: `[B, D]`, `[B, 2D]` for `token_gap`, or `[B, R]` with a representation layer.
    pub fn features(&self) -> Mat {
        self.train.head.features
    }
}
