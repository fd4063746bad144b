//! The micro-kernel, and products of small matrices built from it.
//!
//! A tile is `rows ≤ MR` by one or two vectors. Its accumulators stay in registers over the whole sum: each
//! step of k loads one or two vectors of B and broadcasts `rows` values of A. A may have any strides; a row
//! of B is contiguous. Every element is one chain of `fma` over ascending k, whichever tile it is in, so how
//! a product is cut into tiles, k-blocks or threads changes no bit.

use crate::backend::cpu::simd::{MAX_MR, MAX_NR, Simd};

/// One call of the micro-kernel: `C (+)= A·B`, C of `rows × vectors·LANES`.
pub struct Tile {
    pub k: usize,
    pub a: *const f32,
    /// From A[i, k] to A[i+1, k].
    pub a_row: usize,
    /// From A[i, k] to A[i, k+1].
    pub a_k: usize,
    pub b: *const f32,
    /// From B[k, j] to B[k+1, j].
    pub b_k: usize,
    pub c: *mut f32,
    pub c_row: usize,
    /// Starts from the values of C instead of zero.
    pub add: bool,
}

/// The micro-kernel of one instruction set and size.
/// # Safety of calling
/// The instruction set must exist, and A, B and C must be valid over the whole tile; C overlaps neither A nor B.
pub type TileFn = unsafe fn(&Tile);

/// # Safety
/// A, B and C must be valid over the whole tile; C overlaps neither A nor B.
#[inline(always)]
pub unsafe fn tile<S: Simd, const M: usize, const N: usize>(s: S, t: &Tile) {
    // SAFETY: all offsets stay inside the tile, by the caller's promise.
    unsafe {
        let mut acc = [[s.splat(0.0); N]; M];
        if t.add {
            for i in 0..M {
                for v in 0..N {
                    acc[i][v] = s.load(t.c.add(i * t.c_row + v * S::LANES));
                }
            }
        }
        // Rows of A in groups of four from a few bases: four strides fit addressing modes, more would need a
        // chain of additions.
        let mut a = [t.a; 3];
        for (four, base) in a.iter_mut().enumerate() {
            *base = base.wrapping_add(4 * four * t.a_row);
        }
        let offset = [0, t.a_row, 2 * t.a_row, 3 * t.a_row];
        let mut b = t.b;
        for _ in 0..t.k {
            let mut row = [s.splat(0.0); N];
            for v in 0..N {
                row[v] = s.load(b.add(v * S::LANES));
            }
            for i in 0..M {
                let x = s.splat(*a[i / 4].add(offset[i % 4]));
                for v in 0..N {
                    acc[i][v] = s.fma(x, row[v], acc[i][v]);
                }
            }
            for base in a.iter_mut().take(M.div_ceil(4)) {
                *base = base.wrapping_add(t.a_k);
            }
            b = b.wrapping_add(t.b_k);
        }
        for i in 0..M {
            for v in 0..N {
                s.store(t.c.add(i * t.c_row + v * S::LANES), acc[i][v]);
            }
        }
    }
}

/// The left matrix of a product.
#[derive(Clone, Copy)]
pub struct Left {
    pub at: *const f32,
    pub row: usize,
    pub k: usize,
}

/// The right matrix of a product, as [`super::pack`] made it: panels of two vectors of columns (one where no more
/// columns are left), one after the other, each `k` rows of its width, padded with zeros.
#[derive(Clone, Copy)]
pub struct Right {
    pub at: *const f32,
    pub k: usize,
}

impl Right {
    /// Where the panel of `width` columns from `j` has its row `k`.
    #[inline(always)]
    pub fn panel(self, j: usize, k: usize, width: usize) -> *const f32 {
        self.at.wrapping_add(j * self.k + k * width)
    }
}

/// Space for the largest tile, used for tiles at the edge of a matrix.
#[repr(align(64))]
pub struct TileBuffer([f32; MAX_MR * MAX_NR]);

impl Default for TileBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl TileBuffer {
    #[inline(always)]
    pub fn new() -> Self {
        Self([0.0; MAX_MR * MAX_NR])
    }
    #[inline(always)]
    pub fn at(&mut self) -> *mut f32 {
        self.0.as_mut_ptr()
    }
}

/// Vectors in the panel that starts `left` columns before the end.
#[inline(always)]
pub fn panel_vectors<S: Simd>(left: usize) -> usize {
    if left > S::LANES { 2 } else { 1 }
}

/// Copies `rows × cols` values.
/// # Safety
/// Both sides must be valid and must not overlap.
#[inline(always)]
pub unsafe fn copy_block<S: Simd>(
    s: S,
    from: *const f32,
    from_ld: usize,
    to: *mut f32,
    to_ld: usize,
    rows: usize,
    cols: usize,
) {
    for r in 0..rows {
        let mut j = 0;
        while j < cols {
            // SAFETY: row r, columns j..j+n, inside the block by the caller's promise.
            unsafe {
                let (from, to) = (from.add(r * from_ld + j), to.add(r * to_ld + j));
                if cols - j >= S::LANES {
                    s.store(to, s.load(from));
                } else {
                    s.store_head(to, s.load_head(from, cols - j), cols - j);
                }
            }
            j += S::LANES;
        }
    }
}

/// `C (+)= A·B` for one thread.
pub struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Left,
    pub b: Right,
    pub c: *mut f32,
    pub c_row: usize,
    pub add: bool,
}

/// # Safety
/// A, B and C must be valid over `m × k`, `k × n` and `m × n`, C for writes and without overlap.
#[inline(always)]
pub unsafe fn product<S: Simd>(s: S, p: &Product, buffer: &mut TileBuffer) {
    let nr = 2 * S::LANES;
    // Blocks of nearly equal height: 16 rows are 8 + 8 rather than 12 + 4.
    let blocks = p.m.div_ceil(S::MR);
    for block in 0..blocks {
        let (i, end) = (block * p.m / blocks, (block + 1) * p.m / blocks);
        let mut j = 0;
        while j < p.n {
            let vectors = panel_vectors::<S>(p.n - j);
            let (width, rows) = (vectors * S::LANES, end - i);
            let cols = width.min(p.n - j);
            // SAFETY: rows i..end and columns j..j+cols lie in the matrices; a tile that would reach past the columns
            // goes through the buffer, which holds any tile.
            unsafe {
                let c = p.c.add(i * p.c_row + j);
                let whole = cols == width;
                let (to, to_row) = if whole { (c, p.c_row) } else { (buffer.at(), width) };
                if !whole && p.add {
                    copy_block(s, c, p.c_row, to, to_row, rows, cols);
                }
                s.tile(rows, vectors)(&Tile {
                    k: p.k,
                    a: p.a.at.add(i * p.a.row),
                    a_row: p.a.row,
                    a_k: p.a.k,
                    b: p.b.panel(j, 0, width),
                    b_k: width,
                    c: to,
                    c_row: to_row,
                    add: p.add,
                });
                if !whole {
                    copy_block(s, to, to_row, c, p.c_row, rows, cols);
                }
            }
            j += nr;
        }
    }
}
