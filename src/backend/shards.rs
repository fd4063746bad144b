//! How ranks divide the gradients and everything that mirrors them.
//!
//! Gradients become final from the last tensor to the first. They are cut from there into buckets, and each
//! bucket into one part for each rank. A rank sums its part over all ranks, updates it, and has its moments
//! and its average: its *shard* is its part of every bucket, in ascending order.
//!
//! Parts are whole blocks of [`BLOCK`] elements. Sums over all gradients are made of one sum per block, added
//! in order, so that they do not depend on the number of ranks.

use std::ops::Range;

use super::Segment;

/// Elements whose squares are summed on one rank, in one piece.
pub const BLOCK: usize = 16 << 10;

/// Elements of a bucket, if parts of whole blocks allow it: 32 MiB of f32.
pub const BUCKET: usize = 8 << 20;

/// The division of a flat buffer of gradients. It is the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    ranks: usize,
    elements: usize,
    bucket: usize,
}

/// A run of neighbouring elements of one tensor that a rank updates, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the tensor's [`Segment`].
    pub segment: usize,
    /// First element in the layout of the weights.
    pub param: usize,
    /// First element in the layout of the gradients.
    pub grad: usize,
    /// First element in the rank's moments.
    pub moment: usize,
    /// First element in the rank's moving average.
    pub ema: usize,
    /// Number of elements.
    pub len: usize,
}

impl Piece {
    /// The pieces of a rank that updates everything: one per tensor.
    pub fn whole(segments: &[Segment]) -> Vec<Piece> {
        let piece = |(segment, s): (usize, &Segment)| {
            let Segment { param, grad, len, .. } = *s;
            Piece { segment, param, grad, moment: grad, ema: param, len }
        };
        segments.iter().enumerate().map(piece).collect()
    }
}

impl Shards {
    /// Divides `elements` gradients among `ranks`.
    pub fn new(elements: usize, ranks: usize) -> Self {
        Self::with_buckets(elements, ranks, BUCKET)
    }

