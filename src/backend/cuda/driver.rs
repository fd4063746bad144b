//! Work on one GPU through the CUDA driver API: streams, memory, events, launches, graphs.
//!
//! All `unsafe` calls for this work are here, behind functions that check every return code and name the
//! failed action. [`Device`] holds the GPU itself, its context and its kernels. Device memory is an address
//! ([`Address`]); a [`Buffer`] owns it.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;

use cudarc::driver::sys;

use super::api::{self, Code};
use super::device::{Device, DeviceProperties, check};
use super::launch::{Args, Kernel, TensorMap};
use super::nccl::{self, Comm};
use crate::error::{Error, Result};

/// An address in device memory.
pub(super) type Address = u64;

/// CUDA_ERROR_OUT_OF_MEMORY
const OUT_OF_MEMORY: Code = 2;

/// A GPU with its own streams. Clones share them.
#[derive(Clone)]
pub(super) struct Gpu(Rc<Inner>);

struct Inner {
    device: &'static Device,
    compute: sys::CUstream,
    copy: sys::CUstream,
    communication: sys::CUstream,
    /// `train.check_launches`: waits after every launch, so that an error names its kernel.
    check_launches: Cell<bool>,
    /// Set between the begin and the end of [`Gpu::capture`].
    capturing: Cell<bool>,
    /// The communicators of the operations captured so far.
    captured: RefCell<Vec<Comm>>,
    /// The live [`Buffer`]s: address and bytes. Copies and fills check that they stay inside one.
    buffers: RefCell<Vec<(Address, usize)>>,
    /// Launches since [`Gpu::watch_launches`], for benchmarks that report what ran.
    launches: RefCell<Option<Vec<Launched>>>,
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Launched {
    /// Its name in `kernels/`.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared: u32,
}

/// The queue for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Compute,
    Copy,
    Communication,
}

