//! Ranks that train one model together. Only one rank is built so far; NCCL and MPI belong here.

use crate::backend::Backend;
use crate::error::{Error, Result};

/// The group of ranks that share a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collective {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
}

impl Collective {
    /// One process by itself.
    pub const ALONE: Collective = Collective { rank: 0, size: 1 };

    /// The ranks that a launcher (mpirun, srun, torchrun) started.
    ///
    /// # Errors
    /// The launcher started more than one rank. Their gradients would not be averaged.
    pub fn from_env() -> Result<Self> {
        for key in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"] {
            let size = std::env::var(key).ok().and_then(|v| v.parse::<usize>().ok()).unwrap_or(1);
            if size > 1 {
                return Err(Error::usage(format!(
                    "`{key}={size}`: training on several ranks is not built yet"
                ))
                .hint("start one process, without mpirun, srun or torchrun"));
            }
        }
        Ok(Self::ALONE)
    }

    /// Sums the gradients over all ranks. Does nothing for one rank.
    pub fn all_reduce_gradients(&self, _backend: &mut dyn Backend) -> Result<()> {
        assert_eq!(self.size, 1, "only one rank is built");
        Ok(())
    }
}
