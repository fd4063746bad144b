//! LayerNorm and the residual add before it.

use crate::backend::{Branch, Join, Mask, Norm, Stats, Write};
use crate::error::Result;

use super::harness::{Body, Case, ELEMENTWISE, Operand, Product, Trial, accumulated, sum_of};

/// B samples of T rows of D values.
#[derive(Clone, Copy)]
struct Shape {
    samples: usize,
    tokens: usize,
    width: usize,
}

const SHAPES: [Shape; 10] = [
    shape(1, 1, 60),
    shape(3, 5, 60),
    shape(5, 65, 192),
    shape(1, 197, 770),
    shape(1, 257, 192),
    shape(7, 1, 5),
    // Devices may hold a row in registers: one width per instance, and one that is too wide. Enough rows that
    // a multiprocessor processes several in turn.
    shape(3, 21, 384),
    shape(3, 13, 768),
    shape(1, 29, 1280),
    shape(1, 37, 1416),
];

const fn shape(samples: usize, tokens: usize, width: usize) -> Shape {
    Shape { samples, tokens, width }
}

const EPS: f32 = 1e-6;

/// What is applied to a branch before it joins the stream.
#[derive(Clone, Copy)]
struct Between {
    layer_scale: LayerScale,
    dropout: bool,
    drop_path: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum LayerScale {
    None,
    Frozen,
    Trained,
}

const BETWEEN: [Between; 6] = [
    between(LayerScale::None, false, false),
    between(LayerScale::None, true, false),
    between(LayerScale::None, false, true),
    between(LayerScale::Trained, false, false),
    between(LayerScale::Trained, true, true),
    between(LayerScale::Frozen, true, true),
];

const fn between(layer_scale: LayerScale, dropout: bool, drop_path: bool) -> Between {
    Between { layer_scale, dropout, drop_path }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut push = |operation, title, body: Box<Body>| {
        cases.push(Case::new(operation, title, body));
    };
    for s in SHAPES {
        push("layernorm", s.title(), Box::new(move |t| layernorm(t, s, None)));
    }
    for (s, b) in joined() {
        push("layernorm join", s.title() + &b.title(), Box::new(move |t| layernorm(t, s, Some(b))));
    }
    for s in SHAPES {
        for work in Work::WITHOUT_BIAS.into_iter().chain(Work::WITH_BIAS) {
            let title = s.title() + &work.title();
            push("layernorm_backward", title, Box::new(move |t| layernorm_backward(t, s, work, None)));
        }
    }
    for works in [&Work::WITHOUT_BIAS[..], &Work::WITH_BIAS] {
        for (i, (s, b)) in joined().into_iter().enumerate() {
            let work = works[i % works.len()];
            let title = s.title() + &b.title() + &work.title();
            push(
                "layernorm_backward join",
                title,
                Box::new(move |t| layernorm_backward(t, s, work, Some(b))),
            );
        }
    }
    for (s, b) in joined() {
        push("residual", s.title() + &b.title(), Box::new(move |t| residual(t, s, b)));
    }
    for bias in [false, true] {
        for (i, (s, b)) in joined().into_iter().enumerate() {
            let accumulate = i % 2 == 1;
            let title = s.title() + &b.title() + if accumulate { ", accumulating" } else { "" };
            let title = title + if bias { ", bias" } else { "" };
            push("residual_backward", title, Box::new(move |t| residual_backward(t, s, b, accumulate, bias)));
        }
    }
    push("residual", "ready: nothing to do".into(), Box::new(nothing_to_do));
    push("residual_backward", "ready: handed on".into(), Box::new(handed_on));
    cases
}

/// Every kind of branch, over shapes with one and with many samples.
fn joined() -> Vec<(Shape, Between)> {
    let shapes = [shape(3, 5, 60), shape(5, 65, 192)];
    let others = [
        (shape(7, 1, 5), BETWEEN[4]),
        (shape(3, 13, 384), BETWEEN[5]),
        (shape(3, 7, 768), BETWEEN[5]),
        (shape(3, 7, 770), BETWEEN[2]),
        (shape(3, 7, 1280), BETWEEN[5]),
        (shape(3, 13, 1416), BETWEEN[4]),
    ];
    BETWEEN.iter().flat_map(|b| shapes.map(|s| (s, *b))).chain(others).collect()
}

impl Shape {
    fn rows(&self) -> usize {
        self.samples * self.tokens
    }

