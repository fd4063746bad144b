//! Each rule against f64 formulas, golden values from the original programs, and the reference folder.

use std::path::PathBuf;

use safetensors::SafeTensors;

use super::*;
use crate::backend::{Factor, Segment};
use crate::rng::{Domain, Stream};

const SGD: Rule = Rule::Sgd { momentum: 0.9, nesterov: false, bf16: false };
const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, bf16: false };

fn compute(threads: usize) -> Compute {
    Compute::new(Isa::best(), threads).unwrap()
}

fn segment(param: usize, grad: usize, len: usize, group: usize) -> Segment {
    Segment { name: format!("tensor.{param}"), param, grad, len, group, factor: None }
}

/// An update of one group.
fn plain<'a>(rule: Rule, segments: &'a [Segment], groups: &'a [GroupScalars], t: u64) -> Update<'a> {
    Update {
        rule,
        segments,
        groups,
        t,
        clip: None,
        clip_torch: false,
        ema_decay: None,
        limits: crate::backend::Limits::NONE,
    }
}

/// The state of a small model: two tensors with a gap between them, of which the parameter arena has more.
#[derive(Clone, PartialEq, Debug)]
struct State {
    params: Vec<f32>,
    grads: Vec<f32>,
    m: Vec<f32>,
    m16: Vec<bf16>,
    v: Vec<f32>,
    ema: Vec<f32>,
}

const LENGTHS: [usize; 2] = [40_000, 1_003];
const PARAM_AT: [usize; 2] = [64, 40_128];
const GRAD_AT: [usize; 2] = [0, 40_000];

impl State {
    fn new() -> State {
        let mut s = Stream::new(3, Domain::Init, 0, 0);
        let mut draw = |n: usize| (0..n).map(|_| s.normal() as f32).collect::<Vec<_>>();
        let (params, grads) = (draw(41_216), draw(41_003));
        let (n, ema) = (grads.len(), params.clone());
        State { params, grads, m: vec![0.0; n], m16: vec![bf16::ZERO; n], v: vec![0.0; n], ema }
    }

    fn segments() -> Vec<Segment> {
        (0..2).map(|i| segment(PARAM_AT[i], GRAD_AT[i], LENGTHS[i], i)).collect()
    }

    fn step(&mut self, c: &Compute, update: &Update, bf16: bool, loss_is_finite: bool) -> Outcome {
        let moment1 = if bf16 { Moment1::Bf16(&mut self.m16) } else { Moment1::F32(&mut self.m) };
        let buffers = Buffers {
            params: &mut self.params,
            grads: &self.grads,
            moment1,
            moment2: &mut self.v,
            ema: update.ema_decay.map(|_| &mut self.ema[..]),
        };
        super::update(c, update, buffers, loss_is_finite)
    }
}

/// `(g, m, v, t) → (u, m, v)` in f64, with the momentum constants given.
fn in_f64(rule: Rule, g: f64, m: f64, v: f64, t: i32) -> (f64, f64, f64) {
    match rule {
        Rule::Sgd { momentum, nesterov, .. } => {
            let new = g + momentum * m;
            (if nesterov { g + momentum * new } else { new }, new, v)
        }
        Rule::Adam { beta1, beta2, eps, .. } => {
            let (m, v) = (beta1 * m + (1.0 - beta1) * g, beta2 * v + (1.0 - beta2) * g * g);
            let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
            (m_hat / (v_hat.sqrt() + eps), m, v)
        }
        Rule::Lion { beta1, beta2, .. } => {
            let c = beta1 * m + (1.0 - beta1) * g;
            (if c == 0.0 { 0.0 } else { c.signum() }, beta2 * m + (1.0 - beta2) * g, v)
        }
        Rule::Adafactor { .. } => unreachable!("tested over whole tensors"),
    }
}

