//! MPI, opened at run time: the program has no MPI library among those that it is linked to.
//!
//! Only bytes travel, and all sums are ours, so of MPI's many constants two suffice:
//! `MPI_COMM_WORLD` and `MPI_BYTE`. Their values are the only difference between the two families of
//! libraries. In Open MPI they are addresses of objects, in MPICH and its relatives integers of 32 bits; both
//! are passed in one register. Status codes are integers on this side of the boundary, as for CUDA.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::launch::{Launch, Launcher};
use crate::error::{Error, Result};

/// A communicator or a type: an address, or an integer in its lower half.
type Handle = usize;

/// `MPI_THREAD_SERIALIZED`: any thread may call, one at a time.
const SERIALIZED: c_int = 2;

/// MPICH's values (`mpi.h` of every version since the common ABI of 2014).
const MPICH_COMM_WORLD: Handle = 0x4400_0000;
const MPICH_BYTE: Handle = 0x4c00_010d;

/// Bytes per call: counts are `int`.
const MOST: usize = 1 << 30;

/// MPICH's mpirun loses what a rank printed immediately before it aborted.
const LAST_WORDS: Duration = Duration::from_millis(200);

const OPEN_MPI_NAMES: [&str; 2] = ["libmpi.so.40", "libmpi.so.20"];
const MPICH_NAMES: [&str; 2] = ["libmpich.so.12", "libmpi.so.12"];
/// Whatever the machine's developers' package points to.
const UNVERSIONED: [&str; 1] = ["libmpi.so"];

macro_rules! library {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The functions that we call, each of which returns a status: 0 is success.
        #[allow(non_snake_case)]
        struct Functions { $($name: unsafe extern "C" fn($($type),*) -> c_int,)* }

        impl Functions {
            /// All functions, or the name of a missing one.
            fn load(library: &'static Library) -> Result<Self, &'static str> {
                Ok(Self { $($name: {
                    // SAFETY: the MPI standard declares it so, with `Handle` for the library's own types.
                    let found = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                    *found.map_err(|_| stringify!($name))?
                },)* })
            }
        }
    };
}

library! {
    fn MPI_Abort(comm: Handle, code: c_int);
    fn MPI_Allgather(
        from: *const c_void, count: c_int, kind: Handle, to: *mut c_void, each: c_int, kind_to: Handle, comm: Handle,
    );
    fn MPI_Alltoall(
        from: *const c_void, count: c_int, kind: Handle, to: *mut c_void, each: c_int, kind_to: Handle, comm: Handle,
    );
    fn MPI_Barrier(comm: Handle);
    fn MPI_Bcast(buffer: *mut c_void, count: c_int, kind: Handle, root: c_int, comm: Handle);
    fn MPI_Comm_rank(comm: Handle, rank: *mut c_int);
    fn MPI_Comm_size(comm: Handle, size: *mut c_int);
    fn MPI_Finalize();
    fn MPI_Init_thread(argc: *mut c_int, argv: *mut c_void, required: c_int, provided: *mut c_int);
}

/// All ranks of this run, through MPI. A process starts it once.
pub(super) struct Mpi {
    functions: Functions,
    world: Handle,
    byte: Handle,
    size: usize,
    /// One call at a time.
    calls: Mutex<()>,
    finalized: AtomicBool,
}

static STARTED: OnceLock<Mpi> = OnceLock::new();

/// MPI, if this process started it and has not ended it.
pub(super) fn running() -> Option<&'static Mpi> {
    STARTED.get().filter(|mpi| !mpi.finalized.load(Ordering::SeqCst))
}