    fn title(&self) -> String {
        format!("B {} T {} D {}", self.samples, self.tokens, self.width)
    }
}

impl Between {
    fn title(&self) -> String {
        let mut title = String::new();
        title += match self.layer_scale {
            LayerScale::None => "",
            LayerScale::Frozen => ", frozen LayerScale",
            LayerScale::Trained => ", LayerScale",
        };
        title += if self.dropout { ", dropout" } else { "" };
        title += if self.drop_path { ", drop-path" } else { "" };
        if title.is_empty() { ", plain branch".into() } else { title }
    }
}

/// What a backward has to do.
#[derive(Clone, Copy)]
struct Work {
    /// Gamma, beta.
    trained: [bool; 2],
    accumulate: bool,
    fresh: bool,
    /// A product with a trained bias reads the gradient that the operation produces.
    bias: bool,
}

impl Work {
    const WITHOUT_BIAS: [Work; 4] = [
        Work { trained: [true, true], accumulate: false, fresh: true, bias: false },
        Work { trained: [true, true], accumulate: true, fresh: false, bias: false },
        Work { trained: [false, false], accumulate: false, fresh: false, bias: false },
        Work { trained: [true, false], accumulate: true, fresh: true, bias: false },
    ];
    const WITH_BIAS: [Work; 3] = [
        Work { trained: [true, true], accumulate: false, fresh: false, bias: true },
        Work { trained: [true, true], accumulate: true, fresh: true, bias: true },
        Work { trained: [false, false], accumulate: true, fresh: false, bias: true },
    ];

    fn title(&self) -> String {
        let trained = match self.trained {
            [true, true] => "",
            [false, false] => ", frozen",
            _ => ", gamma only",
        };
        let accumulate = if self.accumulate { ", accumulating" } else { "" };
        let fresh = if self.fresh { ", fresh" } else { "" };
        let bias = if self.bias { ", bias" } else { "" };
        format!("{trained}{accumulate}{fresh}{bias}")
    }
}

/// Normal rows, the first three of them hard: constant, of tiny variance, far from zero.
fn hard_rows(t: &mut Trial, s: Shape) -> Operand {
    let mut values = t.normal(s.rows() * s.width, 1.0);
    for (r, row) in values.chunks_mut(s.width).enumerate().take(if s.rows() > 3 { 3 } else { 0 }) {
        for (i, x) in row.iter_mut().enumerate() {
            *x = match r {
                0 => 1.5,
                // Steps of bf16 at 0.5.
                1 => 0.5 + f64::from(i as u32 % 3) / 256.0,
                // Steps of bf16 at 64.
                _ => 64.0 + (2.0 * *x).round() / 2.0,
            };
        }
    }
    t.stream_given(s.rows(), s.width, values)
}

/// A branch with its operands.
struct Joined {
    base: Operand,
    branch: Operand,
    layer_scale: Option<(Operand, Option<Operand>)>,
    dropout: Mask,
    drop_path: Mask,
    /// `[R, D]`: the factors of dropout and drop-path.
    factors: Vec<f64>,
    tokens: usize,
}

impl Joined {
    fn new(t: &mut Trial, s: Shape, b: Between, accumulate: bool) -> Self {
        let layer_scale = (b.layer_scale != LayerScale::None).then(|| {
            let scale = t.param(1, s.width, 0.0, 0.5);
            let grad = (b.layer_scale == LayerScale::Trained).then(|| t.grad(&scale, accumulate));
            (scale, grad)
        });
        let rate = |on: bool, rate: f32| if on { rate } else { 0.0 };
        let dropout = Mask { rate: rate(b.dropout, 0.25), site: 3 };
        let drop_path = Mask { rate: rate(b.drop_path, 0.4), site: 7 };
        let (elements, paths) = (t.mask(dropout), t.mask(drop_path));
        let mut factors = Vec::new();
        for sample in 0..s.samples {
            // Dropout draws for every element of the sample, drop-path once.
            let path = if b.drop_path { f64::from(paths.factor(sample, 0)) } else { 1.0 };
            factors.extend((0..s.tokens * s.width).map(|element| {
                if b.dropout { path * f64::from(elements.factor(sample, element)) } else { path }
            }));
        }
        let kept =
            factors.chunks(s.tokens * s.width).filter(|sample| sample.iter().any(|f| *f != 0.0)).count();
        assert!(!b.drop_path || (1..s.samples).contains(&kept), "drop-path has to keep and to drop samples");
        Self {
            base: t.stream_input(s.rows(), s.width, false),
            branch: t.input(s.rows(), s.width, 1.0),
            layer_scale,
            dropout,
            drop_path,
            factors,
            tokens: s.tokens,
        }
    }