impl Gpu {
    /// Opens GPU `ordinal`: new streams on a device that the process opens once.
    ///
    /// # Errors
    /// Those of [`Device::open`].
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let stream = || {
            let mut stream = ptr::null_mut();
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: a valid out-pointer; the stream belongs to the device's context, which is current.
            check(unsafe { api::driver().cuStreamCreate(&mut stream, flags) }, "create a stream")?;
            Ok::<_, Error>(stream)
        };
        Ok(Self(Rc::new(Inner {
            device,
            compute: stream()?,
            copy: stream()?,
            communication: stream()?,
            check_launches: Cell::new(false),
            capturing: Cell::new(false),
            captured: RefCell::default(),
            buffers: RefCell::default(),
            launches: RefCell::default(),
        })))
    }

    /// Makes the context current on the calling thread.
    pub(super) fn make_current(&self) -> Result<()> {
        self.0.device.make_current()
    }

    pub(super) fn properties(&self) -> &DeviceProperties {
        &self.0.device.properties
    }

    pub(super) fn stream(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.0.compute,
            Stream::Copy => self.0.copy,
            Stream::Communication => self.0.communication,
        }
    }

    pub(super) fn check_launches(&self, on: bool) {
        self.0.check_launches.set(on);
    }

    /// Records every launch of `work`.
    pub(super) fn watch_launches(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<Launched>> {
        self.0.launches.replace(Some(Vec::new()));
        let done = work();
        let launches = self.0.launches.take().unwrap_or_default();
        done.map(|()| launches)
    }

    /// Free and total bytes.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.make_current()?;
        memory_of_current_gpu()
    }

    /// Zeroed device memory.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.reserve(bytes)?;
        self.fill(buffer.address, 0, bytes)?;
        // The copy stream may touch it next, and that stream waits for no event of this fill.
        self.synchronize(Stream::Compute)?;
        Ok(buffer)
    }

    /// Uninitialised device memory. For 0 bytes, which the driver refuses, the address is 0.
    pub(super) fn reserve(&self, bytes: usize) -> Result<Buffer> {
        let mut address = 0;
        if bytes == 0 {
            return Ok(Buffer { gpu: self.clone(), address, bytes });
        }
        // SAFETY: a valid out-pointer and a size above 0.
        let code = unsafe { api::driver().cuMemAlloc_v2(&mut address, bytes) };
        if code == OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            return Err(Error::new(format!(
                "out of memory on the GPU: {:.2} GiB requested, {:.2} of {:.2} GiB are free",
                gib(bytes),
                gib(free),
                gib(total)
            ))
            .hint("set a smaller `train.micro_batch`; `vitrum plan` says what a run needs"));
        }
        check(code, "allocate device memory")?;
        self.0.buffers.borrow_mut().push((address, bytes));
        Ok(Buffer { gpu: self.clone(), address, bytes })
    }

    /// Page-locked host memory, zeroed. Not write-combined: workers may read what they wrote.
    pub(super) fn allocate_pinned(&self, bytes: usize) -> Result<Pinned> {
        let mut pointer = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        let code = unsafe { api::driver().cuMemHostAlloc(&mut pointer, bytes.max(1), 0) };
        check(code, "allocate page-locked memory")?;
        // SAFETY: the driver gave `bytes` writable bytes at `pointer`.
        unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { pointer: pointer.cast(), bytes, device: self.0.device })
    }

    /// Panics if `bytes` bytes at `at` are not all in one live buffer of this GPU.
    pub(super) fn check_range(&self, at: Address, bytes: usize) {
        let within =
            |&(start, size): &(Address, usize)| at >= start && at - start + bytes as u64 <= size as u64;
        let inside = self.0.buffers.borrow().iter().any(within);
        assert!(inside, "{bytes} bytes at {at:#x} are not in a buffer of the GPU");
    }

    /// Sets `bytes` bytes at `at`.
    pub(super) fn fill(&self, at: Address, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.check_range(at, bytes);
        // SAFETY: a range inside a live buffer.
        unsafe {
            check(api::driver().cuMemsetD8Async(at, value, bytes, self.0.compute), "clear device memory")
        }
    }

    /// Host → device; finished when this returns.
    pub(super) fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.check_range(to, from.len());
        // SAFETY: a range inside a live buffer; `from` lives until the stream has been waited for.
        unsafe {
            let code =
                api::driver().cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.0.compute);
            check(code, "copy to the GPU")?;
        }
        self.synchronize(Stream::Compute)
    }

    /// Device → host; finished when this returns.
    pub(super) fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.check_range(from, to.len());
        // SAFETY: a range inside a live buffer; `to` lives, exclusively borrowed, until the stream has been waited for.
        unsafe {
            let code =
                api::driver().cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.0.compute);
            check(code, "copy from the GPU")?;
        }
        self.synchronize(Stream::Compute)
    }

    /// Page-locked host → device, in stream order.
    ///
    /// # Safety
    /// `from` stays alive and unchanged until the stream has passed the copy.
    pub(super) unsafe fn upload_async(&self, to: Address, from: &[u8], stream: Stream) -> Result<()> {
        self.check_range(to, from.len());
        // SAFETY: a range inside a live buffer; the rest is the caller's promise.
        unsafe {
            let code =
                api::driver().cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream(stream));
            check(code, "copy to the GPU")
        }
    }

    /// Device → page-locked host, in stream order.
    ///
    /// # Safety
    /// `to` stays alive, and nobody reads or writes it, until the stream has passed the copy.
    pub(super) unsafe fn download_async(&self, from: Address, to: &mut [u8], stream: Stream) -> Result<()> {
        self.check_range(from, to.len());
        // SAFETY: a range inside a live buffer; the rest is the caller's promise.
        unsafe {
            let code = api::driver().cuMemcpyDtoHAsync_v2(
                to.as_mut_ptr().cast(),
                from,
                to.len(),
                self.stream(stream),
            );
            check(code, "copy from the GPU")
        }
    }

    /// Device → device, in the order of the compute stream.
    pub(super) fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.check_range(to, bytes);
        self.check_range(from, bytes);
        // SAFETY: ranges inside live buffers.
        unsafe {
            check(api::driver().cuMemcpyDtoDAsync_v2(to, from, bytes, self.0.compute), "copy on the GPU")
        }
    }

    /// Describes a matrix of bf16 to bulk copies: four dimensions, the innermost first, of `sizes` elements whose outer
    /// three are `strides` bytes apart. Copies move `part` elements, stored in shared memory with a swizzle of 128 bytes.
    ///
    /// # Errors
    /// The driver refuses it: the address or a stride is not a multiple of 16 bytes, or a part is too large.
    pub(super) fn tensor_map(
        &self,
        at: Address,
        sizes: [u64; 4],
        strides: [u64; 3],
        part: [u32; 4],
    ) -> Result<TensorMap> {
        const WORD: u64 = 2;
        let outer = sizes[1..].iter().zip(strides).map(|(size, stride)| (size - 1) * stride);
        self.check_range(at, (outer.sum::<u64>() + sizes[0] * WORD) as usize);
        let mut map = TensorMap([0; 16]);
        // SAFETY: valid pointers to as many numbers as there are dimensions, and to a map of the type's size and alignment.
        let code = unsafe {
            api::driver().cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as u32,
                sizes.len() as u32,
                at as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                part.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE as u32,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B as u32,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B as u32,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as u32,
            )
        };
        check(code, format_args!("describe a matrix of {sizes:?} elements to bulk copies"))?;
        Ok(map)
    }

    pub(super) fn synchronize(&self, stream: Stream) -> Result<()> {
        // SAFETY: a stream of this context.
        unsafe { check(api::driver().cuStreamSynchronize(self.stream(stream)), "wait for the GPU") }
    }

    /// An event that orders streams and that the host may wait for. It records no time, and waiting for it
    /// frees the core: the loader's workers need it.
    pub(super) fn new_event(&self) -> Result<Event> {
        use sys::CUevent_flags_enum::{CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING};
        self.event(CU_EVENT_BLOCKING_SYNC as u32 | CU_EVENT_DISABLE_TIMING as u32)
    }

    /// An event that records the time, for [`Event::since`].
    pub(super) fn new_timer(&self) -> Result<Event> {
        self.event(sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32)
    }

    fn event(&self, flags: u32) -> Result<Event> {
        let mut event = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        unsafe { check(api::driver().cuEventCreate(&mut event, flags), "create an event")? };
        Ok(Event(event))
    }

    /// The event occurs when all work submitted to the stream so far is done.
    pub(super) fn record_event(&self, event: &Event, stream: Stream) -> Result<()> {
        // SAFETY: event and stream of this context.
        unsafe { check(api::driver().cuEventRecord(event.0, self.stream(stream)), "record an event") }
    }

    /// Work submitted to the stream after this call waits for the event.
    pub(super) fn wait_event(&self, stream: Stream, event: &Event) -> Result<()> {
        // SAFETY: event and stream of this context.
        unsafe {
            check(api::driver().cuStreamWaitEvent(self.stream(stream), event.0, 0), "wait for an event")
        }
    }

    /// Starts a kernel on the compute stream, with the kernel's own number of threads.
    ///
    /// # Safety
    /// Every address in `args` is one that the kernel accepts as absent, or lies in a buffer of this GPU that
    /// outlives the work of the stream and holds the extents that the kernel derives from `args`; `grid` and
    /// `shared` are what the kernel expects for these arguments.
    pub(super) unsafe fn launch<A: Args>(
        &self,
        kernel: Kernel<A>,
        grid: [u32; 3],
        shared: u32,
        args: &A,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_on(Stream::Compute, kernel, grid, shared, args) }
    }

    /// The same on any stream.
    ///
    /// # Safety
    /// As for [`Gpu::launch`].
    pub(super) unsafe fn launch_on<A: Args>(
        &self,
        stream: Stream,
        kernel: Kernel<A>,
        grid: [u32; 3],
        shared: u32,
        args: &A,
    ) -> Result<()> {
        let Kernel { name, threads, .. } = kernel;
        let function = self.0.device.kernel(name, shared)?;
        let [x, y, z] = grid;
        let stream = self.stream(stream);
        let mut args = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one `A`, which the driver copies before it returns; the rest is the caller's
        // promise.
        let code = unsafe {
            api::driver().cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(code, format_args!("start kernel `{name}`"))?;
        if let Some(launches) = &mut *self.0.launches.borrow_mut() {
            launches.push(Launched { kernel: name, grid, threads, shared });
        }
        if self.0.check_launches.get() {
            // SAFETY: a stream of this context.
            let code = unsafe { api::driver().cuStreamSynchronize(stream) };
            check(
                code,
                format_args!("run kernel `{name}` (grid {grid:?}, block {threads}, shared {shared})"),
            )?;
        }
        Ok(())
    }

    /// Records what `body` submits to the compute stream, without running it.
    pub(super) fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this context that is not capturing.
        unsafe {
            check(api::driver().cuStreamBeginCapture_v2(self.0.compute, mode), "begin recording a step")?
        };
        self.0.capturing.set(true);
        let done = body();
        self.0.capturing.set(false);
        let communicators = self.0.captured.take();
        let mut graph = ptr::null_mut();
        // SAFETY: the capture begun above; it is ended whether or not `body` failed.
        let code = unsafe { api::driver().cuStreamEndCapture(self.0.compute, &mut graph) };
        done?;
        check(code, "end recording a step")?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph that was just captured; it may be destroyed once it is instantiated.
        unsafe {
            let code = api::driver().cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            api::driver().cuGraphDestroy(graph);
            check(code, "instantiate the recorded step")?;
        }
        Ok(Graph { exec, _communicators: communicators })
    }

    /// Keeps a communicator until the graph that is being captured, which uses it, is destroyed.
    pub(super) fn keep_in_graph(&self, comm: &Comm) {
        if self.is_capturing() {
            let mut captured = self.0.captured.borrow_mut();
            if !captured.iter().any(|known| known.is(comm)) {
                captured.push(comm.clone());
            }
        }
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.0.capturing.get()
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: an instantiated graph of this context.
        unsafe { check(api::driver().cuGraphLaunch(graph.exec, self.0.compute), "replay the recorded step") }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if nccl::has_failed() {
            return;
        }
        // SAFETY: made by `Gpu::open`, destroyed once. Errors at the end of a run are of no use to anyone.
        unsafe {
            for stream in [self.compute, self.copy, self.communication] {
                api::driver().cuStreamSynchronize(stream);
                api::driver().cuStreamDestroy_v2(stream);
            }
        }
    }
}

