//! Groups, rates and the table, and Adafactor over every layout of a model against an f64 program on JAX's
//! axes.

use super::*;
use crate::backend::cpu::compute::{Compute, Isa};
use crate::backend::cpu::update::{self, Buffers, Moment1};
use crate::recipe::{DecayOn, Duration, ScheduleKind};
use crate::rng::{Domain, Stream};
use crate::vit::config::PoolKind;

const RUN: RunLength = RunLength { steps: 100, batch: 32, data_size: 320 };

fn config() -> ModelConfig {
    let mut c = ModelConfig::variant("mu/32", 64, 40).unwrap();
    (c.width, c.heads, c.mlp, c.depth, c.rep_size) = (64, 2, 96, 2, 48);
    c
}

fn group(pattern: &str) -> GroupSection {
    GroupSection { pattern: pattern.into(), ..Default::default() }
}

fn layout(optim: &OptimSection, config: &ModelConfig) -> ParamLayout {
    ParamLayout::new(config, |param| is_frozen(optim, param))
}

fn build(optim: &OptimSection, schedule: &ScheduleSection) -> Result<Optimizer> {
    let config = config();
    Optimizer::new(optim, schedule, &layout(optim, &config), &config, RUN)
}

/// (lr, decay) of the segment with this name after `t` updates.
fn rates(o: &Optimizer, name: &str, t: u64) -> (f32, f32) {
    let segment = o.segments().iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no `{name}`"));
    let scalars = o.scalars(t)[segment.group];
    (scalars.lr, scalars.decay)
}

fn linear() -> ScheduleSection {
    ScheduleSection { kind: ScheduleKind::Linear, ..Default::default() }
}

#[test]
fn flax_names_are_those_of_published_and_of_linen_files() {
    let config = ModelConfig { pool: PoolKind::Map, ..config() };
    let layout = ParamLayout::new(&config, |_| false);
    let flax = |name: &str| {
        let parts = groups::parts(layout.get(name));
        parts.into_iter().map(|p| p.names[1..].join(" ")).collect::<Vec<_>>()
    };
    let block = "Transformer/encoderblock_1";
    for (own, expected) in [
        ("cls_token", vec!["cls".to_string()]),
        ("pos_embed", vec!["Transformer/posembed_input/pos_embedding pos_embedding".into()]),
        ("patch_embed.proj.weight", vec!["embedding/kernel".into()]),
        ("blocks.1.norm1.weight", vec![format!("{block}/LayerNorm_0/scale")]),
        ("blocks.1.norm2.bias", vec![format!("{block}/LayerNorm_2/bias {block}/LayerNorm_1/bias")]),
        (
            "blocks.1.attn.qkv.weight",
            ["query", "key", "value"]
                .map(|x| {
                    [1, 0].map(|n| format!("{block}/MultiHeadDotProductAttention_{n}/{x}/kernel")).join(" ")
                })
                .to_vec(),
        ),
        (
            "blocks.1.attn.proj.bias",
            vec![[1, 0].map(|n| format!("{block}/MultiHeadDotProductAttention_{n}/out/bias")).join(" ")],
        ),
        (
            "blocks.1.mlp.fc2.weight",
            vec![[3, 0].map(|n| format!("{block}/MlpBlock_{n}/Dense_1/kernel")).join(" ")],
        ),
        ("norm.weight", vec!["Transformer/encoder_norm/scale".into()]),
        ("attn_pool.latent", vec!["MAPHead_0/probe".into()]),
        ("attn_pool.q.weight", vec!["MAPHead_0/MultiHeadDotProductAttention_0/query/kernel".into()]),
        (
            "attn_pool.kv.bias",
            ["key", "value"].map(|x| format!("MAPHead_0/MultiHeadDotProductAttention_0/{x}/bias")).to_vec(),
        ),
        ("attn_pool.norm.weight", vec!["MAPHead_0/LayerNorm_0/scale".into()]),
        ("attn_pool.mlp.fc1.bias", vec!["MAPHead_0/MlpBlock_0/Dense_0/bias".into()]),
        ("pre_logits.weight", vec!["pre_logits/kernel".into()]),
        ("head.bias", vec!["head/bias".into()]),
    ] {
        assert_eq!(flax(own), expected, "{own}");
    }
    for param in layout.parameters() {
        assert!(groups::parts(param).iter().all(|p| p.names.len() > 1), "{} has no flax name", param.name);
    }
}

