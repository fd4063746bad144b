//! Matrix products for dense layers: forward, gradient of the input, gradient of the weight. All are f32,
//! row-major, with fused epilogues.
//!
//! The weight is packed once per call into panels that all threads read ([`pack`]); the other side is read in
//! place. Tasks are ranges of rows. Within a task the loops go over column blocks that stay in the L2 cache,
//! blocks of k, rows by MR (whose values of A stay in L1) and panels; the micro-kernel ([`tile`]) does the
//! rest. After the last block of k, a tile goes through its epilogue ([`epilogue`]) while it is in cache. The
//! gradient of the weight sums over all rows, so its tasks are parts of the output, and each packs its own
//! columns of `d_y` and x block by block.
//!
//! No sum is ever split between threads: results have the same bits for any number of them.

// Arrays of vectors are indexed: iterators would need closures, which lose the instruction set.
#![allow(clippy::needless_range_loop)]

pub mod epilogue;
pub mod pack;
pub mod tile;

use super::compute::Compute;
use super::simd::{MAX_MR, MAX_NR, Simd, Task};
use super::view::{Rows, RowsMut, Shared};
use crate::backend::Gelu;
pub use epilogue::Dropout;
use epilogue::{Done, Finish, finish};
use tile::{Left, Product, Right, Tile, TileBuffer, copy_block, panel_vectors, product};

/// Where a residual comes from.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// y itself: `y += x·wᵀ + b`.
    InPlace,
    /// A matrix of y's shape.
    From(Rows<'a>),
}

/// What is done to `x·wᵀ` before it is stored.
#[derive(Debug)]
pub enum Epilogue<'a> {
    None,
    Bias(&'a [f32]),
    BiasResidual {
        bias: &'a [f32],
        residual: Residual<'a>,
    },
    /// `pre` receives `x·wᵀ + b`, if it is kept.
    BiasGelu {
        bias: &'a [f32],
        pre: Option<RowsMut<'a>>,
        form: Gelu,
        dropout: Option<Dropout>,
    },
    BiasTanh(&'a [f32]),
}

/// What is done to `d_y·w` before it is stored.
#[derive(Clone, Copy, Debug)]
pub enum InputEpilogue<'a> {
    Plain,
    /// `d_x += d_y·w`
    Add,
    /// `d_x = (d_y·w)∘mask∘gelu'(pre)`
    Gelu {
        pre: Rows<'a>,
        form: Gelu,
        dropout: Option<Dropout>,
    },
    /// `d_x = (d_y·w)∘(1 - y²)`
    Tanh {
        y: Rows<'a>,
    },
}

/// `y[R, out] = epilogue(x[R, in]·wᵀ)`, `w: [out, in]`.
/// # Panics
/// If shapes do not fit.
pub fn matmul(c: &Compute, x: Rows, w: Rows, epilogue: Epilogue, y: RowsMut) {
    let (rows, out, depth) = (x.rows, w.rows, x.cols);
    assert_eq!(w.cols, depth, "matmul: x has {depth} columns, w has {}", w.cols);
    assert_eq!((y.rows, y.cols), (rows, out), "matmul: shape of y");
    let check = |bias: &[f32]| assert_eq!(bias.len(), out, "matmul: length of the bias");
    let mut from_output = false;
    let mut partial = None;
    let finish = match epilogue {
        Epilogue::None => Finish::Store,
        Epilogue::Bias(bias) => {
            check(bias);
            Finish::Bias(bias)
        }
        Epilogue::BiasResidual { bias, residual: Residual::InPlace } => {
            check(bias);
            from_output = true;
            Finish::Bias(bias)
        }
        Epilogue::BiasResidual { bias, residual: Residual::From(residual) } => {
            check(bias);
            assert_eq!((residual.rows, residual.cols), (rows, out), "matmul: shape of the residual");
            Finish::BiasResidual { bias, residual }
        }
        Epilogue::BiasGelu { bias, pre, form, dropout } => {
            check(bias);
            if let Some(pre) = &pre {
                assert_eq!((pre.rows, pre.cols), (rows, out), "matmul: shape of the pre-activation");
            }
            let pre = pre.map(Shared::new);
            partial = pre;
            Finish::BiasGelu { bias, pre, form, dropout: some(dropout) }
        }
        Epilogue::BiasTanh(bias) => {
            check(bias);
            Finish::BiasTanh(bias)
        }
    };
    let y = Shared::new(y);
    let right = Weight { w, transposed: true };
    run(c, &Gemm { n: out, a: x, right, y, partial: partial.unwrap_or(y), from_output, finish });
}

