//! Ranks on GPUs exchange bytes of the host, through a small buffer on their GPUs: what a run agrees on, its reports and
//! its evaluations. Gradients and weights do not pass through here.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::driver::{Address, Buffer, Event, Gpu, Stream};
use super::nccl::{Comm, Element, Group, Id};
use crate::error::Result;

/// Bytes of each half of the buffer: what is sent, and what comes.
const HALF: usize = 4 << 20;

/// All ranks of a run, as this process reaches them.
pub struct Peers(Mutex<Inner>);

struct Inner {
    /// `None` after the end.
    comm: Option<Comm>,
    /// Of the last operation.
    done: Event,
    staging: Buffer,
    gpu: Gpu,
    size: usize,
}

// SAFETY: `Gpu` counts its clones without atomics; all of them are in here, behind the lock. The driver allows calls
// from any thread on which the context is current, and every operation makes it current.
unsafe impl Send for Inner {}

impl Peers {
    /// Joins the ranks that have the same id, on GPU `ordinal` of this process. Calls `waiting` again and again until
    /// all have joined; its error ends the wait.
    ///
    /// # Errors
    /// The GPU cannot be opened; NCCL's; those of `waiting`.
    pub fn join(
        ordinal: usize,
        id: &Id,
        rank: usize,
        size: usize,
        waiting: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        let staging = gpu.allocate(2 * HALF)?;
        let comm = Comm::join(&gpu, id, rank, size, waiting)?;
        let inner = Inner { comm: Some(comm), done: gpu.new_event()?, staging, size, gpu };
        Ok(Self(Mutex::new(inner)))
    }

    /// The communicator, for work on the same GPU. `None` after the end.
    pub fn comm(&self) -> Option<Comm> {
        self.lock().comm.clone()
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// Another rank has ended, as for all that follow.
    pub fn barrier(&self) -> Result<()> {
        let mut all = vec![0; self.lock().size];
        self.all_gather(&[0], &mut all)
    }

    /// Gives every rank the bytes of rank 0; all pass the same length.
    pub fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let inner = self.lock();
        for piece in bytes.chunks_mut(HALF) {
            let sent = piece.to_vec();
            inner.run(&sent, |group, at, _| group.broadcast(at, sent.len(), Element::U8, 0))?;
            inner.gpu.download(inner.staging.address, piece)?;
        }
        Ok(())
    }

    /// Gives every rank the bytes of all ranks, in rank order. All pass the same length.
    pub fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        let inner = self.lock();
        assert_eq!(all.len(), own.len() * inner.size, "all_gather: room for every rank");
        let mut came = vec![0; HALF.min(all.len())];
        for (index, piece) in own.chunks(inner.piece()).enumerate() {
            let came = &mut came[..piece.len() * inner.size];
            inner.run(piece, |group, from, to| group.all_gather(from, to, piece.len(), Element::U8))?;
            inner.gpu.download(inner.received(), came)?;
            for (whole, part) in all.chunks_mut(own.len()).zip(came.chunks(piece.len())) {
                whole[index * inner.piece()..][..part.len()].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// Sends part `r` of `parts` to rank `r`, and receives this rank's part of each rank, in rank order.
    pub fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        let inner = self.lock();
        assert_eq!(parts.len(), own.len(), "all_to_all: as much comes as goes");
        assert_eq!(parts.len() % inner.size, 0, "all_to_all: equal parts");
        let part = parts.len() / inner.size;
        let mut came = vec![0; HALF.min(own.len())];
        for at in (0..part).step_by(inner.piece()) {
            let bytes = inner.piece().min(part - at);
            let sent: Vec<u8> = parts.chunks(part).flat_map(|part| &part[at..at + bytes]).copied().collect();
            inner.run(&sent, |group, from, to| {
                for rank in 0..inner.size {
                    let offset = (rank * bytes) as u64;
                    group.send(from + offset, bytes, Element::U8, rank)?;
                    group.receive(to + offset, bytes, Element::U8, rank)?;
                }
                Ok(())
            })?;
            let came = &mut came[..sent.len()];
            inner.gpu.download(inner.received(), came)?;
            for (whole, piece) in own.chunks_mut(part).zip(came.chunks(bytes)) {
                whole[at..at + bytes].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    /// Leaves the ranks, which all do. The communicator ends with its last user.
    pub fn leave(&self) {
        self.lock().comm = None;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Bytes of each rank that fit into half of the buffer.
    fn piece(&self) -> usize {
        (HALF / self.size).max(1)
    }

    fn received(&self) -> Address {
        self.staging.address + HALF as u64
    }

    /// Uploads `sent` and waits for a group of operations, which gets the addresses of both halves.
    fn run(&self, sent: &[u8], body: impl FnOnce(&Group, Address, Address) -> Result<()>) -> Result<()> {
        let comm = self.comm.as_ref().expect("the ranks have not been left");
        self.gpu.make_current()?;
        self.gpu.upload(self.staging.address, sent)?;
        comm.group(&self.gpu, Stream::Compute, |group| body(group, self.staging.address, self.received()))?;
        self.gpu.record_event(&self.done, Stream::Compute)?;
        comm.wait(&self.done)
    }
}
