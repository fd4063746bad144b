//! The optimiser step over the flat buffers: every rule, both types of first moment, clipping, EMA, and
//! skipping.
//!
//! The tensors of the case have the features of the model's: padded rows, a frozen neighbour, two groups, and
//! views for Adafactor that run along the rows, along the columns and across both.

use half::bf16;

use crate::backend::{Arena, Factor, GroupScalars, Rule, Segment, Update};
use crate::error::Result;

use super::harness::{Case, ELEMENTWISE, Trial};

pub(super) fn cases() -> Vec<Case> {
    let plain = Setting { t: 7, clip: Clip::None, ema: None, gradient: Gradient::Normal, more: More::None };
    let mut cases = Vec::new();
    let mut push = |rule: Rule, s: Setting| {
        cases.push(Case::new(operation(rule), s.title(rule), move |t| update(t, rule, s)));
    };
    for rule in rules() {
        push(rule, Setting { t: 1, ..plain });
        push(rule, plain);
        push(rule, Setting { clip: Clip::Optax(1.0), ema: Some(0.9), ..plain });
        push(rule, Setting { gradient: Gradient::Zero, clip: Clip::Optax(1.0), ..plain });
    }
    let adam = Rule::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, bf16: false };
    let sgd = Rule::Sgd { momentum: 0.9, nesterov: false, bf16: false };
    for rule in [adam, sgd] {
        for clip in [Clip::Optax(1e4), Clip::Torch(1.0), Clip::Torch(1e4)] {
            push(rule, Setting { clip, ema: Some(0.999), ..plain });
        }
        push(rule, Setting { t: 300_000, ..plain });
        push(rule, Setting { gradient: Gradient::Zero, clip: Clip::Torch(1.0), ..plain });
        // The squares of such gradients overflow f32.
        push(rule, Setting { gradient: Gradient::Huge, clip: Clip::Optax(1.0), ..plain });
    }
    // More than the threads, or the blocks, of a device handle at once.
    push(adam, Setting { more: More::Tensors, ema: Some(0.9), ..plain });
    push(adafactor(Some(0.5), false), Setting { more: More::Tiles, ..plain });
    for rule in [adam, rules()[1], rules()[6]] {
        for (title, cause) in [
            ("NaN in the gradient", Cause::NanGradient),
            ("infinite gradient", Cause::InfiniteGradient),
            ("NaN loss", Cause::NanLoss),
        ] {
            let title = format!("{title}: {}", name(rule));
            cases.push(Case::new("update skipped", title, move |t| skip(t, rule, cause)));
        }
    }
    cases
}

pub(super) fn rules() -> Vec<Rule> {
    let mut rules = Vec::new();
    for bf16 in [false, true] {
        rules.extend([
            Rule::Sgd { momentum: 0.9, nesterov: false, bf16 },
            Rule::Sgd { momentum: 0.9, nesterov: true, bf16 },
            Rule::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, bf16 },
            Rule::Lion { beta1: 0.9, beta2: 0.99, bf16 },
            adafactor(None, bf16),
            adafactor(Some(0.5), bf16),
        ]);
    }
    rules
}

fn adafactor(clip_rms: Option<f64>, bf16: bool) -> Rule {
    Rule::Adafactor { momentum: 0.9, beta2_cap: 0.999, decay_power: 0.8, clip_rms, bf16 }
}

fn operation(rule: Rule) -> &'static str {
    match rule {
        Rule::Sgd { .. } => "update sgd",
        Rule::Adam { .. } => "update adam",
        Rule::Lion { .. } => "update lion",
        Rule::Adafactor { .. } => "update adafactor",
    }
}

pub(super) fn is_bf16(rule: Rule) -> bool {
    match rule {
        Rule::Sgd { bf16, .. } | Rule::Adam { bf16, .. } => bf16,
        Rule::Lion { bf16, .. } | Rule::Adafactor { bf16, .. } => bf16,
    }
}