/// `d_x[R, in] = epilogue(d_y[R, out]·w)`, `w: [out, in]`.
/// # Panics
/// If shapes do not fit.
pub fn input_grad(c: &Compute, d_y: Rows, w: Rows, epilogue: InputEpilogue, d_x: RowsMut) {
    let (rows, out, cols) = (d_y.rows, d_y.cols, w.cols);
    assert_eq!(w.rows, out, "input_grad: d_y has {out} columns, w has {} rows", w.rows);
    assert_eq!((d_x.rows, d_x.cols), (rows, cols), "input_grad: shape of d_x");
    let finish = match epilogue {
        InputEpilogue::Plain | InputEpilogue::Add => Finish::Store,
        InputEpilogue::Gelu { pre, form, dropout } => {
            assert_eq!((pre.rows, pre.cols), (rows, cols), "input_grad: shape of the pre-activation");
            Finish::GeluGrad { pre, form, dropout: some(dropout) }
        }
        InputEpilogue::Tanh { y } => {
            assert_eq!((y.rows, y.cols), (rows, cols), "input_grad: shape of y");
            Finish::TanhGrad(y)
        }
    };
    let y = Shared::new(d_x);
    let from_output = matches!(epilogue, InputEpilogue::Add);
    let right = Weight { w, transposed: false };
    run(c, &Gemm { n: cols, a: d_y, right, y, partial: y, from_output, finish });
}

/// Treats a mask of rate 0 as no dropout.
fn some(dropout: Option<Dropout>) -> Option<Dropout> {
    dropout.filter(|d| !d.mask.is_none())
}

// The product with a packed right side ----------------------------------------------------------------------------

/// Depth of a block of k: MR rows of it stay in L1.
const K_BLOCK: usize = 384;
/// Values of the packed columns that a task processes at a time: most of an L2 cache of 1 MiB.
const L2_VALUES: usize = 144 * 1024;
/// Tasks per thread: enough to balance a core that also does other work.
const TASKS_PER_THREAD: usize = 4;
/// Weights of at least this many values are packed by several threads.
const PACK_ALONE: usize = 32 * 1024;

/// The right side, `B[k, n]`.
#[derive(Clone, Copy)]
struct Weight<'a> {
    w: Rows<'a>,
    /// `B[k, j] = w[j, k]`
    transposed: bool,
}

/// `y = finish(a·B)`; incomplete sums are kept in `partial`.
struct Gemm<'a> {
    n: usize,
    a: Rows<'a>,
    right: Weight<'a>,
    y: Shared<'a>,
    partial: Shared<'a>,
    /// The sums start from y.
    from_output: bool,
    finish: Finish<'a>,
}

