//! What a driver refuses while a stream is captured, with which code, and whether the capture is lost.
//!
//! The codes are those of NVIDIA's CUDA Driver API reference 13.0: the descriptions of
//! CUDA_ERROR_STREAM_CAPTURE_*, of cuStreamBeginCapture, and of cuThreadExchangeStreamCaptureMode.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::ptr;

use common::{Gpu, Handle, arg};

/// The default stream.
const DEFAULT: Handle = ptr::null_mut();

const SHIFT: &str = "race_in_block_mended";
const BYTES: usize = 256;

const GLOBAL: c_int = 0;
const THREAD_LOCAL: c_int = 1;
const RELAXED: c_int = 2;

const UNSUPPORTED: c_int = 900;
const INVALIDATED: c_int = 901;
const MERGE: c_int = 902;
const UNMATCHED: c_int = 903;
const UNJOINED: c_int = 904;
const ISOLATION: c_int = 905;
const IMPLICIT: c_int = 906;
const CAPTURED_EVENT: c_int = 907;
const WRONG_THREAD: c_int = 908;

/// Streams, of which only the last waits for the default stream; events, of which only the first was recorded;
/// memory.
struct Bench {
    gpu: Gpu,
    stream: Handle,
    other: Handle,
    blocking: Handle,
    recorded: Handle,
    event: Handle,
    x: u64,
    y: u64,
    spare: u64,
    pinned: *mut c_void,
}

impl Bench {
    fn new() -> Self {
        let gpu = Gpu::open(&vitrum_standin::libraries().join("bugs"), "checks=on,threads=1");
        gpu.function(SHIFT); // loads it
        let mut blocking = ptr::null_mut();
        assert_eq!(cu!(gpu, cuStreamCreate(&mut blocking => *mut Handle, 0 => u32)), 0);
        let t = Self {
            stream: gpu.new_stream(),
            other: gpu.new_stream(),
            blocking,
            recorded: gpu.new_event(),
            event: gpu.new_event(),
            x: gpu.upload(&[1f32; 64]),
            y: gpu.upload(&[1f32; 64]),
            spare: gpu.allocate(64).unwrap(),
            pinned: gpu.pinned(BYTES),
            gpu,
        };
        t.record(t.recorded, t.other);
        assert_eq!(t.gpu.wait(), 0);
        t
    }

    fn begin(&self, stream: Handle, mode: c_int) -> c_int {
        cu!(self.gpu, cuStreamBeginCapture_v2(stream => Handle, mode => c_int))
    }

    /// Ends a capture; the code.
    fn end(&self, stream: Handle) -> c_int {
        let mut graph = ptr::null_mut();
        let code = cu!(self.gpu, cuStreamEndCapture(stream => Handle, &mut graph => *mut Handle));
        assert_eq!(code == 0, !graph.is_null());
        if code == 0 {
            assert_eq!(cu!(self.gpu, cuGraphDestroy(graph => Handle)), 0);
        }
        code
    }

    /// 0: not captured, 1: captured, 2: captured in vain.
    fn state(&self, stream: Handle) -> c_int {
        let mut state = -1;
        assert_eq!(cu!(self.gpu, cuStreamIsCapturing(stream => Handle, &mut state => *mut c_int)), 0);
        state
    }

    fn shift(&self, stream: Handle) -> c_int {
        self.gpu.launch_on(stream, SHIFT, 1, 64, 256, &[arg(self.x), arg(self.y), arg(64u32)])
    }

    fn record(&self, event: Handle, stream: Handle) {
        assert_eq!(cu!(self.gpu, cuEventRecord(event => Handle, stream => Handle)), 0);
    }

    fn wait_event(&self, stream: Handle, event: Handle) -> c_int {
        cu!(self.gpu, cuStreamWaitEvent(stream => Handle, event => Handle, 0 => u32))
    }

    fn upload(&self, from: *const c_void, stream: Handle) -> c_int {
        cu!(self.gpu, cuMemcpyHtoDAsync_v2(self.x => u64, from => *const c_void, BYTES => usize, stream => Handle))
    }
}

