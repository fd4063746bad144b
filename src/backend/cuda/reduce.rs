//! Several ranks on GPUs, and chunks: gradients are summed bucket by bucket on the communication stream while
//! the backward pass goes on; then the update of the rank's shard; then everyone has all weights. The order of
//! sums, and the way of the weights through the memory of the gradients, are those of `cpu/reduce.rs`.
//!
//! Without chunks NCCL adds (reduce-scatter). With chunks its order must not depend on the number of ranks, so
//! every rank gets the others' parts as they are, and adds them in the tree.
//!
//! The host takes no part, so that all of it can be recorded. The communication stream waits for the compute
//! stream where a bucket is final, and the compute stream for it before the norm.

use super::driver::{Address, Event, Gpu, Stream};
use super::launch::{AddArgs, SquaresOfBlocksArgs, UpdateChunk, WeightsArgs, kernel};
use super::nccl::{Comm, Element};
use super::{Cuda, update};
use crate::backend::ranks::{Advance, Group, Progress, received_elements};
use crate::backend::shards::{BLOCK, Piece};
use crate::backend::{Arena, Mat, Update};
use crate::error::Result;

/// The ranks, and how far the sums of this step are.
pub(super) struct Reduction {
    group: Group,
    progress: Progress,
    /// The compute stream has come to where communication may begin.
    ready: Event,
    /// Communication is done.
    done: Event,
    /// The table of every tensor, in [`Arena::Update`], and its length.
    whole: (Address, usize),
    /// Whether the gradients' memory holds the whole average (and, while they are exchanged, the weights).
    holds_ema: bool,
}

/// Blocks of 256 threads for the way of the weights.
const WEIGHT_BLOCKS: usize = 4096;

/// [`crate::backend::Backend::join`]
pub(super) fn join(cuda: &mut Cuda, group: Group) -> Result<()> {
    cuda.gpu.make_current()?;
    let mut whole = (0, 0);
    if group.is_sharded {
        let at = cuda.arena(Arena::Update).address;
        let own = update::chunks(&group.segments, &group.pieces());
        let all = update::chunks(&group.segments, &Piece::whole(&group.segments));
        let room = update::most_own_chunks(&group.segments, &group.shards);
        assert!(own.len() <= room, "{} chunks in a table of {room}", own.len());
        whole = (at + (room * size_of::<UpdateChunk>()) as u64, all.len());
        cuda.gpu.upload(at, bytemuck::cast_slice(&own))?;
        cuda.gpu.upload(whole.0, bytemuck::cast_slice(&all))?;
        update::set_table(cuda, &group.segments, own.len());
    }
    cuda.reduction = Some(Reduction {
        progress: Progress::new(&group),
        group,
        ready: cuda.gpu.new_event()?,
        done: cuda.gpu.new_event()?,
        whole,
        holds_ema: false,
    });
    Ok(())
}

/// Calls `work` with the reduction, if there is one.
pub(super) fn with(cuda: &mut Cuda, work: impl FnOnce(&mut Reduction, &Cuda) -> Result<()>) -> Result<()> {
    let Some(mut reduction) = cuda.reduction.take() else { return Ok(()) };
    let done = cuda.gpu.make_current().and_then(|()| work(&mut reduction, cuda));
    cuda.reduction = Some(reduction);
    done
}

/// [`crate::backend::Backend::swap_ema`], if each rank has its own part of the average.
pub(super) fn swap_ema(cuda: &mut Cuda) -> Result<bool> {
    let Some(reduction) = cuda.reduction.as_ref().filter(|r| r.group.is_sharded) else { return Ok(false) };
    assert!(reduction.holds_ema, "the average is gathered before it is used");
    reduction.move_weights(cuda, kernel!("swap_with_grads"), reduction.whole)?;
    Ok(true)
}

impl Reduction {
    /// A step begins, whose gradients take the place of the average. Called for a replayed graph, too.
    pub(super) fn forget_ema(&mut self) {
        self.holds_ema = false;
    }

    /// The way to the other ranks, if there are any.
    pub(super) fn comm(&self) -> Option<&Comm> {
        self.group.comm.as_ref()
    }

    /// The address of gradient `element`.
    fn grads(&self, cuda: &Cuda, element: usize) -> Address {
        cuda.arena(Arena::Grads).address + 4 * element as u64
    }

    /// The sums of a level of the tree that wait.
    fn waiting(&self, cuda: &Cuda, level: usize, element: usize) -> Address {
        let shards = &self.group.shards;
        let first = received_elements(shards) + level * shards.padded() + element;
        cuda.arena(Arena::Exchange).address + 4 * first as u64
    }

