//! Contexts as in the driver: reference counts per GPU, one current context per thread, errors that stay in
//! one context, and the calls that need none.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::{fs, ptr};

use common::{Gpu, Handle, arg, role, run_again};

const NO_CONTEXT: c_int = 201;
const DESTROYED: c_int = 709;

/// A kernel of the planted bugs with two pointers and a count: see `driver.rs`.
const KERNEL: &str = "race_in_block_mended";

fn open(options: &str) -> Gpu {
    Gpu::open(&vitrum_standin::libraries().join("bugs"), options)
}

fn active(gpu: &Gpu, card: c_int) -> bool {
    let (mut flags, mut active) = (0u32, -1);
    let code = cu!(gpu, cuDevicePrimaryCtxGetState(
        card => c_int, &mut flags => *mut u32, &mut active => *mut c_int));
    assert_eq!(code, 0);
    active == 1
}

fn current(gpu: &Gpu) -> Handle {
    let mut context = ptr::null_mut();
    assert_eq!(cu!(gpu, cuCtxGetCurrent(&mut context => *mut Handle)), 0);
    context
}

/// The code of a call that needs a context.
fn synchronize(gpu: &Gpu) -> c_int {
    cu!(gpu, cuCtxSynchronize())
}

#[test]
fn a_context_lives_from_its_first_reference_to_its_last() {
    let gpu = open("checks=on,cards=2");
    let first = current(&gpu);
    assert!(active(&gpu, 0) && !active(&gpu, 1));
    assert_eq!(gpu.retain(0), first, "one context for each card");
    assert_eq!(gpu.release(0), 0);
    assert!(active(&gpu, 0));
    let (_, memory) = (gpu.allocate(256).unwrap(), gpu.upload(&[1f32; 64]));

    // The second GPU has its own count.
    let second = gpu.retain(1);
    assert_ne!(second, first);
    assert_eq!((gpu.release(1), gpu.release(1)), (0, NO_CONTEXT));
    assert!(active(&gpu, 0) && !active(&gpu, 1));

    assert_eq!(gpu.release(0), 0);
    assert!(!active(&gpu, 0));
    assert_eq!(gpu.release(0), NO_CONTEXT, "it was released too often");
    // It stays current, but is unusable; it cannot be made current again.
    assert_eq!(current(&gpu), first);
    assert_eq!(synchronize(&gpu), DESTROYED);
    assert_eq!(gpu.allocate(64), Err(DESTROYED));
    assert_eq!(cu!(gpu, cuCtxSetCurrent(first => Handle)), NO_CONTEXT);
    assert_eq!(cu!(gpu, cuCtxPushCurrent_v2(second => Handle)), NO_CONTEXT);

    // Retained again, it has the same address and no old contents.
    assert_eq!(gpu.retain(0), first);
    assert_eq!(synchronize(&gpu), 0);
    let function = gpu.function_of(gpu.load(), KERNEL);
    let args = [arg(memory), arg(gpu.allocate(256).unwrap()), arg(64u32)];
    assert_eq!(gpu.launch_function(function, ptr::null_mut(), 1, 64, 256, &args), 0);
    assert_eq!(gpu.wait(), 700);
    let gone = ", whose context was released by cuDevicePrimaryCtxRelease_v2";
    assert!(gpu.report().contains("out of bounds") && gpu.report().contains(gone), "{}", gpu.report());
}

#[test]
fn what_is_left_of_freed_memory_is_its_name() {
    let gpu = open("checks=on");
    let (from, to) = (gpu.upload(&[1f32; 64]), gpu.upload(&[0f32; 64]));
    gpu.free(from);
    assert_eq!(gpu.launch(KERNEL, 1, 64, 256, &[arg(from), arg(to), arg(64u32)]), 0);
    assert_eq!(gpu.wait(), 700);
    let report = gpu.report();
    let ordinal = report.split_once(" of device allocation ").unwrap().1;
    assert!(ordinal.contains(", freed by cuMemFree_v2"), "{report}");
}