/// Free and total bytes of the GPU whose context is current on this thread.
pub(super) fn memory_of_current_gpu() -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: valid out-pointers; without a context the driver says so.
    unsafe { check(api::driver().cuMemGetInfo_v2(&mut free, &mut total), "ask for free memory")? };
    Ok((free, total))
}

/// Device memory, freed when dropped.
pub(super) struct Buffer {
    gpu: Gpu,
    pub(super) address: Address,
    pub(super) bytes: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes == 0 || nccl::has_failed() {
            return;
        }
        self.gpu.0.buffers.borrow_mut().retain(|(address, _)| *address != self.address);
        // SAFETY: allocated by `Gpu::reserve`, freed once, after the streams that may still use it.
        unsafe {
            api::driver().cuStreamSynchronize(self.gpu.0.compute);
            api::driver().cuStreamSynchronize(self.gpu.0.communication);
            api::driver().cuMemFree_v2(self.address);
        }
    }
}

/// Page-locked host memory, freed when dropped.
pub(super) struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    device: &'static Device,
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
        if nccl::has_failed() {
            return;
        }
        // SAFETY: allocated by `Gpu::allocate_pinned`, freed once; a worker thread may have no context of its own.
        unsafe {
            let _ = self.device.make_current();
            api::driver().cuMemFreeHost(self.pointer.cast());
        }
    }
}