    /// The factor of a branch element in the sum.
    fn weight(&self, i: usize) -> f64 {
        let scale = self.layer_scale.as_ref().map_or(1.0, |(scale, _)| scale.values[i % scale.values.len()]);
        self.factors[i] * scale
    }

    fn sum(&self) -> Vec<f64> {
        let terms = self.base.values.iter().zip(&self.branch.values).enumerate();
        terms.map(|(i, (base, branch))| base + self.weight(i) * branch).collect()
    }

    fn join(&self, sum: &Operand) -> Join {
        let layer_scale = self.layer_scale.as_ref();
        Join::Branch {
            sum: sum.mat,
            branch: Branch {
                base: self.base.mat,
                branch: self.branch.mat,
                layer_scale: layer_scale.map(|(scale, grad)| (scale.mat, grad.as_ref().map(|grad| grad.mat))),
                dropout: self.dropout,
                drop_path: self.drop_path,
                tokens: self.tokens,
            },
        }
    }

    /// Compares the gradients of branch and LayerScale with those that follow from `d_sum`.
    fn check(&self, t: &mut Trial, d_sum: &[f64], d_branch: &Operand, accumulate: bool) -> Result<()> {
        let expected: Vec<f64> = d_sum.iter().enumerate().map(|(i, d)| d * self.weight(i)).collect();
        t.compare("d_branch", d_branch, &expected, 2.0 * ELEMENTWISE)?;
        if let Some((scale, Some(grad))) = &self.layer_scale {
            let mut sum = vec![0.0; scale.values.len()];
            for (i, d) in d_sum.iter().enumerate() {
                sum[i % scale.values.len()] += d * self.factors[i] * self.branch.values[i];
            }
            // It may be summed from d_sum as it was stored.
            let tolerance = t.tolerance(d_branch, sum_of(self.base.mat.rows) + ELEMENTWISE);
            t.compare("d_layer_scale", grad, &accumulated(grad, accumulate, &sum), tolerance)?;
        }
        Ok(())
    }
}

/// Mean and reciprocal deviation of every row.
fn statistics(x: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    x.chunks(width)
        .map(|row| {
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            (mean, 1.0 / (variance + f64::from(EPS)).sqrt())
        })
        .unzip()
}

fn layernorm(t: &mut Trial, s: Shape, between: Option<Between>) -> Result<()> {
    t.samples(s.samples, false);
    let joined = between.map(|b| Joined::new(t, s, b, false));
    let x = match &joined {
        Some(_) => t.stream_output(s.rows(), s.width, false),
        None => hard_rows(t, s),
    };
    let gamma = t.param(1, s.width, 1.0, 0.3);
    let beta = t.param(1, s.width, 0.0, 0.5);
    let y = t.output(s.rows(), s.width);
    let [mean, rstd] = [0, 1].map(|_| t.statistics_output(s.rows(), 1));

    let sum = joined.as_ref().map_or(x.values.clone(), Joined::sum);
    let (means, rstds) = statistics(&sum, s.width);
    let normalised = |i: usize| (sum[i] - means[i / s.width]) * rstds[i / s.width];
    let expected: Vec<f64> = (0..sum.len())
        .map(|i| normalised(i) * gamma.values[i % s.width] + beta.values[i % s.width])
        .collect();

    let join = joined.as_ref().map_or(Join::Ready(x.mat), |joined| joined.join(&x));
    let norm = Norm { gamma: gamma.mat, beta: beta.mat, d_gamma: None, d_beta: None, eps: EPS };
    t.start()?.layernorm(&join, &norm, y.mat, Stats { mean: mean.mat, rstd: rstd.mat })?;
    if joined.is_some() {
        t.compare("sum", &x, &sum, ELEMENTWISE)?;
    }
    t.compare_rows("y", &y, &expected, 0.0, 2.0 * ELEMENTWISE)?;
    // A mean near zero is a difference of much larger values, so the means are compared as a whole. The
    // statistics of a sum may be those of the stored sum. The deviation is the root of a sum over the row,
    // which halves the sum's relative error.
    let [of_mean, of_rstd] = [2.0 * ELEMENTWISE, ELEMENTWISE.max(0.5 * sum_of(s.width))]
        .map(|exact| if joined.is_some() { t.tolerance(&x, exact) } else { exact });
    t.compare("mean", &mean, &means, of_mean)?;
    t.compare_rows("rstd", &rstd, &rstds, 0.0, of_rstd)
}

fn layernorm_backward(t: &mut Trial, s: Shape, work: Work, between: Option<Between>) -> Result<()> {
    let Work { trained, accumulate, fresh, bias } = work;
    t.samples(s.samples, accumulate);
    let joined = between.map(|b| Joined::new(t, s, b, accumulate));
    let x = match &joined {
        Some(joined) => t.stream_given(s.rows(), s.width, joined.sum()),
        None => hard_rows(t, s),
    };
    let (means, rstds) = statistics(&x.values, s.width);
    let mean = t.statistics(s.rows(), 1, means.clone());
    let rstd = t.statistics(s.rows(), 1, rstds.clone());
    let gamma = t.param(1, s.width, 1.0, 0.3);
    let beta = t.param(1, s.width, 0.0, 0.5);
    let d_gamma = trained[0].then(|| t.grad(&gamma, accumulate));
    let d_beta = trained[1].then(|| t.grad(&beta, accumulate));
    let d_y = t.input(s.rows(), s.width, 1.0);
    let d_sum = if fresh {
        t.stream_output(s.rows(), s.width, false)
    } else {
        t.stream_input(s.rows(), s.width, false)
    };
    let d_branch = t.output(s.rows(), s.width);
    let product = bias.then(|| Product::behind(t, s.rows(), s.width, accumulate));

    let width = s.width as f64;
    let mut expected = if fresh { vec![0.0; d_y.values.len()] } else { d_sum.values.clone() };
    let (mut gamma_sum, mut beta_sum) = (vec![0.0; s.width], vec![0.0; s.width]);
    for r in 0..s.rows() {
        let hat: Vec<f64> = x.row(r).iter().map(|x| (x - means[r]) * rstds[r]).collect();
        let u: Vec<f64> = d_y.row(r).iter().zip(&gamma.values).map(|(d, gamma)| d * gamma).collect();
        let mean_u = u.iter().sum::<f64>() / width;
        let mean_u_hat = u.iter().zip(&hat).map(|(u, hat)| u * hat).sum::<f64>() / width;
        for c in 0..s.width {
            expected[r * s.width + c] += rstds[r] * (u[c] - mean_u - hat[c] * mean_u_hat);
            gamma_sum[c] += d_y.row(r)[c] * hat[c];
            beta_sum[c] += d_y.row(r)[c];
        }
    }

    // Without a branch, `d_sum` itself is the result: in place (not readable by products of another type), or
    // as a copy.
    let is_copied = joined.is_none() && (bias || !fresh) && d_branch.mat.dtype != d_sum.mat.dtype;
    let join = joined.as_ref().map_or(Join::Ready(x.mat), |joined| joined.join(&x));
    let handed_on = if joined.is_some() || is_copied { &d_branch } else { &d_sum };
    let handle = |grad: &Option<Operand>| grad.as_ref().map(|grad| grad.mat);
    let norm = Norm {
        gamma: gamma.mat,
        beta: beta.mat,
        d_gamma: handle(&d_gamma),
        d_beta: handle(&d_beta),
        eps: EPS,
    };
    let stats = Stats { mean: mean.mat, rstd: rstd.mat };
    let d_bias = product.as_ref().map(Product::d_bias);
    t.start()?.layernorm_backward(
        d_y.mat,
        &join,
        &norm,
        stats,
        d_sum.mat,
        Write::add_if(!fresh),
        handed_on.mat,
        d_bias,
    )?;
    if let Some(product) = &product {
        product.check(t, handed_on, accumulate)?;
    }
    t.compare_rows("d_sum", &d_sum, &expected, 0.0, 3.0 * ELEMENTWISE)?;
    for (name, grad, sum) in [("d_gamma", &d_gamma, &gamma_sum), ("d_beta", &d_beta, &beta_sum)] {
        if let Some(grad) = grad {
            t.compare(name, grad, &accumulated(grad, accumulate, sum), sum_of(s.rows()) + ELEMENTWISE)?;
        }
    }
    match &joined {
        Some(joined) => joined.check(t, &expected, &d_branch, accumulate),
        None if is_copied => t.compare("d_branch", &d_branch, &expected, 2.0 * ELEMENTWISE),
        None => Ok(()),
    }
}

fn residual(t: &mut Trial, s: Shape, b: Between) -> Result<()> {
    t.samples(s.samples, false);
    let joined = Joined::new(t, s, b, false);
    let sum = t.stream_output(s.rows(), s.width, false);
    let join = joined.join(&sum);
    t.start()?.residual(&join)?;
    t.compare("sum", &sum, &joined.sum(), ELEMENTWISE)
}

fn residual_backward(t: &mut Trial, s: Shape, b: Between, accumulate: bool, bias: bool) -> Result<()> {
    t.samples(s.samples, accumulate);
    let joined = Joined::new(t, s, b, accumulate);
    let sum = t.stream_given(s.rows(), s.width, joined.sum());
    let d_sum = t.stream_input(s.rows(), s.width, false);
    let d_branch = t.output(s.rows(), s.width);
    let product = bias.then(|| Product::behind(t, s.rows(), s.width, accumulate));
    let join = joined.join(&sum);
    let d_bias = product.as_ref().map(Product::d_bias);
    t.start()?.residual_backward(&join, d_sum.mat, d_branch.mat, d_bias)?;
    if let Some(product) = &product {
        product.check(t, &d_branch, accumulate)?;
    }
    joined.check(t, &d_sum.values, &d_branch, accumulate)
}

/// Where products cannot read the stream's type, they get a copy.
fn handed_on(t: &mut Trial) -> Result<()> {
    t.samples(1, false);
    let [sum, d_sum] = [0, 1].map(|_| t.stream_input(5, 60, false));
    let copy = t.output(5, 60);
    let d_branch = if copy.mat.dtype == d_sum.mat.dtype { d_sum.clone() } else { copy };
    let product = Product::behind(t, 5, 60, false);
    let d_bias = Some(product.d_bias());
    t.start()?.residual_backward(&Join::Ready(sum.mat), d_sum.mat, d_branch.mat, d_bias)?;
    product.check(t, &d_branch, false)?;
    t.compare("d_branch", &d_branch, &d_sum.values, 0.0)
}

fn nothing_to_do(t: &mut Trial) -> Result<()> {
    let [sum, d_sum] = [0, 1].map(|_| t.stream_input(5, 60, false));
    let backend = t.start()?;
    backend.residual(&Join::Ready(sum.mat))?;
    backend.residual_backward(&Join::Ready(sum.mat), d_sum.mat, d_sum.mat, None)?;
    t.expect("nothing is written", true);
    Ok(())
}
