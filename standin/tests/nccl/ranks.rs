//! Ranks as processes, each on a stand-in GPU of its own, and the calls of NCCL that they make.

use std::ffi::{c_char, c_int, c_uint};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use libloading::Library;

use super::common::{Gpu, Handle};

/// Like `cu!`, for NCCL.
macro_rules! nc {
    ($rank:expr, $name:ident ( $($value:expr => $type:ty),* $(,)? )) => {{
        // SAFETY: the C declaration's types, written down by the caller; pointers are valid for the call.
        unsafe {
            let function: libloading::Symbol<unsafe extern "C" fn($($type),*) -> std::ffi::c_int> =
                $rank.nccl.get(concat!(stringify!($name), "\0").as_bytes()).expect(stringify!($name));
            function($($value),*)
        }
    }};
}

pub(super) const OK: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const NOT_READY: c_int = 600;

pub(super) const U8: c_int = 1;
pub(super) const I32: c_int = 2;
pub(super) const F32: c_int = 7;
pub(super) const F64: c_int = 8;
pub(super) const BF16: c_int = 9;

pub(super) const SUM: c_int = 0;
pub(super) const MAX: c_int = 2;
pub(super) const MIN: c_int = 3;

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Id(pub(super) [u8; 128]);

#[repr(C)]
pub(super) struct Config {
    pub(super) size: usize,
    pub(super) magic: c_uint,
    pub(super) version: c_uint,
    pub(super) blocking: c_int,
    pub(super) ctas: [c_int; 3],
    pub(super) network: *const c_char,
}

impl Config {
    pub(super) fn new(blocking: c_int) -> Self {
        let size = size_of::<Self>();
        let ctas = [c_int::MIN; 3];
        Self { size, magic: 0xcafe_beef, version: 21_700, blocking, ctas, network: ptr::null() }
    }
}

// ---- Processes --------------------------------------------------------------------------------------------

/// What a rank left.
pub(super) struct Done {
    pub(super) signal: Option<i32>,
    pub(super) success: bool,
    pub(super) said: String,
}

/// Runs `test` of this binary as `size` ranks; each gets options of the stand-in.
pub(super) fn ranks(test: &str, role: &str, size: usize, options: &str) -> Vec<Done> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = std::env::temp_dir().join(format!("standin-nccl-{}-{count}", std::process::id()));
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]);
        command.env("STANDIN_TEST_ROLE", role).env("STANDIN_TEST_ID", &id);
        command.env("STANDIN_TEST_RANK", format!("{rank}/{size}"));
        command.env("VITRUM_STANDIN", format!("bus={rank},nccl_timeout=60,{options}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..size).map(start).collect();
    let end = Instant::now() + Duration::from_secs(90);
    let finish = |mut child: Child| {
        let mut said = String::new();
        // A rank writes little: the pipe holds it until the end.
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        Done { signal: status.signal(), success: status.success(), said }
    };
    let done = children.into_iter().map(finish).collect();
    for rank in 0..size {
        let _ = std::fs::remove_file(id.with_extension(format!("done-{rank}")));
    }
    for path in [id.with_extension("seen"), id] {
        let _ = std::fs::remove_file(path);
    }
    done
}

/// All ranks succeed and none reports anything.
#[track_caller]
pub(super) fn pass(test: &str, role: &str, size: usize, options: &str) {
    for (rank, done) in ranks(test, role, size, options).into_iter().enumerate() {
        assert!(done.success, "{role}, rank {rank}: {}", done.said);
        assert!(!done.said.contains("stand-in GPU:"), "{role}, rank {rank}: {}", done.said);
    }
}

/// All ranks see what they expect, and the reports contain `texts`.
#[track_caller]
pub(super) fn caught(test: &str, role: &str, size: usize, options: &str, texts: &[&str]) {
    let done = ranks(test, role, size, options);
    let all: String = done.iter().map(|done| done.said.as_str()).collect();
    for (rank, done) in done.iter().enumerate() {
        assert!(done.success || done.signal == Some(9), "{role}, rank {rank}: {all}");
    }
    for text in texts {
        assert!(all.contains(text), "{role}: `{text}` is not in: {all}");
    }
}

/// A process that is one of the ranks.
pub(super) struct Rank {
    pub(super) role: String,
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) gpu: Gpu,
    pub(super) nccl: Library,
    pub(super) id: PathBuf,
}

impl Rank {
    /// This process, if [`ranks`] started it.
    pub(super) fn here() -> Option<Self> {
        let place = std::env::var("STANDIN_TEST_RANK").ok()?;
        let (rank, size) = place.split_once('/').unwrap();
        let gpu = Gpu::open(vitrum_standin::libraries(), "");
        // SAFETY: our own library, which finds the libcuda.so that is already loaded.
        let nccl = unsafe { Library::new(vitrum_standin::libraries().join("libnccl.so.2")).unwrap() };
        Some(Self {
            role: std::env::var("STANDIN_TEST_ROLE").unwrap(),
            rank: rank.parse().unwrap(),
            size: size.parse().unwrap(),
            gpu,
            nccl,
            id: std::env::var_os("STANDIN_TEST_ID").unwrap().into(),
        })
    }