    /// One f64 for each block, then one for each rank: those of this rank, and the sums over the ranks. They are
    /// the end of the arena.
    fn squares(&self, cuda: &Cuda) -> [Address; 2] {
        let (exchange, count) = (cuda.arena(Arena::Exchange), self.squares_count());
        let end = exchange.address + exchange.bytes as u64;
        [end - 16 * count as u64, end - 8 * count as u64]
    }

    fn squares_count(&self) -> usize {
        self.group.shards.blocks() + self.group.shards.ranks()
    }

    /// Communication may begin once the compute stream is here.
    fn fork(&self, gpu: &Gpu) -> Result<()> {
        gpu.record_event(&self.ready, Stream::Compute)?;
        gpu.wait_event(Stream::Communication, &self.ready)
    }

    /// The compute stream waits for all communication.
    fn meet(&self, gpu: &Gpu) -> Result<()> {
        gpu.record_event(&self.done, Stream::Communication)?;
        gpu.wait_event(Stream::Compute, &self.done)
    }

    /// Gradients from `from` on are final in the current micro-batch.
    pub(super) fn advance(&mut self, cuda: &Cuda, from: usize) -> Result<()> {
        let Advance { fresh, chunk, buckets } = self.progress.advance(&self.group, cuda.micro, from);
        if let Some((chunk, chunks)) = chunk.filter(|_| !fresh.is_empty()) {
            self.add_chunk(cuda, fresh, chunk, chunks)?;
        }
        let Some(comm) = self.group.comm.as_ref().filter(|_| !buckets.is_empty()) else { return Ok(()) };
        self.fork(&cuda.gpu)?;
        buckets.into_iter().try_for_each(|index| self.sum_bucket(cuda, comm, index))
    }

    /// Adds some of the gradients of a chunk in the tree of this rank's chunks.
    fn add_chunk(
        &self,
        cuda: &Cuda,
        fresh: std::ops::Range<usize>,
        chunk: usize,
        chunks: usize,
    ) -> Result<()> {
        let grads = self.grads(cuda, fresh.start);
        let mut level = 0;
        while chunk >> level & 1 == 1 {
            let args = AddArgs {
                a: self.waiting(cuda, level, fresh.start),
                b: grads,
                out: grads,
                count: fresh.len() as u64,
                stride: 0,
            };
            add(cuda, Stream::Compute, 1, &args)?;
            level += 1;
        }
        if chunk + 1 < chunks {
            cuda.gpu.copy(self.waiting(cuda, level, fresh.start), grads, 4 * fresh.len())?;
        }
        Ok(())
    }

    /// Sums this rank's part of a bucket over the ranks.
    fn sum_bucket(&self, cuda: &Cuda, comm: &Comm, index: usize) -> Result<()> {
        let Group { ranks, shards, in_chunks, .. } = &self.group;
        let (rank, size) = (ranks.rank(), ranks.size());
        let bucket = shards.bucket(index);
        let part = bucket.len() / size;
        let own = self.grads(cuda, shards.part(&bucket, rank).start);
        if !in_chunks {
            let from = self.grads(cuda, bucket.start);
            return comm.group(&cuda.gpu, Stream::Communication, |group| {
                group.reduce_scatter(from, own, part, Element::F32)
            });
        }
        let received = cuda.arena(Arena::Exchange).address;
        let place = |rank: usize| received + 4 * (rank * part) as u64;
        comm.group(&cuda.gpu, Stream::Communication, |group| {
            (0..size).try_for_each(|other| {
                group.send(self.grads(cuda, shards.part(&bucket, other).start), part, Element::F32, other)?;
                group.receive(place(other), part, Element::F32, other)
            })
        })?;
        let mut apart = 1;
        while apart < size {
            let is_last = 2 * apart == size;
            let args = AddArgs {
                a: received,
                b: place(apart),
                out: if is_last { own } else { received },
                count: part as u64,
                stride: (2 * apart * part) as u64,
            };
            add(cuda, Stream::Communication, size / (2 * apart), &args)?;
            apart *= 2;
        }
        Ok(())
    }

