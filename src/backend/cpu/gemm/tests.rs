//! Products against float64 loops, over sizes that no tile divides; bit-identical for any split and any
//! number of threads.

use super::*;
use crate::backend::cpu::testing::{Matrix, Numbers, Tensors, on_every_isa, reference, rel_l2};
use crate::backend::mask::BoundMask;
use crate::backend::{Mask, Micro, StepKeys, Write};

/// (R, in, out): 1 everywhere, sizes that nothing divides, several blocks of k, of columns and of rows.
const SHAPES: [(usize, usize, usize); 16] = [
    (1, 1, 1),
    (2, 1, 7),
    (3, 5, 7),
    (4, 7, 5),
    (5, 10, 21),
    (6, 12, 10),
    (7, 21, 12),
    (13, 33, 47),
    (12, 32, 32),
    (25, 16, 48),
    (197, 70, 96),
    (300, 12, 33),
    (61, 800, 43),
    (40, 130, 150),
    (30, 385, 500),
    (65, 64, 1300),
];

/// Largest error of a sum of `n` products, when the absolute values sum to `size`.
fn bound(n: usize, size: f64) -> f64 {
    (n + 8) as f64 * 2f64.powi(-24) * (size + 1.0)
}

fn gelu64(form: Gelu, x: f64) -> f64 {
    match form {
        Gelu::Tanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Gelu::Erf => x * crate::backend::cpu::math::tests::normal64(x),
        Gelu::Quick => x / (1.0 + (-1.702 * x).exp()),
    }
}

fn slope64(form: Gelu, x: f64) -> f64 {
    let h = 1e-5;
    (gelu64(form, x + h) - gelu64(form, x - h)) / (2.0 * h)
}

fn dropout(rate: f32, rows_per_sample: usize) -> Dropout {
    let micro = Micro { first: 1, samples: 8, global_first: 16, gradients: Write::Assign, mean_over: 8 };
    let keys = StepKeys { seed: 3, step: 11 };
    Dropout { mask: BoundMask::new(Mask { rate, site: 5 }, keys, micro), rows_per_sample }
}

fn factor(d: &Option<Dropout>, r: usize, j: usize, cols: usize) -> f64 {
    d.map_or(1.0, |d| d.mask.factor(r / d.rows_per_sample, r % d.rows_per_sample * cols + j) as f64)
}

struct Case {
    x: Matrix,
    w: Matrix,
    bias: Vec<f32>,
    /// x·wᵀ + b and the sum of its absolute values.
    sums: Vec<(f64, f64)>,
}

fn case(seed: usize, (rows, depth, out): (usize, usize, usize)) -> Case {
    let mut numbers = Numbers::new(seed as u64);
    let x = Matrix::random(&mut numbers, rows, depth, seed % 3);
    let w = Matrix::random(&mut numbers, out, depth, seed % 4);
    let bias = numbers.vec(out);
    let mut sums = Vec::new();
    for r in 0..rows {
        for j in 0..out {
            let (mut sum, mut size) = (bias[j] as f64, bias[j].abs() as f64);
            for k in 0..depth {
                sum += x.at(r, k) * w.at(j, k);
                size += (x.at(r, k) * w.at(j, k)).abs();
            }
            sums.push((sum, size));
        }
    }
    Case { x, w, bias, sums }
}

