//! The model's gradients, for every architecture that the configuration allows: the backward pass against
//! central differences of the loss along random directions, with dropout, drop-path and accumulation.

use vitrum::backend::cpu::CpuBackend;
use vitrum::backend::{
    Backend, Gelu, Loss, LossKind, Micro, MixBox, Normalise, Pixels, Recompute, Slot, SlotLayout, StepKeys,
    Storage, TargetKind, Write,
};
use vitrum::rng::{Domain, Stream};
use vitrum::vit::config::{
    DropPathMode, MlpKind, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias, RopeIndexing, RopeKind,
};
use vitrum::vit::{LastBlock, Mode, ModelConfig, Param, Vit};

struct Bench {
    backend: CpuBackend,
    model: Vit,
    loss: Loss,
    batch: usize,
}

impl Bench {
    fn new(config: ModelConfig, batch: usize, micro: usize, loss: LossKind, frozen: &[&str]) -> Self {
        Self::with(Storage::CPU, LastBlock::Pruned, config, batch, micro, loss, frozen)
    }

    fn with(
        storage: Storage,
        last_block: LastBlock,
        config: ModelConfig,
        batch: usize,
        micro: usize,
        loss: LossKind,
        frozen: &[&str],
    ) -> Self {
        config.validate().unwrap();
        let mut backend = CpuBackend::new(2).unwrap();
        let is_frozen = |p: &Param| frozen.iter().any(|f| p.name.starts_with(f));
        let (normalise, mode) = (Normalise::INCEPTION, Mode::Train);
        let model = Vit::new(config.clone(), normalise, micro, mode, storage, last_block, is_frozen);
        backend.allocate(&model.plan()).unwrap();
        assert_eq!(backend.allocated_bytes(), model.plan().total_bytes());
        let mut s = Stream::new(3, Domain::Init, 99, 0);
        model.init(&mut backend, 1).unwrap();
        // Away from zero and from small weights, so that every path carries a gradient.
        for p in model.layout.parameters() {
            let mut values = vec![0.0; p.len()];
            backend.read(p.mat(), &mut values).unwrap();
            values.iter_mut().for_each(|v| *v += 0.15 * s.normal() as f32);
            backend.write(p.mat(), &values).unwrap();
        }
        let layout = SlotLayout {
            samples: batch,
            image: config.image,
            pixels: Pixels::U8,
            targets: TargetKind::Labels,
        };
        let mut slot = backend.new_slot(layout).unwrap();
        slot.images_u8_mut().iter_mut().for_each(|p| *p = s.next_u32() as u8);
        slot.labels_mut().iter_mut().for_each(|l| *l = s.below(config.classes) as i32);
        mix(&mut slot);
        backend.bind_batch(slot).unwrap();
        Self { backend, model, loss: Loss { label_smoothing: 0.1, ..Loss::plain(loss) }, batch }
    }

    /// The loss of the whole batch. With `backward`, also computes gradients.
    fn run(&mut self, backward: bool) -> f64 {
        let b = &mut self.backend;
        b.begin_step(StepKeys { seed: 7, step: 11 }).unwrap();
        b.begin_report().unwrap();
        for first in (0..self.batch).step_by(self.model.micro_batch) {
            let samples = self.model.micro_batch;
            let micro = Micro {
                first,
                samples,
                global_first: 0,
                gradients: Write::add_if(first > 0),
                mean_over: self.batch,
            };
            b.begin_micro(micro).unwrap();
            self.model.forward(b, true).unwrap();
            self.model.loss(b, self.loss).unwrap();
            if backward {
                self.model.backward(b, true).unwrap();
            }
        }
        b.report().unwrap().loss
    }

    fn gradients(&mut self) -> Vec<(String, Vec<f32>)> {
        self.run(true);
        let mut gradients = Vec::new();
        for p in self.model.layout.parameters() {
            if let Some(gradient) = p.grad() {
                let mut values = vec![0.0; p.len()];
                self.backend.read(gradient, &mut values).unwrap();
                gradients.push((p.name.clone(), values));
            }
        }
        gradients
    }

