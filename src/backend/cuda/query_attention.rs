//! Attention with one query per head and image on a GPU: the class token's, and a MAP head's, where all
//! images share the query.
//!
//! There is one block per image and head. A shared query's gradient is summed in two stages: first a few
//! blocks each sum several images, then their results are added.

use super::Cuda;
use super::attention::{MAX_HEAD_SIZE, check_head_size};
use super::driver::Address;
use super::launch::{MaskArgs, launch, variant};
use crate::backend::{Dtype, Heads, Mask, Mat, ops};
use crate::error::{Error, Result};

const THREADS: u32 = 128;
/// Blocks per multiprocessor that share the gradient of a shared query.
const BLOCKS: usize = 8;

/// An attention with checked shapes.
struct Work {
    heads: Heads,
    images: usize,
    dtype: Dtype,
    /// Elements from one image's query to the next; 0 where they share it.
    q_ld: u32,
    /// f32 values from one head of `p` to the next. One row of all heads is equivalent to a row per head.
    p_ld: u32,
    /// Heads, rows and tensors consist of whole 16-byte accesses.
    whole: u32,
    mask: MaskArgs,
}

impl Work {
    /// `rows` are the `[B, H·Dh]` and `[B·T, 2·H·Dh]` tensors besides `q` and `kv`.
    fn new(
        cuda: &Cuda,
        heads: Heads,
        [q, kv, p]: [Mat; 3],
        [of_image, of_tokens]: [&[Mat]; 2],
        dropout: Mask,
    ) -> Result<Self> {
        let Heads { tokens, heads: count, head_size } = heads;
        assert!(tokens > 0 && count > 0 && head_size > 0, "probe attention: an empty head");
        check_head_size(head_size)?;
        let width = count * head_size;
        assert_eq!((q.cols, kv.cols), (width, 2 * width), "probe attention: columns of q and kv");
        assert_eq!(kv.rows % tokens, 0, "probe attention: {} rows are not whole images", kv.rows);
        let images = kv.rows / tokens;
        assert!(q.rows == 1 || q.rows == images, "probe attention: {} queries of {images} images", q.rows);
        assert_eq!((p.rows * p.cols, p.dtype), (images * count * tokens, Dtype::F32), "probe attention: p");
        for mat in of_image {
            assert_eq!((mat.rows, mat.cols), (images, width), "probe attention: shape of {mat}");
        }
        for mat in of_tokens {
            assert_eq!((mat.rows, mat.cols), (kv.rows, kv.cols), "probe attention: shape of {mat}");
        }
        let all = || [q, kv].into_iter().chain(of_image.iter().chain(of_tokens).copied());
        assert!(all().all(|mat| mat.dtype == q.dtype), "probe attention: tensors of two types");
        let aligned =
            |mat: Mat| cuda.at(mat).is_multiple_of(16) && (mat.rows == 1 || mat.ld.is_multiple_of(8));
        Ok(Self {
            heads,
            images,
            dtype: q.dtype,
            q_ld: if q.rows == 1 { 0 } else { q.ld as u32 },
            p_ld: if p.rows == 1 { tokens as u32 } else { p.ld as u32 },
            whole: u32::from(head_size.is_multiple_of(8) && all().all(aligned)),
            mask: cuda.mask(dropout),
        })
    }

    /// Four partial rows of a head, and `per_token` values per token.
    fn shared(&self, cuda: &Cuda, per_token: usize) -> Result<u32> {
        shared(self.heads.tokens, per_token, cuda.card().shared_memory, &cuda.card().name)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_size as f32).sqrt()
    }

    /// `T`, `H`, `Dh` as kernels take them.
    fn sizes(&self) -> [u32; 3] {
        [self.heads.tokens as u32, self.heads.heads as u32, self.heads.head_size as u32]
    }
}

/// The same, for a GPU whose blocks have `most` bytes.
fn shared(tokens: usize, per_token: usize, most: u32, card: &str) -> Result<u32> {
    let needed = 4 * (4 * MAX_HEAD_SIZE + per_token * tokens);
    if needed > most as usize {
        return Err(Error::new(format!(
            "one query's attention to {tokens} tokens needs {} KB of shared memory; a block of {card} has {}",
            needed.div_ceil(1024),
            most / 1024
        ))
        .hint("set a smaller `model.image` or a larger `model.patch`, or compute on the CPU with `--device cpu`"));
    }
    Ok(needed as u32)
}