/// A call during the capture of `stream` by this thread: its name, and the call.
type Call = (&'static str, fn(&Bench) -> c_int);

/// Calls that may wait for the GPU or for its default stream: "potentially unsafe".
const UNSAFE: &[Call] = &[
    ("cuMemAlloc", |t| t.gpu.allocate(64).err().unwrap_or(0)),
    ("cuMemFree", |t| cu!(t.gpu, cuMemFree_v2(t.spare => u64))),
    (
        "cuMemHostAlloc",
        |t| cu!(t.gpu, cuMemHostAlloc(&mut ptr::null_mut() => *mut *mut c_void, 64 => usize, 0 => u32)),
    ),
    ("cuMemFreeHost", |t| cu!(t.gpu, cuMemFreeHost(t.pinned => *mut c_void))),
    (
        "cuMemHostRegister",
        |t| cu!(t.gpu, cuMemHostRegister_v2(ptr::from_ref(t).cast_mut().cast() => *mut c_void, 64 => usize, 0 => u32)),
    ),
    (
        "cuMemcpyHtoD",
        |t| cu!(t.gpu, cuMemcpyHtoD_v2(t.x => u64, [0u8; BYTES].as_ptr().cast() => *const c_void, BYTES => usize)),
    ),
    (
        "cuMemcpyDtoH",
        |t| cu!(t.gpu, cuMemcpyDtoH_v2([0u8; BYTES].as_mut_ptr().cast() => *mut c_void, t.x => u64, BYTES => usize)),
    ),
    ("cuMemcpyDtoD", |t| cu!(t.gpu, cuMemcpyDtoD_v2(t.x => u64, t.y => u64, BYTES => usize))),
    ("cuModuleLoadData", |t| {
        let mut module = ptr::null_mut();
        cu!(t.gpu, cuModuleLoadData(&mut module => *mut Handle, ptr::null() => *const c_void))
    }),
    ("cuModuleUnload", |t| cu!(t.gpu, cuModuleUnload(t.gpu.module() => Handle))),
    // Lazy loading: the first request for a kernel loads it.
    ("cuModuleGetFunction", |t| {
        let mut function = ptr::null_mut();
        let name = c"race_in_warp_mended".as_ptr();
        cu!(t.gpu, cuModuleGetFunction(
            &mut function => *mut Handle, t.gpu.module() => Handle, name => *const std::ffi::c_char))
    }),
    ("cuStreamSynchronize of another stream", |t| cu!(t.gpu, cuStreamSynchronize(t.other => Handle))),
    ("cuStreamQuery of another stream", |t| cu!(t.gpu, cuStreamQuery(t.other => Handle))),
    ("cuEventSynchronize", |t| cu!(t.gpu, cuEventSynchronize(t.recorded => Handle))),
    ("cuEventQuery", |t| cu!(t.gpu, cuEventQuery(t.recorded => Handle))),
];

#[test]
fn an_unsafe_call_of_the_capturing_thread_is_refused_and_costs_the_capture() {
    for mode in [THREAD_LOCAL, GLOBAL] {
        for (name, call) in UNSAFE {
            let t = Bench::new();
            assert_eq!(t.begin(t.stream, mode), 0);
            assert_eq!(call(&t), UNSUPPORTED, "{name}");
            assert_eq!(t.state(t.stream), 2, "{name}");
            assert_eq!(t.shift(t.stream), INVALIDATED, "{name}");
            assert_eq!(t.end(t.stream), INVALIDATED, "{name}");
            // What was refused was not done, and now it may be.
            assert_eq!(call(&t), 0, "{name}");
        }
    }
}

#[test]
fn another_thread_is_free_unless_the_capture_is_global_and_relaxed_captures_forbid_nothing() {
    for (name, call) in UNSAFE {
        for (mode, elsewhere, expected) in
            [(THREAD_LOCAL, true, 0), (GLOBAL, true, UNSUPPORTED), (RELAXED, true, 0), (RELAXED, false, 0)]
        {
            let t = Bench::new();
            let mut context = ptr::null_mut();
            assert_eq!(cu!(t.gpu, cuCtxGetCurrent(&mut context => *mut Handle)), 0);
            assert_eq!(t.begin(t.stream, mode), 0);
            let code = if elsewhere {
                /// The bench, for one call of another thread while this one waits.
                struct Lent<'a>(&'a Bench, Handle);
                // SAFETY: handles may be used from any thread.
                unsafe impl Send for Lent<'_> {}
                let lent = Lent(&t, context);
                std::thread::scope(|scope| {
                    let go = move || {
                        let lent = lent;
                        lent.0.gpu.use_context(lent.1);
                        call(lent.0)
                    };
                    scope.spawn(go).join().unwrap()
                })
            } else {
                call(&t)
            };
            assert_eq!(code, expected, "{name}, mode {mode}, in another thread: {elsewhere}");
            assert_eq!(t.end(t.stream), if expected == 0 { 0 } else { INVALIDATED }, "{name}");
        }
    }
}