pub(super) fn name(rule: Rule) -> String {
    let form = match rule {
        Rule::Sgd { nesterov: true, .. } => "nesterov",
        Rule::Sgd { .. } => "momentum",
        Rule::Adam { .. } => "adam",
        Rule::Lion { .. } => "lion",
        Rule::Adafactor { clip_rms: Some(_), .. } => "adafactor, block clip",
        Rule::Adafactor { .. } => "adafactor",
    };
    format!("{form}, {} moment", if is_bf16(rule) { "bf16" } else { "f32" })
}

#[derive(Clone, Copy)]
pub(super) struct Setting {
    t: u64,
    clip: Clip,
    ema: Option<f64>,
    gradient: Gradient,
    pub(super) more: More,
}

/// Tensors besides the usual ones.
#[derive(Clone, Copy)]
pub(super) enum More {
    None,
    /// More than a GPU has blocks for.
    Tensors,
    /// One with more rows, and one with more pieces, than a block handles at once.
    Tiles,
}

#[derive(Clone, Copy)]
enum Clip {
    None,
    Optax(f32),
    Torch(f32),
}

#[derive(Clone, Copy)]
enum Gradient {
    Normal,
    Zero,
    Huge,
}

impl Setting {
    /// A later step, clipped, with an average.
    pub(super) fn in_a_group() -> Self {
        let (clip, ema) = (Clip::Optax(1.0), Some(0.9));
        Setting { t: 7, clip, ema, gradient: Gradient::Normal, more: More::None }
    }

    fn title(&self, rule: Rule) -> String {
        let gradient = match self.gradient {
            Gradient::Normal => "",
            Gradient::Zero => ", zero gradient",
            Gradient::Huge => ", gradients of 1e20",
        };
        let clip = match self.clip {
            Clip::None => String::new(),
            Clip::Optax(max) => format!(", clip {max}"),
            Clip::Torch(max) => format!(", torch clip {max}"),
        };
        let ema = if self.ema.is_some() { ", ema" } else { "" };
        let more = match self.more {
            More::None => "",
            More::Tensors => ", many tensors",
            More::Tiles => ", many rows and pieces",
        };
        format!("{}, t {}{clip}{ema}{gradient}{more}", name(rule), self.t)
    }
}

// Buffers --------------------------------------------------------------------------------------------------------

/// Values of a frozen tensor before the trained ones, in the weights only.
const FROZEN: usize = 64;

const GROUPS: [GroupScalars; 2] =
    [GroupScalars { lr: 0.25, decay: 0.03125 }, GroupScalars { lr: 0.0625, decay: 0.0 }];

pub(super) fn segments(more: More) -> Vec<Segment> {
    let view = |outer, rows, cols, outer_stride, row_stride, col_stride, factored| Factor {
        outer,
        rows,
        cols,
        outer_stride,
        row_stride,
        col_stride,
        state: 0,
        factored,
    };
    let mut tensors = vec![
        // [60, 7] with padded rows, kept in full.
        ("head", 480, 0, view([1, 1], 60, 7, [0, 0], 8, 1, false)),
        // [48, 192], factored along its own axes, then along them exchanged.
        ("weight", 48 * 192, 0, view([1, 1], 48, 192, [0, 0], 192, 1, true)),
        ("transposed", 40 * 48, 1, view([1, 1], 48, 40, [0, 0], 1, 48, true)),
        // Three heads of 16 rows over 40 columns, and a kernel whose innermost axis is not factored.
        ("heads", 3 * 16 * 40, 0, view([3, 1], 16, 40, [16 * 40, 0], 40, 1, true)),
        ("kernel", 12 * 3 * 16 * 2, 1, view([3, 2], 12, 16, [32, 1], 96, 2, true)),
        ("bias", 60, 1, view([1, 1], 1, 60, [0, 0], 60, 1, false)),
    ];
    match more {
        More::None => {}
        More::Tensors => {
            // Eight blocks for each of 148 multiprocessors are 1,184.
            tensors.extend((0..1200).map(|i| ("small", 6, i % 2, view([1, 1], 2, 3, [0, 0], 3, 1, false))));
        }
        More::Tiles => {
            tensors.push(("tall", 300 * 4, 0, view([1, 1], 300, 4, [0, 0], 4, 1, true)));
            tensors.push(("pieces", 260 * 6, 1, view([260, 1], 2, 3, [6, 0], 3, 1, true)));
        }
    }
    let (mut at, mut state) = (0, 0);
    tensors
        .into_iter()
        .map(|(name, len, group, factor)| {
            let len = usize::next_multiple_of(len, 64);
            let factor = Factor { state, ..factor };
            let segment =
                Segment { name: name.into(), param: FROZEN + at, grad: at, len, group, factor: Some(factor) };
            at += len;
            state += factor.state_len();
            segment
        })
        .collect()
}

