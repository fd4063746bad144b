//! Invalid use of handles: each planted misuse ends its process with a report, and its corrected version runs
//! silently.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::ptr;

use common::{Gpu, Handle, arg, role, run_again};

/// A kernel of the planted bugs with two pointers and a count: see `driver.rs`.
const KERNEL: &str = "race_in_block_mended";

/// A misuse: its name, what the report says about it, and the calls, which are correct if not `broken`.
type Misuse = (&'static str, &'static [&'static str], fn(&Gpu, bool));

const RELEASED: &str = "its context was released before, by cuDevicePrimaryCtxRelease_v2";

const MISUSES: &[Misuse] = &[
    // After the context.
    (
        "event destroyed late",
        &["cuEventDestroy_v2: event 1, made by cuEventCreate", RELEASED],
        |gpu, broken| {
            let event = gpu.new_event();
            around_release(gpu, broken, || cu!(gpu, cuEventDestroy_v2(event => Handle)));
        },
    ),
    ("event recorded late", &["cuEventRecord: event 2, made by cuEventCreate", RELEASED], |gpu, broken| {
        let _other = gpu.new_event();
        let event = gpu.new_event();
        around_release(gpu, broken, || cu!(gpu, cuEventRecord(event => Handle, ptr::null_mut() => Handle)));
    }),
    (
        "stream waited for late",
        &["cuStreamSynchronize: stream 1, made by cuStreamCreate", RELEASED],
        |gpu, broken| {
            let stream = gpu.new_stream();
            around_release(gpu, broken, || cu!(gpu, cuStreamSynchronize(stream => Handle)));
        },
    ),
    (
        "stream destroyed late",
        &["cuStreamDestroy_v2: stream 1, made by cuStreamCreate", RELEASED],
        |gpu, broken| {
            let stream = gpu.new_stream();
            around_release(gpu, broken, || cu!(gpu, cuStreamDestroy_v2(stream => Handle)));
        },
    ),
    (
        "graph destroyed late",
        &["cuGraphDestroy: graph 1, made by cuStreamEndCapture", RELEASED],
        |gpu, broken| {
            let (graph, _) = capture(gpu, gpu.module());
            around_release(gpu, broken, || cu!(gpu, cuGraphDestroy(graph => Handle)));
        },
    ),
    (
        "executable graph destroyed late",
        &["cuGraphExecDestroy: executable graph 1, made by cuGraphInstantiateWithFlags", RELEASED],
        |gpu, broken| {
            let (_, executable) = capture(gpu, gpu.module());
            around_release(gpu, broken, || cu!(gpu, cuGraphExecDestroy(executable => Handle)));
        },
    ),
    (
        "module unloaded late",
        &["cuModuleUnload: module 1, made by cuModuleLoadData", RELEASED],
        |gpu, broken| {
            around_release(gpu, broken, || cu!(gpu, cuModuleUnload(gpu.module() => Handle)));
        },
    ),
    (
        "function launched late",
        &["cuLaunchKernel: function 1, made by cuModuleGetFunction", RELEASED],
        |gpu, broken| {
            let function = gpu.function(KERNEL);
            let memory = gpu.upload(&[0f32; 64]);
            around_release(gpu, broken, || launch(gpu, function, ptr::null_mut(), memory));
        },
    ),
    (
        "memory freed late",
        &["cuMemFree_v2: device allocation 1, made by cuMemAlloc_v2", RELEASED],
        |gpu, broken| {
            let memory = gpu.allocate(64).unwrap();
            around_release(gpu, broken, || cu!(gpu, cuMemFree_v2(memory => u64)));
        },
    ),
    (
        "page-locked memory freed late",
        &["cuMemFreeHost: page-locked allocation 1, made by cuMemHostAlloc", RELEASED],
        |gpu, broken| {
            let memory = gpu.pinned(64);
            around_release(gpu, broken, || cu!(gpu, cuMemFreeHost(memory => *mut c_void)));
        },
    ),
    (
        "handle of an earlier context",
        &["cuEventRecord: event 1, made by cuEventCreate", RELEASED],
        |gpu, broken| {
            // The context that is retained again has the same address, but is a new one.
            let mut event = gpu.new_event();
            assert_eq!(gpu.release(0), 0);
            gpu.use_context(gpu.retain(0));
            if !broken {
                event = gpu.new_event();
            }
            assert_eq!(cu!(gpu, cuEventRecord(event => Handle, ptr::null_mut() => Handle)), 0);
        },
    ),
    (
        "handle of a context that was reset",
        &["cuStreamQuery: stream 1, made by cuStreamCreateWithPriority", "by cuDevicePrimaryCtxReset_v2"],
        |gpu, broken| {
            let mut stream = ptr::null_mut();
            let code = cu!(gpu, cuStreamCreateWithPriority(&mut stream => *mut Handle, 1 => u32, 0 => c_int));
            assert_eq!(code, 0);
            if broken {
                assert_eq!(cu!(gpu, cuDevicePrimaryCtxReset_v2(0 => c_int)), 0);
            }
            assert_eq!(cu!(gpu, cuStreamQuery(stream => Handle)), 0);
        },
    ),
    // Twice.
    ("event destroyed twice", &["event 1", "was destroyed already, by cuEventDestroy_v2"], |gpu, broken| {
        let event = gpu.new_event();
        twice(broken, || cu!(gpu, cuEventDestroy_v2(event => Handle)));
    }),
    (
        "stream destroyed twice",
        &["stream 1", "was destroyed already, by cuStreamDestroy_v2"],
        |gpu, broken| {
            let stream = gpu.new_stream();
            twice(broken, || cu!(gpu, cuStreamDestroy_v2(stream => Handle)));
        },
    ),
    ("graph destroyed twice", &["graph 1", "was destroyed already, by cuGraphDestroy"], |gpu, broken| {
        let (graph, _) = capture(gpu, gpu.module());
        twice(broken, || cu!(gpu, cuGraphDestroy(graph => Handle)));
    }),
    (
        "executable graph destroyed twice",
        &["executable graph 1", "was destroyed already, by cuGraphExecDestroy"],
        |gpu, broken| {
            let (_, executable) = capture(gpu, gpu.module());
            twice(broken, || cu!(gpu, cuGraphExecDestroy(executable => Handle)));
        },
    ),
    ("module unloaded twice", &["module 2", "was destroyed already, by cuModuleUnload"], |gpu, broken| {
        let module = gpu.load();
        twice(broken, || cu!(gpu, cuModuleUnload(module => Handle)));
    }),
    (
        "memory freed twice",
        &["device allocation 1", "was destroyed already, by cuMemFree_v2"],
        |gpu, broken| {
            let memory = gpu.allocate(64).unwrap();
            twice(broken, || cu!(gpu, cuMemFree_v2(memory => u64)));
        },
    ),
    (
        "page-locked memory freed twice",
        &["page-locked allocation 1", "was destroyed already, by cuMemFreeHost"],
        |gpu, broken| {
            let memory = gpu.pinned(64);
            twice(broken, || cu!(gpu, cuMemFreeHost(memory => *mut c_void)));
        },
    ),
    // After its own end.
    (
        "event waited for after its end",
        &["cuEventSynchronize: event 1", "was destroyed already"],
        |gpu, broken| {
            let event = gpu.new_event();
            let wait = || cu!(gpu, cuEventSynchronize(event => Handle));
            around(broken, || cu!(gpu, cuEventDestroy_v2(event => Handle)), wait);
        },
    ),
    (
        "launch after the end of its module",
        &[
            "cuLaunchKernel: function 1",
            "its module, module 2, made by cuModuleLoadData, was unloaded by cuModuleUnload",
        ],
        |gpu, broken| {
            let module = gpu.load();
            let function = gpu.function_of(module, KERNEL);
            let memory = gpu.upload(&[0f32; 64]);
            let unload = || {
                assert_eq!(gpu.wait(), 0);
                cu!(gpu, cuModuleUnload(module => Handle))
            };
            around(broken, unload, || launch(gpu, function, ptr::null_mut(), memory));
        },
    ),
    (
        "graph launched after the end of its module",
        &["cuGraphLaunch: function 1", "its module, module 2", "was unloaded by cuModuleUnload"],
        |gpu, broken| {
            let module = gpu.load();
            let (_, executable) = capture(gpu, module);
            let stream = gpu.new_stream();
            let unload = || {
                assert_eq!(gpu.wait(), 0);
                cu!(gpu, cuModuleUnload(module => Handle))
            };
            around(broken, unload, || cu!(gpu, cuGraphLaunch(executable => Handle, stream => Handle)));
        },
    ),
    (
        "copy from page-locked memory after its end",
        &["cuMemcpyHtoD_v2: page-locked allocation 1", "was destroyed already, by cuMemFreeHost"],
        |gpu, broken| {
            let (from, to) = (gpu.pinned(64), gpu.allocate(64).unwrap());
            let free = || cu!(gpu, cuMemFreeHost(from => *mut c_void));
            around(broken, free, || cu!(gpu, cuMemcpyHtoD_v2(to => u64, from => *mut c_void, 64 => usize)));
        },
    ),
    // Of another GPU.
    (
        "event and stream of two cards",
        &[
            "cuEventRecord: event 1, made by cuEventCreate for card 0, with stream 1, made by cuStreamCreate for card 1",
        ],
        |gpu, broken| {
            let event = gpu.new_event();
            gpu.use_context(gpu.retain(c_int::from(broken)));
            let stream = gpu.new_stream();
            assert_eq!(cu!(gpu, cuEventRecord(event => Handle, stream => Handle)), 0);
        },
    ),
    (
        "event on another card's default stream",
        &["cuEventRecord: event 1, made by cuEventCreate for card 0, in the context of card 1"],
        |gpu, broken| {
            let event = gpu.new_event();
            gpu.use_context(gpu.retain(c_int::from(broken)));
            assert_eq!(cu!(gpu, cuEventRecord(event => Handle, ptr::null_mut() => Handle)), 0);
        },
    ),
    (
        "time between events of two cards",
        &["cuEventElapsedTime_v2: event 1, made by cuEventCreate for card 0, with event 2"],
        |gpu, broken| {
            let start = gpu.new_event();
            assert_eq!(cu!(gpu, cuEventRecord(start => Handle, ptr::null_mut() => Handle)), 0);
            gpu.use_context(gpu.retain(c_int::from(broken)));
            let end = gpu.new_event();
            assert_eq!(cu!(gpu, cuEventRecord(end => Handle, ptr::null_mut() => Handle)), 0);
            assert_eq!(gpu.wait(), 0);
            let mut time = -1f32;
            let code = cu!(gpu, cuEventElapsedTime_v2(&mut time => *mut f32, start => Handle, end => Handle));
            assert_eq!(code, 0);
            assert!(time >= 0.0);
        },
    ),
    (
        "launch on another card's stream",
        &["cuLaunchKernel: stream 1, made by cuStreamCreate for card 1, in the context of card 0"],
        |gpu, broken| {
            let (first, memory) = (gpu.retain(0), gpu.upload(&[0f32; 64]));
            gpu.use_context(gpu.retain(c_int::from(broken)));
            let stream = gpu.new_stream();
            gpu.use_context(first);
            assert_eq!(launch(gpu, gpu.function(KERNEL), stream, memory), 0);
        },
    ),
    (
        "graph on another card's stream",
        &[
            "cuGraphLaunch: executable graph 1, made by cuGraphInstantiateWithFlags for card 0, in the context of card 1",
        ],
        |gpu, broken| {
            let (_, executable) = capture(gpu, gpu.module());
            gpu.use_context(gpu.retain(c_int::from(broken)));
            let stream = gpu.new_stream();
            assert_eq!(cu!(gpu, cuGraphLaunch(executable => Handle, stream => Handle)), 0);
        },
    ),
    (
        "launch in another card's context",
        &["cuLaunchKernel: function 1, made by cuModuleGetFunction for card 0, in the context of card 1"],
        |gpu, broken| {
            let (function, memory) = (gpu.function(KERNEL), gpu.upload(&[0f32; 64]));
            gpu.use_context(gpu.retain(c_int::from(broken)));
            assert_eq!(launch(gpu, function, ptr::null_mut(), memory), 0);
        },
    ),
    (
        "module unloaded in another card's context",
        &["cuModuleUnload: module 1, made by cuModuleLoadData for card 0, in the context of card 1"],
        |gpu, broken| {
            gpu.use_context(gpu.retain(c_int::from(broken)));
            assert_eq!(cu!(gpu, cuModuleUnload(gpu.module() => Handle)), 0);
        },
    ),
    (
        "kernel with another card's memory",
        &["cuLaunchKernel: device allocation 1, made by cuMemAlloc_v2 for card 1, in the context of card 0"],
        |gpu, broken| {
            let first = gpu.retain(0);
            gpu.use_context(gpu.retain(c_int::from(broken)));
            let memory = gpu.upload(&[0f32; 64]);
            gpu.use_context(first);
            assert_eq!(launch(gpu, gpu.function(KERNEL), ptr::null_mut(), memory), 0);
        },
    ),
    // Invalid ones.
    ("address that was never allocated", &["cuMemFree_v2: 0x40 is no device allocation"], |gpu, broken| {
        let memory = gpu.allocate(64).unwrap();
        cu!(gpu, cuMemFree_v2(if broken { 0x40 } else { memory } => u64));
    }),
    (
        "address inside an allocation",
        &["is no device allocation: byte 8 of an allocation of 64 bytes"],
        |gpu, broken| {
            let memory = gpu.allocate(64).unwrap();
            cu!(gpu, cuMemFree_v2(if broken { memory + 8 } else { memory } => u64));
        },
    ),
    (
        "host memory that is not page-locked",
        &["cuMemFreeHost:", "is no page-locked allocation"],
        |gpu, broken| {
            let (mut plain, pinned) = (0u64, gpu.pinned(64));
            let plain = ptr::from_mut(&mut plain).cast::<c_void>();
            cu!(gpu, cuMemFreeHost(if broken { plain } else { pinned } => *mut c_void));
        },
    ),
    (
        "stream that is an event",
        &["cuStreamSynchronize: event 1, made by cuEventCreate, where a stream is wanted"],
        |gpu, broken| {
            let handle = if broken { gpu.new_event() } else { gpu.new_stream() };
            cu!(gpu, cuStreamSynchronize(handle => Handle));
        },
    ),
    ("event that is anything", &["cuEventQuery:", "is no handle of an event"], |gpu, broken| {
        let anything = [0u64; 64];
        let handle = if broken { anything.as_ptr().cast_mut().cast() } else { gpu.new_event() };
        cu!(gpu, cuEventQuery(handle => Handle));
    }),
];

/// `act`, then the end of the context; if `broken`, in the opposite order.
fn around_release(gpu: &Gpu, broken: bool, act: impl Fn() -> c_int) {
    around(broken, || gpu.release(0), act);
}

fn around(broken: bool, end: impl Fn() -> c_int, act: impl Fn() -> c_int) {
    if broken {
        assert_eq!(end(), 0);
    }
    assert_eq!(act(), 0);
    if !broken {
        assert_eq!(end(), 0);
    }
}

fn twice(broken: bool, act: impl Fn() -> c_int) {
    for _ in 0..=u32::from(broken) {
        assert_eq!(act(), 0);
    }
}

fn launch(gpu: &Gpu, function: Handle, stream: Handle, memory: u64) -> c_int {
    gpu.launch_function(function, stream, 1, 64, 256, &[arg(memory), arg(memory), arg(64u32)])
}

/// A graph of one launch, and its executable form.
fn capture(gpu: &Gpu, module: Handle) -> (Handle, Handle) {
    let (stream, memory) = (gpu.new_stream(), gpu.upload(&[0f32; 64]));
    let function = gpu.function_of(module, KERNEL);
    let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
    assert_eq!(cu!(gpu, cuStreamBeginCapture_v2(stream => Handle, 1 => c_int)), 0);
    assert_eq!(launch(gpu, function, stream, memory), 0);
    assert_eq!(cu!(gpu, cuStreamEndCapture(stream => Handle, &mut graph => *mut Handle)), 0);
    let code =
        cu!(gpu, cuGraphInstantiateWithFlags(&mut executable => *mut Handle, graph => Handle, 0 => u64));
    assert_eq!(code, 0);
    (graph, executable)
}

#[test]
fn every_misuse_ends_with_a_report_and_its_mended_twin_says_nothing() {
    if let Some(role) = role() {
        let (which, how) = role.split_once(": ").unwrap();
        let (.., calls) = MISUSES.iter().find(|(name, ..)| *name == which).unwrap();
        let gpu = Gpu::open(&vitrum_standin::libraries().join("bugs"), "checks=on,threads=1,cards=2");
        return calls(&gpu, how == "broken");
    }
    let mut wrong = Vec::new();
    for (name, says, _) in MISUSES {
        let test = "every_misuse_ends_with_a_report_and_its_mended_twin_says_nothing";
        let (aborted, said) = run_again(test, &format!("{name}: broken"));
        if !aborted || !says.iter().all(|part| said.contains(part)) {
            wrong.push(format!("{name}, broken, aborted {aborted}: {said}"));
        }
        let (aborted, said) = run_again(test, &format!("{name}: mended"));
        if aborted || said.contains("stand-in GPU") {
            wrong.push(format!("{name}, mended, aborted {aborted}: {said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
