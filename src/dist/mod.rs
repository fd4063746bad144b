//! Ranks: processes that train one model together (`docs/distributed.md`).
//!
//! [`launch`] says which rank this process is, `mpi` moves bytes between ranks. Ranks on CPUs are built; ranks
//! on GPUs need NCCL, which is not.

pub mod launch;
mod mpi;

use crate::backend::Ranks;
use crate::error::{Error, Result};
use crate::terminal;

pub use launch::{Launch, Launcher};

/// The group of ranks that share a run.
#[derive(Clone, Copy)]
pub struct Collective {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// How many ranks run on the cores of this one.
    sharing: usize,
    /// `None` for one rank.
    mpi: Option<&'static mpi::Mpi>,
}

impl Collective {
    /// One process by itself.
    pub const ALONE: Collective = Collective { rank: 0, size: 1, sharing: 1, mpi: None };

    /// Joins the ranks that a launcher (mpirun, srun) started.
    ///
    /// # Errors
    /// The launcher's variables contradict each other; MPI is missing, or belongs to another launcher.
    pub fn from_env() -> Result<Self> {
        let launch = Launch::from_env()?;
        if launch.size == 1 {
            return Ok(Self::ALONE);
        }
        let mpi = mpi::Mpi::start(&launch)?;
        let mut ranks = Self { rank: launch.rank, size: launch.size, sharing: 1, mpi: Some(mpi) };
        let own = cores();
        ranks.sharing = ranks.gather_number(own)?.into_iter().filter(|cores| *cores == own).count();
        Ok(ranks)
    }

    /// Whether this rank writes the run's files and speaks to people.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// The number of threads for `wanted`, where 0 stands for this rank's share of the cores.
    pub fn threads(&self, wanted: usize) -> usize {
        if wanted > 0 || self.sharing == 1 {
            return wanted;
        }
        (std::thread::available_parallelism().map_or(1, |n| n.get()) / self.sharing).max(1)
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// Another rank ended, as for all that follow.
    pub fn barrier(&self) -> Result<()> {
        self.mpi.map_or(Ok(()), |mpi| mpi.barrier())
    }

    /// Gives every rank the bytes of the first one; those of the others are replaced, at any length.
    pub fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        let Some(mpi) = self.mpi else { return Ok(()) };
        let mut length = (bytes.len() as u64).to_le_bytes();
        mpi.broadcast(&mut length)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        mpi.broadcast(bytes)
    }

    /// Gives every rank the bytes of all ranks, in rank order. All pass the same length.
    pub fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        match self.mpi {
            None => all.copy_from_slice(own),
            Some(mpi) => mpi.all_gather(own, all)?,
        }
        Ok(())
    }

    /// Sends part `r` of `parts` to rank `r`, and receives this rank's part of each rank, in rank order.
    pub fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        match self.mpi {
            None => own.copy_from_slice(parts),
            Some(mpi) => mpi.all_to_all(parts, own)?,
        }
        Ok(())
    }

    /// A number of each rank, in rank order.
    pub fn gather_number(&self, own: u64) -> Result<Vec<u64>> {
        let mut all = vec![0; self.size];
        self.all_gather(&own.to_le_bytes(), bytemuck::cast_slice_mut(&mut all))?;
        Ok(all.into_iter().map(u64::from_le).collect())
    }

    /// Checks that `value` is the same on all ranks.
    ///
    /// # Errors
    /// It is not; `what` says of what.
    pub fn agree(&self, what: &str, value: &[u8]) -> Result<()> {
        let hashes = self.gather_number(xxhash_rust::xxh3::xxh3_64(value))?;
        match hashes.iter().position(|hash| *hash != hashes[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::new(format!("rank {rank} has {what} other than rank 0's"))
                .hint("start all ranks with the same program, command line and data")),
        }
    }

    /// Leaves the group together with all other ranks: nobody ends while another one still works.
    pub fn leave(&self) -> Result<()> {
        self.barrier()?;
        self.mpi.map_or(Ok(()), |mpi| mpi.finalize())
    }
}

impl Ranks for Collective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        Collective::all_to_all(self, parts, own)
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        Collective::all_gather(self, own, all)
    }
}

/// Ends the whole group, for a process that ends without the others: they would wait for it for ever. Does
/// nothing for a process that is in no group, or has left it.
pub fn end_all(code: i32) {
    if let Some(mpi) = mpi::running() {
        mpi.abort(code);
    }
}

/// Ends the whole group if this thread panics while it exists.
pub struct EndAllOnPanic;

impl Drop for EndAllOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            end_all(101);
        }
    }
}

/// All ranks but the first are silent, except for the error that ends them.
pub fn silence(launch: &Launch) {
    if launch.rank > 0 {
        terminal::hide_messages();
    }
}

/// A number for this machine and the cores that this process may use: ranks with equal ones share them.
fn cores() -> u64 {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cores = status.lines().find(|line| line.starts_with("Cpus_allowed:")).unwrap_or_default();
    xxhash_rust::xxh3::xxh3_64(format!("{host}{cores}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_talks_to_itself() {
        let alone = Collective::ALONE;
        let mut all = [0; 3];
        alone.all_gather(&[1, 2, 3], &mut all).unwrap();
        assert_eq!(all, [1, 2, 3]);
        assert_eq!(alone.gather_number(7).unwrap(), [7]);
        alone.agree("a recipe", b"recipe").unwrap();
        let mut bytes = vec![5, 6];
        alone.broadcast(&mut bytes).unwrap();
        assert_eq!(bytes, [5, 6]);
        assert_eq!((alone.threads(0), alone.threads(3)), (0, 3));
        alone.leave().unwrap();
    }

    #[test]
    fn ranks_that_share_cores_divide_them() {
        let cores = std::thread::available_parallelism().unwrap().get();
        let sharing = Collective { sharing: 2, ..Collective::ALONE };
        assert_eq!(sharing.threads(0), (cores / 2).max(1));
        assert_eq!(sharing.threads(5), 5);
    }
}