/// Slices of images over which a shared query's gradient is summed: as many blocks as the GPU has room for.
fn slices(images: usize, heads: usize, multiprocessors: usize) -> usize {
    images.min((BLOCKS * multiprocessors).div_ceil(heads))
}

pub(super) fn query_attention(cuda: &mut Cuda, op: &ops::QueryAttention) -> Result<()> {
    let ops::QueryAttention { heads, q, kv, p, o, dropout } = *op;
    let work = Work::new(cuda, heads, [q, kv, p], [&[o], &[]], dropout)?;
    let [t, h, dh] = work.sizes();
    launch! {
        cuda, variant!(work.dtype, "query_attention"), [(work.images * heads.heads) as u32, 1, 1], THREADS,
        work.shared(cuda, 1)?,
        cuda.step_params.address(), work.mask, cuda.at(q), work.q_ld, cuda.at(kv), kv.ld as u32, cuda.at(p), work.p_ld,
        cuda.at(o), o.ld as u32, work.scale(), t, h, dh, work.whole,
    }
}

pub(super) fn query_attention_backward(cuda: &mut Cuda, op: &ops::QueryAttentionBackward) -> Result<()> {
    let ops::QueryAttentionBackward { heads, q, kv, p, dropout, d_o, d_q, d_kv } = *op;
    assert_eq!((d_q.rows, d_q.cols, d_q.dtype), (q.rows, q.cols, q.dtype), "probe attention: shape of d_q");
    let work = Work::new(cuda, heads, [q, kv, p], [&[d_o], &[d_kv]], dropout)?;
    let [t, h, dh] = work.sizes();
    let width = q.cols;
    let (slices, parts): (usize, Address) = if q.rows == work.images {
        (work.images, 0)
    } else {
        let slices = slices(work.images, heads.heads, cuda.card().multiprocessors as usize);
        (slices, cuda.scratch(4 * slices * width))
    };
    launch! {
        cuda, variant!(work.dtype, "query_attention_backward"), [(slices * heads.heads) as u32, 1, 1], THREADS,
        work.shared(cuda, 2)?,
        cuda.step_params.address(), work.mask, cuda.at(q), work.q_ld, cuda.at(kv), kv.ld as u32, cuda.at(p), work.p_ld,
        cuda.at(d_o), d_o.ld as u32, cuda.at(d_q), d_q.ld as u32, parts, cuda.at(d_kv), d_kv.ld as u32,
        work.scale(), work.images as u32, t, h, dh, work.whole,
    }?;
    if parts == 0 {
        return Ok(());
    }
    launch! {
        cuda, variant!(work.dtype, "query_attention_backward_query"), [(width as u32).div_ceil(THREADS), 1, 1],
        THREADS, 0,
        parts, cuda.at(d_q), slices as u32, width as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::super::SCRATCH;
    use super::*;

    #[test]
    fn more_tokens_than_shared_memory_holds_are_an_error() {
        // Images of 1,728 pixels in patches of 16 on the smallest GPUs, of 2,624 on Hopper.
        for (kilobytes, tokens) in [(99, 108 * 108), (227, 164 * 164)] {
            let shared = |tokens| shared(tokens, 2, kilobytes << 10, "a card");
            assert!(shared(tokens).unwrap() <= kilobytes << 10);
            let refused = shared(2 * tokens).unwrap_err();
            assert!(refused.message().contains("tokens needs"), "{}", refused.message());
        }
    }

    #[test]
    fn the_scratch_of_a_shared_query_does_not_grow_with_the_batch() {
        for multiprocessors in [1, 16, 132, 400] {
            for heads in [1, 3, 12, 16, 64] {
                for images in [1, 7, 512, 100_000] {
                    let slices = slices(images, heads, multiprocessors);
                    assert!((1..=images).contains(&slices));
                    assert!(4 * slices * heads * MAX_HEAD_SIZE <= SCRATCH);
                }
            }
        }
    }
}
