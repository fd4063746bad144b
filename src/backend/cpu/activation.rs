//! GELU alone, for a pre-activation whose GELU was not kept.

use super::compute::Compute;
use super::gemm::Dropout;
use super::math::{Curve, ErfForm, TanhForm};
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