fn run(c: &Compute, g: &Gemm) {
    let (rows, k, n) = (g.a.rows, g.a.cols, g.n);
    if rows == 0 || n == 0 {
        return;
    }
    let mut packed = c.scratch(c.isa.run(PackedLen { k, n }));
    let to = Shared::new(RowsMut::dense(&mut packed, 1, k * n));
    let panels = n.div_ceil(PACK_COLUMNS);
    let pack = |i: usize| {
        let columns = i * PACK_COLUMNS..n.min((i + 1) * PACK_COLUMNS);
        c.isa.run(Pack { right: g.right, k, n, columns, to });
    };
    if k * n < PACK_ALONE {
        (0..panels).for_each(pack);
    } else {
        c.for_each(panels, pack);
    }
    let blocks = rows.div_ceil(MAX_MR);
    let tasks = blocks.min(c.threads() * TASKS_PER_THREAD);
    let packed = &packed[..];
    c.for_each(tasks, |i| {
        let start = i * blocks / tasks * MAX_MR;
        let end = ((i + 1) * blocks / tasks * MAX_MR).min(rows);
        c.isa.run(RowTask { g, packed, start, end });
    });
}

/// Columns that are packed at a time: a multiple of every panel width.
const PACK_COLUMNS: usize = 64;

struct PackedLen {
    k: usize,
    n: usize,
}

impl Task for PackedLen {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        pack::packed_len::<S>(self.k, self.n)
    }
}

struct Pack<'a> {
    right: Weight<'a>,
    k: usize,
    n: usize,
    columns: std::ops::Range<usize>,
    to: Shared<'a>,
}

impl Task for Pack<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Pack { right: Weight { w, transposed }, k, n, columns, to } = self;
        let (from, to) = (w.data.as_ptr(), to.base());
        // SAFETY: w is [n, k] or [k, n] by the caller's asserts, `to` has room for `packed_len`, and each task writes the
        // panels of its own columns.
        unsafe {
            if transposed {
                pack::pack_transposed(s, from, w.ld, k, n, columns, to);
            } else {
                pack::pack_plain(s, from, w.ld, k, n, columns, to);
            }
        }
    }
}

/// Rows `start..end` of a product.
struct RowTask<'a> {
    g: &'a Gemm<'a>,
    packed: &'a [f32],
    start: usize,
    end: usize,
}

impl Task for RowTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let RowTask { g, packed, start, end } = self;
        let (k, n, nr) = (g.a.cols, g.n, 2 * S::LANES);
        let right = Right { at: packed.as_ptr(), k };
        let mut buffer = TileBuffer::new();
        let k_blocks = k.div_ceil(K_BLOCK).max(1);
        let columns = (L2_VALUES / k.clamp(1, K_BLOCK) / nr).max(1) * nr;
        let row_blocks = (end - start).div_ceil(S::MR);
        for first in (0..n).step_by(columns) {
            let last = n.min(first + columns);
            for kb in 0..k_blocks {
                let (k0, k1) = (kb * k / k_blocks, (kb + 1) * k / k_blocks);
                let (add, complete) = (kb > 0 || g.from_output, kb + 1 == k_blocks);
                let sums = if kb > 0 { g.partial } else { g.y };
                for block in 0..row_blocks {
                    let r = start + block * (end - start) / row_blocks;
                    let rows = start + (block + 1) * (end - start) / row_blocks - r;
                    let mut j = first;
                    while j < last {
                        let vectors = panel_vectors::<S>(n - j);
                        let width = vectors * S::LANES;
                        let cols = width.min(n - j);
                        // SAFETY: rows r..r+rows belong to this task, columns j..j+cols lie in the matrices; a tile that
                        // would reach past the columns lies in the buffer, which holds any tile.
                        unsafe {
                            let direct = !complete && cols == width && (kb > 0 || !g.from_output);
                            let (to, to_row) = if direct {
                                (g.partial.at(r, j), g.partial.ld)
                            } else {
                                (buffer.at(), width)
                            };
                            if add && !direct {
                                copy_block(s, sums.at(r, j), sums.ld, to, to_row, rows, cols);
                            }
                            s.tile(rows, vectors)(&Tile {
                                k: k1 - k0,
                                a: g.a.data.as_ptr().add(r * g.a.ld + k0),
                                a_row: g.a.ld,
                                a_k: 1,
                                b: right.panel(j, k0, width),
                                b_k: width,
                                c: to,
                                c_row: to_row,
                                add,
                            });
                            if complete {
                                let done = Done { tile: to, tile_row: to_row, r, rows, j, cols, n };
                                finish(s, &g.finish, &done, g.y);
                            } else if !direct {
                                copy_block(s, to, to_row, g.partial.at(r, j), g.partial.ld, rows, cols);
                            }
                        }
                        j += nr;
                    }
                }
            }
        }
    }
}