#[test]
fn the_head_has_the_base_rate_and_the_rest_its_multiple() {
    let optim = OptimSection { lr: 0.1, backbone_lr_mult: 0.1, weight_decay: 0.5, ..Default::default() };
    let o = build(&optim, &linear()).unwrap();
    // Halfway through the linear schedule. Decay follows the rate, on kernels only.
    assert_eq!(rates(&o, "head.weight", 50), (0.05, 0.025));
    assert_eq!(rates(&o, "pre_logits.bias", 50), (0.05, 0.0));
    assert_eq!(rates(&o, "blocks.0.mlp.fc1.weight", 50), (0.005, 0.0025));
    assert_eq!(rates(&o, "cls_token", 50), (0.005, 0.0));
    assert_eq!(o.lr(50), 0.05);
    assert_eq!(o.batch_scale(), 1.0);
}

#[test]
fn decay_reaches_what_the_recipe_says() {
    let decayed = |decay_on| {
        let optim = OptimSection { lr: 1.0, weight_decay: 1.0, decay_on, ..Default::default() };
        let config = ModelConfig { pool: PoolKind::Map, ..config() };
        let o = Optimizer::new(&optim, &linear(), &layout(&optim, &config), &config, RUN).unwrap();
        move |name: &str| rates(&o, name, 0).1 > 0.0
    };
    let (all, kernels, timm) = (decayed(DecayOn::All), decayed(DecayOn::Kernels), decayed(DecayOn::Timm));
    for name in ["head.bias", "cls_token", "pos_embed", "norm.weight", "attn_pool.latent"] {
        assert!(all(name), "{name}");
        assert!(!kernels(name), "{name}");
        assert_eq!(timm(name), name == "attn_pool.latent", "{name}");
    }
    for name in ["head.weight", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "attn_pool.kv.weight"]
    {
        assert!(all(name) && kernels(name) && timm(name), "{name}");
    }
}

#[test]
fn big_vision_decays_by_the_schedule_alone_and_scales_both_by_batch() {
    let optim = OptimSection {
        lr: 2e-3,
        weight_decay: 1e-2,
        decay_mode: DecayMode::BigVision,
        lr_scale_batch: 64,
        groups: vec![
            GroupSection { lr_mult: Some(3.0), ..group("head/kernel") },
            GroupSection { lr_mult: Some(3.0), decay_mult: Some(0.5), ..group("head/.*") },
            GroupSection { lr_mult: Some(0.25), decay_mult: Some(1.0), ..group(".*/kernel") },
            GroupSection { lr_mult: Some(0.25), decay_mult: Some(0.5), ..group(".*/bias") },
            GroupSection { lr_mult: Some(0.25), ..group(".*") },
        ],
        ..Default::default()
    };
    let o = build(&optim, &linear()).unwrap();
    // A batch of 32 for a reference of 64, and the schedule at one half: everything is a quarter.
    assert_eq!(rates(&o, "head.weight", 50), (1.5e-3, 2.5e-3));
    assert_eq!(rates(&o, "head.bias", 50), (1.5e-3, 1.25e-3));
    assert_eq!(rates(&o, "blocks.0.attn.qkv.weight", 50), (1.25e-4, 2.5e-3));
    assert_eq!(rates(&o, "blocks.0.norm1.bias", 50), (1.25e-4, 1.25e-3));
    assert_eq!(rates(&o, "blocks.0.norm1.weight", 50), (1.25e-4, 0.0));
    assert_eq!(o.lr(50), 5e-4, "the log shows the rate without multipliers");
    assert_eq!(o.batch_scale(), 0.5);
}

