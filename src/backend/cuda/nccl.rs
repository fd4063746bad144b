//! Communication between ranks on GPUs, through NCCL: a communicator, its collectives on device memory, its end.
//!
//! A communicator never blocks the host. Each call may still be in progress when it returns, and is polled until it is
//! done; an error of another rank is seen by polling, too ([`Comm::check`]), because the GPU itself would wait for ever.
//!
//! The end has an order. NCCL destroys a communicator only after every graph that uses it: a graph
//! keeps its communicators. After a failure nothing is destroyed at all ([`has_failed`]): NCCL and the driver would wait
//! for work that can never finish. The process then ends by [`exit_now`].

use std::ffi::{CStr, c_int, c_void};
use std::io::Write as _;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::api::{self, Code, Nccl, NcclComm, NcclConfig, NcclId};
use super::driver::{Address, Event, Gpu, Stream};
use super::libraries;
use crate::error::{Error, Result};

/// `ncclInProgress`
const IN_PROGRESS: Code = 7;

/// A wait looks this often while it is short, and sleeps this long between looks afterwards.
const SPIN: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(100);
/// How often a wait looks after the other ranks.
const LOOK: Duration = Duration::from_millis(5);

/// A communicator of this process has failed.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Whether a communicator of this process has failed. GPU memory, streams and graphs are then left as they are.
pub fn has_failed() -> bool {
    FAILED.load(Ordering::SeqCst)
}

/// Ends the process at once: the libraries' own work at exit would wait for ranks that are gone.
pub fn exit_now(code: i32) -> ! {
    unsafe extern "C" {
        fn _exit(code: c_int) -> !;
    }
    let _ = std::io::stdout().flush();
    // SAFETY: the C library's function; it does not return.
    unsafe { _exit(code) }
}

/// Makes NCCL choose the same algorithm and protocol in every run, where the user has not chosen them: its trees and
/// its sums in the switch may add in another order from call to call. Call it before the first [`Id`] or [`Comm`].
pub fn fix_algorithms() {
    for (name, value) in [("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple"), ("NCCL_NVLS_ENABLE", "0")] {
        if std::env::var_os(name).is_none() {
            // SAFETY: a run calls this before it opens NCCL, starts its workers or lets a library read the
            // environment in another thread.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// The name of a communicator that is to be made: rank 0 makes it and tells it to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(pub [u8; 128]);

impl Id {
    /// A new one.
    ///
    /// # Errors
    /// There is no usable NCCL, or it finds no network interface.
    pub fn new() -> Result<Self> {
        let found = libraries::nccl()?;
        let mut id = NcclId([0; 128]);
        // SAFETY: a valid out-pointer.
        let code = unsafe { found.api.ncclGetUniqueId(&mut id) };
        match code {
            0 => Ok(Self(id.0)),
            code => Err(failure(ptr::null_mut(), code, "make a communicator's id")),
        }
    }
}

/// The type of elements that travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    U8,
    F32,
    F64,
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::U8 => 1,
            Element::F32 => 4,
            Element::F64 => 8,
        }
    }

    /// `ncclDataType_t`
    fn code(self) -> c_int {
        match self {
            Element::U8 => 1,
            Element::F32 => 7,
            Element::F64 => 8,
        }
    }
}

/// `ncclSum`: values of several ranks are added.
const SUM: c_int = 0;

/// Ranks that communicate. Clones share the communicator; the last one destroys it, together with those of the
/// other ranks.
#[derive(Clone)]
pub struct Comm(Arc<Inner>);

struct Inner {
    handle: NcclComm,
    rank: usize,
    size: usize,
    /// The number of its GPU.
    gpu: usize,
    /// One call at a time, and all calls of a group together.
    calls: Mutex<()>,
}

