//! Dense layers: every epilogue of the forward, every form of the input gradient, weights with padded rows.

use crate::backend::{Epilogue, Gelu, InputGrad, Mask};

use super::harness::{Case, Dense, ELEMENTWISE, Operand, Trial, accumulated, sum_of};
use super::reference::{gelu, gelu_grad};

/// B samples of T rows, `in` → `out`.
#[derive(Clone, Copy)]
struct Shape {
    samples: usize,
    tokens: usize,
    input: usize,
    out: usize,
}

/// Token counts, head sizes and widths that are not multiples of a tile; one longer than any block in each
/// direction.
const SHAPES: [Shape; 10] = [
    shape(1, 1, 60, 7),
    shape(3, 5, 60, 180),
    shape(3, 65, 192, 60),
    shape(1, 197, 192, 192),
    shape(5, 1, 192, 7),
    shape(1, 257, 80, 320),
    shape(1, 33, 17, 1),
    shape(1, 70, 800, 100),
    shape(5, 257, 48, 60),
    shape(1, 9, 60, 1100),
];

const fn shape(samples: usize, tokens: usize, input: usize, out: usize) -> Shape {
    Shape { samples, tokens, input, out }
}

const DROPOUT: Mask = Mask { rate: 0.3, site: 11 };

/// [`Epilogue`] before its matrices are placed.
#[derive(Clone, Copy)]
enum Forward {
    None,
    Bias,
    Residual {
        in_place: bool,
    },
    /// `keeps`: whether `pre` is stored, as it is when a backward follows.
    Gelu {
        form: Gelu,
        dropout: Mask,
        keeps: bool,
    },
    Tanh,
}

/// [`InputGrad`] before its matrices are placed.
#[derive(Clone, Copy)]
enum Backward {
    None,
    Plain,
    Add,
    Gelu(Gelu, Mask),
    Tanh,
}

pub(super) fn cases() -> Vec<Case> {
    let gelu = |form, dropout, keeps| Forward::Gelu { form, dropout, keeps };
    let forward = [
        ("matmul none", "", Forward::None),
        ("matmul bias", "", Forward::Bias),
        ("matmul residual", ", into another matrix", Forward::Residual { in_place: false }),
        ("matmul residual", ", in place", Forward::Residual { in_place: true }),
        ("matmul gelu", ", tanh", gelu(Gelu::Tanh, Mask::NONE, true)),
        ("matmul gelu", ", erf", gelu(Gelu::Erf, Mask::NONE, true)),
        ("matmul gelu", ", quick", gelu(Gelu::Quick, Mask::NONE, true)),
        ("matmul gelu", ", tanh, dropout", gelu(Gelu::Tanh, DROPOUT, true)),
        ("matmul gelu", ", erf, dropout", gelu(Gelu::Erf, DROPOUT, true)),
        ("matmul gelu", ", tanh, pre not kept", gelu(Gelu::Tanh, Mask::NONE, false)),
        ("matmul gelu", ", erf, pre not kept", gelu(Gelu::Erf, Mask::NONE, false)),
        ("matmul gelu", ", tanh, dropout, pre not kept", gelu(Gelu::Tanh, DROPOUT, false)),
        ("matmul tanh", "", Forward::Tanh),
    ];
    let backward = [
        ("matmul_backward none", "", Backward::None),
        ("matmul_backward plain", "", Backward::Plain),
        ("matmul_backward add", "", Backward::Add),
        ("matmul_backward gelu", ", tanh", Backward::Gelu(Gelu::Tanh, Mask::NONE)),
        ("matmul_backward gelu", ", erf", Backward::Gelu(Gelu::Erf, Mask::NONE)),
        ("matmul_backward gelu", ", quick", Backward::Gelu(Gelu::Quick, Mask::NONE)),
        ("matmul_backward gelu", ", tanh, dropout", Backward::Gelu(Gelu::Tanh, DROPOUT)),
        ("matmul_backward gelu", ", erf, dropout", Backward::Gelu(Gelu::Erf, DROPOUT)),
        ("matmul_backward tanh", "", Backward::Tanh),
    ];

    let mut cases = Vec::new();
    for (operation, form, epilogue) in forward {
        for shape in SHAPES {
            let title = format!("{}{form}", shape.title());
            cases.push(Case::new(operation, title, move |t| matmul(t, shape, epilogue, false)));
        }
        let shape = shape(3, 65, 60, 180);
        let title = format!("{}{form}, gaps between rows", shape.title());
        cases.push(Case::new(operation, title, move |t| matmul(t, shape, epilogue, true)));
    }
    for (operation, form, variant) in backward {
        for (i, shape) in SHAPES.into_iter().enumerate() {
            // Accumulation and the trained parameters alternate with the shape, so that each shape meets each
            // variant somewhere.
            let accumulate = i % 2 == 1;
            let trained = [[true, true], [true, false], [true, true], [false, true], [false, false]][i % 5];
            let work = Work { variant, trained, accumulate, gap: false };
            let title = format!("{}{form}{}", shape.title(), work.title());
            cases.push(Case::new(operation, title, move |t| matmul_backward(t, shape, work)));
        }
        let shape = shape(3, 65, 60, 180);
        let work = Work { variant, trained: [true, true], accumulate: true, gap: true };
        let title = format!("{}{form}{}", shape.title(), work.title());
        cases.push(Case::new(operation, title, move |t| matmul_backward(t, shape, work)));
    }
    // A row of 60 ends off the 16-byte boundaries of bf16, a row of 64 on one.
    for width in [60, 64] {
        let title = format!("some outputs of {width} → {}, the first row of each sample", 3 * width);
        cases.push(Case::new("matmul bias", title.clone(), move |t| matmul_of_views(t, width)));
        for accumulate in [false, true] {
            let title = format!("{title}{}", if accumulate { ", accumulating" } else { "" });
            let body = move |t: &mut Trial| matmul_backward_of_views(t, width, accumulate);
            cases.push(Case::new("matmul_backward add", title, body));
        }
    }
    cases
}