#[test]
fn frozen_groups_have_no_segment_and_others_may_have_their_own_schedule() {
    let rsqrt = ScheduleSection {
        kind: ScheduleKind::Rsqrt,
        timescale: 7.0,
        warmup: Duration::Steps(2),
        ..Default::default()
    };
    let optim = OptimSection {
        lr: 1.0,
        groups: vec![
            GroupSection { schedule: Some(linear()), ..group("head/.*") },
            GroupSection { schedule: Some(rsqrt), ..group("Transformer/encoder_norm/.*") },
            GroupSection { frozen: true, ..group(".*") },
        ],
        ..Default::default()
    };
    let o = build(&optim, &ScheduleSection::default()).unwrap();
    let names: Vec<_> = o.segments().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["norm.weight", "norm.bias", "head.weight", "head.bias"]);
    assert_eq!(rates(&o, "head.bias", 25).0, 0.75);
    assert_eq!(rates(&o, "norm.bias", 1).0, 0.5);
    assert!((f64::from(rates(&o, "norm.bias", 9).0) - 0.5f64.sqrt()).abs() < 1e-7);
    assert_eq!(o.lr(25), 0.75, "the head's schedule");

    let layout = layout(&optim, &config());
    assert_eq!(o.moment1_bytes(), layout.grad_elements * 4);
    assert_eq!(o.moment2_bytes(), layout.grad_elements * 4);
    assert!(layout.get("blocks.0.attn.qkv.weight").grad_offset.is_none());
}

#[test]
fn parts_of_a_fused_tensor_may_differ_but_not_in_being_frozen() {
    let with = |section: GroupSection| OptimSection {
        groups: vec![GroupSection { pattern: ".*/key/.*".into(), ..section }],
        ..Default::default()
    };
    let o = build(&with(GroupSection { lr_mult: Some(0.0), ..Default::default() }), &linear()).unwrap();
    let layout = ParamLayout::new(&config(), |_| false);
    let pieces = |name: &str| -> Vec<(usize, usize, f32)> {
        let param = layout.get(name);
        let inside = |s: &&Segment| (param.offset..param.offset + param.padded_len()).contains(&s.param);
        let piece = |s: &Segment| {
            assert_eq!(s.param - param.offset, s.grad - param.grad_offset.unwrap(), "moments mirror weights");
            (s.param - param.offset, s.len, o.scalars(0)[s.group].lr)
        };
        o.segments().iter().filter(inside).map(piece).collect()
    };
    let (kernel, bias) = (64 * 64, 64);
    assert_eq!(
        pieces("blocks.0.attn.qkv.weight"),
        [(0, kernel, 1e-3), (kernel, kernel, 0.0), (2 * kernel, kernel, 1e-3)]
    );
    assert_eq!(
        pieces("blocks.0.attn.qkv.bias"),
        [(0, bias, 1e-3), (bias, bias, 0.0), (2 * bias, bias, 1e-3)]
    );
    assert_eq!(pieces("blocks.0.attn.proj.weight"), [(0, 64 * 64, 1e-3)], "one group, one piece");

    let text = build(&with(GroupSection { frozen: true, ..Default::default() }), &linear()).err().unwrap();
    assert!(text.message().contains("`blocks.0.attn.qkv.weight`"), "{text}");
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let refused = |optim: OptimSection, needle: &str| {
        let text = build(&optim, &linear()).err().unwrap_or_else(|| panic!("accepted: {needle}")).to_string();
        assert!(text.contains(needle) && text.contains("hint"), "{needle}: {text}");
    };
    let d = OptimSection::default;
    refused(OptimSection { lr: -1.0, ..d() }, "`optim.lr` is -1");
    refused(OptimSection { lr: f64::NAN, ..d() }, "`optim.lr` is NaN");
    refused(OptimSection { beta1: 1.0, ..d() }, "`optim.beta1` is 1");
    refused(OptimSection { beta2: -0.1, ..d() }, "`optim.beta2`");
    refused(OptimSection { momentum: f64::INFINITY, ..d() }, "`optim.momentum`");
    refused(OptimSection { eps: 0.0, ..d() }, "`optim.eps`");
    refused(OptimSection { ema: 1.0, ..d() }, "`optim.ema`");
    refused(OptimSection { clip: f32::NAN, ..d() }, "`optim.clip`");
    let groups = |groups| OptimSection { groups, ..d() };
    refused(groups(vec![group("head/.*"), group("haed/.*")]), "`optim.groups[1]` (pattern `haed/.*`)");
    refused(groups(vec![group("head")]), "no parameter");
    refused(groups(vec![group("head/(.*")]), "not a regular expression");
    refused(groups(vec![group(".*"), group("head/.*")]), "earlier groups");
    refused(groups(vec![GroupSection { lr_mult: Some(-1.0), ..group(".*") }]), "lr_mult");
    refused(groups(vec![GroupSection { frozen: true, ..group(".*") }]), "freezes every parameter");
    let warmup = ScheduleSection { warmup: Duration::Steps(100), ..linear() };
    refused(groups(vec![GroupSection { schedule: Some(warmup), ..group(".*") }]), "optim.groups[0]");
}