// SAFETY: NCCL allows calls from any thread, one at a time, which `calls` sees to.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Comm {
    /// Joins the ranks that have the same id, on this rank's GPU. Calls `waiting` again and again until all have
    /// joined; its error ends the wait.
    ///
    /// # Errors
    /// NCCL's, and those of `waiting`.
    pub(super) fn join(
        gpu: &Gpu,
        id: &Id,
        rank: usize,
        size: usize,
        waiting: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let found = libraries::nccl()?;
        gpu.make_current()?;
        let mut handle = ptr::null_mut();
        // SAFETY: valid pointers; NCCL copies the config before it returns.
        let code = unsafe {
            found.api.ncclCommInitRankConfig(
                &mut handle,
                size as c_int,
                NcclId(id.0),
                rank as c_int,
                &mut config(),
            )
        };
        Self::made(gpu, handle, code, &mut || waiting())
    }

    /// Waits until a communicator is made.
    fn made(
        gpu: &Gpu,
        handle: NcclComm,
        code: Code,
        waiting: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let doing = "connect the ranks";
        let mut waiting = || waiting().inspect_err(|_| FAILED.store(true, Ordering::SeqCst));
        settle(handle, code, doing, &mut waiting)?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a communicator that is made, valid out-pointers.
        let code = unsafe {
            match nccl().ncclCommUserRank(handle, &mut rank) {
                0 => nccl().ncclCommCount(handle, &mut size),
                code => code,
            }
        };
        check(handle, code, doing)?;
        let gpu = gpu.properties().ordinal;
        let (rank, size) = (rank as usize, size as usize);
        Ok(Self(Arc::new(Inner { handle, rank, size, gpu, calls: Mutex::new(()) })))
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// Whether both are the same communicator.
    pub(super) fn is(&self, other: &Comm) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Submits the operations of `body` to a stream of the communicator's GPU, as one: none of them waits for another,
    /// and all ranks make the same group. A captured graph keeps the communicator.
    ///
    /// # Errors
    /// NCCL's, at once or from another rank; those of `body`.
    pub(super) fn group(
        &self,
        gpu: &Gpu,
        stream: Stream,
        body: impl FnOnce(&Group) -> Result<()>,
    ) -> Result<()> {
        assert_eq!(gpu.properties().ordinal, self.0.gpu, "a communicator belongs to one GPU");
        let _one = self.lock();
        // SAFETY: a group of this thread, which is ended below.
        check(self.0.handle, unsafe { nccl().ncclGroupStart() }, "begin a group")?;
        let done = body(&Group { comm: &self.0, gpu, stream });
        // SAFETY: the group begun above; it is ended whether or not `body` failed.
        let code = unsafe { nccl().ncclGroupEnd() };
        done?;
        settle(self.0.handle, code, "communicate", &mut || Ok(()))?;
        gpu.keep_in_graph(self);
        Ok(())
    }

    /// Looks whether this communicator has failed, on this rank or on another one.
    ///
    /// # Errors
    /// It has.
    pub(super) fn check(&self) -> Result<()> {
        let _one = self.lock();
        let mut state = 0;
        // SAFETY: a live communicator, a valid out-pointer.
        let code = unsafe { nccl().ncclCommGetAsyncError(self.0.handle, &mut state) };
        check(self.0.handle, if code == 0 { state } else { code }, "communicate")
    }

    /// Waits for an event, and looks after the other ranks meanwhile.
    ///
    /// # Errors
    /// The communicator has failed, or the GPU.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        let start = Instant::now();
        let mut looked = start;
        loop {
            match event.has_occurred() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // NCCL may know why.
                Err(error) => return Err(self.check().err().unwrap_or(error)),
            }
            if start.elapsed() > SPIN {
                std::thread::sleep(NAP);
            } else {
                std::hint::spin_loop();
            }
            if looked.elapsed() > LOOK {
                self.check()?;
                looked = Instant::now();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if has_failed() {
            return;
        }
        // SAFETY: a live communicator that nobody else has; graphs that use it would keep it.
        unsafe {
            let code = nccl().ncclCommFinalize(self.handle);
            if settle(self.handle, code, "end communication", &mut || Ok(())).is_ok() {
                nccl().ncclCommDestroy(self.handle);
            }
        }
    }
}

/// Operations that are submitted together. Counts are in elements. Each asserts that its ranges lie in live buffers.
pub(super) struct Group<'a> {
    comm: &'a Inner,
    gpu: &'a Gpu,
    stream: Stream,
}