#[test]
fn a_captured_stream_or_event_is_not_waited_for_in_any_mode() {
    /// A call, and its code.
    type Refused = (&'static str, fn(&Bench) -> c_int, c_int);
    let calls: [Refused; 8] = [
        ("cuStreamSynchronize", |t| cu!(t.gpu, cuStreamSynchronize(t.stream => Handle)), UNSUPPORTED),
        ("cuStreamQuery", |t| cu!(t.gpu, cuStreamQuery(t.stream => Handle)), UNSUPPORTED),
        ("cuEventSynchronize", |t| cu!(t.gpu, cuEventSynchronize(t.event => Handle)), CAPTURED_EVENT),
        ("cuEventQuery", |t| cu!(t.gpu, cuEventQuery(t.event => Handle)), CAPTURED_EVENT),
        ("cuCtxSynchronize", |t| t.gpu.wait(), UNSUPPORTED),
        ("cuStreamBeginCapture", |t| t.begin(t.stream, RELAXED), UNSUPPORTED),
        // Both ends of such a copy are addresses that a graph could not keep.
        ("copy from pageable memory", |t| t.upload([0u8; BYTES].as_ptr().cast(), t.stream), UNSUPPORTED),
        (
            "cuMemAllocAsync",
            |t| cu!(t.gpu, cuMemAllocAsync(&mut 0u64 => *mut u64, 64 => usize, t.stream => Handle)),
            UNSUPPORTED,
        ),
    ];
    for mode in [GLOBAL, THREAD_LOCAL, RELAXED] {
        for (name, call, code) in calls {
            let t = Bench::new();
            assert_eq!(t.begin(t.stream, mode), 0);
            t.record(t.event, t.stream);
            assert_eq!(call(&t), code, "{name}");
            assert_eq!(t.end(t.stream), INVALIDATED, "{name}");
        }
    }
}

#[test]
fn a_time_between_captured_events_is_refused() {
    let t = Bench::new();
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    t.record(t.event, t.stream);
    let mut time = 0f32;
    let code =
        cu!(t.gpu, cuEventElapsedTime_v2(&mut time => *mut f32, t.recorded => Handle, t.event => Handle));
    assert_eq!(code, CAPTURED_EVENT);
    assert_eq!(t.end(t.stream), 0);
}

#[test]
fn the_default_stream_is_refused_while_a_stream_that_waits_for_it_is_captured() {
    let calls: [Call; 7] = [
        ("launch", |t| t.shift(DEFAULT)),
        ("copy", |t| t.upload(t.pinned, DEFAULT)),
        ("fill", |t| cu!(t.gpu, cuMemsetD8_v2(t.x => u64, 0 => u8, BYTES => usize))),
        ("record", |t| cu!(t.gpu, cuEventRecord(t.event => Handle, DEFAULT => Handle))),
        ("wait", |t| cu!(t.gpu, cuStreamSynchronize(DEFAULT => Handle))),
        ("wait for an event", |t| t.wait_event(DEFAULT, t.recorded)),
        (
            "cuMemcpyHtoD",
            |t| cu!(t.gpu, cuMemcpyHtoD_v2(t.x => u64, [0u8; BYTES].as_ptr().cast() => *const c_void, BYTES => usize)),
        ),
    ];
    for mode in [GLOBAL, THREAD_LOCAL, RELAXED] {
        for (name, call) in calls {
            let t = Bench::new();
            assert_eq!(t.begin(t.blocking, mode), 0);
            assert_eq!(call(&t), IMPLICIT, "{name}");
            assert_eq!(t.end(t.blocking), INVALIDATED, "{name}");
            // A stream that does not wait for it leaves it alone.
            let waits = ["wait", "cuMemcpyHtoD"].contains(&name) && mode != RELAXED;
            assert_eq!(t.begin(t.stream, mode), 0);
            assert_eq!(call(&t), if waits { UNSUPPORTED } else { 0 }, "{name}");
            assert_eq!(t.end(t.stream), if waits { INVALIDATED } else { 0 }, "{name}");
        }
    }
    let t = Bench::new();
    assert_eq!(t.begin(DEFAULT, RELAXED), UNSUPPORTED, "it cannot be captured itself");
}

#[test]
fn a_graph_is_whole_and_alone() {
    let t = Bench::new();
    // A stream that is never joined.
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    t.record(t.event, t.stream);
    assert_eq!((t.wait_event(t.other, t.event), t.shift(t.other)), (0, 0));
    assert_eq!(t.end(t.stream), UNJOINED);
    assert_eq!((t.state(t.stream), t.state(t.other)), (0, 0));

    // Work from outside, which the graph would not contain.
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    assert_eq!(t.wait_event(t.stream, t.recorded), ISOLATION);
    assert_eq!(t.end(t.stream), INVALIDATED);
    // An event that was never recorded is nothing to wait for.
    let never = t.gpu.new_event();
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    assert_eq!(t.wait_event(t.stream, never), 0);
    assert_eq!(t.end(t.stream), 0);

    // Two captures cannot become one.
    assert_eq!((t.begin(t.stream, THREAD_LOCAL), t.begin(t.other, THREAD_LOCAL)), (0, 0));
    t.record(t.event, t.stream);
    assert_eq!(t.wait_event(t.other, t.event), MERGE);
    assert_eq!((t.end(t.stream), t.end(t.other)), (INVALIDATED, INVALIDATED));

    // It ends where it began, in the thread that began it.
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    t.record(t.event, t.stream);
    assert_eq!(t.wait_event(t.other, t.event), 0);
    assert_eq!(t.end(t.other), UNMATCHED);
    assert_eq!(t.end(t.stream), INVALIDATED);
    assert_eq!(t.end(t.stream), 1, "it has ended");
    for (mode, code) in [(THREAD_LOCAL, WRONG_THREAD), (GLOBAL, WRONG_THREAD), (RELAXED, 0)] {
        assert_eq!(t.begin(t.stream, mode), 0);
        let stream = t.stream as usize;
        let gpu = &t.gpu;
        let there = std::thread::scope(|scope| {
            let end = || {
                let mut graph = ptr::null_mut();
                cu!(gpu, cuStreamEndCapture(stream as Handle => Handle, &mut graph => *mut Handle))
            };
            scope.spawn(end).join().unwrap()
        });
        assert_eq!(there, code);
        assert_eq!(t.end(t.stream), if code == 0 { 1 } else { 0 });
    }

    // A stream that is destroyed.
    let stream = t.gpu.new_stream();
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    t.record(t.event, t.stream);
    assert_eq!(t.wait_event(stream, t.event), 0);
    assert_eq!(cu!(t.gpu, cuStreamDestroy_v2(stream => Handle)), 0);
    assert_eq!(t.end(t.stream), INVALIDATED);
}

#[test]
fn what_needs_no_wait_is_allowed_in_a_capture() {
    let t = Bench::new();
    let function = t.gpu.function(SHIFT);
    assert_eq!(t.begin(t.stream, THREAD_LOCAL), 0);
    // Attributes of a loaded function are set on the host's side.
    assert_eq!(cu!(t.gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, 60 << 10 => c_int)), 0);
    assert_eq!(t.gpu.function(SHIFT), function);
    let (event, stream) = (t.gpu.new_event(), t.gpu.new_stream());
    assert_eq!((t.shift(t.stream), t.upload(t.pinned, t.stream)), (0, 0));
    // Work on streams that are not captured goes on.
    assert_eq!(t.upload(t.pinned, stream), 0);
    t.record(event, stream);
    assert_eq!(t.end(t.stream), 0);
    assert_eq!(t.gpu.wait(), 0);
}
