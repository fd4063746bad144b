//! Attention on a GPU: which kernel handles a head, how its rows are divided, and how much shared memory it
//! needs.
//!
//! bf16 heads whose values fill whole 16-byte chunks use tensor cores, in the next larger of four widths. All
//! others, and f32, use the plain kernels. In the backward pass one block owns a head of up to
//! [`HEAD_TOKENS`] tokens if its rows fit into shared memory; longer heads take two kernels, one that owns
//! queries and one that owns keys.
//!
//! With dropout, a kernel first draws which probabilities to keep, one bit each, into scratch. Where the bits
//! of all images do not fit, the images are processed in groups.
//!
//! The tensor-core backward kernels also sum their gradients over the tokens if a bias needs that: one row
//! per image, or per tile of its heads. The rows are added up at the end.

pub(super) mod hopper;

use super::driver::Address;
use super::launch::{
    Args, AttentionArgs, AttentionBackwardArgs, AttentionKeepArgs, Kernel, MaskArgs, View, kernel, variant,
};
use super::{Cuda, SCRATCH, bias, sums};
use crate::backend::{Dtype, Heads, Mask, Mat, ops};
use crate::error::{Error, Result};

/// One kernel for tensor cores, and the same with dropout.
struct Tiled<A> {
    kernel: Kernel<A>,
    dropout: Kernel<A>,
    /// Values per head; missing ones are zero.
    width: usize,
    /// Rows that stream past at a time, in a ring of [`STAGES`].
    block: usize,
    /// Rows that a warp owns.
    strip: usize,
    warps: usize,
}

macro_rules! tiled {
    ($pass:literal, $head:literal) => {{
        let kernel = kernel!("attention_", $pass, "_bf16_", $head);
        Tiled {
            kernel,
            dropout: kernel!("attention_", $pass, "_dropout_bf16_", $head),
            width: kernel.constant("width"),
            block: kernel.constant("block"),
            strip: 16 * kernel.constant("m16"),
            warps: kernel.constant("warps"),
        }
    }};
}

/// Wider heads keep more sums in registers, and so fewer scores at a time. At 128 a warp owns 16 rows instead
/// of 32, except in the forward pass, which has one sum instead of two.
const FORWARD: [Tiled<AttentionArgs>; 4] =
    [tiled!("forward", "d32"), tiled!("forward", "d64"), tiled!("forward", "d80"), tiled!("forward", "d128")];
const BACKWARD_QUERIES: [Tiled<AttentionBackwardArgs>; 4] = [
    tiled!("backward_queries", "d32"),
    tiled!("backward_queries", "d64"),
    tiled!("backward_queries", "d80"),
    tiled!("backward_queries", "d128"),
];
const BACKWARD_KEYS: [Tiled<AttentionBackwardArgs>; 4] = [
    tiled!("backward_keys", "d32"),
    tiled!("backward_keys", "d64"),
    tiled!("backward_keys", "d80"),
    tiled!("backward_keys", "d128"),
];
const STAGES: usize = 3;

/// The width and the most tokens of the kernel in which one block owns a head.
const HEAD_WIDTH: usize = 64;
const HEAD_TOKENS: usize = 256;

/// Rows per tile of the plain kernels, and floats from one row of scores to the next.
const PLAIN_ROWS: usize = 32;
const PLAIN_SCORE_ROW: usize = 36;
/// The widest head of any kernel, including single-query attention.
pub(super) const MAX_HEAD_SIZE: usize = 128;

impl<A: Args> Tiled<A> {
    /// Blocks of threads for a head: strips are divided evenly.
    fn tiles(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.strip).div_ceil(self.warps)
    }

    /// Bytes of `owned` tiles of the block's own rows and the ring of two tiles that stream past.
    fn shared(&self, owned: usize) -> usize {
        (owned * self.warps * self.strip + 2 * STAGES * self.block) * 2 * self.width
    }

    /// Starts the kernel for `images` images.
    fn launch(&self, cuda: &Cuda, work: &Work, images: usize, shared: usize, args: &A) -> Result<()> {
        let blocks = images * work.heads.heads * self.tiles(work.heads.tokens);
        let kernel = if work.dropout.rate > 0.0 { self.dropout } else { self.kernel };
        cuda.launch(kernel, [blocks as u32, 1, 1], shared as u32, args)
    }
}