impl Group<'_> {
    /// `to` = the sums over the ranks of `from`; `count` elements each. May be in place.
    pub(super) fn all_reduce(
        &self,
        from: Address,
        to: Address,
        count: usize,
        element: Element,
    ) -> Result<()> {
        let (from, to) = (self.range(from, count, element), self.range(to, count, element));
        // SAFETY: `range` checked both; the buffers outlive the work of the stream.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclAllReduce(from, to, count, element.code(), SUM, self.comm.handle, stream)
        })
    }

    /// `to` = part `rank` of the sums over the ranks of `from`. `count` is that of a part: `from` has one for each rank.
    /// In place, `to` is part `rank` of `from`.
    pub(super) fn reduce_scatter(
        &self,
        from: Address,
        to: Address,
        count: usize,
        element: Element,
    ) -> Result<()> {
        self.only_in_place(from, to, count, element, true);
        let (from, to) = (self.range(from, count * self.comm.size, element), self.range(to, count, element));
        // SAFETY: as in `all_reduce`.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclReduceScatter(from, to, count, element.code(), SUM, self.comm.handle, stream)
        })
    }

    /// `to` = the `count` elements at `from` of all ranks, in rank order. In place, `from` is part `rank` of `to`.
    pub(super) fn all_gather(
        &self,
        from: Address,
        to: Address,
        count: usize,
        element: Element,
    ) -> Result<()> {
        self.only_in_place(to, from, count, element, false);
        let (from, to) = (self.range(from, count, element), self.range(to, count * self.comm.size, element));
        // SAFETY: as in `all_reduce`.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclAllGather(from, to, count, element.code(), self.comm.handle, stream)
        })
    }

    /// Gives every rank the `count` elements of rank `root`, in place.
    pub(super) fn broadcast(&self, at: Address, count: usize, element: Element, root: usize) -> Result<()> {
        let at = self.range(at, count, element);
        // SAFETY: as in `all_reduce`.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclBroadcast(at, at, count, element.code(), root as c_int, self.comm.handle, stream)
        })
    }

    /// Sends `count` elements to a rank, which receives as many in the same group.
    pub(super) fn send(&self, from: Address, count: usize, element: Element, rank: usize) -> Result<()> {
        let from = self.range(from, count, element);
        // SAFETY: as in `all_reduce`.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclSend(from, count, element.code(), rank as c_int, self.comm.handle, stream)
        })
    }

    /// Receives `count` elements from a rank.
    pub(super) fn receive(&self, to: Address, count: usize, element: Element, rank: usize) -> Result<()> {
        let to = self.range(to, count, element);
        // SAFETY: as in `all_reduce`.
        self.done(unsafe {
            let stream = self.gpu.stream(self.stream);
            nccl().ncclRecv(to, count, element.code(), rank as c_int, self.comm.handle, stream)
        })
    }

    /// A range of device memory as NCCL takes it. Panics unless it lies in a live buffer.
    fn range(&self, at: Address, count: usize, element: Element) -> *mut c_void {
        if count > 0 {
            self.gpu.check_range(at, count * element.bytes());
        }
        at as *mut c_void
    }

    /// Panics if a part and the whole overlap elsewhere than where NCCL works in place.
    fn only_in_place(&self, whole: Address, part: Address, count: usize, element: Element, scatters: bool) {
        let bytes = (count * element.bytes()) as u64;
        let (size, rank) = (self.comm.size as u64, self.comm.rank as u64);
        let apart = part + bytes <= whole || part >= whole + size * bytes;
        let what = if scatters { "reduce_scatter" } else { "all_gather" };
        assert!(apart || part == whole + rank * bytes, "{what} in place at the wrong offset");
    }

    /// Inside a group, calls only take note of the operation.
    fn done(&self, code: Code) -> Result<()> {
        if code == IN_PROGRESS { Ok(()) } else { check(self.comm.handle, code, "communicate") }
    }
}

/// The functions. A communicator or an id exists, so the library was found.
fn nccl() -> &'static Nccl {
    api::find_nccl().expect("NCCL was found before")
}

/// A communicator that never blocks the host.
fn config() -> NcclConfig {
    /// What no one has set.
    const UNSET: c_int = c_int::MIN;
    NcclConfig {
        size: size_of::<NcclConfig>(),
        magic: 0xcafe_beef,
        version: 21_700,
        blocking: 0,
        cga_cluster: UNSET,
        min_ctas: UNSET,
        max_ctas: UNSET,
        network: ptr::null(),
    }
}

/// Waits until a call that may be in progress is done.
fn settle(
    handle: NcclComm,
    mut code: Code,
    doing: &str,
    waiting: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    while code == IN_PROGRESS {
        // SAFETY: a communicator that exists from the first call on; a valid out-pointer.
        let asked = unsafe { nccl().ncclCommGetAsyncError(handle, &mut code) };
        if asked != 0 {
            code = asked;
        }
        if code == IN_PROGRESS {
            waiting()?;
            if start.elapsed() > SPIN {
                std::thread::sleep(NAP);
            }
        }
    }
    check(handle, code, doing)
}

fn check(handle: NcclComm, code: Code, doing: &str) -> Result<()> {
    match code {
        0 | IN_PROGRESS => Ok(()),
        code => Err(failure(handle, code, doing)),
    }
}

/// The error of a code, with what NCCL says about it.
fn failure(handle: NcclComm, code: Code, doing: &str) -> Error {
    FAILED.store(true, Ordering::SeqCst);
    // SAFETY: NCCL gives NUL-terminated strings, for any code and for no communicator.
    let words = unsafe {
        [nccl().ncclGetErrorString(code), nccl().ncclGetLastError(handle)].map(|text| match text.is_null() {
            true => String::new(),
            false => CStr::from_ptr(text).to_string_lossy().trim().replace('\n', "; "),
        })
    };
    let [what, last] = words;
    let last = if last.is_empty() { last } else { format!(" ({last})") };
    Error::new(format!("cannot {doing}: NCCL's code {code}, {what}{last}"))
        .hint("another rank may have ended with an error of its own; `NCCL_DEBUG=WARN` makes NCCL say more")
}

#[cfg(test)]
mod tests;