    /// Does the rank's part and ends the process, whatever its GPU still waits for, when the others have done theirs:
    /// they would see that this one is gone.
    pub(super) fn run(self, part: fn(&Rank)) -> ! {
        part(&self);
        let done = |rank: usize| self.id.with_extension(format!("done-{rank}"));
        std::fs::write(done(self.rank), "").unwrap();
        let end = Instant::now() + Duration::from_secs(3);
        while !(0..self.size).all(|rank| done(rank).exists()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::process::exit(0);
    }

    pub(super) fn is(&self, role: &str) -> bool {
        self.role == role
    }

    /// The id that rank 0 made.
    pub(super) fn id(&self) -> Id {
        let mut id = Id([0; 128]);
        if self.rank == 0 {
            assert_eq!(nc!(self, ncclGetUniqueId(&mut id => *mut Id)), OK);
            let part = self.id.with_extension("part");
            std::fs::write(&part, id.0).unwrap();
            std::fs::rename(part, &self.id).unwrap();
            return id;
        }
        loop {
            if let Ok(bytes) = std::fs::read(&self.id) {
                id.0.copy_from_slice(&bytes);
                return id;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn init(&self, rank: usize, config: &Config) -> (c_int, Handle) {
        let mut comm = ptr::null_mut();
        let code = nc!(self, ncclCommInitRankConfig(&mut comm => *mut Handle, self.size as c_int => c_int,
            self.id() => Id, rank as c_int => c_int, ptr::from_ref(config) => *const Config));
        (code, comm)
    }

    /// A communicator of all ranks.
    pub(super) fn join(&self) -> Handle {
        let (code, comm) = self.init(self.rank, &Config::new(1));
        assert_eq!(code, OK);
        comm
    }

    pub(super) fn state(&self, comm: Handle) -> c_int {
        let mut state = -1;
        assert_eq!(nc!(self, ncclCommGetAsyncError(comm => Handle, &mut state => *mut c_int)), OK);
        state
    }

    /// The state once it is not `before`.
    pub(super) fn state_after(&self, comm: Handle, before: c_int) -> c_int {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let state = self.state(comm);
            if state != before || Instant::now() > end {
                return state;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn destroy(&self, comm: Handle) -> c_int {
        nc!(self, ncclCommDestroy(comm => Handle))
    }

    pub(super) fn all_reduce(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
        op: c_int,
        comm: Handle,
        stream: Handle,
    ) -> c_int {
        nc!(self, ncclAllReduce(from => u64, to => u64, count => usize, dtype => c_int, op => c_int, comm => Handle, stream => Handle))
    }

    pub(super) fn reduce_scatter(
        &self,
        from: u64,
        to: u64,
        count: usize,
        comm: Handle,
        stream: Handle,
    ) -> c_int {
        nc!(self, ncclReduceScatter(from => u64, to => u64, count => usize, F32 => c_int, SUM => c_int, comm => Handle, stream => Handle))
    }

    pub(super) fn all_gather(&self, from: u64, to: u64, count: usize, comm: Handle, stream: Handle) -> c_int {
        nc!(self, ncclAllGather(from => u64, to => u64, count => usize, F32 => c_int, comm => Handle, stream => Handle))
    }

    pub(super) fn send(&self, from: u64, count: usize, to: usize, comm: Handle, stream: Handle) -> c_int {
        nc!(self, ncclSend(from => u64, count => usize, F32 => c_int, to as c_int => c_int, comm => Handle, stream => Handle))
    }

    pub(super) fn receive(&self, to: u64, count: usize, from: usize, comm: Handle, stream: Handle) -> c_int {
        nc!(self, ncclRecv(to => u64, count => usize, F32 => c_int, from as c_int => c_int, comm => Handle, stream => Handle))
    }

    pub(super) fn group(&self, calls: impl FnOnce()) -> c_int {
        assert_eq!(nc!(self, ncclGroupStart()), OK);
        calls();
        nc!(self, ncclGroupEnd())
    }

    pub(super) fn synchronize(&self, stream: Handle) -> c_int {
        cu!(self.gpu, cuStreamSynchronize(stream => Handle))
    }

    pub(super) fn record(&self, event: Handle, stream: Handle) {
        assert_eq!(cu!(self.gpu, cuEventRecord(event => Handle, stream => Handle)), 0);
    }

    pub(super) fn wait_for(&self, stream: Handle, event: Handle) {
        assert_eq!(cu!(self.gpu, cuStreamWaitEvent(stream => Handle, event => Handle, 0 => c_uint)), 0);
    }

    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize, stream: Handle) {
        let code =
            cu!(self.gpu, cuMemcpyDtoDAsync_v2(to => u64, from => u64, bytes => usize, stream => Handle));
        assert_eq!(code, 0);
    }
}

/// A value of rank `rank` that no f32 sum of several represents exactly.
pub(super) fn value(i: usize, rank: usize) -> f32 {
    ((i * 7919 + rank * 104_729) % 1000) as f32 * 1e-3 - 0.5
}

pub(super) fn values(count: usize, rank: usize) -> Vec<f32> {
    (0..count).map(|i| value(i, rank)).collect()
}

/// The sum over ranks, in rank order.
pub(super) fn sum(i: usize, size: usize) -> f32 {
    (1..size).fold(value(i, 0), |sum, rank| sum + value(i, rank))
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
