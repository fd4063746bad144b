//! Which rank this process is, from the environment that a launcher gave it.

use crate::error::{Error, Result};

/// The program that started the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nothing started more than this process.
    Nobody,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's `mpirun`, or that of a relative (Intel MPI, MVAPICH).
    Mpich,
    /// Slurm's `srun`.
    Slurm,
    /// PyTorch's `torchrun`.
    Torchrun,
}

impl Launcher {
    /// The command that starts it.
    pub fn name(self) -> &'static str {
        match self {
            Launcher::Nobody => "no launcher",
            Launcher::OpenMpi => "Open MPI's mpirun",
            Launcher::Mpich => "MPICH's mpirun",
            Launcher::Slurm => "srun",
            Launcher::Torchrun => "torchrun",
        }
    }
}

/// The place of this process among the ranks that a launcher started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Who started the ranks.
    pub launcher: Launcher,
}

/// The variables of a launcher.
struct Variables {
    launcher: Launcher,
    rank: &'static str,
    size: &'static str,
}

const OPEN_MPI: Variables =
    Variables { launcher: Launcher::OpenMpi, rank: "OMPI_COMM_WORLD_RANK", size: "OMPI_COMM_WORLD_SIZE" };
const MPICH: Variables = Variables { launcher: Launcher::Mpich, rank: "PMI_RANK", size: "PMI_SIZE" };
const SLURM: Variables =
    Variables { launcher: Launcher::Slurm, rank: "SLURM_PROCID", size: "SLURM_STEP_NUM_TASKS" };
/// Older versions of Slurm set only this one.
const SLURM_TASKS: &str = "SLURM_NTASKS";
const TORCHRUN: Variables = Variables { launcher: Launcher::Torchrun, rank: "RANK", size: "WORLD_SIZE" };

impl Launch {
    /// One process by itself.
    pub const ALONE: Launch = Launch { rank: 0, size: 1, launcher: Launcher::Nobody };

    /// The place of this process.
    ///
    /// # Errors
    /// Those of [`Launch::from`].
    pub fn from_env() -> Result<Self> {
        Self::from(|key| std::env::var(key).ok())
    }

    /// The place that the variables of `lookup` describe. Launchers start each other: `mpirun` in a batch
    /// job is started by `srun`, whose variables then count the machines. So the innermost counts.
    ///
    /// # Errors
    /// A launcher's variables are incomplete or contradict each other.
    pub fn from(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let lookup = |key: &str| lookup(key).filter(|value| !value.is_empty());
        let has = |key: &str| lookup(key).is_some();
        let of = |variables: &Variables| read(variables, lookup);
        if has("TORCHELASTIC_RUN_ID") {
            return of(&TORCHRUN);
        }
        if has(OPEN_MPI.size) || has(OPEN_MPI.rank) {
            return of(&OPEN_MPI);
        }
        // A batch script and `salloc` have the number of tasks without a step; they are one process.
        let step = has("SLURM_STEP_ID") && has(SLURM.rank);
        let slurm = match has(SLURM.size) {
            true => SLURM,
            false => Variables { size: SLURM_TASKS, ..SLURM },
        };
        // `srun --mpi=pmi2` sets the same variables as MPICH's mpirun, to srun's numbers. The rank alone tells
        // nothing: rank 0 of an mpirun that srun started is also task 0 of srun.
        let by_srun =
            step && lookup(MPICH.rank) == lookup(slurm.rank) && lookup(MPICH.size) == lookup(slurm.size);
        if has(MPICH.size) && has(MPICH.rank) && !by_srun {
            return of(&MPICH);
        }
        if step {
            return of(&slurm);
        }
        // Some clusters set the size, or the rank, for programs of another kind.
        if has(TORCHRUN.size) && has(TORCHRUN.rank) {
            return of(&TORCHRUN);
        }
        Ok(Self::ALONE)
    }

    /// Refuses ranks, for a command that runs in one process.
    ///
    /// # Errors
    /// There is more than one rank.
    pub fn alone(&self, what: &str) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{what} runs in one process, and {} started {} ranks",
            self.launcher.name(),
            self.size
        ))
        .hint("start it without a launcher; only `vitrum train`, `vitrum finetune` and `vitrum bench --what train` take ranks"))
    }
}

