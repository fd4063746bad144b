//! Which rank this process is, from the environment that a launcher gave it, and which GPU is its own.

use crate::backend::Device;
use crate::backend::cuda::device;
use crate::error::{Error, Result};
use crate::terminal;

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
    /// Number of this process among those of its machine, from 0, if the launcher tells it.
    pub local_rank: Option<usize>,
    /// Who started the ranks.
    pub launcher: Launcher,
}

/// The variables of a launcher.
struct Variables {
    launcher: Launcher,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    /// What is the same for all ranks of one start, and differs from one start to the next.
    job: &'static [&'static str],
}

const OPEN_MPI: Variables = Variables {
    launcher: Launcher::OpenMpi,
    rank: "OMPI_COMM_WORLD_RANK",
    size: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    job: &["PMIX_NAMESPACE"],
};
const MPICH: Variables = Variables {
    launcher: Launcher::Mpich,
    rank: "PMI_RANK",
    size: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    job: &[],
};
const SLURM: Variables = Variables {
    launcher: Launcher::Slurm,
    rank: "SLURM_PROCID",
    size: "SLURM_STEP_NUM_TASKS",
    local_rank: "SLURM_LOCALID",
    job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
};
/// Older versions of Slurm set only this one.
const SLURM_TASKS: &str = "SLURM_NTASKS";
const TORCHRUN: Variables = Variables {
    launcher: Launcher::Torchrun,
    rank: "RANK",
    size: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    job: &["TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"],
};

impl Launch {
    /// One process by itself.
    pub const ALONE: Launch = Launch { rank: 0, size: 1, local_rank: None, launcher: Launcher::Nobody };

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

    /// The device of this rank: `auto` and `cuda` are the GPU of its number on its machine.
    ///
    /// # Errors
    /// `cuda:N` for more than one rank; more ranks on this machine than GPUs.
    pub fn device(&self, asked: Device) -> Result<Device> {
        if self.size == 1 || asked == Device::Cpu {
            return Ok(asked);
        }
        if let Device::Cuda(number @ 1..) = asked {
            return Err(Error::usage(format!(
                "`--device cuda:{number}` is one GPU, and {} started {} ranks",
                self.launcher.name(),
                self.size
            ))
            .hint("use `--device cuda`: each rank takes the GPU of its number on its machine"));
        }
        let own = self.gpu(device::gpus().map(|gpus| gpus.len()));
        match (asked, own.and_then(|gpu| device::usable(gpu).map(|_| gpu))) {
            (_, Ok(gpu)) => Ok(Device::Cuda(gpu)),
            (Device::Auto, Err(why)) => {
                terminal::note(&format!("computing on the CPU: {}", why.message()));
                Ok(Device::Cpu)
            }
            (_, Err(why)) => Err(why.at("cannot compute on a GPU")),
        }
    }

    /// The number of this rank's GPU, where its process sees `count` of them.
    fn gpu(&self, count: Result<usize>) -> Result<usize> {
        let count = count?;
        if count == 0 {
            return Err(Error::new("there is no GPU"));
        }
        // Without a number on the machine, ranks that come to the same GPU are told when they meet.
        let local = self.local_rank.unwrap_or(self.rank % count);
        match local {
            number if number < count => Ok(number),
            // Slurm can show each rank only its own GPU.
            _ if count == 1 => Ok(0),
            number => Err(Error::usage(format!(
                "this is rank {number} of its machine, counted from 0, and {count} GPUs are visible"
            ))
            .hint(format!("start at most {count} ranks on this machine"))),
        }
    }

    /// A word that is the same for all ranks of this start, and usually differs from that of other starts.
    pub fn job(&self) -> String {
        self.job_from(|key| std::env::var(key).ok())
    }