#[test]
fn every_elementwise_rule_follows_its_formula_with_clip_decay_and_ema() {
    let rules = [
        SGD,
        Rule::Sgd { momentum: 0.9, nesterov: true, bf16: false },
        ADAM,
        Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: false },
    ];
    let groups = [GroupScalars { lr: 0.01, decay: 0.001 }, GroupScalars { lr: 0.1, decay: 0.0 }];
    let c = compute(2);
    for rule in rules {
        let segments = State::segments();
        let mut state = State::new();
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        let (mut theta, mut ema) = (wide(&state.params), wide(&state.ema));
        let (mut m, mut v) = (wide(&state.m), wide(&state.v));
        for t in 1..=4 {
            // A different gradient each step; the second is below the clip limit.
            let scale = [1.0, 1e-3, -2.0, 0.5][t as usize - 1];
            state.grads = State::new().grads.iter().map(|g| g * scale).collect();
            let norm = state.grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let update =
                Update { clip: Some(1.0), ema_decay: Some(0.9), ..plain(rule, &segments, &groups, t) };
            let outcome = state.step(&c, &update, false, true);
            assert!(!outcome.skipped);
            assert!((outcome.grad_norm / norm - 1.0).abs() < 1e-12);

            let factor = if norm < 1.0 { 1.0 } else { 1.0 / norm };
            for i in 0..2 {
                let GroupScalars { lr, decay } = groups[i];
                for k in 0..LENGTHS[i] {
                    let (p, g) = (PARAM_AT[i] + k, GRAD_AT[i] + k);
                    let (u, new_m, new_v) =
                        in_f64(rule, f64::from(state.grads[g]) * factor, m[g], v[g], t as i32);
                    (m[g], v[g]) = (new_m, new_v);
                    theta[p] -= f64::from(lr) * u + f64::from(decay) * theta[p];
                    ema[p] = 0.9 * ema[p] + 0.1 * theta[p];
                }
            }
        }
        let (mut worst, mut worst_ema) = (0.0f64, 0.0f64);
        for (p, expected) in theta.iter().enumerate() {
            worst = worst.max((f64::from(state.params[p]) - expected).abs());
            worst_ema = worst_ema.max((f64::from(state.ema[p]) - ema[p]).abs());
        }
        assert!(worst < 2e-6, "{rule:?}: weights differ by {worst}");
        assert!(worst_ema < 2e-6, "{rule:?}: their average differs by {worst_ema}");
        assert_eq!(state.params[..64], State::new().params[..64], "what no segment covers stays");
    }
}

#[test]
fn threads_and_instruction_sets_change_no_bit() {
    let groups = [GroupScalars { lr: 0.01, decay: 0.001 }; 2];
    for (rule, bf16) in [
        (SGD, false),
        (Rule::Sgd { momentum: 0.9, nesterov: true, bf16: true }, true),
        (ADAM, false),
        (Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, bf16: true }, true),
        (Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: true }, true),
    ] {
        let run = |isa: Isa, threads: usize| {
            let c = Compute::new(isa, threads).unwrap();
            let (mut state, segments) = (State::new(), State::segments());
            let mut norms = Vec::new();
            for t in 1..=3 {
                let update =
                    Update { clip: Some(1.0), ema_decay: Some(0.99), ..plain(rule, &segments, &groups, t) };
                norms.push(state.step(&c, &update, bf16, true).grad_norm);
            }
            (state, norms)
        };
        let first = run(Isa::Scalar, 1);
        for isa in Isa::available() {
            for threads in 1..=3 {
                assert!(run(isa, threads) == first, "{rule:?} on {threads} threads with {}", isa.name());
            }
        }
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let (groups, segments) = ([GroupScalars { lr: 0.01, decay: 0.001 }; 2], State::segments());
    let update = Update { ema_decay: Some(0.9), ..plain(ADAM, &segments, &groups, 1) };
    for (bad, loss_is_finite) in [(f32::NAN, true), (f32::INFINITY, true), (1.0, false)] {
        let mut state = State::new();
        state.grads[40_500] = bad;
        let before = format!("{state:?}");
        let outcome = state.step(&compute(2), &update, false, loss_is_finite);
        assert!(outcome.skipped);
        assert!(format!("{state:?}") == before, "a skipped step changed something");
    }
}

#[test]
fn zero_gradients_move_nothing_but_by_decay() {
    let groups = [GroupScalars { lr: 0.01, decay: 0.0 }; 2];
    for rule in [SGD, ADAM, Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: false }] {
        let (mut state, segments) = (State::new(), State::segments());
        state.grads.fill(0.0);
        let before = state.clone();
        state.step(&compute(1), &plain(rule, &segments, &groups, 1), false, true);
        assert!(state == before, "{rule:?}");
    }
}

/// One weight through three steps: returns every step's weight and stored moment.
fn one_weight(rule: Rule, steps: [(f32, GroupScalars); 3]) -> Vec<(f32, f32)> {
    let (mut theta, mut m, mut v) = ([0.5f32], [bf16::ZERO], [0.0f32]);
    let segments = [segment(0, 0, 1, 0)];
    let mut seen = Vec::new();
    for (t, (g, scalars)) in (1..).zip(steps) {
        let buffers = Buffers {
            params: &mut theta,
            grads: &[g],
            moment1: Moment1::Bf16(&mut m),
            moment2: &mut v,
            ema: None,
        };
        update(&compute(1), &plain(rule, &segments, &[scalars], t), buffers, true);
        seen.push((theta[0], m[0].to_f32()));
    }
    seen
}