#[test]
fn a_reset_ends_the_context_and_leaves_the_references() {
    let gpu = open("checks=on");
    assert_eq!(cu!(gpu, cuDevicePrimaryCtxReset_v2(0 => c_int)), 0);
    assert!(!active(&gpu, 0));
    assert_eq!(synchronize(&gpu), DESTROYED);
    gpu.retain(0);
    assert_eq!(synchronize(&gpu), 0);
    assert_eq!((gpu.release(0), gpu.release(0), gpu.release(0)), (0, 0, NO_CONTEXT));
}

#[test]
fn without_a_current_context_only_what_needs_none_is_done() {
    let gpu = open("checks=on,threads=1");
    let context = current(&gpu);
    let function = gpu.function(KERNEL);
    let (memory, pinned) = (gpu.upload(&[0f32; 64]), gpu.pinned(64));
    let args = [arg(memory), arg(memory), arg(64u32)];
    let stream = gpu.new_stream();
    let [start, end] = [gpu.new_event(), gpu.new_event()];
    assert_eq!(cu!(gpu, cuStreamBeginCapture_v2(stream => Handle, 1 => c_int)), 0);
    assert_eq!(gpu.launch_function(function, stream, 1, 64, 256, &args), 0);

    gpu.use_context(ptr::null_mut());
    assert_eq!(current(&gpu), ptr::null_mut());
    // A handle implies its context.
    let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
    assert_eq!(cu!(gpu, cuStreamEndCapture(stream => Handle, &mut graph => *mut Handle)), 0);
    let code =
        cu!(gpu, cuGraphInstantiateWithFlags(&mut executable => *mut Handle, graph => Handle, 0 => u64));
    assert_eq!(code, 0);
    assert_eq!(cu!(gpu, cuEventRecord(start => Handle, stream => Handle)), 0);
    assert_eq!(cu!(gpu, cuGraphLaunch(executable => Handle, stream => Handle)), 0);
    assert_eq!(cu!(gpu, cuEventRecord(end => Handle, stream => Handle)), 0);
    assert_eq!(cu!(gpu, cuStreamWaitEvent(stream => Handle, end => Handle, 0 => u32)), 0);
    assert_eq!(cu!(gpu, cuStreamSynchronize(stream => Handle)), 0);
    assert_eq!(cu!(gpu, cuEventSynchronize(end => Handle)), 0);
    let mut time = -1f32;
    assert_eq!(cu!(gpu, cuEventElapsedTime_v2(&mut time => *mut f32, start => Handle, end => Handle)), 0);
    assert!(time >= 0.0);
    // The driver, its cards and errors have none.
    let (mut number, mut text) = (0, ptr::null::<u8>());
    assert_eq!(cu!(gpu, cuInit(0 => u32)), 0);
    assert_eq!(cu!(gpu, cuDeviceGetCount(&mut number => *mut c_int)), 0);
    assert_eq!(cu!(gpu, cuDeviceGetAttribute(&mut number => *mut c_int, 75 => c_int, 0 => c_int)), 0);
    assert_eq!(cu!(gpu, cuGetErrorName(709 => c_int, &mut text => *mut *const u8)), 0);

    // The default stream, memory, modules, launches and new objects need one.
    let null = ptr::null_mut::<c_void>;
    let mut made = null();
    let mut address = 0u64;
    let codes = [
        synchronize(&gpu),
        gpu.allocate(64).unwrap_err(),
        cu!(gpu, cuMemFree_v2(memory => u64)),
        cu!(gpu, cuMemHostAlloc(&mut made => *mut Handle, 64 => usize, 0 => u32)),
        cu!(gpu, cuMemFreeHost(pinned => *mut c_void)),
        cu!(gpu, cuMemAllocAsync(&mut address => *mut u64, 64 => usize, null() => Handle)),
        cu!(gpu, cuMemcpyDtoH_v2(pinned => *mut c_void, memory => u64, 64 => usize)),
        cu!(gpu, cuMemcpyDtoHAsync_v2(pinned => *mut c_void, memory => u64, 64 => usize, stream => Handle)),
        cu!(gpu, cuMemsetD8Async(memory => u64, 0 => u8, 64 => usize, stream => Handle)),
        cu!(gpu, cuMemGetInfo_v2(&mut 0usize => *mut usize, &mut 0usize => *mut usize)),
        cu!(gpu, cuStreamCreate(&mut made => *mut Handle, 1 => u32)),
        cu!(gpu, cuEventCreate(&mut made => *mut Handle, 0 => u32)),
        cu!(gpu, cuEventRecord(start => Handle, null() => Handle)),
        cu!(gpu, cuStreamSynchronize(null() => Handle)),
        cu!(gpu, cuModuleLoadData(&mut made => *mut Handle, null() => *const c_void)),
        cu!(gpu, cuModuleUnload(gpu.module() => Handle)),
        cu!(gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, 1024 => c_int)),
        gpu.launch_function(function, ptr::null_mut(), 1, 64, 256, &args),
        gpu.launch_function(function, stream, 1, 64, 256, &args),
        cu!(gpu, cuGraphLaunch(executable => Handle, null() => Handle)),
        cu!(gpu, cuCtxGetDevice(&mut number => *mut c_int)),
        cu!(gpu, cuCtxPopCurrent_v2(&mut made => *mut Handle)),
    ];
    assert_eq!(codes, [NO_CONTEXT; 22]);

    // Neither does destroying handles.
    assert_eq!(cu!(gpu, cuGraphDestroy(graph => Handle)), 0);
    assert_eq!(cu!(gpu, cuGraphExecDestroy(executable => Handle)), 0);
    assert_eq!(cu!(gpu, cuEventDestroy_v2(start => Handle)), 0);
    assert_eq!(cu!(gpu, cuStreamDestroy_v2(stream => Handle)), 0);
    gpu.use_context(context);
    assert_eq!(cu!(gpu, cuMemFreeHost(pinned => *mut c_void)), 0);
}