/// `(lse·log2 e, δ)` of each query, for the kernel that owns keys.
fn row_terms(tokens: usize, block: usize) -> usize {
    tokens.next_multiple_of(block) * 8
}

/// Shared memory of the kernel in which one block owns a head: Q, K, V and dO, the terms of their rows, dS
/// twice.
fn head_shared(tokens: usize) -> usize {
    let rows = tokens.next_multiple_of(32);
    4 * rows * 2 * HEAD_WIDTH + row_terms(tokens, 32) + 2 * rows * 64
}

/// Shared memory of a plain kernel.
fn plain_shared(tiles: usize, score_tiles: usize, head_size: usize) -> usize {
    let row = 4 * (head_size.div_ceil(4) | 1);
    (tiles * row + score_tiles * PLAIN_SCORE_ROW) * PLAIN_ROWS * 4
}

/// Sizes that every kernel takes, and the images per launch.
struct Work {
    heads: Heads,
    images: usize,
    /// The next larger width of the tensor-core kernels.
    tile: Option<usize>,
    dtype: Dtype,
    dropout: Mask,
}

/// Scratch for one group of images, after the part that all groups share.
struct AttentionScratch {
    shared: Address,
    /// Images per group.
    images: usize,
    delta: Address,
    keep: Address,
}

/// # Errors
/// No kernel takes such a head.
pub(super) fn check_head_size(head_size: usize) -> Result<()> {
    if head_size <= MAX_HEAD_SIZE {
        return Ok(());
    }
    Err(Error::new(format!(
        "heads of {head_size} values are not supported on CUDA: attention takes at most {MAX_HEAD_SIZE}"
    ))
    .hint("give `model.heads` a larger number, or run on `--device cpu`"))
}