    /// Compares each tensor's gradient with a difference of the loss.
    fn check(&mut self, what: &str) {
        let gradients = self.gradients();
        for (name, gradient) in &gradients {
            let param = self.model.layout.get(name).clone();
            let mut values = vec![0.0; param.len()];
            self.backend.read(param.mat(), &mut values).unwrap();
            let mut s = Stream::new(17, Domain::Init, param.offset as u64, 1);
            // Signs of the gradient with random weights: the slope adds up instead of cancelling.
            let direction: Vec<f32> = gradient.iter().map(|g| g.signum() * (0.5 + s.uniform())).collect();
            let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let length = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
            let eps = 0.02 / length;
            let mut at = |factor: f32| {
                let moved: Vec<f32> =
                    values.iter().zip(&direction).map(|(v, d)| v + factor * eps * d).collect();
                self.backend.write(param.mat(), &moved).unwrap();
                self.run(false)
            };
            // Fourth order, so that the step can be long enough for f32.
            let numeric = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * f64::from(eps));
            self.backend.write(param.mat(), &values).unwrap();
            let noise = 1e-6 / f64::from(eps);
            let error = (numeric - slope).abs();
            assert!(
                error < 3e-3 * slope.abs() + noise,
                "{what}: `{name}`: difference {numeric:.6}, gradient {slope:.6} (noise {noise:.1e})"
            );
        }
    }
}

/// Mixup on all samples, cutmix on the first.
fn mix(slot: &mut Slot) {
    let n = slot.layout().samples as u32;
    slot.partner_mut().iter_mut().zip(0..).for_each(|(p, i)| *p = (i + n - 1) % n);
    slot.lambda_mut().fill(0.7);
    slot.boxes_mut()[0] = MixBox { y0: 1, x0: 2, y1: 5, x1: 7 };
}

/// Checks the model with the whole last block, and with a pruned one if that differs.
fn check(what: &str, config: ModelConfig) {
    if config.reads_class_token_alone() {
        let whole = LastBlock::Whole;
        Bench::with(Storage::CPU, whole, config.clone(), 3, 3, LossKind::Softmax, &[]).check(what);
    }
    Bench::new(config, 3, 3, LossKind::Softmax, &[]).check(&format!("{what}, pruned"));
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// How far `a` lies from `b`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
}

#[test]
fn gradients_of_every_head_and_position_embedding_are_right() {
    check("class token", ModelConfig::tiny());
    check("representation", ModelConfig { rep_size: 11, gelu: Gelu::Erf, ..ModelConfig::tiny() });
    check(
        "class token, positions before",
        ModelConfig { posemb_join: PosembJoin::Before, ..ModelConfig::tiny() },
    );
    check("distillation", ModelConfig { extra_tokens: 2, ..ModelConfig::tiny() });
    check(
        "distillation, positions before",
        ModelConfig { extra_tokens: 2, posemb_join: PosembJoin::Before, ..ModelConfig::tiny() },
    );
    let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..ModelConfig::tiny() };
    check("gap", gap.clone());
    check("gap, fc_norm", ModelConfig { norm: NormPlace::After, ..gap.clone() });
    check("gap over patches beside a class token", ModelConfig { extra_tokens: 1, ..gap.clone() });
    check("sincos2d", ModelConfig { posemb: Posemb::Sincos2d, ..gap.clone() });
    let sincos =
        ModelConfig { posemb: Posemb::Sincos2d, posemb_join: PosembJoin::Before, ..ModelConfig::tiny() };
    check("sincos2d with a class token", sincos);
    check("map", ModelConfig { pool: PoolKind::Map, ..gap.clone() });
    check(
        "map with a class token and a representation",
        ModelConfig { pool: PoolKind::Map, rep_size: 7, ..ModelConfig::tiny() },
    );
    check(
        "one block, rectangular patch",
        ModelConfig { depth: 1, patch: (2, 6), heads: 2, ..ModelConfig::tiny() },
    );
}