    fn job_from(&self, lookup: impl Fn(&str) -> Option<String>) -> String {
        let variables = match self.launcher {
            Launcher::Nobody => return "alone".into(),
            Launcher::OpenMpi => OPEN_MPI,
            Launcher::Mpich => MPICH,
            Launcher::Slurm => SLURM,
            Launcher::Torchrun => TORCHRUN,
        };
        let mut words: Vec<String> = variables.job.iter().filter_map(|key| lookup(key)).collect();
        // MPICH has none. On one machine, its ranks have one parent.
        if self.launcher == Launcher::Mpich && lookup("MPI_LOCALNRANKS") == lookup(MPICH.size) {
            words.extend(rustix::process::getppid().map(|parent| parent.as_raw_nonzero().to_string()));
        }
        let text = format!("{:?}-{}", self.launcher, words.join("-"));
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
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
    // Some clusters leave it out, or set it to nothing.
    let local_rank = lookup(variables.local_rank).and_then(|number| number.parse().ok());
    Ok(Launch { rank, size, local_rank, launcher: variables.launcher })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::from(|key| variables.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string()))
    }

    fn is(variables: &[(&str, &str)], rank: usize, size: usize, launcher: Launcher) {
        let launch = from(variables).unwrap();
        assert_eq!((launch.rank, launch.size, launch.launcher), (rank, size, launcher), "{variables:?}");
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

    #[test]
    fn a_rank_takes_the_gpu_of_its_number_on_its_machine() {
        let local = |variables: &[(&str, &str)]| from(variables).unwrap().local_rank;
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "5"), ("OMPI_COMM_WORLD_SIZE", "8")];
        assert_eq!(local(&[&open_mpi[..], &[("OMPI_COMM_WORLD_LOCAL_RANK", "1")]].concat()), Some(1));
        assert_eq!(local(&open_mpi), None);
        assert_eq!(local(&[("PMI_RANK", "3"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "1")]), Some(1));
        assert_eq!(local(&[("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")]), Some(1));
        let srun = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4")];
        assert_eq!(local(&[&srun[..], &[("SLURM_LOCALID", "2")]].concat()), Some(2));

        let launch = |local_rank| Launch { rank: 5, size: 8, local_rank, launcher: Launcher::Slurm };
        assert_eq!(launch(Some(1)).gpu(Ok(4)).unwrap(), 1);
        assert_eq!(launch(None).gpu(Ok(4)).unwrap(), 1);
        assert_eq!(launch(Some(3)).gpu(Ok(1)).unwrap(), 0, "each rank sees its own");
        let error = launch(Some(5)).gpu(Ok(4)).unwrap_err();
        assert!(error.message().contains("rank 5 of its machine, counted from 0, and 4 GPUs"));
        let error = launch(Some(1)).device(Device::Cuda(3)).unwrap_err();
        assert!(error.message().contains("`--device cuda:3` is one GPU, and srun started 8 ranks"));
        assert_eq!(Launch::ALONE.device(Device::Cuda(3)).unwrap(), Device::Cuda(3));
        assert_eq!(launch(None).device(Device::Cpu).unwrap(), Device::Cpu);
    }

    #[test]
    fn starts_have_names_of_their_own() {
        let job = |launcher, variables: &[(&str, &str)]| {
            let launch = Launch { rank: 1, size: 2, local_rank: None, launcher };
            launch.job_from(|key| variables.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string()))
        };
        let slurm = [("SLURM_JOB_ID", "41"), ("SLURM_STEP_ID", "0")];
        assert_eq!(job(Launcher::Slurm, &slurm), "Slurm-41-0");
        assert_eq!(job(Launcher::OpenMpi, &[("PMIX_NAMESPACE", "a/b@1")]), "OpenMpi-a_b_1");
        let one_machine = [("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2")];
        assert!(job(Launcher::Mpich, &one_machine).len() > "Mpich-".len());
        assert_eq!(job(Launcher::Mpich, &[("PMI_SIZE", "4"), ("MPI_LOCALNRANKS", "2")]), "Mpich-");
    }
}
