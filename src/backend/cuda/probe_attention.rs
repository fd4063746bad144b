//! The attention of a MAP head on a card: one block per image and head, and a sum over the images for the
//! query.

use super::Cuda;
use super::launch::{launch, variant};
use crate::backend::{Dtype, Heads, Mat};
use crate::error::Result;

const THREADS: u32 = 128;
/// The widest head of the kernels.
const MAX_HEAD_SIZE: usize = 128;

/// Images, after the shapes were checked.
fn images(heads: Heads, q: Mat, kv: Mat, p: Mat) -> usize {
    let Heads { tokens, heads: count, head_size } = heads;
    assert!(tokens > 0 && count > 0, "probe attention: no tokens or no heads");
    assert!((1..=MAX_HEAD_SIZE).contains(&head_size), "probe attention: heads of {head_size} values");
    assert_eq!((q.rows, q.cols), (1, count * head_size), "probe attention: shape of q");
    assert_eq!((kv.cols, kv.dtype), (2 * q.cols, q.dtype), "probe attention: columns and type of kv");
    assert_eq!(kv.rows % tokens, 0, "probe attention: {} rows are no whole images", kv.rows);
    let images = kv.rows / tokens;
    assert_eq!((p.rows * p.cols, p.dtype), (images * count * tokens, Dtype::F32), "probe attention: p");
    images
}

/// f32 from one head of `p` to the next: one row of all heads is as good as a row per head.
fn head_ld(heads: Heads, p: Mat) -> u32 {
    if p.rows == 1 { heads.tokens as u32 } else { p.ld as u32 }
}

/// Four partial rows, and a value per token.
fn shared(heads: Heads) -> u32 {
    (4 * (4 * MAX_HEAD_SIZE + heads.tokens)) as u32
}

fn scale(heads: Heads) -> f32 {
    1.0 / (heads.head_size as f32).sqrt()
}

/// `o: [B, H·Dh]` and the probabilities `p: [B·H, T]` from `q: [1, H·Dh]` and `kv: [B·T, 2·H·Dh]`.
pub(super) fn probe_attention(cuda: &mut Cuda, heads: Heads, q: Mat, kv: Mat, p: Mat, o: Mat) -> Result<()> {
    let images = images(heads, q, kv, p);
    assert_eq!((o.rows, o.cols, o.dtype), (images, q.cols, q.dtype), "probe attention: shape of o");
    let grid = [(images * heads.heads) as u32, 1, 1];
    launch! {
        cuda, variant!(q.dtype, "probe_attention"), grid, THREADS, shared(heads),
        cuda.at(q), cuda.at(kv), kv.ld as u32, cuda.at(p), head_ld(heads, p), cuda.at(o), o.ld as u32,
        scale(heads),
        heads.tokens as u32, heads.heads as u32, heads.head_size as u32,
    }
}

/// `d_q: [1, H·Dh]`, summed over the images in order, and `d_kv: [B·T, 2·H·Dh]` from `d_o: [B, H·Dh]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn probe_attention_backward(
    cuda: &mut Cuda,
    heads: Heads,
    q: Mat,
    kv: Mat,
    p: Mat,
    d_o: Mat,
    d_q: Mat,
    d_kv: Mat,
) -> Result<()> {
    let images = images(heads, q, kv, p);
    assert_eq!((d_o.rows, d_o.cols, d_o.dtype), (images, q.cols, q.dtype), "probe attention: shape of d_o");
    assert_eq!((d_q.rows, d_q.cols, d_q.dtype), (1, q.cols, q.dtype), "probe attention: shape of d_q");
    assert_eq!((d_kv.rows, d_kv.cols), (kv.rows, kv.cols), "probe attention: shape of d_kv");
    assert_eq!(d_kv.dtype, q.dtype, "probe attention: type of d_kv");
    let parts = cuda.scratch(4 * images * q.cols);
    let grid = [(images * heads.heads) as u32, 1, 1];
    launch! {
        cuda, variant!(q.dtype, "probe_attention_backward"), grid, THREADS, shared(heads),
        cuda.at(q), cuda.at(kv), kv.ld as u32, cuda.at(p), head_ld(heads, p), cuda.at(d_o), d_o.ld as u32,
        parts,
        cuda.at(d_kv), d_kv.ld as u32, scale(heads),
        heads.tokens as u32, heads.heads as u32, heads.head_size as u32,
    }?;
    let width = q.cols as u32;
    launch! {
        cuda, variant!(q.dtype, "probe_attention_backward_query"), [width.div_ceil(THREADS), 1, 1], THREADS,
        0,
        parts, cuda.at(d_q), images as u32, width,
    }
}