/// Every choice that came after the first Vision Transformers, alone and with its usual company.
#[test]
fn gradients_of_later_backbones_are_right() {
    let tiny = ModelConfig { width: 24, heads: 3, ..ModelConfig::tiny() };
    let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..tiny.clone() };
    check("registers", ModelConfig { registers: 3, ..tiny.clone() });
    check(
        "registers without positions",
        ModelConfig { registers: 2, posemb_join: PosembJoin::Before, ..gap.clone() },
    );
    check("no positions", ModelConfig { posemb: Posemb::None, ..tiny.clone() });
    check(
        "CLIP",
        ModelConfig { norm_pre: true, patch_bias: false, gelu: Gelu::Quick, dropout: 0.1, ..tiny.clone() },
    );
    check("no bias of q, k, v", ModelConfig { qkv_bias: QkvBias::None, ..tiny.clone() });
    check("no bias of k", ModelConfig { qkv_bias: QkvBias::Qv, ..tiny.clone() });
    check("class token and mean", ModelConfig { pool: PoolKind::TokenGap, registers: 1, ..tiny.clone() });
    check("no final norm", ModelConfig { norm: NormPlace::None, layer_scale: 0.3, ..tiny.clone() });
    check("mean, no final norm", ModelConfig { norm: NormPlace::None, ..gap.clone() });
    check("heads of a MAP head", ModelConfig { pool: PoolKind::Map, map_heads: Some(4), ..gap.clone() });
    let swiglu = ModelConfig { mlp_kind: MlpKind::Swiglu, ..tiny.clone() };
    check("SwiGLU", swiglu.clone());
    check("SwiGLU with a norm", ModelConfig { mlp_norm: true, dropout: 0.1, ..swiglu.clone() });
    let rope = ModelConfig { rope: RopeKind::Dinov3, posemb: Posemb::None, registers: 2, ..tiny };
    check("DINOv3", ModelConfig { qkv_bias: QkvBias::Qv, layer_scale: 0.4, ..rope.clone() });
    check(
        "EVA-02",
        ModelConfig {
            rope: RopeKind::Eva,
            rope_ref: Some((2, 2)),
            rope_offset: 0.5,
            rope_indexing: RopeIndexing::Xy,
            posemb: Posemb::Learned,
            mlp_kind: MlpKind::Swiglu,
            mlp_norm: true,
            attention_dropout: 0.2,
            ..rope
        },
    );
}

#[test]
fn gradients_with_masks_and_layer_scale_are_right() {
    check("layer scale", ModelConfig { layer_scale: 0.3, ..ModelConfig::tiny() });
    check("dropout", ModelConfig { dropout: 0.2, ..ModelConfig::tiny() });
    check("attention dropout", ModelConfig { attention_dropout: 0.3, ..ModelConfig::tiny() });
    let path = ModelConfig { drop_path: 0.5, drop_path_mode: DropPathMode::Constant, ..ModelConfig::tiny() };
    check("drop path", path.clone());
    check(
        "all of them",
        ModelConfig { layer_scale: 0.5, dropout: 0.1, attention_dropout: 0.1, ..path.clone() },
    );
    let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, norm: NormPlace::After, ..path.clone() };
    check("drop path, fc_norm", gap);
    check("dropout, map", ModelConfig { pool: PoolKind::Map, dropout: 0.2, ..path });
}