#[test]
fn state_has_the_size_that_its_type_asks_for() {
    let bytes = |name, moment| {
        let o = build(&OptimSection { name, moment, ..Default::default() }, &linear()).unwrap();
        (o.moment1_bytes(), o.moment2_bytes())
    };
    let n = ParamLayout::new(&config(), |_| false).grad_elements;
    assert_eq!(bytes(OptimName::AdamW, MomentType::F32), (4 * n, 4 * n));
    assert_eq!(bytes(OptimName::Adam, MomentType::Bf16), (2 * n, 4 * n));
    assert_eq!(bytes(OptimName::Sgd, MomentType::Bf16), (2 * n, 0));
    assert_eq!(bytes(OptimName::Lion, MomentType::F32), (4 * n, 0));
    let (_, adafactor) = bytes(OptimName::Adafactor, MomentType::Bf16);
    assert!(adafactor < n / 2, "{adafactor} bytes of statistics for {n} parameters");
}

// Adafactor over the layouts
// -------------------------------------------------------------------------------------

/// A tensor with JAX's axes and its f64 state. The program below works on these.
struct JaxTensor {
    shape: Vec<usize>,
    /// The place of each element (row-major in `shape`) in the flat parameter buffer.
    place: Vec<usize>,
    m: Vec<f64>,
    v_row: Vec<f64>,
    v_col: Vec<f64>,
}

/// The JAX tensors within one of ours, from the conversion of checkpoints: an index into the file's tensor
/// for every index of JAX's.
fn jax_tensors(param: &Param, c: &ModelConfig) -> Vec<JaxTensor> {
    let (d, h, dh) = (c.width, c.heads, c.width / c.heads);
    let s = &param.shape;
    let in_qkv = |part: usize, index: &[usize]| match *index {
        [i, head, k] => ((part * h + head) * dh + k) * d + i,
        [head, k] => (part * h + head) * dh + k,
        _ => unreachable!(),
    };
    type Place<'a> = Box<dyn Fn(&[usize]) -> usize + 'a>;
    let name = param.name.as_str();
    let fused = if name.contains(".qkv.") { 3 } else { usize::from(name.contains("_pool.kv.")) * 2 };
    let fused = if name.contains("_pool.q.") { 1 } else { fused };
    let mut list: Vec<(Vec<usize>, Place)> = Vec::new();
    if fused > 0 {
        for part in 0..fused {
            let shape = if name.ends_with("weight") { vec![d, h, dh] } else { vec![h, dh] };
            list.push((shape, Box::new(move |i| in_qkv(part, i))));
        }
    } else if name.ends_with("attn.proj.weight") || name == "attn_pool.proj.weight" {
        list.push((vec![h, dh, d], Box::new(|i| i[2] * d + i[0] * dh + i[1])));
    } else if name == "patch_embed.proj.weight" {
        let [_, channels, height, width] = s[..] else { unreachable!() };
        let place = move |i: &[usize]| ((i[3] * channels + i[2]) * height + i[0]) * width + i[1];
        list.push((vec![height, width, channels, s[0]], Box::new(place)));
    } else if let [out, input] = s[..] {
        list.push((vec![input, out], Box::new(move |i| i[1] * input + i[0])));
    } else {
        let sizes = s.clone();
        list.push((sizes.clone(), Box::new(move |i| i.iter().zip(&sizes).fold(0, |at, (i, n)| at * n + i))));
    }

    // File order → place in the buffer, found by passing the numbers 0.. through the layout.
    let numbers: Vec<f32> = (0..param.len()).map(|i| i as f32).collect();
    let mut place_of = vec![0; param.len()];
    for (k, file_index) in param.from_file_order(&numbers).iter().enumerate() {
        place_of[*file_index as usize] = param.offset + k / param.cols * param.ld + k % param.cols;
    }
    let tensor = |(shape, file_index): (Vec<usize>, Place)| {
        let n: usize = shape.iter().product();
        let place = (0..n).map(|k| place_of[file_index(&unravel(k, &shape))]).collect();
        JaxTensor { shape, place, m: vec![0.0; n], v_row: vec![], v_col: vec![] }
    };
    list.into_iter().map(tensor).collect()
}