// The gradient of the weight --------------------------------------------------------------------------------------

/// Depth of a block of rows: MR columns of `d_y` over it stay in L1, and the block of x in L2.
const ROW_BLOCK: usize = 384;

/// `d_w[out, in] (+)= d_y[R, out]ᵀ·x[R, in]`.
/// # Panics
/// If shapes do not fit.
pub fn weight_grad(c: &Compute, d_y: Rows, x: Rows, accumulate: bool, d_w: RowsMut) {
    let (out, cols) = (d_y.cols, x.cols);
    assert_eq!(d_y.rows, x.rows, "weight_grad: rows of d_y and x");
    assert_eq!((d_w.rows, d_w.cols), (out, cols), "weight_grad: shape of d_w");
    if out == 0 || cols == 0 {
        return;
    }
    let d_w = Shared::new(d_w);
    let (down, across) = weight_tasks(c.threads(), out, cols);
    let (blocks, panels) = (out.div_ceil(MAX_MR), cols.div_ceil(MAX_NR));
    c.for_each(down * across, |task| {
        let (i, j) = (task / across, task % across);
        let rows = i * blocks / down * MAX_MR..out.min((i + 1) * blocks / down * MAX_MR);
        let columns = j * panels / across * MAX_NR..cols.min((j + 1) * panels / across * MAX_NR);
        c.isa.run(WeightTask { c, d_y, x, accumulate, d_w, rows, columns });
    });
}

/// Into how many parts the rows and the columns of `d_w` are cut. Each task reads all rows of its columns of
/// `d_y` and x, so the longer side is cut first, and into few parts.
fn weight_tasks(threads: usize, out: usize, cols: usize) -> (usize, usize) {
    const LEAST: usize = 2 * MAX_NR;
    let (long, short) = (out.max(cols), out.min(cols));
    if threads == 1 || long < 2 * LEAST {
        return (1, 1);
    }
    let wanted = if long >= threads * 4 * LEAST { 2 * threads } else { threads };
    let along = wanted.min(long / LEAST);
    let across = wanted.div_ceil(along).min((short / LEAST).max(1));
    if out >= cols { (along, across) } else { (across, along) }
}

/// A part of `d_w`.
struct WeightTask<'a> {
    c: &'a Compute,
    d_y: Rows<'a>,
    x: Rows<'a>,
    accumulate: bool,
    d_w: Shared<'a>,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
}