#[test]
fn a_pruned_last_block_changes_nothing_but_rounding() {
    let masked = ModelConfig {
        dropout: 0.2,
        attention_dropout: 0.2,
        drop_path: 0.4,
        drop_path_mode: DropPathMode::Constant,
        ..ModelConfig::tiny()
    };
    let cases = [
        ("plain", ModelConfig::tiny()),
        ("masked", masked.clone()),
        ("layer scale, masked", ModelConfig { layer_scale: 0.4, gelu: Gelu::Erf, ..masked.clone() }),
        ("layer scale", ModelConfig { layer_scale: 0.4, ..ModelConfig::tiny() }),
        ("representation", ModelConfig { rep_size: 11, ..masked.clone() }),
        ("one block", ModelConfig { depth: 1, ..masked.clone() }),
        ("odd sizes", ModelConfig { width: 21, mlp: 13, posemb_join: PosembJoin::Before, ..masked }),
    ];
    let end = ["patch_embed", "cls_token", "pos_embed", "blocks.0."];
    let part = ["blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2", "blocks.0.attn.qkv.bias"];
    let head = ["patch_embed", "cls_token", "pos_embed", "blocks."];
    for (what, config) in cases {
        for recompute in [Recompute::None, Recompute::LnGelu, Recompute::Block] {
            for frozen in [&[][..], &end, &part, &head] {
                let run = |last_block| {
                    let storage = Storage { recompute, ..Storage::CPU };
                    let loss = LossKind::Softmax;
                    let mut bench = Bench::with(storage, last_block, config.clone(), 4, 2, loss, frozen);
                    let loss = bench.run(false);
                    let mut logits = vec![0.0; 2 * bench.model.config.classes];
                    bench.backend.read(bench.model.logits(), &mut logits).unwrap();
                    (loss, logits, bench.gradients(), bench.model.plan().total_bytes())
                };
                let (whole, pruned) = (run(LastBlock::Whole), run(LastBlock::Pruned));
                let what = format!("{what}, {recompute:?}, {frozen:?}");
                assert!(
                    (whole.0 - pruned.0).abs() <= 1e-6 * whole.0,
                    "{what}: loss {} {}",
                    whole.0,
                    pruned.0
                );
                assert!(distance(&whole.1, &pruned.1) <= 2e-6 * norm(&whole.1), "{what}: logits");
                let largest = whole.2.iter().map(|(_, g)| norm(g)).fold(0.0, f64::max);
                assert_eq!(whole.2.len(), pruned.2.len());
                for ((name, a), (_, b)) in whole.2.iter().zip(&pruned.2) {
                    let (error, bound) = (distance(a, b), 3e-6 * norm(a) + 1e-7 * largest);
                    assert!(error <= bound, "{what}: `{name}` differs by {error:.1e}, more than {bound:.1e}");
                }
            }
        }
    }
}

#[test]
fn pruning_takes_less_memory_and_fewer_operations_and_leaves_other_models_alone() {
    let vit = |config: &ModelConfig, mode, last_block| {
        Vit::new(config.clone(), Normalise::INCEPTION, 4, mode, Storage::CPU, last_block, |_| false)
    };
    let large = ModelConfig { depth: 12, ..ModelConfig::variant("Ti/16", 224, 1000).unwrap() };
    for mode in [Mode::Train, Mode::Infer] {
        let both = [LastBlock::Whole, LastBlock::Pruned].map(|last_block| vit(&large, mode, last_block));
        let [whole, pruned] = both.each_ref().map(|model| model.plan().total_bytes());
        // All blocks share their buffers in inference, so pruning saves no memory.
        assert!(if mode == Mode::Train { pruned < whole } else { pruned < whole + whole / 20 });
        let [whole, pruned] = both.each_ref().map(|model| model.flops_done(true));
        assert_eq!(whole, large.train_flops());
        let share = 1.0 - pruned as f64 / whole as f64;
        assert!((0.065..0.075).contains(&share), "{share} of the operations are left out");
        assert_eq!(both[0].layout, both[1].layout);
    }
    let others = [
        ModelConfig { pool: PoolKind::Gap, ..ModelConfig::tiny() },
        ModelConfig { pool: PoolKind::Map, ..ModelConfig::tiny() },
        ModelConfig { extra_tokens: 2, ..ModelConfig::tiny() },
    ];
    for config in others {
        let [whole, pruned] = [LastBlock::Whole, LastBlock::Pruned].map(|l| vit(&config, Mode::Train, l));
        assert!(!pruned.pruned && pruned.plan().total_bytes() == whole.plan().total_bytes());
        assert_eq!(pruned.flops_done(true), whole.flops_done(true));
    }
}