#[test]
fn moments_in_bf16_give_the_golden_values_of_jax() {
    let check = |got: Vec<(f32, f32)>, expected: [(f32, f32); 3]| {
        for ((theta, m), (expected_theta, expected_m)) in got.into_iter().zip(expected) {
            assert!((theta - expected_theta).abs() <= 6e-8, "weight {theta}, not {expected_theta}");
            assert!((m - expected_m).abs() <= 1e-9, "moment {m}, not {expected_m}");
        }
    };
    // big_vision's Adam: lr 1e-3, decay 1e-4, both times the schedule 0, 0.5, 1.
    let bv = |s: f32| GroupScalars { lr: 1e-3 * s, decay: 1e-4 * s };
    let adam = Rule::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, bf16: true };
    check(
        one_weight(adam, [(0.1, bv(0.0)), (-0.2, bv(0.5)), (0.3, bv(1.0))]),
        [(0.5, 0.010009766), (0.5001582, -0.010986328), (0.49976444, 0.020141602)],
    );
    // vit_jax's SGD.
    let lr = |lr: f32| GroupScalars { lr, decay: 0.0 };
    let sgd = Rule::Sgd { momentum: 0.9, nesterov: false, bf16: true };
    check(
        one_weight(sgd, [(0.1, lr(0.0)), (-0.2, lr(0.005)), (0.3, lr(0.01))]),
        [(0.5, 0.100097656), (0.5005503, -0.10986328), (0.4985374, 0.20117188)],
    );
}

#[test]
fn bf16_is_stored_to_nearest_even() {
    let mut s = Stream::new(8, Domain::Init, 0, 0);
    let edges = [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY, 1e-40];
    let random = (0..100_000).map(|_| f32::from_bits(s.next_u32())).filter(|x| !x.is_nan());
    for x in edges.into_iter().chain(random) {
        let stored = <bf16 as Moment>::store(x);
        assert_eq!(stored.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
        assert_eq!(stored.load(), stored.to_f32());
    }
    assert_eq!(<bf16 as Moment>::constant(0.9), 0.8984375);
    assert_eq!(<bf16 as Moment>::constant(0.99), 0.98828125);
}

// Reference folder -----------------------------------------------------------------------------------------------

/// The bytes of a file of the reference folder; `None`, after a printed line, if it is absent.
fn reference(name: &str) -> Option<Vec<u8>> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
    let path = PathBuf::from(std::env::var("VITRUM_REFERENCE").unwrap_or(default.into())).join(name);
    let bytes = std::fs::read(&path);
    if bytes.is_err() {
        println!("skipped: no {}", path.display());
    }
    bytes.ok()
}