/// A point in a stream.
pub(super) struct Event(sys::CUevent);

impl Event {
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: a live event.
        unsafe { check(api::driver().cuEventSynchronize(self.0), "wait for the GPU") }
    }

    /// Whether all work before it is done.
    pub(super) fn has_occurred(&self) -> Result<bool> {
        /// CUDA_ERROR_NOT_READY
        const NOT_READY: Code = 600;
        // SAFETY: a live event.
        match unsafe { api::driver().cuEventQuery(self.0) } {
            NOT_READY => Ok(false),
            code => check(code, "wait for the GPU").map(|()| true),
        }
    }

    /// Milliseconds from `start` to this event. Both are timers and have occurred.
    pub(super) fn since(&self, start: &Event) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: live events, a valid out-pointer.
        unsafe {
            check(api::driver().cuEventElapsedTime_v2(&mut milliseconds, start.0, self.0), "time two events")?
        };
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `Gpu::new_event`, destroyed once.
        unsafe { api::driver().cuEventDestroy_v2(self.0) };
    }
}

/// A recorded step that can be replayed.
pub(super) struct Graph {
    exec: sys::CUgraphExec,
    /// A communicator cannot be destroyed while a graph uses it: NCCL would wait for the graph for ever.
    _communicators: Vec<Comm>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if nccl::has_failed() {
            return;
        }
        // SAFETY: instantiated by `Gpu::capture`, destroyed once.
        unsafe { api::driver().cuGraphExecDestroy(self.exec) };
    }
}