/// Offsets of a tensor's values from its start, as `(offset, row statistic, column statistic)`.
fn places(f: Factor) -> impl Iterator<Item = (usize, usize, usize)> {
    let outer = (0..f.outer[0]).flat_map(move |a| (0..f.outer[1]).map(move |b| (a, b)));
    let inner = move || (0..f.rows).flat_map(move |r| (0..f.cols).map(move |c| (r, c)));
    outer.flat_map(move |(a, b)| {
        inner().map(move |(r, c)| {
            let offset = a * f.outer_stride[0] + b * f.outer_stride[1] + r * f.row_stride + c * f.col_stride;
            let tensor = a * f.outer[1] + b;
            (offset, tensor * f.rows + r, tensor * f.cols + c)
        })
    })
}

/// The flat buffers, in float64.
#[derive(Clone)]
pub(super) struct Buffers {
    pub(super) params: Vec<f64>,
    pub(super) grads: Vec<f64>,
    pub(super) moment1: Vec<f64>,
    pub(super) moment2: Vec<f64>,
    pub(super) ema: Vec<f64>,
}

impl Buffers {
    /// Plausible contents before update `t`; padding is zero.
    pub(super) fn new(t: &mut Trial, rule: Rule, segments: &[Segment], s: Setting) -> Self {
        let n = segments.last().map_or(0, |s| s.grad + s.len);
        let scale = match s.gradient {
            Gradient::Normal => 1.0,
            Gradient::Zero => 0.0,
            Gradient::Huge => 1e20,
        };
        let mut trained = vec![false; n];
        for s in segments {
            places(s.factor.expect("all have one")).for_each(|(offset, ..)| trained[s.grad + offset] = true);
        }
        let mut flat = |scale: f64| -> Vec<f64> {
            let values = t.normal(n, scale);
            values.into_iter().zip(&trained).map(|(v, trained)| if *trained { v } else { 0.0 }).collect()
        };
        let (weights, grads, average) = (flat(1.0), flat(scale), flat(1.0));
        let old = if s.t == 1 { 0.0 } else { 1.0 };
        let moment1 = flat(0.5 * old);
        let squares = flat(old).iter().map(|v| v * v).collect();
        let frozen = t.normal(FROZEN, 1.0);
        let moment2 = match rule {
            Rule::Adam { .. } => squares,
            Rule::Adafactor { .. } => {
                let len = segments.iter().map(|s| s.factor.expect("all have one").state_len()).sum();
                t.normal(len, old).iter().map(|v| old * (v * v + 0.125)).collect()
            }
            _ => Vec::new(),
        };
        let with_frozen = |values: Vec<f64>| [frozen.clone(), values].concat();
        let ema = if s.ema.is_some() { with_frozen(average) } else { Vec::new() };
        Self { params: with_frozen(weights), grads, moment1, moment2, ema }
    }

    pub(super) fn place(&self, t: &mut Trial, rule: Rule) {
        let f32s =
            |values: &[f64]| values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect::<Vec<u8>>();
        t.arena(Arena::Params, f32s(&self.params));
        t.arena(Arena::Grads, f32s(&self.grads));
        t.arena(
            Arena::Moment1,
            match is_bf16(rule) {
                true => self.moment1.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
                false => f32s(&self.moment1),
            },
        );
        t.arena(Arena::Moment2, f32s(&self.moment2));
        t.arena(Arena::Ema, f32s(&self.ema));
    }