#[test]
fn gradients_of_the_sigmoid_loss_are_right() {
    Bench::new(ModelConfig::tiny(), 3, 3, LossKind::Sigmoid, &[]).check("sigmoid");
}

#[test]
fn accumulation_changes_no_mask_and_no_mean() {
    let config = ModelConfig {
        dropout: 0.2,
        attention_dropout: 0.2,
        drop_path: 0.3,
        drop_path_mode: DropPathMode::Constant,
        ..ModelConfig::tiny()
    };
    let whole = Bench::new(config.clone(), 6, 6, LossKind::Softmax, &[]).gradients();
    let largest = whole.iter().flat_map(|(_, g)| g).fold(0.0f32, |m, g| m.max(g.abs()));
    for micro in [3, 2, 1] {
        let split = Bench::new(config.clone(), 6, micro, LossKind::Softmax, &[]).gradients();
        for ((name, a), (_, b)) in whole.iter().zip(&split) {
            let (norm, difference) = (norm(a), distance(a, b));
            let bound = 1e-5 * norm + 1e-6 * f64::from(largest);
            assert!(difference <= bound, "micro-batch {micro}: `{name}` differs by {difference} of {norm}");
        }
    }
}

#[test]
fn frozen_parameters_get_no_gradient_and_leave_the_others_as_they_were() {
    let config = ModelConfig { depth: 3, drop_path: 0.2, ..ModelConfig::tiny() };
    let all = Bench::new(config.clone(), 3, 3, LossKind::Softmax, &[]).gradients();
    let frozen = [
        "cls_token",
        "pos_embed",
        "patch_embed",
        "blocks.0",
        "blocks.1.norm1",
        "blocks.1.attn",
        "blocks.2.mlp",
    ];
    let some = Bench::new(config, 3, 3, LossKind::Softmax, &frozen).gradients();
    assert!(some.len() < all.len());
    for (name, gradient) in &some {
        assert!(!frozen.iter().any(|f| name.starts_with(f)), "{name}");
        let same = all.iter().find(|(n, _)| n == name).unwrap();
        assert_eq!(&same.1, gradient, "{name}");
    }
}

#[test]
fn what_is_recomputed_changes_no_bit_of_a_gradient_and_takes_less_memory() {
    let depth = 4;
    let plain = ModelConfig { depth, ..ModelConfig::tiny() };
    let masked = ModelConfig { dropout: 0.2, attention_dropout: 0.1, drop_path: 0.3, ..plain.clone() };
    let scaled = ModelConfig { layer_scale: 0.1, gelu: Gelu::Erf, ..plain.clone() };
    for (what, config) in [("plain", plain), ("masked", masked), ("scaled", scaled)] {
        let half = ["patch_embed", "cls_token", "pos_embed", "blocks.0.", "blocks.1."];
        let cases = [(LastBlock::Pruned, &[][..]), (LastBlock::Pruned, &half), (LastBlock::Whole, &half)];
        for (last_block, frozen) in cases {
            let run = |recompute| {
                let storage = Storage { recompute, ..Storage::CPU };
                let config = config.clone();
                let mut bench = Bench::with(storage, last_block, config, 4, 2, LossKind::Softmax, frozen);
                (bench.gradients(), bench.model.plan().total_bytes())
            };
            let (kept, all) = run(Recompute::None);
            let (light, less) = run(Recompute::LnGelu);
            let (heavy, least) = run(Recompute::Block);
            assert!(kept == light, "{what}: ln+gelu changes a gradient");
            assert!(kept == heavy, "{what}: block changes a gradient");
            assert!(least < less && less < all, "{what}: {least}, {less}, {all} bytes");
        }
    }
}