#[test]
fn matmul_equals_f64_with_every_epilogue() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let (rows, depth, out) = shape;
        let Case { x, w, bias, sums } = case(seed, shape);
        let mut numbers = Numbers::new(99);
        let blank = Matrix::random(&mut numbers, rows, out, seed % 2);
        let residual = Matrix::random(&mut numbers, rows, out, 1);
        let check = |name: &str, isa, got: &[f32], want: &dyn Fn(usize, usize, f64) -> f64| {
            for r in 0..rows {
                for j in 0..out {
                    let (sum, size) = sums[r * out + j];
                    let error = (got[r * out + j] as f64 - want(r, j, sum)).abs();
                    assert!(
                        error <= 1.2 * bound(depth, size),
                        "{name} {shape:?} {isa:?} [{r}, {j}]: {error:e}"
                    );
                }
            }
        };
        let run = |c: &Compute, epilogue: Epilogue, start: &Matrix| {
            let mut y = start.clone();
            matmul(c, x.rows(), w.rows(), epilogue, y.rows_mut());
            y.values()
        };
        on_every_isa(
            |c| run(c, Epilogue::None, &blank),
            |isa, got| check("none", isa, got, &|_, j, sum| sum - bias[j] as f64),
        );
        on_every_isa(
            |c| run(c, Epilogue::Bias(&bias), &blank),
            |isa, got| check("bias", isa, got, &|_, _, sum| sum),
        );
        on_every_isa(
            |c| run(c, Epilogue::BiasResidual { bias: &bias, residual: Residual::InPlace }, &residual),
            |isa, got| check("residual in place", isa, got, &|r, j, sum| sum + residual.at(r, j)),
        );
        let from = Residual::From(residual.rows());
        on_every_isa(
            |c| run(c, Epilogue::BiasResidual { bias: &bias, residual: from }, &blank),
            |isa, got| check("residual", isa, got, &|r, j, sum| sum + residual.at(r, j)),
        );
        on_every_isa(
            |c| run(c, Epilogue::BiasTanh(&bias), &blank),
            |isa, got| check("tanh", isa, got, &|_, _, sum| sum.tanh()),
        );
        for form in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
            for dropout in [None, Some(dropout(0.0, 3)), Some(dropout(0.4, 3))] {
                on_every_isa(
                    |c| {
                        let mut pre = blank.clone();
                        let epilogue =
                            Epilogue::BiasGelu { bias: &bias, pre: Some(pre.rows_mut()), form, dropout };
                        let mut y = run(c, epilogue, &residual);
                        y.extend(pre.values());
                        y
                    },
                    |isa, got| {
                        let (y, pre) = got.split_at(rows * out);
                        check("pre", isa, pre, &|_, _, sum| sum);
                        // The slope is below 1.13, the mask's scale 1/0.6: scale the values down by as much
                        // as that may amplify the error.
                        let shrunk: Vec<f32> = y.iter().map(|y| y * 0.5).collect();
                        check("gelu", isa, &shrunk, &|r, j, sum| {
                            0.5 * gelu64(form, sum) * factor(&dropout, r, j, out)
                        });
                    },
                );
            }
        }
    }
}

#[test]
fn input_grad_equals_f64_with_every_epilogue() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let (rows, depth, cols) = shape;
        let mut numbers = Numbers::new(seed as u64 + 40);
        let d_y = Matrix::random(&mut numbers, rows, depth, seed % 3);
        let w = Matrix::random(&mut numbers, depth, cols, seed % 4);
        let start = Matrix::random(&mut numbers, rows, cols, seed % 2);
        let other = Matrix::random(&mut numbers, rows, cols, 2);
        let check = |name: &str, isa, got: &[f32], want: &dyn Fn(usize, usize, f64) -> f64| {
            for r in 0..rows {
                for j in 0..cols {
                    let terms = (0..depth).map(|k| d_y.at(r, k) * w.at(k, j));
                    let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                    let error = (got[r * cols + j] as f64 - want(r, j, sum)).abs();
                    assert!(
                        error <= 2.0 * bound(depth, size),
                        "{name} {shape:?} {isa:?} [{r}, {j}]: {error:e}"
                    );
                }
            }
        };
        let run = |c: &Compute, epilogue: InputEpilogue| {
            let mut d_x = start.clone();
            input_grad(c, d_y.rows(), w.rows(), epilogue, d_x.rows_mut());
            d_x.values()
        };
        on_every_isa(|c| run(c, InputEpilogue::Plain), |isa, got| check("plain", isa, got, &|_, _, sum| sum));
        on_every_isa(
            |c| run(c, InputEpilogue::Add),
            |isa, got| check("add", isa, got, &|r, j, sum| sum + start.at(r, j)),
        );
        on_every_isa(
            |c| run(c, InputEpilogue::Tanh { y: other.rows() }),
            |isa, got| check("tanh", isa, got, &|r, j, sum| sum * (1.0 - other.at(r, j).powi(2))),
        );
        for form in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
            for dropout in [None, Some(dropout(0.3, 2))] {
                on_every_isa(
                    |c| run(c, InputEpilogue::Gelu { pre: other.rows(), form, dropout }),
                    |isa, got| {
                        check("gelu", isa, got, &|r, j, sum| {
                            sum * slope64(form, other.at(r, j)) * factor(&dropout, r, j, cols)
                        })
                    },
                );
            }
        }
    }
}

