//! One GPU through the CUDA driver API: context, streams, memory, kernels, launches, graphs.
//!
//! Everything `unsafe` about the driver is here, behind functions that check every return code and say what was being
//! done when it failed. Device memory is an address ([`Address`]); who owns it is [`Buffer`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::rc::Rc;

use cudarc::driver::sys;
use sys::CUdevice_attribute as Attribute;

use super::images;
use super::probe;
use crate::error::{Error, Result};

/// An address in device memory.
pub(super) type Address = u64;

/// The oldest compute capability that the kernels are compiled for.
pub(super) const OLDEST_CARD: (i32, i32) = (8, 0);

/// What the card is.
#[derive(Clone, Debug)]
pub struct Card {
    pub name: String,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (i32, i32),
    pub multiprocessors: u32,
    /// Largest dynamic shared memory of a block, in bytes.
    pub shared_memory: u32,
    pub total_memory: usize,
    pub driver_version: i32,
}

/// A card with its context, streams and kernels. Cloning shares them.
#[derive(Clone)]
pub(super) struct Gpu(Rc<Inner>);

struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    card: Card,
    compute: sys::CUstream,
    copy: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Kernels met so far, with the dynamic shared memory that each was allowed.
    kernels: RefCell<HashMap<&'static str, (sys::CUfunction, u32)>>,
    /// `train.check_launches`: wait after every launch, so that an error names its kernel.
    check_launches: Cell<bool>,
    /// Launches since [`Gpu::watch_launches`], for benchmarks that want to know what ran.
    launches: RefCell<Option<Vec<Launched>>>,
}

/// One kernel as it was started.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Launched {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

/// Which queue an operation goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Compute,
    Copy,
}

