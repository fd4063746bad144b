//! The moments and the average of a run, of which each of several ranks holds its shard: made whole for a
//! checkpoint, and divided again.
//!
//! Whole means: as one rank would hold them, to the byte. So a checkpoint says nothing of ranks.

use crate::backend::shards::Piece;
use crate::backend::{Arena, Mat, Shards};
use crate::error::Result;

use super::Trainer;

/// What ranks divide, in the order of a checkpoint.
pub(super) const SHARED: [Arena; 3] = [Arena::Ema, Arena::Moment1, Arena::Moment2];

/// How the state is divided, and whole arenas on their way to or from a checkpoint.
pub(super) struct SharedState {
    /// `None` where each rank holds everything.
    shards: Option<Shards>,
    /// In main memory.
    whole: Vec<(Arena, Vec<u8>)>,
}

impl SharedState {
    pub(super) fn new(shards: Option<Shards>) -> Self {
        Self { shards, whole: Vec::new() }
    }

    /// Hands out an arena that was gathered or restored.
    pub(super) fn take(&mut self, arena: Arena) -> Option<Vec<u8>> {
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

    /// Gathers the shards of all ranks, for [`Trainer::whole`]. All ranks call it; one rank does nothing.
    pub(super) fn gather_state(&mut self) -> Result<()> {
        self.state.whole.clear();
        let Some(shards) = self.state.shards.clone() else { return Ok(()) };
        for arena in SHARED {
            let (own, whole) = (self.backend.read_arena(arena)?, self.whole_bytes(arena));
            if whole == 0 {
                continue;
            }
            let size = own.len() / shards.shard();
            let mut bytes = vec![0; shards.padded() * size];
            let mut rest = &own[..];
            for index in (0..shards.buckets()).rev() {
                let bucket = shards.bucket(index);
                let (part, others) = rest.split_at(bucket.len() / shards.ranks() * size);
                self.collective.all_gather(part, &mut bytes[bucket.start * size..bucket.end * size])?;
                rest = others;
            }
            if !self.collective.is_first() {
                continue;
            }
            if arena == Arena::Ema {
                bytes = self.like_weights(&bytes)?;
            }
            bytes.truncate(whole);
            self.state.whole.push((arena, bytes));
        }
        Ok(())
    }

    /// An arena as one rank would hold it. Where it is divided, rank 0 has it once after
    /// [`Trainer::gather_state`].
    pub(super) fn whole(&mut self, arena: Arena) -> Result<Vec<u8>> {
        match self.state.take(arena) {
            Some(bytes) => Ok(bytes),
            None => self.backend.read_arena(arena),
        }
    }

    /// Takes this rank's shard of an arena.
    pub(super) fn set_whole(&mut self, arena: Arena, whole: &[u8]) -> Result<()> {
        let Some(shards) = self.state.shards.as_ref().filter(|_| SHARED.contains(&arena)) else {
            return self.backend.write_arena(arena, whole);
        };
        let held = self.memory.bytes(arena);
        if held == 0 {
            return Ok(());
        }
        let size = held / shards.shard();
        let mut own = vec![0; held];
        for piece in shards.pieces(self.optimizer.segments(), self.collective.rank) {
            let from = if arena == Arena::Ema { piece.param } else { piece.grad };
            own[piece.moment * size..][..piece.len * size]
                .copy_from_slice(&whole[from * size..][..piece.len * size]);
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

    /// An average in the layout of the gradients, in the layout of the weights. A tensor that is not trained is
    /// its own average.
    fn like_weights(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut all = self.backend.read_arena(Arena::Params)?;
        for Piece { param, grad, len, .. } in Piece::whole(self.optimizer.segments()) {
            all[param * 4..][..len * 4].copy_from_slice(&bytes[grad * 4..][..len * 4]);
        }
        Ok(all)
    }
}

/// The values of a parameter in an arena of weights, dense.
pub(super) fn values(bytes: &[u8], at: Mat) -> Vec<f32> {
    let mut values = Vec::with_capacity(at.rows * at.cols);
    for row in 0..at.rows {
        let start = at.offset + row * at.ld * 4;
        values.extend(
            bytes[start..start + at.cols * 4].as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)),
        );
    }
    values
}

/// The inverse of [`values`].
pub(super) fn set_values(bytes: &mut [u8], at: Mat, values: &[f32]) {
    for (row, values) in values.chunks_exact(at.cols.max(1)).enumerate() {
        let start = at.offset + row * at.ld * 4;
        let to = bytes[start..start + at.cols * 4].as_chunks_mut::<4>().0;
        to.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_le_bytes());
    }
}