    /// The device's current contents.
    pub(super) fn take(t: &mut Trial, rule: Rule) -> Result<Self> {
        let mut now = |arena| -> Result<Vec<u8>> {
            t.may_change(arena);
            t.arena_now(arena)
        };
        let f32s = |bytes: Vec<u8>| -> Vec<f64> {
            bytes.as_chunks().0.iter().map(|word| f64::from(f32::from_le_bytes(*word))).collect()
        };
        let moment1 = now(Arena::Moment1)?;
        let moment1 = match is_bf16(rule) {
            true => moment1.as_chunks().0.iter().map(|half| bf16::from_le_bytes(*half).to_f64()).collect(),
            false => f32s(moment1),
        };
        Ok(Self {
            params: f32s(now(Arena::Params)?),
            grads: f32s(now(Arena::Grads)?),
            moment1,
            moment2: f32s(now(Arena::Moment2)?),
            ema: f32s(now(Arena::Ema)?),
        })
    }
}

// The reference --------------------------------------------------------------------------------------------------

/// The factor that multiplies the gradient.
fn clip_factor(clip: Clip, norm: f64) -> f64 {
    match clip {
        Clip::None => 1.0,
        Clip::Optax(max) => {
            if norm < f64::from(max) {
                1.0
            } else {
                f64::from(max) / norm
            }
        }
        Clip::Torch(max) => (f64::from(max) / (norm + 1e-6)).min(1.0),
    }
}

/// One update of all tensors in float64; moments are not rounded.
pub(super) fn reference(b: &mut Buffers, rule: Rule, segments: &[Segment], s: Setting) -> f64 {
    let norm = b.grads.iter().map(|g| g * g).sum::<f64>().sqrt();
    let clip = clip_factor(s.clip, norm);
    // JAX converts a constant that multiplies a bf16 moment to bf16.
    let beside_moment = |x: f64| if is_bf16(rule) { bf16::from_f64(x).to_f64() } else { x };
    let t = s.t as f64;

    for segment in segments {
        let group = GROUPS[segment.group];
        let factor = segment.factor.expect("all have one");
        let direction = match rule {
            Rule::Adafactor { beta2_cap, decay_power, clip_rms, .. } => {
                let beta2 = beta2_cap.min(1.0 - t.powf(-decay_power));
                adafactor_direction(b, segment, factor, clip, beta2, clip_rms)
            }
            _ => Vec::new(),
        };
        for (i, (offset, ..)) in places(factor).enumerate() {
            let (g, at) = (clip * b.grads[segment.grad + offset], segment.grad + offset);
            let m = b.moment1[at];
            let (u, new_m) = match rule {
                Rule::Sgd { momentum, nesterov, .. } => {
                    let new = g + beside_moment(momentum) * m;
                    (if nesterov { g + beside_moment(momentum) * new } else { new }, new)
                }
                Rule::Adam { beta1, beta2, eps, .. } => {
                    let new = beside_moment(beta1) * m + (1.0 - beta1) * g;
                    let v = &mut b.moment2[at];
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    let (m_hat, v_hat) = (new / (1.0 - beta1.powf(t)), *v / (1.0 - beta2.powf(t)));
                    (m_hat / (v_hat.sqrt() + eps), new)
                }
                Rule::Lion { beta1, beta2, .. } => {
                    let mixed = beside_moment(beta1) * m + (1.0 - beta1) * g;
                    let sign = if mixed == 0.0 { 0.0 } else { mixed.signum() };
                    (sign, beside_moment(beta2) * m + (1.0 - beta2) * g)
                }
                Rule::Adafactor { momentum, .. } => {
                    let new = beside_moment(momentum) * m + (1.0 - momentum) * direction[i];
                    (new, new)
                }
            };
            b.moment1[at] = new_m;
            let theta = &mut b.params[segment.param + offset];
            *theta -= f64::from(group.lr) * u + f64::from(group.decay) * *theta;
            if let Some(decay) = s.ema {
                let e = &mut b.ema[segment.param + offset];
                *e = decay * *e + (1.0 - decay) * *theta;
            }
        }
    }
    norm
}

