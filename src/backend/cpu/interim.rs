//! Plain scalar versions of the matrix products and the attention, until their tuned kernels join.

use crate::backend::{Gelu, Heads};

fn gelu(x: f32, form: Gelu) -> f32 {
    let x = f64::from(x);
    match form {
        Gelu::Tanh => (0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh())) as f32,
        Gelu::Erf => (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) as f32,
    }
}

fn gelu_grad(x: f32, form: Gelu) -> f32 {
    let x = f64::from(x);
    match form {
        Gelu::Tanh => {
            let k = 0.7978845608028654;
            let t = (k * (x + 0.044715 * x * x * x)).tanh();
            (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * k * (1.0 + 3.0 * 0.044715 * x * x)) as f32
        }
        Gelu::Erf => {
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            (0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2)) + x * density) as f32
        }
    }
}

/// Series and continued fraction, to 1e-14.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return x.signum();
    }
    if a < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let mut fraction = 0.0;
    for n in (1..60).rev() {
        fraction = f64::from(n) / 2.0 / (a + fraction);
    }
    let complement = (-a * a).exp() / (std::f64::consts::PI.sqrt() * (a + fraction));
    x.signum() * (1.0 - complement)
}

pub(super) mod gemm {
    use super::*;
    use crate::backend::cpu::compute::Compute;
    use crate::backend::cpu::view::{Rows, RowsMut};
    use crate::backend::mask::BoundMask;

    #[derive(Clone, Copy)]
    pub(crate) struct Dropout {
        pub(crate) mask: BoundMask,
        pub(crate) rows_per_sample: usize,
    }

    impl Dropout {
        fn factor(this: Option<Dropout>, r: usize, j: usize, cols: usize) -> f32 {
            this.map_or(1.0, |d| d.mask.factor(r / d.rows_per_sample, r % d.rows_per_sample * cols + j))
        }
    }

    pub(crate) enum Residual<'a> {
        Rows(Rows<'a>),
        InPlace,
    }

