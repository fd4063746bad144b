//! Ranks: processes that train one model together (`docs/distributed.md`).
//!
//! [`launch`] says which rank this process is, and which GPU is its own. Bytes of the host travel through `mpi` between
//! ranks on CPUs, and through NCCL between ranks on GPUs, which meet by [`rendezvous`].

pub mod launch;
mod mpi;
pub mod rendezvous;

use std::path::Path;
use std::sync::OnceLock;

use crate::backend::cuda::nccl::{self, Comm, Id};
use crate::backend::cuda::peers::Peers;
use crate::backend::cuda::{device, libraries};
use crate::backend::{Device, Ranks};
use crate::error::{Error, Result};
use crate::terminal;
use rendezvous::{Place, Rendezvous};

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
    transport: Transport,
}

/// What carries bytes from rank to rank.
#[derive(Clone, Copy)]
enum Transport {
    /// There is one rank.
    None,
    Mpi(&'static mpi::Mpi),
    Nccl(&'static Peers),
}

/// The other ranks, if they are on GPUs. A process joins them once.
static PEERS: OnceLock<Peers> = OnceLock::new();

/// How a process becomes one of the ranks.
pub struct Joining<'a> {
    /// The device that the user asked for.
    pub device: Device,
    /// The run's directory, in which ranks on GPUs meet. `None` if ranks may have chosen different ones.
    pub out: Option<&'a Path>,
    /// `train.deterministic`: sums over GPUs have the same order in every run.
    pub deterministic: bool,
}

impl Collective {
    /// One process by itself.
    pub const ALONE: Collective = Collective { rank: 0, size: 1, sharing: 1, transport: Transport::None };

    /// Joins the ranks that a launcher (mpirun, srun, torchrun) started. Also returns the device of this rank.
    ///
    /// # Errors
    /// The launcher's variables contradict each other; a device that ranks cannot have ([`Launch::device`]). On CPUs: MPI
    /// is missing, or belongs to another launcher. On GPUs: NCCL is missing or too old, ranks are missing, or two have
    /// one GPU.
    pub fn join(joining: &Joining) -> Result<(Self, Device)> {
        let launch = Launch::from_env()?;
        if launch.size == 1 {
            return Ok((Self::ALONE, joining.device));
        }
        let device = launch.device(joining.device)?;
        let transport = match device {
            Device::Cuda(gpu) => Transport::Nccl(join_gpus(&launch, gpu, joining)?),
            _ => Transport::Mpi(mpi::Mpi::start(&launch)?),
        };
        let mut ranks = Self { rank: launch.rank, size: launch.size, sharing: 1, transport };
        let own = cores();
        ranks.sharing = ranks.gather_number(own)?.into_iter().filter(|cores| *cores == own).count();
        Ok((ranks, device))
    }

    /// The communicator of ranks on GPUs, for work on this rank's GPU.
    pub fn comm(&self) -> Option<Comm> {
        match self.transport {
            Transport::Nccl(peers) => peers.comm(),
            _ => None,
        }
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
        match self.transport {
            Transport::None => Ok(()),
            Transport::Mpi(mpi) => mpi.barrier(),
            Transport::Nccl(peers) => peers.barrier(),
        }
    }

    /// Gives every rank the bytes of the first one; those of the others are replaced, at any length.
    pub fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        let broadcast = |bytes: &mut [u8]| match self.transport {
            Transport::None => Ok(()),
            Transport::Mpi(mpi) => mpi.broadcast(bytes),
            Transport::Nccl(peers) => peers.broadcast(bytes),
        };
        let mut length = (bytes.len() as u64).to_le_bytes();
        broadcast(&mut length)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        broadcast(bytes)
    }

    /// Gives every rank the bytes of all ranks, in rank order. All pass the same length.
    pub fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        match self.transport {
            Transport::None => all.copy_from_slice(own),
            Transport::Mpi(mpi) => mpi.all_gather(own, all)?,
            Transport::Nccl(peers) => peers.all_gather(own, all)?,
        }
        Ok(())
    }

    /// Sends part `r` of `parts` to rank `r`, and receives this rank's part of each rank, in rank order.
    pub fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        match self.transport {
            Transport::None => own.copy_from_slice(parts),
            Transport::Mpi(mpi) => mpi.all_to_all(parts, own)?,
            Transport::Nccl(peers) => peers.all_to_all(parts, own)?,
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

    /// Leaves the group together with all other ranks: nobody ends while another one still works. On GPUs the
    /// communicator ends with its last user, which is a backend that works with it.
    pub fn leave(&self) -> Result<()> {
        self.barrier()?;
        match self.transport {
            Transport::None => Ok(()),
            Transport::Mpi(mpi) => mpi.finalize(),
            Transport::Nccl(peers) => {
                peers.leave();
                Ok(())
            }
        }
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

/// Meets the other ranks on GPUs.
fn join_gpus(launch: &Launch, gpu: usize, joining: &Joining) -> Result<&'static Peers> {
    if let Some(peers) = PEERS.get() {
        return Ok(peers);
    }
    libraries::nccl_version().map_err(|e| e.at(format!("{} ranks on GPUs cannot talk", launch.size)))?;
    let out = joining.out.ok_or_else(|| {
        Error::usage("ranks on GPUs meet in the run's directory, which needs a name").hint("use `--out DIR`")
    })?;
    if joining.deterministic {
        nccl::fix_algorithms();
    }
    let place = Place { host: host(), gpu: device::pci_address(gpu)? };
    let mut way = Rendezvous::new(launch, out, place)?;
    let id = way.id(Id::new)?;
    let peers = Peers::join(gpu, &id, launch.rank, launch.size, &mut || way.look())?;
    way.done();
    Ok(PEERS.get_or_init(|| peers))
}

/// Ends the whole group, for a process that ends without the others: they would wait for it for ever. Does
/// nothing for a process that is in no group, or has left it. The others of ranks on GPUs are ended by their launcher.
pub fn end_all(code: i32) {
    if let Some(mpi) = mpi::running() {
        mpi.abort(code);
    }
    if nccl::has_failed() || PEERS.get().is_some_and(|peers| peers.comm().is_some()) {
        nccl::exit_now(code);
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
    let host = host();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cores = status.lines().find(|line| line.starts_with("Cpus_allowed:")).unwrap_or_default();
    xxhash_rust::xxh3::xxh3_64(format!("{host}{cores}").as_bytes())
}

/// This machine's name.
fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or(String::new(), |name| name.trim().into())
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