impl Work {
    fn new(heads: Heads, qkv: Mat, rows: &[Mat], dropout: Mask) -> Result<Self> {
        let Heads { tokens, heads: count, head_size } = heads;
        assert!(tokens > 0 && count > 0 && head_size > 0, "attention: an empty head");
        check_head_size(head_size)?;
        assert_eq!(qkv.cols, 3 * count * head_size, "attention: columns of qkv");
        assert_eq!(qkv.rows % tokens, 0, "attention: {} rows are not whole images", qkv.rows);
        for mat in rows {
            assert_eq!((mat.rows, mat.dtype), (qkv.rows, qkv.dtype), "attention: rows and type of {mat}");
        }
        let aligned = |mat: &Mat| mat.ld.is_multiple_of(8);
        let whole_chunks = qkv.dtype == Dtype::Bf16
            && head_size.is_multiple_of(8)
            && aligned(&qkv)
            && rows.iter().all(aligned);
        let tile = FORWARD.iter().position(|t| t.width >= head_size).filter(|_| whole_chunks);
        Ok(Self { heads, images: qkv.rows / tokens, tile, dtype: qkv.dtype, dropout })
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_size as f32).sqrt()
    }

    fn keep_scale(&self) -> f32 {
        1.0 / (1.0 - self.dropout.rate)
    }

    /// `T`, `H`, `Dh` as kernels take them.
    fn sizes(&self) -> [u32; 3] {
        [self.heads.tokens as u32, self.heads.heads as u32, self.heads.head_size as u32]
    }

    /// Rows of lse and δ per image.
    fn head_rows(&self) -> usize {
        self.heads.heads * self.heads.tokens
    }

    /// f32 values from one head of δ to the next.
    fn delta_ld(&self) -> usize {
        self.heads.tokens.next_multiple_of(4)
    }

    fn keep_words(&self) -> usize {
        self.head_rows() * self.heads.tokens.div_ceil(32)
    }

    /// Divides the scratch after `shared` bytes among as many images as fit.
    ///
    /// # Errors
    /// Not even one image fits: dropout draws a bit for every pair of tokens.
    fn scratch(&self, cuda: &Cuda, shared: usize, delta: bool) -> Result<AttentionScratch> {
        let delta = if delta { 4 * self.heads.heads * self.delta_ld() } else { 0 };
        let keep = if self.dropout.rate > 0.0 { 4 * self.keep_words() } else { 0 };
        let room = SCRATCH - shared;
        let images = room.checked_div(delta + keep).map_or(self.images, |most| most.min(self.images));
        if images == 0 {
            let Heads { tokens, heads, .. } = self.heads;
            return Err(Error::new(format!(
                "attention dropout needs {} MiB of scratch for one image of {tokens} tokens and {heads} heads; {} MiB are available",
                keep.div_ceil(1 << 20),
                room >> 20
            ))
            .hint("set `model.attention_dropout = 0`, or a smaller `model.image`"));
        }
        let at = cuda.scratch(shared + images * (delta + keep));
        let (delta, keep_at) = (at + shared as u64, at + (shared + images * delta) as u64);
        Ok(AttentionScratch { shared: at, images, delta, keep: if keep > 0 { keep_at } else { 0 } })
    }

    /// Draws which probabilities to keep, for `images` images starting at `first`.
    fn draw_keep(&self, cuda: &Cuda, keep: Address, first: usize, images: usize) -> Result<()> {
        if keep == 0 {
            return Ok(());
        }
        let mut mask = MaskArgs::new(self.dropout, &cuda.micro);
        mask.first_sample = mask.first_sample.wrapping_add(first as u32);
        let [tokens, heads, _] = self.sizes();
        let blocks = (images * self.keep_words()).div_ceil(256) as u32;
        let params = cuda.step_params.address();
        let args = AttentionKeepArgs { keep, params, dropout: mask, images: images as u32, heads, tokens };
        cuda.launch(kernel!("attention_keep"), [blocks, 1, 1], 0, &args)
    }

    /// `images` images of a matrix of `[B·T, ..]`, starting at image `first`.
    fn rows(&self, cuda: &Cuda, mat: Mat, first: usize, images: usize) -> View {
        let skipped = first * self.heads.tokens * mat.ld * mat.dtype.bytes();
        View::new(cuda.at(mat) + skipped as u64, Mat { rows: images * self.heads.tokens, ..mat })
    }

    /// The same of `[B·H, T]`.
    fn per_head(&self, cuda: &Cuda, mat: Mat, first: usize, images: usize) -> View {
        assert_eq!(
            (mat.rows * mat.cols, mat.dtype),
            (self.images * self.head_rows(), Dtype::F32),
            "attention: lse"
        );
        // One row of all heads is equivalent to a row per head.
        let Heads { tokens, heads, .. } = self.heads;
        let ld = if mat.rows == 1 { tokens } else { mat.ld };
        let skipped = 4 * first * heads * ld;
        View::new(cuda.at(mat) + skipped as u64, Mat { ld, rows: images * heads, cols: tokens, ..mat })
    }

    /// Groups of images: first image and count.
    fn groups(&self, most: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let images = self.images;
        (0..images).step_by(most.max(1)).map(move |first| (first, most.min(images - first)))
    }

    /// Starts a plain kernel for `images` images.
    fn launch_plain<A: Args>(
        &self,
        cuda: &Cuda,
        kernel: Kernel<A>,
        images: usize,
        shared: usize,
        args: &A,
    ) -> Result<()> {
        let blocks = images * self.heads.heads * self.plain_tiles();
        cuda.launch(kernel, [blocks as u32, 1, 1], shared as u32, args)
    }

    fn plain_tiles(&self) -> usize {
        self.heads.tokens.div_ceil(PLAIN_ROWS)
    }
}

