//! Loops over the elements of rows, for operations that stream memory: written once, compiled per instruction
//! set.
//!
//! Everything here is inlined into a [`Task`](super::simd::Task). Closures passed to it must be
//! `#[inline(always)]`, and no closure may go through a function of the standard library (`array::map`),
//! because that would be compiled for the baseline.

use super::simd::Simd;

/// `K` sums of `term` over the elements of `N` slices of one length. Each runs in two vectors of partial
/// sums, so that an addition need not wait for the previous one.
#[inline(always)]
pub(super) fn sums<S: Simd, const N: usize, const K: usize>(
    s: S,
    inputs: [&[f32]; N],
    term: impl Fn([S::V; N]) -> [S::V; K],
) -> [f32; K] {
    let len = inputs[0].len();
    for input in inputs {
        assert_eq!(input.len(), len, "inputs differ in length");
    }
    let (mut even, mut odd) = ([s.splat(0.0); K], [s.splat(0.0); K]);
    let mut at = 0;
    while at + 2 * S::LANES <= len {
        // SAFETY: `at + 2·LANES <= len`, the length of each input.
        let (first, second) = unsafe { (load(s, inputs, at), load(s, inputs, at + S::LANES)) };
        let (first, second) = (term(first), term(second));
        for k in 0..K {
            even[k] = s.add(even[k], first[k]);
            odd[k] = s.add(odd[k], second[k]);
        }
        at += 2 * S::LANES;
    }
    while at < len {
        let n = S::LANES.min(len - at);
        // SAFETY: `n <= LANES` values from `at` on lie inside each input.
        let terms = term(unsafe { load_head(s, inputs, at, n) });
        for k in 0..K {
            even[k] = s.add(even[k], s.keep_head(terms[k], n, s.splat(0.0)));
        }
        at += n;
    }
    let mut sums = [0.0; K];
    for k in 0..K {
        sums[k] = s.sum(s.add(even[k], odd[k]));
    }
    sums
}

/// `outputs = f(inputs, outputs)`, element by element; all slices have one length.
#[inline(always)]
pub(super) fn update<S: Simd, const N: usize, const M: usize>(
    s: S,
    inputs: [&[f32]; N],
    outputs: [&mut [f32]; M],
    f: impl Fn([S::V; N], [S::V; M]) -> [S::V; M],
) {
    let len = outputs[0].len();
    for input in inputs {
        assert_eq!(input.len(), len, "inputs and outputs differ in length");
    }
    for output in &outputs {
        assert_eq!(output.len(), len, "outputs differ in length");
    }
    let mut at = 0;
    while at + S::LANES <= len {
        // SAFETY: `at + LANES <= len`, the length of all slices.
        unsafe {
            let mut old = [s.splat(0.0); M];
            for m in 0..M {
                old[m] = s.load(outputs[m].as_ptr().add(at));
            }
            let new = f(load(s, inputs, at), old);
            for m in 0..M {
                s.store(outputs[m].as_mut_ptr().add(at), new[m]);
            }
        }
        at += S::LANES;
    }
    let n = len - at;
    if n > 0 {
        // SAFETY: `n < LANES` values are left in all slices.
        unsafe {
            let mut old = [s.splat(0.0); M];
            for m in 0..M {
                old[m] = s.load_head(outputs[m].as_ptr().add(at), n);
            }
            let new = f(load_head(s, inputs, at, n), old);
            for m in 0..M {
                s.store_head(outputs[m].as_mut_ptr().add(at), new[m], n);
            }
        }
    }
}

/// # Safety
/// Each input has at least `at + LANES` values.
#[inline(always)]
unsafe fn load<S: Simd, const N: usize>(s: S, inputs: [&[f32]; N], at: usize) -> [S::V; N] {
    let mut values = [s.splat(0.0); N];
    for n in 0..N {
        // SAFETY: the caller's promise.
        values[n] = unsafe { s.load(inputs[n].as_ptr().add(at)) };
    }
    values
}

/// # Safety
/// Each input has at least `at + n` values, and `n <= LANES`.
#[inline(always)]
unsafe fn load_head<S: Simd, const N: usize>(s: S, inputs: [&[f32]; N], at: usize, n: usize) -> [S::V; N] {
    let mut values = [s.splat(0.0); N];
    for i in 0..N {
        // SAFETY: the caller's promise.
        values[i] = unsafe { s.load_head(inputs[i].as_ptr().add(at), n) };
    }
    values
}