/// Adafactor's update before the momentum, in the order of [`places`]; updates the statistics in `moment2`.
fn adafactor_direction(
    b: &mut Buffers,
    segment: &Segment,
    f: Factor,
    clip: f64,
    beta2: f64,
    clip_rms: Option<f64>,
) -> Vec<f64> {
    let g: Vec<f64> = places(f).map(|(offset, ..)| clip * b.grads[segment.grad + offset]).collect();
    let state = &mut b.moment2[f.state..f.state + f.state_len()];
    let outer = f.outer[0] * f.outer[1];
    let mut u: Vec<f64>;
    if f.factored {
        let (mut row_means, mut col_means) = (vec![0.0; outer * f.rows], vec![0.0; outer * f.cols]);
        for ((_, row, col), g) in places(f).zip(&g) {
            row_means[row] += (g * g + 1e-30) / f.cols as f64;
            col_means[col] += (g * g + 1e-30) / f.rows as f64;
        }
        for (state, mean) in state.iter_mut().zip(row_means.iter().chain(&col_means)) {
            *state = beta2 * *state + (1.0 - beta2) * mean;
        }
        let (rows, cols) = state.split_at(outer * f.rows);
        let mean_row: Vec<f64> = rows.chunks(f.rows).map(|r| r.iter().sum::<f64>() / f.rows as f64).collect();
        let weight = |row: usize, col: usize| (rows[row] / mean_row[row / f.rows] * cols[col]).powf(-0.5);
        u = places(f).zip(&g).map(|((_, row, col), g)| g * weight(row, col)).collect();
    } else {
        for (state, g) in state.iter_mut().zip(&g) {
            *state = beta2 * *state + (1.0 - beta2) * (g * g + 1e-30);
        }
        u = state.iter().zip(&g).map(|(v, g)| g * v.powf(-0.5)).collect();
    }
    if let Some(limit) = clip_rms {
        let rms = (u.iter().map(|u| u * u).sum::<f64>() / u.len() as f64).sqrt();
        u.iter_mut().for_each(|u| *u /= (rms / limit).max(1.0));
    }
    u
}

// Cases ----------------------------------------------------------------------------------------------------------

pub(super) fn request<'a>(rule: Rule, segments: &'a [Segment], s: Setting) -> Update<'a> {
    let (clip, clip_torch) = match s.clip {
        Clip::None => (None, false),
        Clip::Optax(max) => (Some(max), false),
        Clip::Torch(max) => (Some(max), true),
    };
    Update {
        rule,
        segments,
        groups: &GROUPS,
        t: s.t,
        clip,
        clip_torch,
        ema_decay: s.ema,
        limits: crate::backend::Limits::NONE,
    }
}