fn unravel(mut k: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, n) in index.iter_mut().zip(shape).rev() {
        (*i, k) = (k % n, k / n);
    }
    index
}

/// Index into the array with one axis removed.
fn without(index: &[usize], shape: &[usize], axis: usize) -> usize {
    (0..shape.len()).filter(|a| *a != axis).fold(0, |at, a| at * shape[a] + index[a])
}

struct Reference {
    beta2: f64,
    momentum: f64,
    add1: f64,
    min_factor: usize,
    clip_rms: Option<f64>,
    bf16: bool,
}

impl JaxTensor {
    /// One step on gradient `g`: returns the update.
    fn step(&mut self, g: &[f64], k: &Reference) -> Vec<f64> {
        let (n, shape) = (g.len(), self.shape.clone());
        let mut axes: Vec<usize> = (0..shape.len()).collect();
        axes.sort_by_key(|a| shape[*a]);
        let two = (axes.len() > 1 && shape[axes[axes.len() - 2]] >= k.min_factor)
            .then(|| (axes[axes.len() - 2], axes[axes.len() - 1]));
        let square: Vec<f64> = g.iter().map(|g| g * g + 1e-30).collect();
        let ema = |state: &mut Vec<f64>, new: Vec<f64>| {
            state.resize(new.len(), 0.0);
            state.iter_mut().zip(new).for_each(|(s, x)| *s = k.beta2 * *s + (1.0 - k.beta2) * x);
        };
        let mean_over = |values: &[f64], shape: &[usize], axis: usize| {
            let mut means = vec![0.0; values.len() / shape[axis]];
            for (i, v) in values.iter().enumerate() {
                means[without(&unravel(i, shape), shape, axis)] += v / shape[axis] as f64;
            }
            means
        };
        let mut u: Vec<f64> = if let Some((d1, d0)) = two {
            ema(&mut self.v_row, mean_over(&square, &shape, d0));
            ema(&mut self.v_col, mean_over(&square, &shape, d1));
            let mut row_shape = shape.clone();
            row_shape.remove(d0);
            let d1_in_rows = if d1 > d0 { d1 - 1 } else { d1 };
            let row_mean = mean_over(&self.v_row, &row_shape, d1_in_rows);
            let update = |i: usize| {
                let index = unravel(i, &shape);
                let row = without(&index, &shape, d0);
                let mean = row_mean[without(&unravel(row, &row_shape), &row_shape, d1_in_rows)];
                let col = self.v_col[without(&index, &shape, d1)];
                g[i] * (self.v_row[row] / mean).powf(-0.5) * col.powf(-0.5)
            };
            (0..n).map(update).collect()
        } else {
            ema(&mut self.v_row, square);
            g.iter().zip(&self.v_row).map(|(g, v)| g * v.powf(-0.5)).collect()
        };
        if let Some(threshold) = k.clip_rms {
            let rms = (u.iter().map(|u| u * u).sum::<f64>() / n as f64).sqrt();
            u.iter_mut().for_each(|u| *u /= (rms / threshold).max(1.0));
        }
        let stored = |m: f64| if k.bf16 { half::bf16::from_f64(m).to_f64() } else { m };
        let new: Vec<f64> = self.m.iter().zip(u).map(|(m, u)| k.momentum * m + k.add1 * u).collect();
        self.m = new.iter().copied().map(stored).collect();
        new
    }
}

