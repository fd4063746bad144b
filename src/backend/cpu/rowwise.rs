//! Loops over the elements of rows, for operations that stream memory: written once, compiled per instruction set.
//!
//! Everything here is inlined into a [`super::simd::Task`]; the closures that it takes must be `#[inline(always)]`.

use super::simd::Simd;

/// `K` sums of `term` over the elements of `N` slices of one length. Sums of a row run in two vectors of partial sums,
/// so that an addition need not wait for the one before it.
#[inline(always)]
pub(super) fn sums<S: Simd, const N: usize, const K: usize>(
    s: S,
    inputs: [&[f32]; N],
    term: impl Fn([S::V; N]) -> [S::V; K],
) -> [f32; K] {
    let len = common_len(inputs);
    let mut partial = [[s.splat(0.0); K]; 2];
    let mut at = 0;
    let mut turn = 0;
    while at + 2 * S::LANES <= len {
        for partial in &mut partial {
            // SAFETY: `at + LANES <= len`, the length of each input.
            let terms = term(inputs.map(
                #[inline(always)]
                |input| unsafe { s.load(input.as_ptr().add(at)) },
            ));
            for k in 0..K {
                partial[k] = s.add(partial[k], terms[k]);
            }
            at += S::LANES;
        }
    }
    while at < len {
        let n = S::LANES.min(len - at);
        // SAFETY: `n <= LANES` values from `at` on lie inside each input.
        let terms = term(inputs.map(
            #[inline(always)]
            |input| unsafe { s.load_head(input.as_ptr().add(at), n) },
        ));
        for k in 0..K {
            partial[turn][k] = s.add(partial[turn][k], s.keep_head(terms[k], n, s.splat(0.0)));
        }
        turn = 1 - turn;
        at += n;
    }
    let mut sums = [0.0; K];
    for k in 0..K {
        sums[k] = s.sum(s.add(partial[0][k], partial[1][k]));
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
    assert_eq!(common_len(inputs), len, "inputs and outputs differ in length");
    assert!(outputs.iter().all(|output| output.len() == len), "outputs differ in length");
    let inputs = inputs.map(<[f32]>::as_ptr);
    let outputs = outputs.map(<[f32]>::as_mut_ptr);
    let mut at = 0;
    while at + S::LANES <= len {
        // SAFETY: `at + LANES <= len`, the length of all slices, of which the outputs are borrowed for writing.
        unsafe {
            let new = f(
                inputs.map(
                    #[inline(always)]
                    |input| s.load(input.add(at)),
                ),
                outputs.map(
                    #[inline(always)]
                    |output| s.load(output.add(at)),
                ),
            );
            for m in 0..M {
                s.store(outputs[m].add(at), new[m]);
            }
        }
        at += S::LANES;
    }
    let n = len - at;
    if n > 0 {
        // SAFETY: as above, for the `n` values that are left.
        unsafe {
            let new = f(
                inputs.map(
                    #[inline(always)]
                    |input| s.load_head(input.add(at), n),
                ),
                outputs.map(
                    #[inline(always)]
                    |output| s.load_head(output.add(at), n),
                ),
            );
            for m in 0..M {
                s.store_head(outputs[m].add(at), new[m], n);
            }
        }
    }
}

/// The one length of all inputs.
#[inline(always)]
fn common_len<const N: usize>(inputs: [&[f32]; N]) -> usize {
    let len = inputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == len), "inputs differ in length");
    len
}