impl Task for WeightTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let WeightTask { c, d_y, x, accumulate, d_w, rows, columns } = self;
        let (m, n, depth) = (rows.len(), columns.len(), x.rows);
        let k_blocks = depth.div_ceil(ROW_BLOCK).max(1);
        let most = depth.div_ceil(k_blocks);
        let (panels, nr) = (m.div_ceil(S::MR), 2 * S::LANES);
        let step = (L2_VALUES / most.max(1) / nr).max(1) * nr;
        let mut left = c.scratch(panels * S::LANES * most);
        let mut right = c.scratch(pack::packed_len::<S>(most, step.min(n)));
        let mut buffer = TileBuffer::new();
        for kb in 0..k_blocks {
            let (k0, k1) = (kb * depth / k_blocks, (kb + 1) * depth / k_blocks);
            let k = k1 - k0;
            // SAFETY: rows k0..k1 of both matrices; the scratch is large enough for the longest block. This
            // part of d_w belongs to this task.
            unsafe {
                let from = d_y.data.as_ptr().wrapping_add(k0 * d_y.ld);
                pack::pack_left(s, from, d_y.ld, k, d_y.cols, rows.clone(), left.as_mut_ptr());
                for first in (0..n).step_by(step) {
                    let here = step.min(n - first);
                    let from = x.data.as_ptr().wrapping_add(k0 * x.ld + columns.start + first);
                    pack::pack_plain(s, from, x.ld, k, here, 0..here, right.as_mut_ptr());
                    for i in (0..m).step_by(S::MR) {
                        let part = Product {
                            m: S::MR.min(m - i),
                            n: here,
                            k,
                            a: Left { at: left.as_ptr().add(i / S::MR * S::LANES * k), row: 1, k: S::LANES },
                            b: Right { at: right.as_ptr(), k },
                            c: d_w.at(rows.start + i, columns.start + first),
                            c_row: d_w.ld,
                            add: accumulate || kb > 0,
                        };
                        product(s, &part, &mut buffer);
                    }
                }
            }
        }
    }
}

// The gradient of the bias ----------------------------------------------------------------------------------------

/// Rows that are summed before they are added to the total: keeps the error of long sums small.
const SUM_ROWS: usize = 64;
/// Columns of a task.
const SUM_COLUMNS: usize = 64;

/// `out (+)= Σ_r d_y[r, ·]`: the gradient of a bias.
/// # Panics
/// If `out` does not have one value per column.
pub fn column_sums(c: &Compute, d_y: Rows, accumulate: bool, out: &mut [f32]) {
    assert_eq!(out.len(), d_y.cols, "column_sums: length of the result");
    let columns = out.len();
    let out = Shared::new(RowsMut::dense(out, 1, columns));
    c.for_each(columns.div_ceil(SUM_COLUMNS), |i| {
        let (start, end) = (i * SUM_COLUMNS, columns.min((i + 1) * SUM_COLUMNS));
        c.isa.run(SumTask { d_y, accumulate, out, start, end });
    });
}

struct SumTask<'a> {
    d_y: Rows<'a>,
    accumulate: bool,
    out: Shared<'a>,
    start: usize,
    end: usize,
}

impl Task for SumTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SumTask { d_y, accumulate, out, start, end } = self;
        const VECTORS: usize = 4;
        let mut j = start;
        while j < end {
            let cols = (end - j).min(VECTORS * S::LANES);
            let mut total = [s.splat(0.0); VECTORS];
            for chunk in (0..d_y.rows).step_by(SUM_ROWS) {
                let mut sum = [s.splat(0.0); VECTORS];
                for r in chunk..d_y.rows.min(chunk + SUM_ROWS) {
                    // SAFETY: row r and columns j..j+cols of d_y.
                    unsafe {
                        let from = d_y.data.as_ptr().add(r * d_y.ld + j);
                        if cols == VECTORS * S::LANES {
                            for v in 0..VECTORS {
                                sum[v] = s.add(sum[v], s.load(from.add(v * S::LANES)));
                            }
                        } else {
                            for v in 0..cols.div_ceil(S::LANES) {
                                let len = S::LANES.min(cols - v * S::LANES);
                                sum[v] = s.add(sum[v], s.load_head(from.add(v * S::LANES), len));
                            }
                        }
                    }
                }
                for v in 0..VECTORS {
                    total[v] = s.add(total[v], sum[v]);
                }
            }
            for v in 0..cols.div_ceil(S::LANES) {
                let len = S::LANES.min(cols - v * S::LANES);
                // SAFETY: columns j..j+cols of the result belong to this task.
                unsafe {
                    let to = out.at(0, j + v * S::LANES);
                    let before = if accumulate { s.load_head(to, len) } else { s.splat(0.0) };
                    s.store_head(to, s.add(before, total[v]), len);
                }
            }
            j += cols;
        }
    }
}

#[cfg(test)]
mod tests;