fn read(variables: &Variables, lookup: impl Fn(&str) -> Option<String>) -> Result<Launch> {
    let name = variables.launcher.name();
    let number = |key: &str| -> Result<usize> {
        let value = lookup(key).ok_or_else(|| {
            Error::usage(format!("this is a process of {name}, but `{key}` is not set"))
                .hint(format!("start it with {name} itself, or unset the launcher's other variables"))
        })?;
        value.parse().map_err(|_| {
            Error::usage(format!("`{key}={value}` is not a number of a rank"))
                .hint(format!("start it with {name} itself"))
        })
    };
    let (rank, size) = (number(variables.rank)?, number(variables.size)?);
    if rank >= size {
        return Err(Error::usage(format!(
            "`{}={rank}` and `{}={size}` contradict each other: ranks are counted from 0",
            variables.rank, variables.size
        ))
        .hint(format!("start it with {name} itself")));
    }
    if size == 1 {
        return Ok(Launch::ALONE);
    }
    Ok(Launch { rank, size, launcher: variables.launcher })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::from(|key| variables.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string()))
    }

    fn is(variables: &[(&str, &str)], rank: usize, size: usize, launcher: Launcher) {
        assert_eq!(from(variables).unwrap(), Launch { rank, size, launcher }, "{variables:?}");
    }

    #[test]
    fn each_launcher_is_recognised() {
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "5"), ("OMPI_COMM_WORLD_SIZE", "8"), ("PMIX_RANK", "5")];
        is(&open_mpi, 5, 8, Launcher::OpenMpi);
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        is(&mpich, 1, 2, Launcher::Mpich);
        let srun = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "9"),
            ("SLURM_STEP_NUM_TASKS", "4"),
        ];
        is(&srun, 3, 4, Launcher::Slurm);
        let pmi2 = [("PMI_RANK", "3"), ("PMI_SIZE", "4")];
        is(&[&srun[..], &pmi2].concat(), 3, 4, Launcher::Slurm);
        is(&[srun[0], srun[1], ("SLURM_NTASKS", "4")], 3, 4, Launcher::Slurm);
        let torchrun = [("TORCHELASTIC_RUN_ID", "none"), ("RANK", "6"), ("WORLD_SIZE", "8")];
        is(&torchrun, 6, 8, Launcher::Torchrun);
        is(&torchrun[1..], 6, 8, Launcher::Torchrun);
    }

    #[test]
    fn the_innermost_launcher_counts() {
        // Each machine of a batch job runs one task of srun: the daemon of mpirun, or torchrun.
        let outer = [("SLURM_STEP_ID", "1"), ("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")];
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "6"), ("OMPI_COMM_WORLD_SIZE", "8")];
        is(&[&outer[..], &open_mpi].concat(), 6, 8, Launcher::OpenMpi);
        let mpich = [("PMI_RANK", "6"), ("PMI_SIZE", "8")];
        is(&[&outer[..], &mpich].concat(), 6, 8, Launcher::Mpich);
        let first = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2")];
        let first =
            [&first[..], &[("SLURM_STEP_NUM_TASKS", "1"), ("PMI_RANK", "0"), ("PMI_SIZE", "2")]].concat();
        is(&first, 0, 2, Launcher::Mpich);
        let torchrun = [("TORCHELASTIC_RUN_ID", "x"), ("RANK", "9"), ("WORLD_SIZE", "16")];
        is(&[&outer[..], &torchrun].concat(), 9, 16, Launcher::Torchrun);
    }

    #[test]
    fn one_process_is_alone() {
        // A batch script, one task, a variable of another program, and an empty one.
        for variables in [
            &[][..],
            &[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "7")],
            &[("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")],
            &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")],
            &[("WORLD_SIZE", "8")],
            &[("RANK", ""), ("WORLD_SIZE", "8")],
        ] {
            assert_eq!(from(variables).unwrap(), Launch::ALONE, "{variables:?}");
        }
    }

    #[test]
    fn contradictions_are_named() {
        let refused = |variables: &[(&str, &str)], text: &str| {
            let error = from(variables).unwrap_err();
            assert!(error.message().contains(text), "{}", error.message());
        };
        refused(&[("OMPI_COMM_WORLD_SIZE", "2")], "`OMPI_COMM_WORLD_RANK` is not set");
        refused(&[("RANK", "2"), ("WORLD_SIZE", "2")], "`RANK=2` and `WORLD_SIZE=2` contradict");
        refused(&[("PMI_RANK", "x"), ("PMI_SIZE", "2")], "`PMI_RANK=x` is not a number");
    }
}