#[test]
fn weight_and_bias_gradients_equal_f64() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        // The rows are summed over here: also run the shape with long sums.
        for (rows, depth, out) in [shape, (shape.1 + 600, shape.2 % 60 + 1, shape.0 % 60 + 1)] {
            let mut numbers = Numbers::new(seed as u64 + 80);
            let d_y = Matrix::random(&mut numbers, rows, out, seed % 3);
            let x = Matrix::random(&mut numbers, rows, depth, seed % 4);
            let start = Matrix::random(&mut numbers, out, depth, seed % 2);
            let start_bias = numbers.vec(out);
            for accumulate in [false, true] {
                let before = |v: f64| if accumulate { v } else { 0.0 };
                on_every_isa(
                    |c| {
                        let mut d_w = start.clone();
                        weight_grad(c, d_y.rows(), x.rows(), accumulate, d_w.rows_mut());
                        d_w.values()
                    },
                    |isa, got| {
                        for o in 0..out {
                            for i in 0..depth {
                                let terms = (0..rows).map(|r| d_y.at(r, o) * x.at(r, i));
                                let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                                let error = got[o * depth + i] as f64 - (sum + before(start.at(o, i)));
                                assert!(
                                    error.abs() <= bound(rows, size),
                                    "{rows} {depth} {out} {isa:?} [{o}, {i}]: {error:e}"
                                );
                            }
                        }
                    },
                );
                on_every_isa(
                    |c| {
                        let mut sums = start_bias.clone();
                        column_sums(c, d_y.rows(), accumulate, &mut sums);
                        sums
                    },
                    |isa, got| {
                        for o in 0..out {
                            let sum: f64 = (0..rows).map(|r| d_y.at(r, o)).sum();
                            let error = got[o] as f64 - (sum + before(start_bias[o] as f64));
                            assert!(
                                error.abs() <= bound(64, rows as f64),
                                "{rows} {out} {isa:?} [{o}]: {error:e}"
                            );
                        }
                    },
                );
            }
        }
    }
}

#[test]
fn empty_matrices_are_allowed() {
    let c = Compute::new(crate::backend::cpu::compute::Isa::best(), 2).unwrap();
    let (mut d_w, mut sums) = ([7.0; 6], [7.0; 3]);
    weight_grad(&c, Rows::dense(&[], 0, 3), Rows::dense(&[], 0, 2), false, RowsMut::dense(&mut d_w, 3, 2));
    column_sums(&c, Rows::dense(&[], 0, 3), false, &mut sums);
    assert_eq!((d_w, sums), ([0.0; 6], [0.0; 3]), "no rows sum to zero");
    matmul(
        &c,
        Rows::dense(&[], 0, 2),
        Rows::dense(&[0.0; 6], 3, 2),
        Epilogue::None,
        RowsMut::dense(&mut [], 0, 3),
    );
}