fn tensor(file: &SafeTensors, name: &str) -> Option<Vec<f32>> {
    let view = file.tensor(name).ok()?;
    Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

fn rel_l2(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    (error / size.max(1e-300)).sqrt()
}

#[test]
fn torch_adamw_is_met_at_its_first_and_a_later_step() {
    let Some(bytes) = reference("kernels/adamw_step.safetensors") else { return };
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    let number = |text: &str| text.parse::<f64>().unwrap();
    let (beta1, beta2) = metadata["betas"].split_once(',').unwrap();
    let rule =
        Rule::Adam { beta1: number(beta1), beta2: number(beta2), eps: number(&metadata["eps"]), bf16: false };
    let lr = number(&metadata["lr"]);
    let scalars = [GroupScalars { lr: lr as f32, decay: (lr * number(&metadata["weight_decay"])) as f32 }];

    let file = SafeTensors::deserialize(&bytes).unwrap();
    let get = |name: &str| tensor(&file, name).unwrap();
    for t in [1, 7] {
        let n = get("p").len();
        let before = |key: &str| if t == 1 { vec![0.0; n] } else { get(&format!("{key}_before_s{t}")) };
        let (mut p, mut m, mut v) = (get("p"), before("m"), before("v"));
        let segments = [segment(0, 0, n, 0)];
        let buffers = Buffers {
            params: &mut p,
            grads: &get("g"),
            moment1: Moment1::F32(&mut m),
            moment2: &mut v,
            ema: None,
        };
        update(&compute(1), &plain(rule, &segments, &scalars, t), buffers, true);
        for (name, got) in [("p", p), ("m", m), ("v", v)] {
            let error = rel_l2(&got, &get(&format!("s{t}.{name}")));
            assert!(error < 1e-6, "step {t}: {name} differs by {error}");
        }
    }
}

#[test]
fn both_clips_are_met() {
    let Some(bytes) = reference("kernels/clip.safetensors") else { return };
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let max: f32 = metadata.metadata().as_ref().unwrap()["max_norm"].parse().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tags: Vec<&str> = file.names().into_iter().filter_map(|n| n.strip_suffix(".norm")).collect();
    assert!(!tags.is_empty());
    // SGD without momentum, from zero, with rate 1, leaves minus the clipped gradient.
    let rule = Rule::Sgd { momentum: 0.0, nesterov: false, bf16: false };
    let gather = |prefix: &str| -> Vec<f32> {
        (0..).map_while(|i| tensor(&file, &format!("{prefix}.g{i}"))).flatten().collect()
    };
    for tag in tags {
        let grads = gather(tag);
        for (form, torch) in [("optax", false), ("torch", true)] {
            let expected = gather(&format!("{tag}.{form}"));
            if expected.is_empty() {
                continue;
            }
            let n = grads.len();
            let (mut theta, mut m) = (vec![0.0; n], vec![0.0; n]);
            let (segments, scalars) = ([segment(0, 0, n, 0)], [GroupScalars { lr: 1.0, decay: 0.0 }]);
            let update = Update { clip: Some(max), clip_torch: torch, ..plain(rule, &segments, &scalars, 1) };
            let moment1 = Moment1::F32(&mut m);
            let buffers = Buffers { params: &mut theta, grads: &grads, moment1, moment2: &mut [], ema: None };
            let outcome = super::update(&compute(1), &update, buffers, true);
            let norm = f64::from(tensor(&file, &format!("{tag}.norm")).unwrap()[0]);
            assert!(
                (outcome.grad_norm - norm).abs() <= 1e-6 * norm,
                "{tag}: {} not {norm}",
                outcome.grad_norm
            );
            let got: Vec<f32> = theta.iter().map(|x| -x).collect();
            let error = rel_l2(&got, &expected);
            assert!(error < 1e-6, "{tag} {form}: differs by {error}");
        }
    }
}

// Adafactor's two storages on one matrix; the layouts of a model are tested next to the table that describes them. ---

#[test]
fn adafactor_keeps_the_means_of_rows_and_columns() {
    let (rows, cols) = (3, 4);
    let grads: Vec<f32> = (0..12).map(|i| (i as f32 - 5.5) * 0.1).collect();
    let factor = Factor {
        outer: [1, 1],
        rows,
        cols,
        outer_stride: [0, 0],
        row_stride: cols,
        col_stride: 1,
        state: 0,
        factored: true,
    };
    let rule =
        Rule::Adafactor { momentum: 0.0, beta2_cap: 0.999, decay_power: 0.8, clip_rms: None, bf16: false };
    for factored in [true, false] {
        let factor = Factor { factored, ..factor };
        let segments = [Segment { factor: Some(factor), ..segment(0, 0, 12, 0) }];
        let (mut theta, mut m, mut v) = (vec![0.0; 12], vec![0.0; 12], vec![0.0; factor.state_len()]);
        let buffers = Buffers {
            params: &mut theta,
            grads: &grads,
            moment1: Moment1::F32(&mut m),
            moment2: &mut v,
            ema: None,
        };
        let scalars = [GroupScalars { lr: 1.0, decay: 0.0 }];
        update(&compute(1), &plain(rule, &segments, &scalars, 1), buffers, true);
        let square = |r: usize, c: usize| f64::from(grads[r * cols + c]).powi(2);
        let row = |r| (0..cols).map(|c| square(r, c)).sum::<f64>() / cols as f64;
        let col = |c| (0..rows).map(|r| square(r, c)).sum::<f64>() / rows as f64;
        let mean = (0..rows).map(row).sum::<f64>() / rows as f64;
        for r in 0..rows {
            for c in 0..cols {
                let g = f64::from(grads[r * cols + c]);
                let u = if factored { g / (row(r) / mean * col(c)).sqrt() } else { g.signum() };
                let got = -f64::from(theta[r * cols + c]);
                assert!((got - u).abs() < 1e-6, "factored {factored}, ({r}, {c}): {got}, not {u}");
            }
        }
        if factored {
            assert!((f64::from(v[1]) - row(1)).abs() < 1e-7);
            assert!((f64::from(v[rows + 2]) - col(2)).abs() < 1e-7);
        }
    }
}