    /// The same with buckets of about `bucket` elements.
    pub fn with_buckets(elements: usize, ranks: usize, bucket: usize) -> Self {
        let unit = ranks * BLOCK;
        Self { ranks, elements, bucket: (bucket / unit).max(1) * unit }
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Gradients of the model.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The length of a buffer that can be divided: [`Shards::elements`], then zeros.
    pub fn padded(&self) -> usize {
        self.elements.next_multiple_of(self.ranks * BLOCK)
    }

    /// Elements of each rank's shard.
    pub fn shard(&self) -> usize {
        self.padded() / self.ranks
    }

    /// Number of blocks of all ranks.
    pub fn blocks(&self) -> usize {
        self.padded() / BLOCK
    }

    /// The largest bucket.
    pub fn largest_bucket(&self) -> usize {
        self.bucket.min(self.padded())
    }

    /// Number of buckets.
    pub fn buckets(&self) -> usize {
        self.padded().div_ceil(self.bucket)
    }

    /// Bucket `index`, in the order in which they become final: the first one ends at [`Shards::padded`].
    pub fn bucket(&self, index: usize) -> Range<usize> {
        let end = self.padded() - index * self.bucket;
        end.saturating_sub(self.bucket)..end
    }

    /// The part of a bucket that belongs to `rank`.
    pub fn part(&self, bucket: &Range<usize>, rank: usize) -> Range<usize> {
        let part = bucket.len() / self.ranks;
        let start = bucket.start + rank * part;
        start..start + part
    }

    /// The shard of `rank`: its parts of all buckets, in ascending order. A buffer of the shard holds them one
    /// after another.
    pub fn own(&self, rank: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        (0..self.buckets()).rev().map(move |index| self.part(&self.bucket(index), rank))
    }

    /// The runs of tensors in the shard of `rank`, in ascending order. They say which bytes of the moments and
    /// of the average the rank holds: those of all ranks together are all, each once.
    pub fn pieces(&self, segments: &[Segment], rank: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut own_start = 0;
        for own in self.own(rank) {
            let first = segments.partition_point(|s| s.grad + s.len <= own.start);
            for (index, s) in segments.iter().enumerate().skip(first) {
                let (start, end) = (own.start.max(s.grad), own.end.min(s.grad + s.len));
                if start >= end {
                    break;
                }
                let at = own_start + start - own.start;
                pieces.push(Piece {
                    segment: index,
                    param: s.param + start - s.grad,
                    grad: start,
                    moment: at,
                    ema: at,
                    len: end - start,
                });
            }
            own_start += own.len();
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(param: usize, grad: usize, len: usize) -> Segment {
        Segment { name: format!("tensor.{grad}"), param, grad, len, group: 0, factor: None }
    }

    #[test]
    fn every_element_belongs_to_one_rank_and_blocks_are_whole() {
        for ranks in [1, 2, 3, 4, 8] {
            for elements in [1, BLOCK, 5 * BLOCK + 7, 40 * BLOCK] {
                let shards = Shards::with_buckets(elements, ranks, 9 * BLOCK);
                assert!(shards.padded() >= elements && shards.padded() < elements + ranks * BLOCK);
                let mut owners = vec![0; shards.blocks()];
                for rank in 0..ranks {
                    let own: Vec<_> = shards.own(rank).collect();
                    assert_eq!(own.iter().map(Range::len).sum::<usize>(), shards.shard());
                    assert!(own.windows(2).all(|pair| pair[0].end <= pair[1].start));
                    for range in own {
                        assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK));
                        (range.start / BLOCK..range.end / BLOCK).for_each(|block| owners[block] += 1);
                    }
                }
                assert!(owners.iter().all(|count| *count == 1), "{ranks} ranks, {elements} elements");
            }
        }
    }

    #[test]
    fn buckets_go_down_from_the_end() {
        let shards = Shards::with_buckets(21 * BLOCK, 2, 8 * BLOCK);
        let buckets: Vec<_> = (0..shards.buckets()).map(|i| shards.bucket(i)).collect();
        let blocks = |from: usize, to: usize| from * BLOCK..to * BLOCK;
        assert_eq!(buckets, [blocks(14, 22), blocks(6, 14), blocks(0, 6)]);
        assert_eq!(shards.own(1).collect::<Vec<_>>(), [blocks(3, 6), blocks(10, 14), blocks(18, 22)]);
        assert_eq!(shards.largest_bucket(), 8 * BLOCK);
        assert_eq!(Shards::with_buckets(5, 2, 8 * BLOCK).largest_bucket(), 2 * BLOCK);
    }

    #[test]
    fn pieces_cover_every_tensor_once() {
        // A gap between tensors, and weights in another layout than gradients.
        let segments = [
            segment(100, 0, 3 * BLOCK + 5),
            segment(9 * BLOCK, 3 * BLOCK + 64, 10),
            segment(0, 4 * BLOCK, BLOCK),
        ];
        for ranks in [1, 2, 4] {
            let shards = Shards::with_buckets(5 * BLOCK, ranks, 2 * BLOCK);
            let mut seen = vec![0; 5 * BLOCK];
            for rank in 0..ranks {
                let mut held = Vec::new();
                for own in shards.own(rank) {
                    held.extend(own);
                }
                for piece in shards.pieces(&segments, rank) {
                    let s = &segments[piece.segment];
                    assert_eq!(piece.param - s.param, piece.grad - s.grad);
                    for i in 0..piece.len {
                        seen[piece.grad + i] += 1;
                        assert_eq!(held[piece.moment + i], piece.grad + i);
                    }
                }
            }
            for (i, count) in seen.iter().enumerate() {
                let inside = segments.iter().any(|s| (s.grad..s.grad + s.len).contains(&i));
                assert_eq!(*count, u32::from(inside), "element {i} of {ranks} ranks");
            }
        }
    }
}