#[test]
fn each_thread_has_its_own_current_context() {
    let gpu = open("checks=on,cards=2");
    let (first, second) = (current(&gpu) as usize, gpu.retain(1) as usize);
    let seen = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let before = (current(&gpu) as usize, synchronize(&gpu));
            gpu.use_context(second as Handle);
            (before, current(&gpu) as usize, synchronize(&gpu))
        });
        other.join().unwrap()
    });
    assert_eq!(seen, ((0, NO_CONTEXT), second, 0));
    assert_eq!(current(&gpu) as usize, first);

    // Pushed and popped, they form a stack.
    let mut popped = ptr::null_mut();
    assert_eq!(cu!(gpu, cuCtxPushCurrent_v2(second as Handle => Handle)), 0);
    let mut card = -1;
    assert_eq!(cu!(gpu, cuCtxGetDevice(&mut card => *mut c_int)), 0);
    assert_eq!(card, 1);
    assert_eq!(cu!(gpu, cuCtxPopCurrent_v2(&mut popped => *mut Handle)), 0);
    assert_eq!((popped as usize, current(&gpu) as usize), (second, first));
    assert_eq!(cu!(gpu, cuCtxSetCurrent(0x40 as Handle => Handle)), NO_CONTEXT, "this is no context");
    assert_eq!(gpu.release(1), 0);
}

#[test]
fn an_error_breaks_the_context_that_it_came_in() {
    for broken in [0, 1] {
        let gpu = open("checks=on,cards=2,fail_launch=1");
        let (broken, whole) = (gpu.retain(broken), gpu.retain(1 - broken));
        let launch = || {
            let (function, memory) = (gpu.function_of(gpu.load(), KERNEL), gpu.upload(&[0f32; 64]));
            let args = [arg(memory), arg(memory), arg(64u32)];
            assert_eq!(gpu.launch_function(function, ptr::null_mut(), 1, 64, 256, &args), 0);
            gpu.wait()
        };
        gpu.use_context(broken);
        let event = gpu.new_event();
        assert_eq!(launch(), 719);
        assert_eq!((synchronize(&gpu), gpu.allocate(64)), (719, Err(719)));

        gpu.use_context(whole);
        assert_eq!((synchronize(&gpu), launch()), (0, 0));
        // A handle of the broken one returns its error.
        assert_eq!(cu!(gpu, cuEventSynchronize(event => Handle)), 719);
        assert_eq!(cu!(gpu, cuEventDestroy_v2(event => Handle)), 719);
        while active(&gpu, 0) {
            gpu.release(0);
        }
        while active(&gpu, 1) {
            gpu.release(1);
        }
        // The error disappears with its context.
        gpu.use_context(gpu.retain(0));
        assert_eq!(synchronize(&gpu), 0);
        gpu.use_context(gpu.retain(1));
        assert_eq!((synchronize(&gpu), gpu.release(1)), (0, 0));
    }
}