/// Called with the step, the weights, their EMA, and the rates and tensors of the update.
type StepDone<'a> = dyn FnMut(u64, &[f32], &[f32], &[GroupScalars], &[Segment]) + 'a;

/// Three steps of our Adafactor over a whole model; returns the weights.
fn run_adafactor(
    optim: &OptimSection,
    config: &ModelConfig,
    layout: &ParamLayout,
    isa: Isa,
    threads: usize,
    step_done: &mut StepDone,
) -> Vec<f32> {
    let c = Compute::new(isa, threads).unwrap();
    let mut o = Optimizer::new(optim, &linear(), layout, config, RUN).unwrap();
    let mut params = vec![0.0f32; layout.param_elements];
    let mut ema = params.clone();
    let mut m = vec![0.0f32; layout.grad_elements];
    let mut m16 = vec![half::bf16::ZERO; layout.grad_elements];
    let mut v = vec![0.0f32; o.moment2_bytes() / 4];
    for t in 0..3 {
        let grads = gradient(layout, t);
        let update = o.update(t);
        let moment1 = match optim.moment {
            MomentType::F32 => Moment1::F32(&mut m),
            MomentType::Bf16 => Moment1::Bf16(&mut m16),
        };
        let buffers =
            Buffers { params: &mut params, grads: &grads, moment1, moment2: &mut v, ema: Some(&mut ema) };
        let outcome = update::update(&c, &update, buffers, true);
        assert!(!outcome.skipped);
        step_done(t, &params, &ema, update.groups, update.segments);
    }
    params
}

/// A gradient whose rows and columns have different sizes, with zeros in it; padding is zero.
fn gradient(layout: &ParamLayout, t: u64) -> Vec<f32> {
    let mut grads = vec![0.0; layout.grad_elements];
    for (i, param) in layout.parameters().enumerate() {
        let mut s = Stream::new(t, Domain::Init, i as u64, 0);
        for row in 0..param.rows {
            let size = 10f32.powf(s.range(-3.0, 0.0));
            for col in 0..param.cols {
                let g = s.normal() as f32 * size * (1.0 + col as f32 * 0.1);
                grads[param.grad_offset.unwrap() + row * param.ld + col] =
                    if s.chance(0.05) { 0.0 } else { g };
            }
        }
    }
    grads
}

