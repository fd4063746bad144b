//! What is rounded, per operation and in whole models.

use super::*;
use crate::backend::{GroupScalars, Loss, LossKind, Mask, Normalise, Pixels, Rule, Segment, TargetKind};
use crate::rng::{Domain, Stream};
use crate::vit::config::PoolKind;
use crate::vit::{LastBlock, Mode, ModelConfig, Vit};

/// Models that together use every operation.
fn models() -> [ModelConfig; 4] {
    let map = ModelConfig { pool: PoolKind::Map, extra_tokens: 0, drop_path: 0.2, ..ModelConfig::tiny() };
    let representation = ModelConfig { rep_size: 7, ..ModelConfig::tiny() };
    let masks = ModelConfig {
        extra_tokens: 2,
        layer_scale: 0.5,
        gelu: Gelu::Erf,
        dropout: 0.1,
        attention_dropout: 0.1,
        ..ModelConfig::tiny()
    };
    [ModelConfig::tiny(), map, representation, masks]
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
        limits: crate::backend::Limits::NONE,
        ema_decay: None,
    };
    let loss = Loss { label_smoothing: 0.1, ..Loss::plain(LossKind::Softmax) };
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

/// Names of the activations whose values are not all bf16.
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
    let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, drop_path: 0.2, ..ModelConfig::tiny() };
    let stream = ["block 0 x", "block 0 mid", "block 1 x", "block 1 mid", "x", "d_x"];
    assert_eq!(names(gap.clone()), stream);
    // Joined by the epilogue of a product.
    assert_eq!(names(ModelConfig { drop_path: 0.0, ..gap }), stream);
    // The class tokens' part of the stream.
    let [blocks, class] =
        [["block 0 x", "block 0 mid", "block 1 x"], ["block 1 class x", "block 1 class mid", "x"]];
    assert_eq!(names(ModelConfig::tiny()), [&blocks[..], &class, &["d_x", "class d_x"]].concat());
}

#[test]
fn products_read_rounded_weights_and_updates_do_not() {
    for rounds in [Rounds::All, Rounds::AllButResidual] {
        let (mut b, _) = trained(ModelConfig::tiny(), rounds);
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

/// A `pre` that is not kept is rounded all the same, as on a GPU.
#[test]
fn gelu_is_that_of_the_same_value_with_and_without_a_place_for_it() {
    for form in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
        let mut plan = MemoryPlan::new(Storage::CPU);
        let [x, pre, kept, alone] = [12, 8, 8, 8].map(|cols| plan.activation("operand".to_owned(), 5, cols));
        plan.set_bytes(Arena::Params, 4 * (8 * 12 + 8));
        let param = |offset, rows, cols| Mat {
            arena: Arena::Params,
            offset,
            rows,
            cols,
            ld: cols,
            dtype: Dtype::F32,
        };
        let (weight, bias) = (param(0, 8, 12), param(4 * 8 * 12, 1, 8));
        let layer = Linear { weight, bias, d_weight: None, d_bias: None };
        let mut b = Rounded::new(CpuBackend::new(1).unwrap(), Rounds::All);
        b.allocate(&plan).unwrap();
        let mut random = Stream::new(5, Domain::Init, 1, 0);
        for (mat, count) in [(x, 60), (weight, 96), (bias, 8)] {
            let values: Vec<f32> = (0..count).map(|_| random.normal() as f32).collect();
            b.write(mat, &values).unwrap();
        }
        for (pre, y) in [(Some(pre), kept), (None, alone)] {
            b.matmul(x, &layer, Epilogue::BiasGelu { pre, form, dropout: Mask::NONE }, y).unwrap();
        }
        let mut values = [vec![0.0; 40], vec![0.0; 40]];
        for (mat, values) in [kept, alone].into_iter().zip(&mut values) {
            b.read(mat, values).unwrap();
        }
        assert_eq!(values[0], values[1], "{form:?}");
        assert!(values[0].iter().any(|value| *value != 0.0));
    }
}