fn update(t: &mut Trial, rule: Rule, s: Setting) -> Result<()> {
    let segments = segments(s.more);
    let before = Buffers::new(t, rule, &segments, s);
    let mut expected = before.clone();
    reference(&mut expected, rule, &segments, s);
    before.place(t, rule);

    let backend = t.start()?;
    backend.begin_report()?;
    backend.update(&request(rule, &segments, s))?;
    let got = Buffers::take(t, rule)?;

    if is_bf16(rule) {
        rounded_like(&mut expected.moment1, &got.moment1);
    }
    for segment in &segments {
        let params = segment.param..segment.param + segment.len;
        let grads = segment.grad..segment.grad + segment.len;
        let named = |what: &str| format!("{what} of `{}`", segment.name);
        t.judge(
            &named("moment 1"),
            &got.moment1[grads.clone()],
            &expected.moment1[grads.clone()],
            segment.len,
            ELEMENTWISE,
        );
        if let Rule::Adam { .. } = rule {
            let (got, expected) = (&got.moment2[grads.clone()], &expected.moment2[grads]);
            t.judge(&named("moment 2"), got, expected, segment.len, ELEMENTWISE);
        }
        // The change of the weights is more sensitive than their values, down to the weights' own rounding.
        let moved = |b: &Buffers| -> Vec<f64> {
            b.params[params.clone()].iter().zip(&before.params[params.clone()]).map(|(b, a)| b - a).collect()
        };
        let (moved_to, should) = (moved(&got), moved(&expected));
        let size = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let rounding =
            size(&before.params[params.clone()]) / size(&should).max(1e-30) * f64::from(f32::EPSILON);
        let tolerance = 2.0 * ELEMENTWISE + rounding;
        t.judge(&named("step"), &moved_to, &should, segment.len, tolerance);
        if s.ema.is_some() {
            let (got, expected) = (&got.ema[params.clone()], &expected.ema[params]);
            t.judge(&named("ema"), got, expected, segment.len, ELEMENTWISE);
        }
        if let Rule::Adafactor { .. } = rule {
            let f = segment.factor.expect("all have one");
            let state = f.state..f.state + f.state_len();
            t.judge(
                &named("statistics"),
                &got.moment2[state.clone()],
                &expected.moment2[state],
                1,
                ELEMENTWISE,
            );
        }
    }
    t.judge("frozen weights", &got.params[..FROZEN], &before.params[..FROZEN], FROZEN, 0.0);
    if s.ema.is_some() {
        t.judge("average of frozen weights", &got.ema[..FROZEN], &before.ema[..FROZEN], FROZEN, ELEMENTWISE);
    }
    for segment in &segments {
        let mut padding = vec![true; segment.len];
        places(segment.factor.expect("all have one")).for_each(|(offset, ..)| padding[offset] = false);
        let zero = (0..segment.len).filter(|i| padding[*i]).all(|i| got.params[segment.param + i] == 0.0);
        t.expect(&format!("padding of `{}` stays zero", segment.name), zero);
    }
    Ok(())
}

/// The bf16 values of exact ones, where the device has these.
pub(super) fn rounded_like(exact: &mut [f64], got: &[f64]) {
    exact.iter_mut().zip(got).for_each(|(exact, got)| *exact = rounded_to_bf16(*exact, *got));
}

/// The bf16 value of `exact`; if it is near the middle of two, the one that the device chose.
fn rounded_to_bf16(exact: f64, got: f64) -> f64 {
    // bf16 has seven bits after the leading one.
    let half_step = if exact == 0.0 { 0.0 } else { exact.abs().log2().floor().exp2() / 256.0 };
    let slack = 1e-5 * exact.abs() + 1e-7;
    if (got - exact).abs() <= half_step + slack { got } else { bf16::from_f64(exact).to_f64() }
}

#[derive(Clone, Copy)]
enum Cause {
    NanGradient,
    InfiniteGradient,
    NanLoss,
}

/// An update whose loss or gradient is not finite changes nothing, and reports that.
fn skip(t: &mut Trial, rule: Rule, cause: Cause) -> Result<()> {
    let more = More::None;
    let segments = segments(more);
    let s = Setting { t: 7, clip: Clip::Optax(1.0), ema: Some(0.9), gradient: Gradient::Normal, more };
    let mut before = Buffers::new(t, rule, &segments, s);
    let last = segments[1].grad + segments[1].len - 1;
    match cause {
        Cause::NanGradient => before.grads[last] = f64::NAN,
        Cause::InfiniteGradient => before.grads[last] = f64::NEG_INFINITY,
        Cause::NanLoss => {}
    }
    before.place(t, rule);
    let loss = if let Cause::NanLoss = cause { f64::NAN } else { 1.0 };
    let samples = t.statistics(2, 3, vec![2.0, 1.0, 1.0, loss, 0.0, 1.0]);

    t.start()?;
    let backend = t.backend();
    backend.begin_report()?;
    backend.add_to_report(samples.mat)?;
    backend.update(&request(rule, &segments, s))?;
    let skipped = backend.report()?.skipped;
    // Every case checks at its end that weights, moments and average are unchanged.
    t.expect("the update says that it was skipped", skipped);
    Ok(())
}