impl Shape {
    fn rows(&self) -> usize {
        self.samples * self.tokens
    }

    fn title(&self) -> String {
        format!("B {} T {}, {} → {}", self.samples, self.tokens, self.input, self.out)
    }
}

/// `[R, in]·[out, in]ᵀ`
fn times_transposed(x: &Operand, w: &Operand) -> Vec<f64> {
    let dot = |r: usize, j: usize| x.row(r).iter().zip(w.row(j)).map(|(x, w)| x * w).sum::<f64>();
    (0..x.mat.rows).flat_map(|r| (0..w.mat.rows).map(move |j| (r, j))).map(|(r, j)| dot(r, j)).collect()
}

/// The dropout factors of `[R, cols]`: element `token·cols + col` of each sample.
fn dropout_factors(t: &Trial, mask: Mask, shape: Shape, cols: usize) -> Vec<f64> {
    let bound = t.mask(mask);
    let elements = shape.tokens * cols;
    let factor = |i: usize| f64::from(bound.factor(i / elements, i % elements));
    (0..shape.samples * elements).map(|i| if mask.rate == 0.0 { 1.0 } else { factor(i) }).collect()
}

fn matmul(t: &mut Trial, shape: Shape, form: Forward, gap: bool) -> crate::error::Result<()> {
    let (rows, out) = (shape.rows(), shape.out);
    t.samples(shape.samples, false);
    let x = t.input_with_gap(rows, shape.input, 1.5, gap);
    let Dense { weight, bias, .. } = &t.linear(out, shape.input, [false; 2], false);
    let layer = Dense { weight: weight.clone(), bias: bias.clone(), d_weight: None, d_bias: None };
    // These produce a part of the residual stream.
    let in_stream = matches!(form, Forward::None | Forward::Residual { .. });
    let other =
        if in_stream { t.stream_input(rows, out, gap) } else { t.input_with_gap(rows, out, 1.0, gap) };
    let pre = matches!(form, Forward::Gelu { keeps: true, .. }).then(|| t.output_with_gap(rows, out, gap));
    let separate =
        if in_stream { t.stream_output(rows, out, gap) } else { t.output_with_gap(rows, out, gap) };
    let y = if let Forward::Residual { in_place: true } = form { other.clone() } else { separate };

    let product = times_transposed(&x, &layer.weight);
    let biased = || product.iter().enumerate().map(|(i, z)| z + layer.bias.values[i % out]);
    let expected: Vec<f64> = match form {
        Forward::None => product.clone(),
        Forward::Bias => biased().collect(),
        Forward::Residual { .. } => biased().zip(&other.values).map(|(z, base)| z + base).collect(),
        Forward::Gelu { form, dropout, .. } => {
            let factors = dropout_factors(t, dropout, shape, out);
            biased().zip(factors).map(|(z, factor)| gelu(z, form) * factor).collect()
        }
        Forward::Tanh => biased().map(f64::tanh).collect(),
    };
    let epilogue = match form {
        Forward::None => Epilogue::None,
        Forward::Bias => Epilogue::Bias,
        Forward::Residual { .. } => Epilogue::BiasResidual(other.mat),
        Forward::Gelu { form, dropout, .. } => {
            Epilogue::BiasGelu { pre: pre.as_ref().map(|pre| pre.mat), form, dropout }
        }
        Forward::Tanh => Epilogue::BiasTanh,
    };

    t.start()?.matmul(x.mat, &layer.handles(), epilogue, y.mat)?;
    t.compare("y", &y, &expected, sum_of(shape.input))?;
    if let Some(pre) = &pre {
        let expected: Vec<f64> = biased().collect();
        t.compare("pre", pre, &expected, sum_of(shape.input))?;
    }
    Ok(())
}

