//! Attention with one query per head and image on a GPU: the class token's, and a MAP head's, where all
//! images share the query.
//!
//! There is one block per image and head. A shared query's gradient is summed in two stages: first a few
//! blocks each sum several images, then their results are added.

use super::Cuda;
use super::attention::{MAX_HEAD_SIZE, check_head_size};
use super::driver::Address;
use super::launch::{
    MaskArgs, QueryAttentionArgs, QueryAttentionBackwardArgs, SharedQueryArgs, View, variant,
};
use crate::backend::{Dtype, Heads, Mask, Mat, ops};
use crate::error::{Error, Result};

/// Blocks per multiprocessor that share the gradient of a shared query.
const BLOCKS: usize = 8;

/// An attention with checked shapes.
struct Work {
    heads: Heads,
    images: usize,
    dtype: Dtype,
    /// A row for each image; rows 0 elements apart where images share one.
    q: View,
    /// A row for each head.
    p: View,
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
        assert!(tokens > 0 && count > 0 && head_size > 0, "query attention: an empty head");
        check_head_size(head_size)?;
        let width = count * head_size;
        assert_eq!((q.cols, kv.cols), (width, 2 * width), "query attention: columns of q and kv");
        assert_eq!(kv.rows % tokens, 0, "query attention: {} rows are not whole images", kv.rows);
        let images = kv.rows / tokens;
        assert!(q.rows == 1 || q.rows == images, "query attention: {} queries of {images} images", q.rows);
        assert_eq!((p.rows * p.cols, p.dtype), (images * count * tokens, Dtype::F32), "query attention: p");
        for mat in of_image {
            assert_eq!((mat.rows, mat.cols), (images, width), "query attention: shape of {mat}");
        }
        for mat in of_tokens {
            assert_eq!((mat.rows, mat.cols), (kv.rows, kv.cols), "query attention: shape of {mat}");
        }
        let all = || [q, kv].into_iter().chain(of_image.iter().chain(of_tokens).copied());
        assert!(all().all(|mat| mat.dtype == q.dtype), "query attention: tensors of two types");
        let aligned =
            |mat: Mat| cuda.at(mat).is_multiple_of(16) && (mat.rows == 1 || mat.ld.is_multiple_of(8));
        Ok(Self {
            heads,
            images,
            dtype: q.dtype,
            q: if q.rows == 1 { View { ld: 0, ..cuda.view(q) } } else { cuda.view(q) },
            // One row of all heads is equivalent to a row per head.
            p: if p.rows == 1 { View { ld: tokens as u32, ..cuda.view(p) } } else { cuda.view(p) },
            whole: u32::from(head_size.is_multiple_of(8) && all().all(aligned)),
            mask: cuda.mask(dropout),
        })
    }

    /// Four partial rows of a head, and `per_token` values per token.
    fn shared(&self, cuda: &Cuda, per_token: usize) -> Result<u32> {
        shared(self.heads.tokens, per_token, cuda.properties().shared_memory, &cuda.properties().name)
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
fn shared(tokens: usize, per_token: usize, most: u32, gpu: &str) -> Result<u32> {
    let needed = 4 * (4 * MAX_HEAD_SIZE + per_token * tokens);
    if needed > most as usize {
        return Err(Error::new(format!(
            "one query's attention to {tokens} tokens needs {} KB of shared memory; a block of {gpu} has {}",
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
    let [tokens, heads_count, head_size] = work.sizes();
    let args = QueryAttentionArgs {
        params: cuda.step_params.address(),
        dropout: work.mask,
        whole: work.whole,
        q: work.q,
        kv: cuda.view(kv),
        p: work.p,
        o: cuda.view(o),
        scale: work.scale(),
        tokens,
        heads: heads_count,
        head_size,
    };
    let grid = [(work.images * heads.heads) as u32, 1, 1];
    cuda.launch(variant!(work.dtype, "query_attention"), grid, work.shared(cuda, 1)?, &args)
}

pub(super) fn query_attention_backward(cuda: &mut Cuda, op: &ops::QueryAttentionBackward) -> Result<()> {
    let ops::QueryAttentionBackward { heads, q, kv, p, dropout, d_o, d_q, d_kv } = *op;
    assert_eq!((d_q.rows, d_q.cols, d_q.dtype), (q.rows, q.cols, q.dtype), "query attention: shape of d_q");
    let work = Work::new(cuda, heads, [q, kv, p], [&[d_o], &[d_kv]], dropout)?;
    let [tokens, heads_count, head_size] = work.sizes();
    let width = q.cols;
    let (slices, parts): (usize, Address) = if q.rows == work.images {
        (work.images, 0)
    } else {
        let slices = slices(work.images, heads.heads, cuda.properties().multiprocessors as usize);
        (slices, cuda.scratch(4 * slices * width))
    };
    let args = QueryAttentionBackwardArgs {
        params: cuda.step_params.address(),
        dropout: work.mask,
        whole: work.whole,
        q: work.q,
        kv: cuda.view(kv),
        p: work.p,
        d_o: cuda.view(d_o),
        d_q: cuda.view(d_q),
        parts,
        d_kv: cuda.view(d_kv),
        scale: work.scale(),
        images: work.images as u32,
        tokens,
        heads: heads_count,
        head_size,
    };
    let grid = [(slices * heads.heads) as u32, 1, 1];
    cuda.launch(variant!(work.dtype, "query_attention_backward"), grid, work.shared(cuda, 2)?, &args)?;
    if parts == 0 {
        return Ok(());
    }
    let args = SharedQueryArgs { parts, d_q: cuda.view(d_q), slices: slices as u32 };
    let kernel = variant!(work.dtype, "query_attention_backward_query");
    cuda.launch(kernel, [(width as u32).div_ceil(kernel.threads), 1, 1], 0, &args)
}

#[cfg(test)]
mod tests {
    use super::super::SCRATCH;
    use super::*;

    #[test]
    fn more_tokens_than_shared_memory_holds_are_an_error() {
        // Images of 1,728 pixels in patches of 16 on the smallest GPUs, of 2,624 on Hopper.
        for (kilobytes, tokens) in [(99, 108 * 108), (227, 164 * 164)] {
            let shared = |tokens| shared(tokens, 2, kilobytes << 10, "a GPU");
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