impl Mpi {
    /// Opens the library and joins the ranks that `launch` describes.
    ///
    /// # Errors
    /// No library, or an incomplete one; a launcher that MPI does not work with; MPI finds other ranks than
    /// the launcher started.
    pub(super) fn start(launch: &Launch) -> Result<&'static Mpi> {
        static ONCE: Mutex<()> = Mutex::new(());
        let _once = ONCE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mpi) = STARTED.get() {
            return Ok(mpi);
        }
        can_start(launch)?;
        let (library, name) = open(launch.launcher)?;
        let functions = Functions::load(library).map_err(|function| {
            Error::new(format!("{name} has no function `{function}`: it is not a complete MPI"))
                .hint("`apt-get install openmpi-bin` installs Open MPI, with its mpirun")
        })?;
        let (world, byte) = constants(library);
        let mut provided = 0;
        // SAFETY: called once, under the lock above; null stands for the program's arguments.
        let code = unsafe {
            (functions.MPI_Init_thread)(std::ptr::null_mut(), std::ptr::null_mut(), SERIALIZED, &mut provided)
        };
        check(code, "MPI_Init_thread")?;
        let mut mpi =
            Mpi { functions, world, byte, size: 0, calls: Mutex::new(()), finalized: AtomicBool::new(false) };
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI is initialised, and the pointers are valid.
        unsafe {
            check((mpi.functions.MPI_Comm_rank)(world, &mut rank), "MPI_Comm_rank")?;
            check((mpi.functions.MPI_Comm_size)(world, &mut size), "MPI_Comm_size")?;
        }
        mpi.size = size as usize;
        let mpi = STARTED.get_or_init(|| mpi);
        if (rank as usize, size as usize) != (launch.rank, launch.size) {
            return Err(other_library(launch, name, rank, size));
        }
        if provided < SERIALIZED {
            return Err(Error::new(format!("{name} was built without support for threads"))
                .hint("`apt-get install openmpi-bin` installs an Open MPI that has it"));
        }
        Ok(mpi)
    }

    /// Waits until every rank is here.
    pub(super) fn barrier(&self) -> Result<()> {
        let _one = self.lock();
        // SAFETY: MPI is running: `lock` says so.
        check(unsafe { (self.functions.MPI_Barrier)(self.world) }, "MPI_Barrier")
    }

    /// Gives every rank the bytes of rank 0; all pass the same length.
    pub(super) fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let _one = self.lock();
        for piece in bytes.chunks_mut(MOST) {
            // SAFETY: MPI is running, and the pointer is valid for that many bytes.
            let code = unsafe {
                let to = piece.as_mut_ptr().cast();
                (self.functions.MPI_Bcast)(to, piece.len() as c_int, self.byte, 0, self.world)
            };
            check(code, "MPI_Bcast")?;
        }
        Ok(())
    }

    /// Gives every rank the bytes of all ranks, in rank order. All pass the same length.
    pub(super) fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        assert_eq!(all.len(), own.len() * self.size, "all_gather: room for every rank");
        let (count, _one) = (count(own.len()), self.lock());
        // SAFETY: MPI is running; `own` has `count` bytes and `all` has `count` for each rank.
        let code = unsafe {
            let (from, to) = (own.as_ptr().cast(), all.as_mut_ptr().cast());
            (self.functions.MPI_Allgather)(from, count, self.byte, to, count, self.byte, self.world)
        };
        check(code, "MPI_Allgather")
    }

    /// Sends part `r` of `parts` to rank `r`, and receives this rank's part of each rank, in rank order.
    pub(super) fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        assert_eq!(parts.len(), own.len(), "all_to_all: as much comes as goes");
        assert_eq!(parts.len() % self.size, 0, "all_to_all: equal parts");
        let (count, _one) = (count(parts.len() / self.size), self.lock());
        // SAFETY: MPI is running; both buffers have `count` bytes for each rank.
        let code = unsafe {
            let (from, to) = (parts.as_ptr().cast(), own.as_mut_ptr().cast());
            (self.functions.MPI_Alltoall)(from, count, self.byte, to, count, self.byte, self.world)
        };
        check(code, "MPI_Alltoall")
    }

    /// Leaves MPI. Every rank must do it. Later calls do nothing.
    pub(super) fn finalize(&self) -> Result<()> {
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if self.finalized.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        // SAFETY: MPI was running until now.
        check(unsafe { (self.functions.MPI_Finalize)() }, "MPI_Finalize")
    }

    /// Ends all ranks, this one with `code`. Does not wait for a call in progress.
    pub(super) fn abort(&self, code: i32) -> ! {
        std::thread::sleep(LAST_WORDS);
        // SAFETY: MPI is running; the standard lets any thread abort.
        unsafe { (self.functions.MPI_Abort)(self.world, code) };
        std::process::exit(code);
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        let lock = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!self.finalized.load(Ordering::SeqCst), "MPI has ended");
        lock
    }
}