#[test]
fn adafactor_follows_its_formulas_on_the_axes_that_jax_has() {
    // Head sizes on both sides of the limit, a width that is padded, and two limits. One limit factors almost
    // everything.
    let wide = config();
    let narrow = ModelConfig { heads: 4, pool: PoolKind::Map, patch: (16, 32), ..config() };
    let mut odd = ModelConfig { width: 60, heads: 3, mlp: 33, rep_size: 0, ..config() };
    odd.classes = 37;
    for config in [wide, narrow, odd] {
        for (min_factor, clip_rms, moment) in
            [(32, 0.0, MomentType::F32), (2, 0.5, MomentType::F32), (32, 0.0, MomentType::Bf16)]
        {
            let optim = OptimSection {
                name: OptimName::Adafactor,
                lr: 0.1,
                clip: 0.0,
                beta2_cap: 0.4,
                ema: 0.5,
                min_factor,
                clip_rms,
                moment,
                weight_decay: 0.1,
                ..Default::default()
            };
            let layout = ParamLayout::new(&config, |_| false);
            let mut tensors: Vec<(&Param, JaxTensor)> = layout
                .parameters()
                .flat_map(|p| jax_tensors(p, &config).into_iter().map(move |t| (p, t)))
                .collect();
            let mut theta = vec![0.0f64; layout.param_elements];
            let mut mean = theta.clone();
            // Where f32 and f64 fall on different sides of a bf16 rounding, a moment differs by one unit of
            // 2^-8.
            let bf16 = moment == MomentType::Bf16;
            let (mut elements, mut apart) = (0, 0);
            let mut seen_factored = 0;
            let mut check =
                |t: u64, params: &[f32], ema: &[f32], groups: &[GroupScalars], segments: &[Segment]| {
                    let grads = gradient(&layout, t);
                    let k = Reference {
                        beta2: 0.4f64.min(1.0 - (t as f64 + 1.0).powf(-0.8)),
                        momentum: if bf16 { 0.8984375 } else { 0.9 },
                        add1: 0.1,
                        min_factor,
                        clip_rms: (clip_rms > 0.0).then_some(clip_rms),
                        bf16,
                    };
                    for (param, tensor) in &mut tensors {
                        let to_grad = |p: usize| p - param.offset + param.grad_offset.unwrap();
                        let g: Vec<f64> =
                            tensor.place.iter().map(|p| f64::from(grads[to_grad(*p)])).collect();
                        let u = tensor.step(&g, &k);
                        let scalars = groups[segments
                            .iter()
                            .find(|s| (s.param..s.param + s.len).contains(&tensor.place[0]))
                            .unwrap()
                            .group];
                        for (place, u) in tensor.place.iter().zip(&u) {
                            theta[*place] -=
                                f64::from(scalars.lr) * u + f64::from(scalars.decay) * theta[*place];
                            mean[*place] = 0.5 * mean[*place] + 0.5 * theta[*place];
                            let error = (f64::from(params[*place]) - theta[*place]).abs();
                            let error = error.max((f64::from(ema[*place]) - mean[*place]).abs());
                            elements += 1;
                            apart += usize::from(error > 2e-6 * (1.0 + u.abs()));
                            let allowed = if bf16 { 1e-2 } else { 2e-6 } * (1.0 + u.abs());
                            assert!(error < allowed, "{} {:?} step {t}: {error}", param.name, tensor.shape);
                        }
                        seen_factored += usize::from(!tensor.v_col.is_empty());
                    }
                    // Only the tensors changed: padding stays zero.
                    let mut outside = params.to_vec();
                    tensors.iter().flat_map(|(_, t)| &t.place).for_each(|p| outside[*p] = 0.0);
                    assert!(outside.iter().all(|p| *p == 0.0), "padding moved");
                };
            run_adafactor(&optim, &config, &layout, Isa::best(), 2, &mut check);
            assert!(seen_factored > 0);
            assert!(apart * 1000 < elements, "{apart} of {elements} values are apart");
        }
    }
}

#[test]
fn threads_and_instruction_sets_change_no_bit_of_adafactor() {
    let config = config();
    let layout = ParamLayout::new(&config, |_| false);
    let optim = OptimSection {
        name: OptimName::Adafactor,
        moment: MomentType::Bf16,
        clip_rms: 1.0,
        ema: 0.9,
        ..Default::default()
    };
    let run = |isa, threads| run_adafactor(&optim, &config, &layout, isa, threads, &mut |_, _, _, _, _| {});
    let first = run(Isa::Scalar, 1);
    for isa in Isa::available() {
        for threads in 1..=3 {
            let same = run(isa, threads).iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{threads} threads with {}", isa.name());
        }
    }
}

#[test]
fn fused_tensors_are_factored_per_head_and_the_patch_kernel_over_its_own_axes() {
    let config = config();
    let optim = OptimSection { name: OptimName::Adafactor, ..Default::default() };
    let layout = ParamLayout::new(&config, |_| false);
    let o = Optimizer::new(&optim, &linear(), &layout, &config, RUN).unwrap();
    let factor = |suffix: &str| {
        let segment = o.segments().iter().find(|s| s.name.ends_with(suffix)).unwrap();
        let f = segment.factor.unwrap();
        (f.outer, f.rows, f.cols, f.factored)
    };
    assert_eq!(factor("/key/kernel"), ([2, 1], 32, 64, true));
    assert_eq!(factor("blocks.0.attn.proj.weight"), ([2, 1], 32, 64, true));
    assert_eq!(factor("patch_embed.proj.weight"), ([32, 3], 32, 64, true));
    assert_eq!(factor("/value/bias"), ([1, 1], 1, 64, false));
    assert_eq!(factor("pos_embed"), ([1, 1], 5, 64, false));
}
