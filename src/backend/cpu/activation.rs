//! GELU alone, for a pre-activation whose GELU was not kept; and the gate of a SwiGLU.

use super::compute::Compute;
use super::gemm::Dropout;
use super::math::{Curve, ErfForm, QuickForm, Silu, TanhForm};
use super::rowwise::update;
use super::simd::{Simd, Task};
use super::sums::CHUNK;
use super::view::{Rows, RowsMut};
use crate::backend::Gelu;

/// `y = dropout(gelu(pre))`: bit-identical to the matmul's epilogue.
pub(super) fn gelu(c: &Compute, pre: Rows, form: Gelu, dropout: Option<Dropout>, y: RowsMut) {
    c.for_each_item(y.blocks(CHUNK), |(start, y)| {
        c.isa.run(Values { pre, form, dropout: dropout.as_ref(), start, y });
    });
}

struct Values<'a> {
    pre: Rows<'a>,
    form: Gelu,
    dropout: Option<&'a Dropout>,
    start: usize,
    y: RowsMut<'a>,
}

impl Task for Values<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.y.cols;
        let mut factors = vec![1.0; if self.dropout.is_some() { cols } else { 0 }];
        for r in 0..self.y.rows {
            let (pre, y) = (self.pre.row(self.start + r), self.y.row(r));
            match self.form {
                Gelu::Tanh => values::<S, TanhForm>(s, pre, y),
                Gelu::Erf => values::<S, ErfForm>(s, pre, y),
                Gelu::Quick => values::<S, QuickForm>(s, pre, y),
            }
            if let Some(dropout) = self.dropout {
                dropout.fill(self.start + r, 0, cols, &mut factors);
                y.iter_mut().zip(&factors).for_each(|(y, factor)| *y *= factor);
            }
        }
    }
}

#[inline(always)]
fn values<S: Simd, C: Curve>(s: S, pre: &[f32], y: &mut [f32]) {
    update(
        s,
        [pre],
        [y],
        #[inline(always)]
        |[x], _| [C::value(s, x)],
    );
}

/// `y = dropout(silu(g) ∘ u)` of `pre = [g | u]`.
pub(super) fn swiglu(c: &Compute, pre: Rows, dropout: Option<Dropout>, y: RowsMut) {
    c.for_each_item(y.blocks(CHUNK), |(start, y)| {
        c.isa.run(Gate { pre, dropout: dropout.as_ref(), start, y });
    });
}

struct Gate<'a> {
    pre: Rows<'a>,
    dropout: Option<&'a Dropout>,
    start: usize,
    y: RowsMut<'a>,
}

impl Task for Gate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.y.cols;
        let mut factors = vec![1.0; if self.dropout.is_some() { cols } else { 0 }];
        for r in 0..self.y.rows {
            let (gate, value) = self.pre.row(self.start + r).split_at(cols);
            let y = self.y.row(r);
            update(
                s,
                [gate, value],
                [&mut *y],
                #[inline(always)]
                |[g, u], _| [s.mul(Silu::value(s, g), u)],
            );
            if let Some(dropout) = self.dropout {
                dropout.fill(self.start + r, 0, cols, &mut factors);
                y.iter_mut().zip(&factors).for_each(|(y, factor)| *y *= factor);
            }
        }
    }
}

/// `d_pre = [d_g | d_u]`: `d_u = d·silu(g)`, `d_g = d·u·silu'(g)`, where `d = dropout'(d_y)`.
pub(super) fn swiglu_backward(c: &Compute, d_y: Rows, pre: Rows, dropout: Option<Dropout>, d_pre: RowsMut) {
    c.for_each_item(d_pre.blocks(CHUNK), |(start, d_pre)| {
        c.isa.run(GateGrad { d_y, pre, dropout: dropout.as_ref(), start, d_pre });
    });
}

struct GateGrad<'a> {
    d_y: Rows<'a>,
    pre: Rows<'a>,
    dropout: Option<&'a Dropout>,
    start: usize,
    d_pre: RowsMut<'a>,
}

impl Task for GateGrad<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.d_y.cols;
        let mut factors = vec![1.0; cols];
        for r in 0..self.d_pre.rows {
            let row = self.start + r;
            if let Some(dropout) = self.dropout {
                dropout.fill(row, 0, cols, &mut factors);
            }
            let (gate, value) = self.pre.row(row).split_at(cols);
            let (d_gate, d_value) = self.d_pre.row(r).split_at_mut(cols);
            update(
                s,
                [gate, value, self.d_y.row(row), &factors],
                [d_gate, d_value],
                #[inline(always)]
                |[g, u, d, factor], _| {
                    let d = s.mul(d, factor);
                    [s.mul(s.mul(d, u), Silu::slope(s, g)), s.mul(d, Silu::value(s, g))]
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::mask::BoundMask;
    use crate::backend::{Backend, Mask};

    #[test]
    fn a_gate_and_its_gradient_are_those_of_the_f64_function() {
        for (samples, tokens, m) in [(1, 1, 3), (3, 5, 24), (2, 65, 85)] {
            for rate in [0.0, 0.3] {
                let rows = samples * tokens;
                let mut b = Testbed::new(samples);
                let (pre, d_y) = (normal(1, rows * 2 * m, 2.0), normal(2, rows * m, 1.0));
                let mask = Mask { rate, site: 5 };
                let (pre_at, d_y_at) = (b.put(rows, 2 * m, &pre), b.put(rows, m, &d_y));
                let (y, d_pre) = (b.room(rows, m), b.room(rows, 2 * m));
                let run = |k: &mut crate::backend::cpu::CpuBackend| {
                    k.swiglu(pre_at, mask, y).unwrap();
                    k.swiglu_backward(d_y_at, pre_at, mask, d_pre, None).unwrap();
                };
                b.everywhere(&[y, d_pre], run, |r| {
                    let bound = BoundMask::new(mask, b.keys, b.micro);
                    let gated = |pre: &[f64]| -> Vec<f64> {
                        let value = |i: usize| {
                            let (row, j) = (i / m, i % m);
                            let (g, u) = (pre[row * 2 * m + j], pre[row * 2 * m + m + j]);
                            let keep = bound.factor(row / tokens, row % tokens * m + j);
                            g / (1.0 + (-g).exp()) * u * f64::from(keep)
                        };
                        (0..rows * m).map(value).collect()
                    };
                    assert_close("y", &r[0], &gated(&wide(&pre)), 1e-6);
                    assert_gradient("d_pre", &pre, &r[1], |v| {
                        gated(v).iter().zip(&d_y).map(|(y, d)| y * f64::from(*d)).sum()
                    });
                });
            }
        }
    }
}