/// What a backward has to do, besides its shape.
#[derive(Clone, Copy)]
struct Work {
    variant: Backward,
    /// Weight, bias.
    trained: [bool; 2],
    accumulate: bool,
    gap: bool,
}

impl Work {
    fn title(&self) -> String {
        let trained = match self.trained {
            [true, true] => "",
            [true, false] => ", weight only",
            [false, true] => ", bias only",
            [false, false] => ", frozen",
        };
        let accumulate = if self.accumulate { ", accumulating" } else { "" };
        let gap = if self.gap { ", gaps between rows" } else { "" };
        format!("{trained}{accumulate}{gap}")
    }
}

fn matmul_backward(t: &mut Trial, shape: Shape, work: Work) -> crate::error::Result<()> {
    let Work { variant, trained, accumulate, gap } = work;
    let (rows, input, out) = (shape.rows(), shape.input, shape.out);
    t.samples(shape.samples, accumulate);
    let d_y = t.input_with_gap(rows, out, 1.0, gap);
    let x = t.input_with_gap(rows, input, 1.0, gap);
    let layer = t.linear(out, input, trained, accumulate);
    // The GELU's pre-activation, the tanh's value (within its range), or the gradient to add to.
    let scale = if let Backward::Tanh = variant { 0.3 } else { 1.5 };
    let other = t.input_with_gap(rows, input, scale, gap);
    let separate = t.output_with_gap(rows, input, gap);
    let d_x = if let Backward::Add = variant { other.clone() } else { separate };

    let mut product = vec![0.0; rows * input];
    let mut d_weight = vec![0.0; out * input];
    let mut d_bias = vec![0.0; out];
    for r in 0..rows {
        for j in 0..out {
            let d = d_y.row(r)[j];
            d_bias[j] += d;
            for k in 0..input {
                product[r * input + k] += d * layer.weight.row(j)[k];
                d_weight[j * input + k] += d * x.row(r)[k];
            }
        }
    }
    let with_other = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        product.iter().zip(&other.values).map(|(z, other)| f(*z, *other)).collect()
    };
    let expected = match variant {
        Backward::None => Vec::new(),
        Backward::Plain => product.clone(),
        Backward::Add => with_other(&|z, old| old + z),
        Backward::Gelu(form, mask) => {
            let factors = dropout_factors(t, mask, shape, input);
            let slopes = with_other(&|z, pre| z * gelu_grad(pre, form));
            slopes.iter().zip(factors).map(|(d, factor)| d * factor).collect()
        }
        Backward::Tanh => with_other(&|z, y| z * (1.0 - y * y)),
    };
    let how = match variant {
        Backward::None => InputGrad::None,
        Backward::Plain => InputGrad::Plain(d_x.mat),
        Backward::Add => InputGrad::Add(d_x.mat),
        Backward::Gelu(form, dropout) => InputGrad::Gelu { d_pre: d_x.mat, pre: other.mat, form, dropout },
        Backward::Tanh => InputGrad::Tanh { d: d_x.mat, y: other.mat },
    };

    t.start()?.matmul_backward(d_y.mat, x.mat, &layer.handles(), how)?;
    if let Some(grad) = &layer.d_weight {
        t.compare("d_weight", grad, &accumulated(grad, accumulate, &d_weight), sum_of(rows))?;
    }
    if let Some(grad) = &layer.d_bias {
        t.compare("d_bias", grad, &accumulated(grad, accumulate, &d_bias), sum_of(rows))?;
    }
    match variant {
        // A frozen layer whose input needs no gradient writes nothing: this case only looks for stray writes.
        Backward::None => t.expect("nothing but the gradients of the layer is written", true),
        _ => t.compare("d_x", &d_x, &expected, sum_of(out) + ELEMENTWISE)?,
    }
    Ok(())
}