#[test]
fn linear_layers_equal_the_reference() {
    let Some(folder) = reference("kernels") else { return };
    let file = Tensors::open(&folder.join("linear.safetensors"));
    let mut cases = 0;
    for name in file.names() {
        let Some(m) = name.strip_suffix(".x") else { continue };
        cases += 1;
        let ((shape, x), (w_shape, w_io), (_, b), (_, dy)) = (
            file.get(&name),
            file.get(&format!("{m}.w")),
            file.get(&format!("{m}.b")),
            file.get(&format!("{m}.dy")),
        );
        let (depth, out) = (w_shape[0], w_shape[1]);
        let rows: usize = x.len() / depth;
        assert_eq!(*shape.last().unwrap(), depth);
        let mut w = vec![0.0; depth * out];
        for i in 0..depth {
            for o in 0..out {
                w[o * depth + i] = w_io[i * out + o];
            }
        }
        let (x, w) = (Rows::dense(&x, rows, depth), Rows::dense(&w, out, depth));
        for fused in [false, true] {
            let key = |part: &str| format!("{m}.linear{}.{part}", if fused { "_gelu" } else { "" });
            let want = |part: &str| file.get(&key(part)).1;
            let check = |part: &str, isa, got: &[f32], want: Vec<f32>| {
                let error = rel_l2(got, want.into_iter().map(|v| v as f64));
                assert!(error < 1e-6, "{} {isa:?}: {error:e}", key(part));
            };
            on_every_isa(
                |c| {
                    let (mut pre, mut y) = (vec![0.0; rows * out], vec![0.0; rows * out]);
                    let kept = RowsMut::dense(&mut pre, rows, out);
                    let epilogue = match fused {
                        false => Epilogue::Bias(&b),
                        true => {
                            Epilogue::BiasGelu { bias: &b, pre: Some(kept), form: Gelu::Tanh, dropout: None }
                        }
                    };
                    matmul(c, x, w, epilogue, RowsMut::dense(&mut y, rows, out));
                    // The gradient of the pre-activation: dy times an identity, so that the epilogue computes
                    // it.
                    let mut d_pre = dy.clone();
                    if fused {
                        let mut identity = vec![0.0; out * out];
                        identity.iter_mut().step_by(out + 1).for_each(|v| *v = 1.0);
                        let epilogue = InputEpilogue::Gelu {
                            pre: Rows::dense(&pre, rows, out),
                            form: Gelu::Tanh,
                            dropout: None,
                        };
                        let d_y = Rows::dense(&dy, rows, out);
                        let eye = Rows::dense(&identity, out, out);
                        input_grad(c, d_y, eye, epilogue, RowsMut::dense(&mut d_pre, rows, out));
                    }
                    let d_pre = Rows::dense(&d_pre, rows, out);
                    let (mut dx, mut dw, mut db) =
                        (vec![0.0; rows * depth], vec![0.0; out * depth], vec![0.0; out]);
                    input_grad(c, d_pre, w, InputEpilogue::Plain, RowsMut::dense(&mut dx, rows, depth));
                    weight_grad(c, d_pre, x, false, RowsMut::dense(&mut dw, out, depth));
                    column_sums(c, d_pre, false, &mut db);
                    [y, dx, dw, db].concat()
                },
                |isa, got| {
                    let (y, got) = got.split_at(rows * out);
                    let (dx, got) = got.split_at(rows * depth);
                    let (dw, db) = got.split_at(depth * out);
                    let mut dw_io = vec![0.0; depth * out];
                    for i in 0..depth {
                        for o in 0..out {
                            dw_io[i * out + o] = dw[o * depth + i];
                        }
                    }
                    check("y", isa, y, want("y"));
                    check("dx", isa, dx, want("dx"));
                    check("dw", isa, &dw_io, want("dw"));
                    check("db", isa, db, want("db"));
                },
            );
        }
    }
    assert!(cases > 0, "no case in linear.safetensors");
}
