//! The moments and the average of a run, of which each of several ranks holds its shard: where its bytes lie
//! among those of one rank that holds everything. A checkpoint holds the latter, so it says nothing of ranks.

use std::ops::Range;

use crate::backend::shards::Piece;
use crate::backend::{Arena, Mat, Shards};
use crate::error::Result;

use super::Trainer;

/// What ranks divide, in the order of a checkpoint.
pub(super) const SHARED: [Arena; 3] = [Arena::Ema, Arena::Moment1, Arena::Moment2];

/// Parts of arenas that all ranks hold start at multiples of this many bytes.
pub(super) const ALIGN: usize = 256;

/// A run of bytes of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Its first byte in the arena as one rank would hold it.
    pub(super) whole: usize,
    /// Its first byte in this rank's arena.
    pub(super) held: usize,
    /// Number of bytes.
    pub(super) len: usize,
}

/// How the state is divided, and whole arenas on their way from a checkpoint.
pub(super) struct SharedState {
    /// `None` where each rank holds everything.
    shards: Option<Shards>,
    /// Whole arenas from a checkpoint, in main memory.
    whole: Vec<(Arena, Vec<u8>)>,
}

impl SharedState {
    pub(super) fn new(shards: Option<Shards>) -> Self {
        Self { shards, whole: Vec::new() }
    }

    fn take(&mut self, arena: Arena) -> Option<Vec<u8>> {
        let at = self.whole.iter().position(|(held, _)| *held == arena)?;
        Some(self.whole.swap_remove(at).1)
    }
}

impl Trainer {
    /// Bytes of an arena as one rank would hold it.
    pub(super) fn whole_bytes(&self, arena: Arena) -> usize {
        match (&self.state.shards, arena) {
            (Some(_), Arena::Moment1) => self.optimizer.moment1_bytes(),
            (Some(_), Arena::Moment2) => self.optimizer.moment2_bytes(),
            (Some(_), Arena::Ema) if self.memory.bytes(arena) > 0 => self.memory.bytes(Arena::Params),
            _ => self.memory.bytes(arena),
        }
    }

    /// The bytes of an arena that this rank writes to a checkpoint. With those of the other ranks they are all
    /// that is not zero, each once; only the average of tensors that are not trained may be missing.
    pub(super) fn runs(&self, arena: Arena) -> Vec<Run> {
        let (held, rank) = (self.memory.bytes(arena), self.collective.rank);
        if held == 0 {
            return Vec::new();
        }
        let Some(shards) = self.state.shards.as_ref().filter(|_| SHARED.contains(&arena)) else {
            let part = equal_part(held, rank, self.collective.size);
            return vec![Run { whole: part.start, held: part.start, len: part.len() }];
        };
        let size = held / shards.shard();
        let pieces = shards.pieces(self.optimizer.segments(), rank).into_iter();
        let at = |piece: &Piece| if arena == Arena::Ema { piece.param } else { piece.grad };
        pieces.map(|p| Run { whole: at(&p) * size, held: p.moment * size, len: p.len * size }).collect()
    }

    /// Takes this rank's shard of an arena.
    pub(super) fn set_whole(&mut self, arena: Arena, whole: &[u8]) -> Result<()> {
        if self.state.shards.is_none() || !SHARED.contains(&arena) {
            return self.backend.write_arena(arena, whole);
        }
        let held = self.memory.bytes(arena);
        if held == 0 {
            return Ok(());
        }
        let mut own = vec![0; held];
        for run in self.runs(arena) {
            own[run.held..][..run.len].copy_from_slice(&whole[run.whole..][..run.len]);
        }
        self.backend.write_arena(arena, &own)
    }

    /// The same for an arena from a checkpoint, which [`Trainer::restored`] then gives to other ranks.
    pub(super) fn restore(&mut self, arena: Arena, whole: Vec<u8>) -> Result<()> {
        self.set_whole(arena, &whole)?;
        if self.collective.size > 1 {
            self.state.take(arena);
            self.state.whole.push((arena, whole));
        }
        Ok(())
    }

    /// What [`Trainer::restore`] got, once.
    pub(super) fn restored(&mut self, arena: Arena) -> Vec<u8> {
        self.state.take(arena).unwrap_or_default()
    }
}

/// Part `rank` of `ranks` equal parts of `bytes` bytes.
fn equal_part(bytes: usize, rank: usize, ranks: usize) -> Range<usize> {
    let part = bytes.div_ceil(ALIGN).div_ceil(ranks) * ALIGN;
    (rank * part).min(bytes)..((rank + 1) * part).min(bytes)
}

/// Writes the values of a parameter, dense, to its place in an arena of weights.
pub(super) fn set_values(bytes: &mut [u8], at: Mat, values: &[f32]) {
    for (row, values) in values.chunks_exact(at.cols.max(1)).enumerate() {
        let start = at.offset + row * at.ld * 4;
        let to = bytes[start..start + at.cols * 4].as_chunks_mut::<4>().0;
        to.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parts_cover_an_arena_once() {
        for bytes in [0, 4, 256, 1000, 4096, 123_456] {
            for ranks in 1..9 {
                let parts: Vec<_> = (0..ranks).map(|rank| equal_part(bytes, rank, ranks)).collect();
                assert_eq!((parts[0].start, parts[ranks - 1].end), (0, bytes));
                assert!(parts.windows(2).all(|two| two[0].end == two[1].start), "{bytes} on {ranks}");
            }
        }
    }
}