impl Gpu {
    /// Opens the first card that `CUDA_VISIBLE_DEVICES` leaves visible.
    pub(super) fn open() -> Result<Self> {
        let found = probe::driver()?;
        let mut device = 0;
        // SAFETY: `probe` found the library and every symbol used here; out-pointers are valid locals.
        unsafe {
            check(sys::cuInit(0), "initialise the driver")?;
            let mut count = 0;
            check(sys::cuDeviceGetCount(&mut count), "count the cards")?;
            if count == 0 {
                return Err(Error::new("the CUDA driver sees no card")
                    .hint("`nvidia-smi` lists the cards; an empty `CUDA_VISIBLE_DEVICES` hides them all"));
            }
            check(sys::cuDeviceGet(&mut device, 0), "open card 0")?;
        }
        let card = describe(device, found.version)?;
        if card.capability < OLDEST_CARD {
            let (major, minor) = card.capability;
            return Err(Error::new(format!(
                "{} has compute capability {major}.{minor}; the kernels need {}.{} (Ampere) or newer",
                card.name, OLDEST_CARD.0, OLDEST_CARD.1
            )));
        }
        let mut context = ptr::null_mut();
        let (mut compute, mut copy) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: as above; the streams belong to the context that was just made current.
        unsafe {
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "create a context")?;
            check(sys::cuCtxSetCurrent(context), "use the context")?;
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
            check(sys::cuStreamCreate(&mut compute, flags), "create a stream")?;
            check(sys::cuStreamCreate(&mut copy, flags), "create a stream")?;
        }
        let modules = load_modules(&card)?;
        Ok(Self(Rc::new(Inner {
            device,
            context,
            card,
            compute,
            copy,
            modules,
            kernels: RefCell::default(),
            check_launches: Cell::new(false),
            launches: RefCell::default(),
        })))
    }

    /// Makes the context current on the calling thread.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: a context that was retained by `open`.
        unsafe { check(sys::cuCtxSetCurrent(self.0.context), "use the context") }
    }

    pub(super) fn card(&self) -> &Card {
        &self.0.card
    }

    pub(super) fn stream(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.0.compute,
            Stream::Copy => self.0.copy,
        }
    }

    pub(super) fn check_launches(&self, on: bool) {
        self.0.check_launches.set(on);
    }

    /// Notes every launch of `work`.
    pub(super) fn watch_launches(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<Launched>> {
        self.0.launches.replace(Some(Vec::new()));
        let done = work();
        let launches = self.0.launches.take().unwrap_or_default();
        done.map(|()| launches)
    }

    /// Free and total bytes.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.make_current()?;
        memory_of_current_card()
    }

    /// Zeroed device memory; nothing at address 0 for no bytes, which the driver refuses.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let mut address = 0;
        if bytes == 0 {
            return Ok(Buffer { gpu: self.clone(), address, bytes });
        }
        // SAFETY: a valid out-pointer and a size above 0.
        let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            return Err(Error::new(format!(
                "no memory left on the card: {:.2} GiB were asked for, {:.2} of {:.2} GiB are free",
                gib(bytes),
                gib(free),
                gib(total)
            ))
            .hint("set a smaller `train.micro_batch`; `vitrum plan` says what a run needs"));
        }
        check(code, "allocate device memory")?;
        let buffer = Buffer { gpu: self.clone(), address, bytes };
        self.fill(address, 0, bytes)?;
        // The next to touch it may be the copy stream, which waits for no event of this fill.
        self.synchronize(Stream::Compute)?;
        Ok(buffer)
    }

    /// Page-locked host memory, zeroed. Not write-combined: workers may read what they wrote.
    pub(super) fn allocate_pinned(&self, bytes: usize) -> Result<Pinned> {
        let mut pointer = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        let code = unsafe { sys::cuMemHostAlloc(&mut pointer, bytes.max(1), 0) };
        check(code, "allocate page-locked memory")?;
        // SAFETY: the driver gave `bytes` writable bytes at `pointer`.
        unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { pointer: pointer.cast(), bytes, context: self.0.context })
    }

    /// Sets `bytes` bytes at `at`.
    pub(super) fn fill(&self, at: Address, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers pass ranges inside their own buffers.
        unsafe { check(sys::cuMemsetD8Async(at, value, bytes, self.0.compute), "clear device memory") }
    }

    /// Host → device, finished when this returns.
    pub(super) fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` lives until the stream has been waited for.
        unsafe {
            let code = sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.0.compute);
            check(code, "copy to the card")?;
        }
        self.synchronize(Stream::Compute)
    }

    /// Device → host, finished when this returns.
    pub(super) fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` lives, exclusively borrowed, until the stream has been waited for.
        unsafe {
            let code = sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.0.compute);
            check(code, "copy from the card")?;
        }
        self.synchronize(Stream::Compute)
    }

    /// Page-locked host → device, in the stream's order.
    ///
    /// The caller keeps `from` alive and unchanged until the stream has passed the copy.
    pub(super) fn upload_async(&self, to: Address, from: &[u8], stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise above.
        unsafe {
            let code = sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream(stream));
            check(code, "copy to the card")
        }
    }

    /// Device → page-locked host, in the stream's order.
    ///
    /// The caller keeps `to` alive and unread until the stream has passed the copy.
    pub(super) fn download_async(&self, from: Address, to: &mut [u8], stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise above.
        unsafe {
            let code = sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream(stream));
            check(code, "copy from the card")
        }
    }

    /// Device → device, in the compute stream's order.
    pub(super) fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: callers pass ranges inside their own buffers.
        unsafe { check(sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.0.compute), "copy on the card") }
    }

    pub(super) fn synchronize(&self, stream: Stream) -> Result<()> {
        // SAFETY: a stream of this context.
        unsafe { check(sys::cuStreamSynchronize(self.stream(stream)), "wait for the card") }
    }

    pub(super) fn new_event(&self) -> Result<Event> {
        let mut event = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        unsafe { check(sys::cuEventCreate(&mut event, 0), "create an event")? };
        Ok(Event(event))
    }

    /// The event happens when everything put into the stream so far is done.
    pub(super) fn record_event(&self, event: &Event, stream: Stream) -> Result<()> {
        // SAFETY: event and stream of this context.
        unsafe { check(sys::cuEventRecord(event.0, self.stream(stream)), "record an event") }
    }

    /// What is put into the stream from now on waits for the event.
    pub(super) fn wait_event(&self, stream: Stream, event: &Event) -> Result<()> {
        // SAFETY: event and stream of this context.
        unsafe { check(sys::cuStreamWaitEvent(self.stream(stream), event.0, 0), "wait for an event") }
    }

    /// Starts a kernel on the compute stream.
    pub(super) fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        let function = self.kernel(kernel, shared)?;
        let [x, y, z] = grid;
        let stream = self.0.compute;
        // SAFETY: the wrapper of each kernel passes the arguments of its signature, by address, and they live until
        // this call returns (the driver copies them).
        let code = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                block,
                1,
                1,
                shared,
                stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(code, format_args!("start kernel `{kernel}`"))?;
        if let Some(launches) = &mut *self.0.launches.borrow_mut() {
            launches.push(Launched { kernel, grid, threads: block, shared });
        }
        if self.0.check_launches.get() {
            // SAFETY: a stream of this context.
            let code = unsafe { sys::cuStreamSynchronize(stream) };
            check(
                code,
                format_args!("run kernel `{kernel}` (grid {grid:?}, block {block}, shared {shared})"),
            )?;
        }
        Ok(())
    }

    /// Looks a kernel up, once, and allows it the shared memory that it asks for.
    fn kernel(&self, name: &'static str, shared: u32) -> Result<sys::CUfunction> {
        let found = self.0.kernels.borrow().get(name).copied();
        let (function, allowed) = match found {
            Some(found) => found,
            None => (self.find_kernel(name)?, DEFAULT_SHARED),
        };
        if shared > allowed {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            let code = unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) };
            check(code, format_args!("give kernel `{name}` {shared} bytes of shared memory"))?;
        }
        self.0.kernels.borrow_mut().insert(name, (function, allowed.max(shared)));
        Ok(function)
    }

    fn find_kernel(&self, name: &'static str) -> Result<sys::CUfunction> {
        let c_name = CString::new(name).expect("a kernel's name has no NUL");
        for module in &self.0.modules {
            let mut function = ptr::null_mut();
            // SAFETY: a loaded module, a NUL-terminated name, a valid out-pointer.
            let code = unsafe { sys::cuModuleGetFunction(&mut function, *module, c_name.as_ptr()) };
            match code {
                sys::CUresult::CUDA_SUCCESS => return Ok(function),
                sys::CUresult::CUDA_ERROR_NOT_FOUND => {}
                other => check(other, format_args!("find kernel `{name}`"))?,
            }
        }
        Err(Error::new(format!("kernel `{name}` is in none of the embedded images"))
            .hint("this build is broken: build it again from a clean checkout"))
    }

    /// Records what `body` puts into the compute stream, without running it.
    pub(super) fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this context that is not capturing.
        unsafe { check(sys::cuStreamBeginCapture_v2(self.0.compute, mode), "begin recording a step")? };
        let done = body();
        let mut graph = ptr::null_mut();
        // SAFETY: the capture begun above; it is ended whether or not `body` failed.
        let code = unsafe { sys::cuStreamEndCapture(self.0.compute, &mut graph) };
        done?;
        check(code, "end recording a step")?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph that was just captured; it may be destroyed once it is instantiated.
        unsafe {
            let code = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            check(code, "instantiate the recorded step")?;
        }
        Ok(Graph(exec))
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: an instantiated graph of this context.
        unsafe { check(sys::cuGraphLaunch(graph.0, self.0.compute), "replay the recorded step") }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: everything was made by `Gpu::open` and is released once. Errors at the end of a run help nobody.
        unsafe {
            sys::cuStreamSynchronize(self.compute);
            sys::cuStreamSynchronize(self.copy);
            self.modules.iter().for_each(|module| {
                sys::cuModuleUnload(*module);
            });
            sys::cuStreamDestroy_v2(self.compute);
            sys::cuStreamDestroy_v2(self.copy);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// Free and total bytes of the card whose context this thread uses.
pub(super) fn memory_of_current_card() -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: valid out-pointers; without a context the driver says so.
    unsafe { check(sys::cuMemGetInfo_v2(&mut free, &mut total), "ask for free memory")? };
    Ok((free, total))
}