    /// The norm of all gradients, what follows from it, and the largest signal: the same on every rank. Where all
    /// ranks update everything, they get all gradients.
    pub(super) fn prepare(&self, cuda: &Cuda, update: &Update) -> Result<()> {
        self.progress.assert_summed(&self.group);
        let Group { ranks, shards, is_sharded, comm, .. } = &self.group;
        self.meet_if(cuda, comm.is_some())?;
        let [own, mut all] = self.squares(cuda);
        let at = |base: Address, index: usize| base + 8 * index as u64;
        for part in shards.own(ranks.rank()) {
            let args = SquaresOfBlocksArgs {
                params: cuda.step_params.address(),
                grads: self.grads(cuda, part.start),
                squares: at(own, part.start / BLOCK),
                signal: at(own, shards.blocks() + ranks.rank()),
            };
            let blocks = (part.len() / BLOCK) as u32;
            cuda.launch(kernel!("squares_of_blocks"), [blocks, 1, 1], 8 * 8, &args)?;
        }
        match comm {
            // Every value is zero on all ranks but one, so the sum is exact.
            Some(comm) => {
                self.fork(&cuda.gpu)?;
                comm.group(&cuda.gpu, Stream::Communication, |group| {
                    group.all_reduce(own, all, self.squares_count(), Element::F64)
                })?;
                if !is_sharded {
                    self.gather(cuda, comm)?;
                }
                self.meet(&cuda.gpu)?;
            }
            None => all = own,
        }
        let signals = (at(all, shards.blocks()), shards.ranks());
        update::decide(cuda, update, (all, shards.blocks()), signals)
    }

    fn meet_if(&self, cuda: &Cuda, is_needed: bool) -> Result<()> {
        if is_needed { self.meet(&cuda.gpu) } else { Ok(()) }
    }

    /// Gives every rank all buckets, of which it holds its parts.
    fn gather(&self, cuda: &Cuda, comm: &Comm) -> Result<()> {
        let Group { ranks, shards, .. } = &self.group;
        comm.group(&cuda.gpu, Stream::Communication, |group| {
            (0..shards.buckets()).try_for_each(|index| {
                let bucket = shards.bucket(index);
                let own = shards.part(&bucket, ranks.rank());
                let (from, to) = (self.grads(cuda, own.start), self.grads(cuda, bucket.start));
                group.all_gather(from, to, own.len(), Element::F32)
            })
        })
    }

    fn gather_now(&self, cuda: &Cuda) -> Result<()> {
        let Some(comm) = &self.group.comm else { return Ok(()) };
        self.fork(&cuda.gpu)?;
        self.gather(cuda, comm)?;
        self.meet(&cuda.gpu)
    }

    /// Gives every rank the weights that the others have updated.
    pub(super) fn give_weights(&self, cuda: &Cuda) -> Result<()> {
        if !self.group.is_sharded {
            return Ok(());
        }
        let own = (cuda.arena(Arena::Update).address, update::own_chunks(cuda));
        self.move_weights(cuda, kernel!("weights_to_grads"), own)?;
        self.gather_now(cuda)?;
        self.move_weights(cuda, kernel!("grads_to_weights"), self.whole)
    }

    fn move_weights(
        &self,
        cuda: &Cuda,
        kernel: super::Kernel<WeightsArgs>,
        (chunks, count): (Address, usize),
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let copy = cuda.arena(Arena::Working);
        let args = WeightsArgs {
            weights: cuda.arena(Arena::Params).address,
            grads: self.grads(cuda, 0),
            copy: if copy.bytes == 0 { 0 } else { copy.address },
            chunks,
            count: count as u32,
        };
        cuda.launch(kernel, [count.min(WEIGHT_BLOCKS) as u32, 1, 1], 0, &args)
    }

    /// [`crate::backend::Backend::gather_rows`]
    pub(super) fn gather_rows(&mut self, cuda: &Cuda, rows: Mat) -> Result<()> {
        let Group { ranks, comm, .. } = &self.group;
        let Some(comm) = comm else { return Ok(()) };
        let (rank, size) = (ranks.rank(), ranks.size());
        assert!(
            rows.rows.is_multiple_of(size) && rows.ld == rows.cols,
            "{rows}: equal shares of {size} ranks"
        );
        let (count, all) = (rows.rows / size * rows.cols, cuda.at(rows));
        self.fork(&cuda.gpu)?;
        comm.group(&cuda.gpu, Stream::Communication, |group| {
            group.all_gather(all + 4 * (rank * count) as u64, all, count, Element::F32)
        })?;
        self.meet(&cuda.gpu)
    }

    /// [`crate::backend::Backend::gather_ema`]
    pub(super) fn gather_ema(&mut self, cuda: &Cuda) -> Result<()> {
        if !self.group.is_sharded {
            return Ok(());
        }
        let mut ema = cuda.arena(Arena::Ema).address;
        for own in self.group.shards.own(self.group.ranks.rank()) {
            cuda.gpu.copy(self.grads(cuda, own.start), ema, 4 * own.len())?;
            ema += 4 * own.len() as u64;
        }
        self.gather_now(cuda)?;
        self.holds_ema = true;
        Ok(())
    }
}

/// Adds parts to others, in `pairs`.
fn add(cuda: &Cuda, stream: Stream, pairs: usize, args: &AddArgs) -> Result<()> {
    let blocks = args.count.div_ceil(4 * 256) as u32;
    cuda.launch_on(stream, kernel!("add_pairs"), [blocks, pairs as u32, 1], 0, args)
}