/// Refuses what would end the process inside `MPI_Init`.
fn can_start(launch: &Launch) -> Result<()> {
    let has = |key: &str| std::env::var_os(key).is_some();
    match launch.launcher {
        Launcher::Torchrun => Err(Error::usage(format!(
            "torchrun started {} ranks, but ranks on CPUs talk through MPI, which torchrun does not start",
            launch.size
        ))
        .hint(format!("use `mpirun -n {} vitrum train ...`", launch.size))),
        // Without the key-value store of PMI or PMIx, `MPI_Init` ends the process.
        Launcher::Slurm if !has("PMIX_RANK") && !has("PMI_RANK") => {
            Err(Error::usage("srun started the ranks without MPI")
                .hint("use `srun --mpi=pmix` for Open MPI or `srun --mpi=pmi2` for MPICH; `srun --mpi=list` lists what there is"))
        }
        _ => Ok(()),
    }
}

/// Opens the first library found, the launcher's own first. It stays open.
fn open(launcher: Launcher) -> Result<(&'static Library, &'static str)> {
    let mpich_first = launcher == Launcher::Mpich || std::env::var_os("PMIX_RANK").is_none();
    let names = match mpich_first && launcher != Launcher::OpenMpi {
        true => [&MPICH_NAMES[..], &UNVERSIONED, &OPEN_MPI_NAMES],
        false => [&OPEN_MPI_NAMES[..], &UNVERSIONED, &MPICH_NAMES],
    };
    let names = names.concat();
    let mut trouble = None;
    for &name in &names {
        // SAFETY: loading MPI runs its initialisers, as in every MPI program. Open MPI's plugins look for
        // its symbols among the global ones.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok((Box::leak(Box::new(library)), name)),
            Err(error) => {
                let why = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
                trouble = trouble.or((!why.contains("No such file")).then_some(why));
            }
        }
    }
    let what = trouble.map_or("was not found".into(), |why| format!("does not load: {why}"));
    Err(Error::new(format!("the MPI library, through which ranks on CPUs talk, {what}")).hint(format!(
        "`apt-get install openmpi-bin` installs Open MPI; if it is elsewhere, add its folder to LD_LIBRARY_PATH \
         (looked for {})",
        names.join(", ")
    )))
}

/// `MPI_COMM_WORLD` and `MPI_BYTE`.
fn constants(library: &'static Library) -> (Handle, Handle) {
    let address = |name: &[u8]| {
        // SAFETY: only the address is taken; what lies there belongs to the library.
        let symbol = unsafe { library.get::<*const c_void>(name) };
        symbol.ok().map(|symbol| symbol.into_raw() as Handle)
    };
    match (address(b"ompi_mpi_comm_world\0"), address(b"ompi_mpi_byte\0")) {
        (Some(world), Some(byte)) => (world, byte),
        _ => (MPICH_COMM_WORLD, MPICH_BYTE),
    }
}

fn other_library(launch: &Launch, name: &str, rank: c_int, size: c_int) -> Error {
    let launcher = launch.launcher.name();
    Error::new(format!(
        "{launcher} started rank {} of {}, but {name} knows this process as rank {rank} of {size}: that is the other \
         MPI's library",
        launch.rank, launch.size
    ))
    .hint("put the folder of the launcher's own libmpi first in LD_LIBRARY_PATH, or use the other MPI's mpirun")
}

/// A length as MPI takes it. Callers cut long work into pieces.
fn count(bytes: usize) -> c_int {
    assert!(bytes <= MOST, "{bytes} bytes in one call of MPI");
    bytes as c_int
}

/// Usually MPI ends the process itself on an error.
fn check(code: c_int, function: &str) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Error::new(format!("`{function}` failed with code {code}: another rank may have ended"))),
    }
}