    pub(crate) enum Epilogue<'a> {
        None,
        Bias(&'a [f32]),
        BiasResidual { bias: &'a [f32], residual: Residual<'a> },
        BiasGelu { bias: &'a [f32], pre: RowsMut<'a>, form: Gelu, dropout: Option<Dropout> },
        BiasTanh(&'a [f32]),
    }

    pub(crate) enum InputEpilogue<'a> {
        Plain,
        Add,
        Gelu { pre: Rows<'a>, form: Gelu, dropout: Option<Dropout> },
        Tanh { y: Rows<'a> },
    }

    pub(crate) fn matmul(_: &Compute, x: Rows, w: Rows, mut epilogue: Epilogue, mut y: RowsMut) {
        let cols = y.cols;
        for r in 0..x.rows {
            for j in 0..w.rows {
                let z: f32 = x.row(r).iter().zip(w.row(j)).map(|(a, b)| a * b).sum();
                y.row(r)[j] = match &mut epilogue {
                    Epilogue::None => z,
                    Epilogue::Bias(bias) => z + bias[j],
                    Epilogue::BiasResidual { bias, residual: Residual::Rows(base) } => {
                        z + bias[j] + base.row(r)[j]
                    }
                    Epilogue::BiasResidual { bias, .. } => z + bias[j] + y.row(r)[j],
                    Epilogue::BiasGelu { bias, pre, form, dropout } => {
                        pre.row(r)[j] = z + bias[j];
                        gelu(z + bias[j], *form) * Dropout::factor(*dropout, r, j, cols)
                    }
                    Epilogue::BiasTanh(bias) => (z + bias[j]).tanh(),
                };
            }
        }
    }

    pub(crate) fn input_grad(_: &Compute, d_y: Rows, w: Rows, epilogue: InputEpilogue, mut d_x: RowsMut) {
        let cols = d_x.cols;
        for r in 0..d_y.rows {
            for k in 0..w.cols {
                let z: f32 = (0..w.rows).map(|j| d_y.row(r)[j] * w.row(j)[k]).sum();
                let old = d_x.row(r)[k];
                d_x.row(r)[k] = match &epilogue {
                    InputEpilogue::Plain => z,
                    InputEpilogue::Add => old + z,
                    InputEpilogue::Gelu { pre, form, dropout } => {
                        z * gelu_grad(pre.row(r)[k], *form) * Dropout::factor(*dropout, r, k, cols)
                    }
                    InputEpilogue::Tanh { y } => z * (1.0 - y.row(r)[k] * y.row(r)[k]),
                };
            }
        }
    }

    pub(crate) fn weight_grad(_: &Compute, d_y: Rows, x: Rows, accumulate: bool, mut d_w: RowsMut) {
        for j in 0..d_w.rows {
            let row = d_w.row(j);
            if !accumulate {
                row.fill(0.0);
            }
            for r in 0..x.rows {
                let d = d_y.row(r)[j];
                row.iter_mut().zip(x.row(r)).for_each(|(w, x)| *w += d * x);
            }
        }
    }

    pub(crate) fn column_sums(_: &Compute, d_y: Rows, accumulate: bool, out: &mut [f32]) {
        if !accumulate {
            out.fill(0.0);
        }
        for r in 0..d_y.rows {
            out.iter_mut().zip(d_y.row(r)).for_each(|(o, d)| *o += d);
        }
    }
}

pub(super) mod attention {
    use super::Heads;
    use crate::backend::cpu::compute::Compute;
    use crate::backend::cpu::view::{Rows, RowsMut};
    use crate::backend::mask::BoundMask;

    fn head(rows: Rows, r: usize, part: usize, parts_width: usize, size: usize) -> Vec<f32> {
        rows.row(r)[part * parts_width..][..size].to_vec()
    }

    pub(crate) fn forward(
        _: &Compute,
        heads: Heads,
        qkv: Rows,
        mut o: RowsMut,
        lse: &mut [f32],
        dropout: Option<BoundMask>,
    ) {
        let Heads { tokens: t, heads: h, head_size: dh } = heads;
        let (d, scale) = (h * dh, 1.0 / (dh as f32).sqrt());
        for image in 0..qkv.rows / t {
            for n in 0..h {
                let part = |row: usize, which: usize| {
                    head(
                        Rows { data: &qkv.data[n * dh..], cols: qkv.cols - n * dh, ..qkv },
                        image * t + row,
                        which,
                        d,
                        dh,
                    )
                };
                for i in 0..t {
                    let q = part(i, 0);
                    let s: Vec<f32> = (0..t)
                        .map(|j| scale * q.iter().zip(part(j, 1)).map(|(a, b)| a * b).sum::<f32>())
                        .collect();
                    let max = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let l = max + s.iter().map(|s| (s - max).exp()).sum::<f32>().ln();
                    lse[(image * h + n) * t + i] = l;
                    let out = &mut o.row(image * t + i)[n * dh..][..dh];
                    out.fill(0.0);
                    for j in 0..t {
                        let keep = dropout.map_or(1.0, |m| m.factor(image, (n * t + i) * t + j));
                        let p = (s[j] - l).exp() * keep;
                        out.iter_mut().zip(part(j, 2)).for_each(|(o, v)| *o += p * v);
                    }
                }
            }
        }
    }

    pub(crate) fn backward(
        _: &Compute,
        heads: Heads,
        qkv: Rows,
        o: Rows,
        lse: &[f32],
        dropout: Option<BoundMask>,
        d_o: Rows,
        mut d_qkv: RowsMut,
    ) {
        let Heads { tokens: t, heads: h, head_size: dh } = heads;
        let (d, scale) = (h * dh, 1.0 / (dh as f32).sqrt());
        (0..d_qkv.rows).for_each(|r| d_qkv.row(r).fill(0.0));
        for image in 0..qkv.rows / t {
            for n in 0..h {
                let part = |row: usize, which: usize| {
                    head(
                        Rows { data: &qkv.data[n * dh..], cols: qkv.cols - n * dh, ..qkv },
                        image * t + row,
                        which,
                        d,
                        dh,
                    )
                };
                for i in 0..t {
                    let row = image * t + i;
                    let (q, dout, out) =
                        (part(i, 0), &d_o.row(row)[n * dh..][..dh], &o.row(row)[n * dh..][..dh]);
                    let delta: f32 = dout.iter().zip(out).map(|(a, b)| a * b).sum();
                    for j in 0..t {
                        let (k, v) = (part(j, 1), part(j, 2));
                        let s = scale * q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>();
                        let p = (s - lse[(image * h + n) * t + i]).exp();
                        let keep = dropout.map_or(1.0, |m| m.factor(image, (n * t + i) * t + j));
                        let dp: f32 = dout.iter().zip(&v).map(|(a, b)| a * b).sum();
                        let ds = p * (dp * keep - delta) * scale;
                        for e in 0..dh {
                            d_qkv.row(row)[n * dh + e] += ds * k[e];
                            d_qkv.row(image * t + j)[d + n * dh + e] += ds * q[e];
                            d_qkv.row(image * t + j)[2 * d + n * dh + e] += p * keep * dout[e];
                        }
                    }
                }
            }
        }
    }
}

pub(super) mod probe_attention {
    use super::Heads;
    use crate::backend::cpu::compute::Compute;
    use crate::backend::cpu::view::{Rows, RowsMut};

    pub(crate) fn forward(_: &Compute, heads: Heads, q: &[f32], kv: Rows, p: &mut [f32], mut o: RowsMut) {
        let Heads { tokens: t, heads: h, head_size: dh } = heads;
        let (d, scale) = (h * dh, 1.0 / (dh as f32).sqrt());
        for image in 0..kv.rows / t {
            for n in 0..h {
                let q = &q[n * dh..][..dh];
                let p = &mut p[(image * h + n) * t..][..t];
                for (j, p) in p.iter_mut().enumerate() {
                    *p = scale
                        * q.iter().zip(&kv.row(image * t + j)[n * dh..]).map(|(a, b)| a * b).sum::<f32>();
                }
                let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                p.iter_mut().for_each(|p| *p = (*p - max).exp());
                let sum: f32 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= sum);
                let out = &mut o.row(image)[n * dh..][..dh];
                out.fill(0.0);
                for (j, p) in p.iter().enumerate() {
                    let v = &kv.row(image * t + j)[d + n * dh..];
                    out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        }
    }

    pub(crate) fn backward(
        _: &Compute,
        heads: Heads,
        q: &[f32],
        kv: Rows,
        p: &[f32],
        d_o: Rows,
        d_q: &mut [f32],
        mut d_kv: RowsMut,
    ) {
        let Heads { tokens: t, heads: h, head_size: dh } = heads;
        let (d, scale) = (h * dh, 1.0 / (dh as f32).sqrt());
        d_q.fill(0.0);
        for image in 0..kv.rows / t {
            for n in 0..h {
                let p = &p[(image * h + n) * t..][..t];
                let dout = &d_o.row(image)[n * dh..][..dh];
                let dp: Vec<f32> = (0..t)
                    .map(|j| kv.row(image * t + j)[d + n * dh..].iter().zip(dout).map(|(a, b)| a * b).sum())
                    .collect();
                let delta: f32 = p.iter().zip(&dp).map(|(a, b)| a * b).sum();
                for j in 0..t {
                    let ds = p[j] * (dp[j] - delta) * scale;
                    for e in 0..dh {
                        d_q[n * dh + e] += ds * kv.row(image * t + j)[n * dh + e];
                        d_kv.row(image * t + j)[n * dh + e] = ds * q[n * dh + e];
                        d_kv.row(image * t + j)[d + n * dh + e] = p[j] * dout[e];
                    }
                }
            }
        }
    }
}