pub(super) fn attention(cuda: &mut Cuda, op: &ops::Attention) -> Result<()> {
    let ops::Attention { heads, qkv, o, lse, dropout } = *op;
    let work = Work::new(heads, qkv, &[o], dropout)?;
    if hopper::takes(cuda, &work) {
        return hopper::forward(cuda, &work, qkv, o, lse);
    }
    let scratch = work.scratch(cuda, 0, false)?;
    let keep = scratch.keep;
    for (first, images) in work.groups(scratch.images) {
        work.draw_keep(cuda, keep, first, images)?;
        let [tokens, heads_count, head_size] = work.sizes();
        let tiles = work.tile.map_or(work.plain_tiles(), |tile| FORWARD[tile].tiles(heads.tokens));
        let args = AttentionArgs {
            qkv: work.rows(cuda, qkv, first, images),
            o: work.rows(cuda, o, first, images),
            lse: work.per_head(cuda, lse, first, images),
            keep,
            keep_scale: work.keep_scale(),
            scale: work.scale(),
            tokens,
            heads: heads_count,
            head_size,
            tiles: tiles as u32,
        };
        match work.tile {
            Some(tile) => {
                let kernel = &FORWARD[tile];
                kernel.launch(cuda, &work, images, kernel.shared(1), &args)?;
            }
            None => {
                let shared = plain_shared(3, 1, heads.head_size);
                work.launch_plain(cuda, variant!(work.dtype, "attention_forward"), images, shared, &args)?;
            }
        }
    }
    Ok(())
}

pub(super) fn attention_backward(cuda: &mut Cuda, op: &ops::AttentionBackward) -> Result<()> {
    let (d_y, stream) = (op.d_qkv, op.d_qkv.dtype);
    bias::make(cuda, "attention_backward", (d_y, stream), op.d_bias, &[], &|cuda, d_bias| {
        launch_attention_backward(cuda, op, d_bias)
    })
}

