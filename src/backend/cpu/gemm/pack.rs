//! Copies matrices into the panels that the micro-kernel streams.
//!
//! A packed right matrix of depth k is cut into panels of `NR = 2·LANES` columns; the last one is a single
//! vector wide if that is enough. Panel j starts at `j·k`, its rows are consecutive, and columns past the end
//! are zero.

use crate::backend::cpu::gemm::tile::panel_vectors;
use crate::backend::cpu::simd::Simd;

/// Values of a packed right matrix.
pub fn packed_len<S: Simd>(k: usize, n: usize) -> usize {
    k * n.next_multiple_of(S::LANES)
}

/// Packs the panels of `columns` (from a panel's start) of the matrix `B[k, n]` whose element `B[k, j]` is
/// `from[j·ld + k]`: a weight `[out, in]`, or the keys of an attention head.
/// # Safety
/// `from` must be valid for n rows of k values, `to` for [`packed_len`] values.
#[inline(always)]
pub unsafe fn pack_transposed<S: Simd>(
    s: S,
    from: *const f32,
    ld: usize,
    k: usize,
    n: usize,
    columns: std::ops::Range<usize>,
    to: *mut f32,
) {
    let mut start = columns.start;
    while start < columns.end {
        let width = panel_vectors::<S>(n - start) * S::LANES;
        let cols = width.min(n - start);
        // SAFETY: the panel lies at start·k and holds k rows of `width`; sources are rows start..start+cols.
        unsafe {
            let (from, to) = (from.add(start * ld), to.add(start * k));
            let (whole_cols, whole_k) = (cols / 8 * 8, k / 8 * 8);
            if cols < width {
                let last = cols / S::LANES * S::LANES;
                for k0 in 0..k {
                    s.store(to.add(k0 * width + last), s.splat(0.0));
                }
            }
            for k0 in (0..whole_k).step_by(8) {
                for j in (0..whole_cols).step_by(8) {
                    s.transpose8(from.add(j * ld + k0), ld, to.add(k0 * width + j), width);
                }
            }
            // What does not fill a block of 8×8, with k outside: the other order would scatter the stores.
            for k0 in 0..k {
                let first = if k0 < whole_k { whole_cols } else { 0 };
                for j in first..cols {
                    *to.add(k0 * width + j) = *from.add(j * ld + k0);
                }
            }
        }
        start += 2 * S::LANES;
    }
}

/// Rows that are copied together: gives long enough runs on both sides.
const GROUP: usize = 8;

/// Packs the panels of `columns` (from a panel's start) of the row-major matrix `B[k, n]`.
/// # Safety
/// `from` must be valid for k rows of n values, `to` for [`packed_len`] values.
#[inline(always)]
pub unsafe fn pack_plain<S: Simd>(
    s: S,
    from: *const f32,
    ld: usize,
    k: usize,
    n: usize,
    columns: std::ops::Range<usize>,
    to: *mut f32,
) {
    let mut group = 0;
    while group < k {
        let end = k.min(group + GROUP);
        let mut start = columns.start;
        while start < columns.end {
            let vectors = panel_vectors::<S>(n - start);
            let width = vectors * S::LANES;
            let whole = start + width <= n;
            for k0 in group..end {
                // SAFETY: row k0 of the panel and of the matrix; the head load keeps inside its n columns.
                unsafe {
                    let (from, to) = (from.add(k0 * ld + start), to.add(start * k + k0 * width));
                    for v in 0..vectors {
                        let from = from.add(v * S::LANES);
                        let x = if whole {
                            s.load(from)
                        } else {
                            s.load_head(from, (n - start - v * S::LANES).min(S::LANES))
                        };
                        s.store(to.add(v * S::LANES), x);
                    }
                }
            }
            start += 2 * S::LANES;
        }
        group = end;
    }
}

/// Packs `columns` of the row-major matrix `[k, cols]` as a left matrix, in panels of MR columns: element (i,
/// k) of panel p at `to[(p·depth + k)·LANES + i]`, depth = k. The lanes past MR hold values that are never
/// read.
/// # Safety
/// `from` must be valid for k rows of `cols` values, `to` for `k·LANES` values per panel.
#[inline(always)]
pub unsafe fn pack_left<S: Simd>(
    s: S,
    from: *const f32,
    ld: usize,
    k: usize,
    cols: usize,
    columns: std::ops::Range<usize>,
    to: *mut f32,
) {
    let panels = columns.len().div_ceil(S::MR);
    let mut group = 0;
    while group < k {
        let end = k.min(group + GROUP);
        for panel in 0..panels {
            let first = columns.start + panel * S::MR;
            for k0 in group..end {
                // SAFETY: the load keeps inside the row.
                unsafe {
                    let from = from.add(k0 * ld + first);
                    let x =
                        if first + S::LANES <= cols { s.load(from) } else { s.load_head(from, cols - first) };
                    s.store(to.add((panel * k + k0) * S::LANES), x);
                }
            }
        }
        group = end;
    }
}