/// Samples and tokens of the cases on views: a class token's query, key and value are computed like this.
const VIEWED: (usize, usize) = (3, 5);

fn matmul_of_views(t: &mut Trial, width: usize) -> crate::error::Result<()> {
    let (samples, tokens) = VIEWED;
    t.samples(samples, false);
    let x = t.input(samples * tokens, width, 1.5);
    let layer = t.linear(3 * width, width, [false; 2], false).outputs(width, 2 * width);
    let y = t.output(samples, 2 * width);
    let first = x.view(x.mat.every_row(tokens));
    let product = times_transposed(&first, &layer.weight);
    let expected: Vec<f64> =
        product.iter().enumerate().map(|(i, z)| z + layer.bias.values[i % (2 * width)]).collect();

    t.start()?.matmul(first.mat, &layer.handles(), Epilogue::Bias, y.mat)?;
    t.compare("y", &y, &expected, sum_of(width))
}

fn matmul_backward_of_views(t: &mut Trial, width: usize, accumulate: bool) -> crate::error::Result<()> {
    let (samples, tokens) = VIEWED;
    t.samples(samples, accumulate);
    let x = t.input(samples * tokens, width, 1.0);
    let d_y = t.input(samples, 2 * width, 1.0);
    let layer = t.linear(3 * width, width, [true; 2], accumulate).outputs(width, 2 * width);
    let d_x = t.input(samples * tokens, width, 1.5);
    let [first, d_first] = [&x, &d_x].map(|all| all.view(all.mat.every_row(tokens)));
    let mut expected = d_first.values.clone();
    let (mut d_weight, mut d_bias) = (vec![0.0; 2 * width * width], vec![0.0; 2 * width]);
    for r in 0..samples {
        for (j, d) in d_y.row(r).iter().enumerate() {
            d_bias[j] += d;
            for k in 0..width {
                expected[r * width + k] += d * layer.weight.row(j)[k];
                d_weight[j * width + k] += d * first.row(r)[k];
            }
        }
    }

    let add = InputGrad::Add(d_first.mat);
    t.start()?.matmul_backward(d_y.mat, first.mat, &layer.handles(), add)?;
    for (name, grad, sum) in [("d_weight", &layer.d_weight, d_weight), ("d_bias", &layer.d_bias, d_bias)] {
        let grad = grad.as_ref().expect("the layer is trained");
        t.compare(name, grad, &accumulated(grad, accumulate, &sum), sum_of(samples))?;
    }
    t.compare("d_x", &d_first, &expected, sum_of(2 * width) + ELEMENTWISE)
}