/// The kernels with or without the sums of a bias. Returns the gradient's destination if it was made: the
/// plain kernels make none, and the sums have to fit next to the rest of the scratch.
fn launch_attention_backward(
    cuda: &Cuda,
    op: &ops::AttentionBackward,
    d_bias: Option<Mat>,
) -> Result<Option<Mat>> {
    let ops::AttentionBackward { heads, qkv, o, lse, dropout, d_o, d_qkv, .. } = *op;
    let work = Work::new(heads, qkv, &[o, d_o, d_qkv], dropout)?;
    let limit = cuda.properties().shared_memory as usize;
    let tile = work.tile.filter(|&tile| {
        let (queries, keys) = (&BACKWARD_QUERIES[tile], &BACKWARD_KEYS[tile]);
        queries.shared(2).max(keys.shared(2) + row_terms(heads.tokens, keys.block)) <= limit
    });
    let whole_head = tile.is_some_and(|tile| FORWARD[tile].width == HEAD_WIDTH)
        && heads.tokens <= HEAD_TOKENS
        && head_shared(heads.tokens) <= limit;

    // Sums per image, or per tile of its heads.
    let parts = match tile {
        Some(tile) if !whole_head => BACKWARD_KEYS[tile].tiles(heads.tokens),
        _ => 1,
    };
    let (rows, part) = (work.images * parts, 4 * d_qkv.cols);
    let d_bias = d_bias.filter(|_| tile.is_some() && rows * part <= SCRATCH / 2);

    let scratch = work.scratch(cuda, if d_bias.is_some() { rows * part } else { 0 }, true)?;
    let keep = scratch.keep;
    for (first, images) in work.groups(scratch.images) {
        work.draw_keep(cuda, keep, first, images)?;
        let [tokens, heads_count, head_size] = work.sizes();
        let [qkv, o, d_o, d_qkv] = [qkv, o, d_o, d_qkv].map(|mat| work.rows(cuda, mat, first, images));
        let args = AttentionBackwardArgs {
            qkv,
            o,
            lse: work.per_head(cuda, lse, first, images),
            delta: View {
                at: scratch.delta,
                ld: work.delta_ld() as u32,
                rows: images as u32 * heads_count,
                cols: tokens,
            },
            keep,
            keep_scale: work.keep_scale(),
            scale: work.scale(),
            d_o,
            d_qkv,
            bias_parts: d_bias.map_or(0, |_| scratch.shared + (first * parts * part) as u64),
            tokens,
            heads: heads_count,
            head_size,
            tiles: 1,
        };
        if whole_head {
            let kernel = match keep {
                0 => kernel!("attention_backward_head_bf16_d64"),
                _ => kernel!("attention_backward_head_dropout_bf16_d64"),
            };
            let grid = [(images * heads.heads) as u32, 1, 1];
            cuda.launch(kernel, grid, head_shared(heads.tokens) as u32, &args)?;
            continue;
        }
        match tile {
            Some(tile) => {
                let (queries, keys) = (&BACKWARD_QUERIES[tile], &BACKWARD_KEYS[tile]);
                let args = AttentionBackwardArgs { tiles: queries.tiles(heads.tokens) as u32, ..args };
                queries.launch(cuda, &work, images, queries.shared(2), &args)?;
                let args = AttentionBackwardArgs { tiles: keys.tiles(heads.tokens) as u32, ..args };
                let shared = keys.shared(2) + row_terms(heads.tokens, keys.block);
                keys.launch(cuda, &work, images, shared, &args)?;
            }
            None => {
                let args = AttentionBackwardArgs { tiles: work.plain_tiles() as u32, ..args };
                let [queries, keys] = [
                    variant!(work.dtype, "attention_backward_queries"),
                    variant!(work.dtype, "attention_backward_keys"),
                ];
                work.launch_plain(cuda, queries, images, plain_shared(4, 1, heads.head_size), &args)?;
                work.launch_plain(cuda, keys, images, plain_shared(4, 2, heads.head_size), &args)?;
            }
        }
    }
    if let Some(d_bias) = d_bias {
        let columns = d_qkv.cols as u32;
        let pitches = [rows as u32, columns, columns];
        sums::sum_partials(cuda, scratch.shared, pitches, [columns, 1], [cuda.at(d_bias), 0, 0])?;
    }
    Ok(d_bias)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A100: usize = 163 << 10;
    /// Ada and the small Amperes.
    const SMALL: usize = 99 << 10;

    #[test]
    fn queries_and_keys_are_shared_out_alike() {
        // Each tile leaves one row of sums: of its queries, and of its keys and values.
        for (queries, keys) in BACKWARD_QUERIES.iter().zip(&BACKWARD_KEYS) {
            assert_eq!((queries.strip, queries.warps), (keys.strip, keys.warps), "{}", keys.kernel.name);
        }
    }

    #[test]
    fn every_query_has_a_warp_whatever_the_length() {
        fn check<A: Args>(k: &Tiled<A>) {
            for tokens in 1..1100 {
                let (tiles, strips) = (k.tiles(tokens), tokens.div_ceil(k.strip));
                let most = (0..tiles).map(|t| (t + 1) * strips / tiles - t * strips / tiles).max();
                assert!(most <= Some(k.warps), "{}: {tokens} tokens in {tiles} tiles", k.kernel.name);
            }
        }
        FORWARD.iter().for_each(check);
        BACKWARD_QUERIES.iter().chain(&BACKWARD_KEYS).for_each(check);
    }

    #[test]
    fn shared_memory_suffices_where_it_must() {
        assert!(head_shared(HEAD_TOKENS) <= A100, "a short head on an A100: {}", head_shared(HEAD_TOKENS));
        for tile in 0..FORWARD.len() {
            let keys = &BACKWARD_KEYS[tile];
            // Two blocks of the forward share a multiprocessor of an A100 (164 KB, of which each block loses
            // 1 KB).
            assert!(2 * (FORWARD[tile].shared(1) + 1024) <= 164 << 10, "forward, tile {tile}");
            assert!(BACKWARD_QUERIES[tile].shared(2) <= SMALL, "queries, tile {tile}");
            assert!(keys.shared(2) + row_terms(1025, keys.block) <= SMALL, "keys, tile {tile}");
        }
        assert!(plain_shared(4, 2, MAX_HEAD_SIZE) <= SMALL, "the plain kernels");
    }
}