/// Shared memory that a kernel may use without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

/// Reads the card's properties.
fn describe(device: sys::CUdevice, driver_version: i32) -> Result<Card> {
    let attribute = |which: Attribute| {
        let mut value = 0;
        // SAFETY: a valid out-pointer and device.
        unsafe { check(sys::cuDeviceGetAttribute(&mut value, which, device), "ask for a card's property")? };
        Ok::<i32, Error>(value)
    };
    let mut name = [0; 128];
    let mut total_memory = 0;
    // SAFETY: the driver writes at most `len` bytes and a NUL.
    unsafe {
        check(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device), "ask for the card's name")?;
        check(sys::cuDeviceTotalMem_v2(&mut total_memory, device), "ask for the card's memory")?;
    }
    // SAFETY: NUL-terminated by the driver.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(Card {
        name,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        total_memory,
        driver_version,
    })
}

/// Loads the embedded kernels. The stand-in GPU has its own and takes an empty image.
fn load_modules(card: &Card) -> Result<Vec<sys::CUmodule>> {
    let stand_in: &[(&str, &[u8])] = &[("stand-in", &[])];
    let images = match images::IMAGES {
        _ if card.name.starts_with(probe::STAND_IN) => stand_in,
        [] => {
            return Err(Error::new(format!(
                "this build has no CUDA kernels inside ({})",
                images::WHY_NONE.unwrap_or("built without nvcc")
            ))
            .hint("`scripts/install-nvcc` fetches nvcc; then build again"));
        }
        embedded => embedded,
    };
    let load = |(file, image): &(&str, &[u8])| {
        let mut module = ptr::null_mut();
        // SAFETY: a fat binary made by nvcc (or, for the stand-in, a pointer that it does not follow).
        let code = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        check(code, format_args!("load the kernels of `{file}` for {}", card.name))?;
        Ok(module)
    };
    images.iter().map(load).collect()
}