#[test]
fn what_two_cards_may_share_is_shared() {
    let gpu = open("checks=on,cards=2,memory=1M");
    let first = current(&gpu);
    let (event, stream) = (gpu.new_event(), gpu.new_stream());
    let memory = gpu.upload(&[3f32; 64]);
    let half = gpu.allocate(512 << 10).unwrap();
    assert_eq!(gpu.allocate(512 << 10), Err(2));

    gpu.use_context(gpu.retain(1));
    // Each GPU has its own memory.
    let theirs = gpu.allocate(768 << 10).unwrap();
    let (mut free, mut total) = (0usize, 0usize);
    assert_eq!(cu!(gpu, cuMemGetInfo_v2(&mut free => *mut usize, &mut total => *mut usize)), 0);
    assert_eq!((free, total), (256 << 10, 1 << 20));
    // A stream waits for an event of the other GPU, copies go both ways, and waiting works in any context.
    let other = gpu.new_stream();
    assert_eq!(cu!(gpu, cuEventRecord(event => Handle, stream => Handle)), 0);
    assert_eq!(cu!(gpu, cuStreamWaitEvent(other => Handle, event => Handle, 0 => u32)), 0);
    assert_eq!(
        cu!(gpu, cuMemcpyDtoDAsync_v2(theirs => u64, memory => u64, 256 => usize, stream => Handle)),
        0
    );
    assert_eq!(cu!(gpu, cuEventSynchronize(event => Handle)), 0);
    assert_eq!(cu!(gpu, cuStreamSynchronize(stream => Handle)), 0);
    assert_eq!(gpu.download::<f32>(theirs, 64), [3f32; 64]);
    gpu.free(half);
    gpu.use_context(first);
    assert!(gpu.allocate(512 << 10).is_ok());
    assert_eq!(gpu.release(1), 0);
}

#[test]
fn memory_in_the_order_of_a_stream_outlives_the_context() {
    let gpu = open("checks=on");
    let mut address = 0u64;
    let code = cu!(gpu, cuMemAllocAsync(&mut address => *mut u64, 64 => usize, ptr::null_mut() => Handle));
    assert_eq!(code, 0);
    assert_eq!(gpu.release(0), 0);
    gpu.use_context(gpu.retain(0));
    assert_eq!(cu!(gpu, cuMemFreeAsync(address => u64, ptr::null_mut() => Handle)), 0);
}

#[test]
fn contexts_are_written_down() {
    let file = std::env::temp_dir().join(format!("standin-contexts-{}.json", std::process::id()));
    let this = "contexts_are_written_down";
    if let Some(file) = role() {
        let gpu = open(&format!("contexts={file},cards=2"));
        gpu.retain(0);
        gpu.retain(1);
        assert_eq!((gpu.release(0), gpu.release(1)), (0, 0));
        return;
    }
    let _ = fs::remove_file(&file);
    for _ in 0..2 {
        let (aborted, said) = run_again(this, file.to_str().unwrap());
        assert!(!aborted, "{said}");
    }
    let lines = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    // The last line of each process is missing: options are reset before the last context is released.
    assert_eq!(lines.len(), 6, "{lines:?}");
    for (line, (state, card)) in lines.iter().zip([("made", 0), ("made", 1), ("destroyed", 1)].iter().cycle())
    {
        let expected = format!(r#"{{"context":"{state}","card":{card},"process":"#);
        assert!(line.starts_with(&expected), "{line}, not {expected}");
    }
    assert_ne!(lines[0], lines[3], "two processes");
}
