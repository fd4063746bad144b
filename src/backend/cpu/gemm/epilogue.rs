//! What is done to a finished tile between the accumulators and memory.

use super::tile::copy_block;
use crate::backend::Gelu;
use crate::backend::cpu::math::{self, Curve, ErfForm, QuickForm, TanhForm};
use crate::backend::cpu::simd::{MAX_NR, Simd};
use crate::backend::cpu::view::{Rows, Shared};
use crate::backend::mask::BoundMask;

/// A dropout over a matrix whose rows belong to samples: element (r, j) of a matrix with `cols` columns is
/// element `(r % rows_per_sample)·cols + j` of sample `r / rows_per_sample`.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    pub mask: BoundMask,
    pub rows_per_sample: usize,
}

impl Dropout {
    /// The factors of row `r`, starting at column `j`, for rows of `cols`.
    pub(in crate::backend::cpu) fn fill(&self, r: usize, j: usize, cols: usize, factors: &mut [f32]) {
        self.mask.fill(r / self.rows_per_sample, r % self.rows_per_sample * cols + j, factors);
    }
}

/// An epilogue whose matrices can be used by many tasks.
#[derive(Clone, Copy)]
pub(super) enum Finish<'a> {
    Store,
    Bias(&'a [f32]),
    BiasResidual { bias: &'a [f32], residual: Rows<'a> },
    BiasGelu { bias: &'a [f32], pre: Option<Shared<'a>>, form: Gelu, dropout: Option<Dropout> },
    BiasTanh(&'a [f32]),
    GeluGrad { pre: Rows<'a>, form: Gelu, dropout: Option<Dropout> },
    TanhGrad(Rows<'a>),
}

/// A finished tile, and its place in the result.
pub(super) struct Done {
    pub tile: *const f32,
    pub tile_row: usize,
    /// First row and number of rows.
    pub r: usize,
    pub rows: usize,
    /// First column and number of columns.
    pub j: usize,
    pub cols: usize,
    /// Columns of the whole result.
    pub n: usize,
}

/// For each row of the tile, for each vector of the row: `$x` is the tile's vector, `$at` its (row, column)
/// and `$len` the number of valid lanes; the value of the body is stored at `$y`. A macro, because a closure
/// would be compiled without the instruction set.
macro_rules! for_each_vector {
    ($s:ident, $done:ident, $y:ident, |$x:ident, $r:ident, $j:ident, $len:ident| $body:expr) => {
        for i in 0..$done.rows {
            let $r = $done.r + i;
            let mut v = 0;
            while v < $done.cols {
                let $j = $done.j + v;
                let $len = S::LANES.min($done.cols - v);
                let $x = $s.load($done.tile.add(i * $done.tile_row + v));
                let value = $body;
                put($s, $y.at($r, $j), value, $len);
                v += S::LANES;
            }
        }
    };
}

/// # Safety
/// `n` values must be readable.
#[inline(always)]
unsafe fn get<S: Simd>(s: S, from: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { s.load(from) } else { s.load_head(from, n) } }
}

/// # Safety
/// `n` values must be writable.
#[inline(always)]
unsafe fn put<S: Simd>(s: S, to: *mut f32, v: S::V, n: usize) {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { s.store(to, v) } else { s.store_head(to, v, n) } }
}

/// Applies the epilogue to a tile and stores the result in `y`.
/// # Safety
/// The tile must hold `rows` rows of whole vectors over `cols`; its place must lie inside `y` and every matrix of the
/// epilogue, and belong to this task alone.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd>(s: S, how: &Finish, done: &Done, y: Shared) {
    // SAFETY: (r, j) with `len` columns lies inside each matrix, by the caller's promise.
    unsafe {
        match *how {
            Finish::Store => {
                copy_block(s, done.tile, done.tile_row, y.at(done.r, done.j), y.ld, done.rows, done.cols)
            }
            Finish::Bias(bias) => {
                for_each_vector!(s, done, y, |x, r, j, len| { s.add(x, get(s, bias.as_ptr().add(j), len)) })
            }
            Finish::BiasResidual { bias, residual } => for_each_vector!(s, done, y, |x, r, j, len| {
                let sum = s.add(x, get(s, bias.as_ptr().add(j), len));
                s.add(sum, get(s, residual.data.as_ptr().add(r * residual.ld + j), len))
            }),
            Finish::BiasTanh(bias) => for_each_vector!(s, done, y, |x, r, j, len| {
                math::tanh(s, s.add(x, get(s, bias.as_ptr().add(j), len)))
            }),
            Finish::TanhGrad(value) => for_each_vector!(s, done, y, |x, r, j, len| {
                let t = get(s, value.data.as_ptr().add(r * value.ld + j), len);
                s.mul(x, s.nfma(t, t, s.splat(1.0)))
            }),
            Finish::BiasGelu { bias, pre, form, ref dropout } => {
                match form {
                    Gelu::Tanh => bias_gelu::<S, TanhForm>(s, bias, pre, done, y),
                    Gelu::Erf => bias_gelu::<S, ErfForm>(s, bias, pre, done, y),
                    Gelu::Quick => bias_gelu::<S, QuickForm>(s, bias, pre, done, y),
                }
                if let Some(dropout) = dropout {
                    drop_tile(dropout, done, y);
                }
            }
            Finish::GeluGrad { pre, form, ref dropout } => {
                match form {
                    Gelu::Tanh => gelu_grad::<S, TanhForm>(s, pre, done, y),
                    Gelu::Erf => gelu_grad::<S, ErfForm>(s, pre, done, y),
                    Gelu::Quick => gelu_grad::<S, QuickForm>(s, pre, done, y),
                }
                if let Some(dropout) = dropout {
                    drop_tile(dropout, done, y);
                }
            }
        }
    }
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn bias_gelu<S: Simd, C: Curve>(s: S, bias: &[f32], pre: Option<Shared>, done: &Done, y: Shared) {
    // SAFETY: the caller's promise.
    unsafe {
        for_each_vector!(s, done, y, |x, r, j, len| {
            let x = s.add(x, get(s, bias.as_ptr().add(j), len));
            if let Some(pre) = pre {
                put(s, pre.at(r, j), x, len);
            }
            C::value(s, x)
        });
    }
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn gelu_grad<S: Simd, C: Curve>(s: S, pre: Rows, done: &Done, y: Shared) {
    // SAFETY: the caller's promise.
    unsafe {
        for_each_vector!(s, done, y, |x, r, j, len| {
            s.mul(x, C::slope(s, get(s, pre.data.as_ptr().add(r * pre.ld + j), len)))
        });
    }
}

/// Multiplies the stored values by their mask.
/// # Safety
/// As [`finish`].
unsafe fn drop_tile(dropout: &Dropout, done: &Done, y: Shared) {
    let mut factors = [0.0; MAX_NR];
    let factors = &mut factors[..done.cols];
    for r in done.r..done.r + done.rows {
        dropout.fill(r, done.j, done.n, factors);
        // SAFETY: `cols` values of row r belong to this task, by the caller's promise.
        let row = unsafe { std::slice::from_raw_parts_mut(y.at(r, done.j), done.cols) };
        for (value, factor) in row.iter_mut().zip(&*factors) {
            *value *= factor;
        }
    }
}