/// Device memory, freed when dropped.
pub(super) struct Buffer {
    gpu: Gpu,
    pub(super) address: Address,
    pub(super) bytes: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        // SAFETY: allocated by `Gpu::allocate`, freed once, after the streams that may still use it.
        unsafe {
            sys::cuStreamSynchronize(self.gpu.0.compute);
            sys::cuMemFree_v2(self.address);
        }
    }
}

/// Page-locked host memory, freed when dropped.
pub(super) struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    context: sys::CUcontext,
}

// SAFETY: plain memory with one owner; the driver allows its use and its release from any thread.
unsafe impl Send for Pinned {}

impl crate::backend::HostMemory for Pinned {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `bytes` initialised bytes, owned.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `bytes` initialised bytes, owned and exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `Gpu::allocate_pinned`, freed once; a worker thread may have no context of its own.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuMemFreeHost(self.pointer.cast());
        }
    }
}

/// A point in a stream.
pub(super) struct Event(sys::CUevent);

impl Event {
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: a live event.
        unsafe { check(sys::cuEventSynchronize(self.0), "wait for the card") }
    }

    /// Milliseconds from `start` to this event, both of which have happened.
    pub(super) fn since(&self, start: &Event) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: live events, a valid out-pointer.
        unsafe { check(sys::cuEventElapsedTime_v2(&mut milliseconds, start.0, self.0), "time two events")? };
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `Gpu::new_event`, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// A recorded step that can be replayed.
pub(super) struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by `Gpu::capture`, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}

/// Turns a return code into an error that says what was being done.
pub(super) fn check(code: sys::CUresult, doing: impl std::fmt::Display) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: the driver gives static NUL-terminated strings, or leaves the pointers null.
    let words = unsafe {
        sys::cuGetErrorName(code, &mut name);
        sys::cuGetErrorString(code, &mut text);
        [name, text].map(|p| (!p.is_null()).then(|| CStr::from_ptr(p).to_string_lossy().into_owned()))
    };
    let [name, text] = words.map(|word| word.unwrap_or_else(|| format!("{code:?}")));
    Err(Error::new(format!("cannot {doing}: {name}, {text}")))
}
