//! The stand-in's driver: order of streams, captured graphs, planted faults, memory, counters.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::{fs, ptr};

use common::{Gpu, Handle, arg};

/// A kernel of the planted bugs that copies 64 values from `x` to `y`: `race_in_block_mended` shifts them by 32.
const SHIFT: &str = "race_in_block_mended";

fn open(options: &str) -> Gpu {
    let folder: PathBuf = vitrum_standin::libraries().join("bugs");
    Gpu::open(&folder, options)
}

fn shift(gpu: &Gpu, stream: Handle, x: u64, y: u64) -> c_int {
    gpu.launch_on(stream, SHIFT, 1, 64, 256, &[arg(x), arg(y), arg(64u32)])
}

/// The same; waits for everything, and returns the code of that.
fn shift_now(gpu: &Gpu, stream: Handle, x: u64, y: u64) -> c_int {
    assert_eq!(shift(gpu, stream, x, y), 0);
    gpu.wait()
}

fn values() -> Vec<f32> {
    (0..64).map(|i| i as f32).collect()
}

fn shifted(values: &[f32], by: usize) -> Vec<f32> {
    (0..64).map(|i| values[(i + by) % 64]).collect()
}

#[test]
fn launches_on_two_streams_need_an_event_between_them() {
    let gpu = open("checks=on");
    let (x, y, z) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]), gpu.upload(&[0f32; 64]));
    let (a, b) = (gpu.new_stream(), gpu.new_stream());

    // With the event: correct, and accepted.
    let event = gpu.new_event();
    assert_eq!(shift(&gpu, a, x, y), 0);
    assert_eq!(cu!(gpu, cuEventRecord(event => Handle, a => Handle)), 0);
    assert_eq!(cu!(gpu, cuStreamWaitEvent(b => Handle, event => Handle, 0 => u32)), 0);
    assert_eq!(shift(&gpu, b, y, z), 0);
    assert_eq!(cu!(gpu, cuStreamSynchronize(b => Handle)), 0);
    assert_eq!(gpu.download::<f32>(z, 64), values());

    // Without it: a read after an unordered write, then a write after an unordered read.
    assert_eq!(shift(&gpu, a, x, y), 0);
    assert_ne!(shift_now(&gpu, b, y, z), 0);
    assert!(gpu.report().contains("race between streams"), "{}", gpu.report());
    assert_eq!(cu!(gpu, standin_reset()), 0);
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 0);
    assert_eq!(shift(&gpu, a, y, z), 0);
    assert_ne!(shift_now(&gpu, b, x, y), 0);
    assert!(gpu.report().contains("without an event"), "{}", gpu.report());
}

#[test]
fn the_host_orders_streams_by_waiting() {
    let gpu = open("checks=on");
    let (x, y, z) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]), gpu.upload(&[0f32; 64]));
    let (a, b) = (gpu.new_stream(), gpu.new_stream());
    assert_eq!(shift(&gpu, a, x, y), 0);
    assert_eq!(cu!(gpu, cuStreamSynchronize(a => Handle)), 0);
    assert_eq!(shift_now(&gpu, b, y, z), 0);
}

#[test]
fn a_copy_is_part_of_the_order() {
    let gpu = open("checks=on");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    let (a, b) = (gpu.new_stream(), gpu.new_stream());
    assert_eq!(shift(&gpu, a, x, y), 0);
    let fresh = [1f32; 64];
    let from = fresh.as_ptr().cast::<c_void>();
    let code = cu!(gpu, cuMemcpyHtoDAsync_v2(x => u64, from => *const c_void, 256 => usize, b => Handle));
    assert_eq!(code, 0);
    assert_ne!(gpu.wait(), 0);
    // Whichever of the two runs second is reported.
    assert!(gpu.report().contains("race between streams"), "{}", gpu.report());
}

/// Captures `body` on a stream and makes it executable.
fn capture(gpu: &Gpu, stream: Handle, body: impl FnOnce()) -> Result<Handle, c_int> {
    gpu.function(SHIFT); // loads it
    assert_eq!(cu!(gpu, cuStreamBeginCapture_v2(stream => Handle, 1 => c_int)), 0);
    body();
    let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
    match cu!(gpu, cuStreamEndCapture(stream => Handle, &mut graph => *mut Handle)) {
        0 => {}
        code => return Err(code),
    }
    let code =
        cu!(gpu, cuGraphInstantiateWithFlags(&mut executable => *mut Handle, graph => Handle, 0 => u64));
    assert_eq!(code, 0);
    assert_eq!(cu!(gpu, cuGraphDestroy(graph => Handle)), 0);
    Ok(executable)
}

#[test]
fn a_captured_launch_runs_at_each_replay_with_the_bytes_of_its_arguments() {
    let gpu = open("checks=on");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[7f32; 64]));
    let stream = gpu.new_stream();
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 0);
    let mut args = [arg(x), arg(y), arg(64u32)];
    let graph = capture(&gpu, stream, || {
        assert_eq!(gpu.launch_on(stream, SHIFT, 1, 64, 256, &args), 0);
    })
    .unwrap();
    assert_eq!(gpu.download::<f32>(y, 64), [7f32; 64], "a capture runs nothing");
    args[0] = arg(0u64);
    for round in 0..2 {
        let fresh: Vec<f32> = values().iter().map(|v| v + round as f32).collect();
        let from = fresh.as_ptr().cast::<c_void>();
        assert_eq!(cu!(gpu, cuMemcpyHtoD_v2(x => u64, from => *const c_void, 256 => usize)), 0);
        assert_eq!(gpu.wait(), 0);
        assert_eq!(cu!(gpu, cuGraphLaunch(graph => Handle, stream => Handle)), 0);
        assert_eq!(cu!(gpu, cuStreamSynchronize(stream => Handle)), 0);
        assert_eq!(gpu.download::<f32>(y, 64), shifted(&fresh, 32));
    }
    assert_eq!(cu!(gpu, cuGraphExecDestroy(graph => Handle)), 0);
}

#[test]
fn a_graph_of_two_streams_keeps_their_order_and_their_races() {
    let gpu = open("checks=on");
    let (x, y, z) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]), gpu.upload(&[0f32; 64]));
    let (a, b) = (gpu.new_stream(), gpu.new_stream());
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 0);
    let (fork, join) = (gpu.new_event(), gpu.new_event());
    let record = |event: Handle, stream: Handle| {
        assert_eq!(cu!(gpu, cuEventRecord(event => Handle, stream => Handle)), 0)
    };
    let wait = |stream: Handle, event: Handle| {
        assert_eq!(cu!(gpu, cuStreamWaitEvent(stream => Handle, event => Handle, 0 => u32)), 0);
    };
    for early in [true, false] {
        let graph = capture(&gpu, a, || {
            if early {
                record(fork, a);
            }
            assert_eq!(shift(&gpu, a, x, y), 0);
            if !early {
                record(fork, a);
            }
            wait(b, fork);
            assert_eq!(shift(&gpu, b, y, z), 0);
            record(join, b);
            wait(a, join);
        })
        .unwrap();
        assert_eq!(cu!(gpu, cuGraphLaunch(graph => Handle, a => Handle)), 0);
        let code = gpu.wait();
        if early {
            assert_ne!(code, 0, "the fork comes before the write that the other stream reads");
            assert!(gpu.report().contains("race between streams"), "{}", gpu.report());
            assert_eq!(cu!(gpu, standin_reset()), 0);
            assert_eq!(cu!(gpu, cuCtxSynchronize()), 0);
        } else {
            assert_eq!(code, 0, "{}", gpu.report());
            assert_eq!(gpu.download::<f32>(z, 64), values());
        }
    }
}

#[test]
fn faults_come_when_they_are_asked_for() {
    let gpu = open("checks=on,fail_allocation=3,fail_launch=2,fail_code=214");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    assert_eq!(gpu.allocate(64), Err(2));
    assert!(gpu.allocate(64).is_ok(), "only the third one fails");
    assert_eq!(shift_now(&gpu, ptr::null_mut(), x, y), 0);
    assert_eq!(shift_now(&gpu, ptr::null_mut(), x, y), 214);
    // The context is broken: everything fails from now on.
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 214);
    assert_eq!(gpu.allocate(64), Err(214));
    assert_eq!(cu!(gpu, standin_reset()), 0);
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 0);

    gpu.configure("memory=1M");
    assert_eq!(gpu.allocate(2 << 20), Err(2));
    gpu.configure("driver=11040,sm=75");
    let (mut version, mut major) = (0, 0);
    assert_eq!(cu!(gpu, cuDriverGetVersion(&mut version => *mut c_int)), 0);
    assert_eq!(cu!(gpu, cuDeviceGetAttribute(&mut major => *mut c_int, 75 => c_int, 0 => c_int)), 0);
    assert_eq!((version, major), (11040, 7));
    assert_eq!(cu!(gpu, cuDeviceGetAttribute(&mut major => *mut c_int, 75 => c_int, 1 => c_int)), 101);
    gpu.configure("cards=0");
    assert_eq!(cu!(gpu, cuInit(0 => u32)), 100);
    gpu.configure("cards=1");
}

#[test]
fn the_driver_does_not_start_on_demand() {
    let gpu = open("checks=on");
    for code in [34, 100, 803, 4242] {
        gpu.configure(&format!("init_code={code}"));
        assert_eq!(cu!(gpu, cuInit(0 => u32)), code);
    }
    gpu.configure("init_code=0");
    assert_eq!(cu!(gpu, cuInit(0 => u32)), 0);
    let mut text = ptr::null::<u8>();
    assert_eq!(cu!(gpu, cuGetErrorName(34 => c_int, &mut text => *mut *const u8)), 0);
    assert_eq!(cu!(gpu, cuGetErrorName(4242 => c_int, &mut text => *mut *const u8)), 1);
    assert!(text.is_null(), "an unknown code has no name");
}

#[test]
fn a_launch_ends_with_a_code_that_nobody_knows_on_demand() {
    let gpu = open("checks=on,fail_launch=1,fail_code=4242");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    assert_eq!(shift_now(&gpu, ptr::null_mut(), x, y), 4242);
    assert_eq!(cu!(gpu, cuCtxSynchronize()), 4242);
}

#[test]
fn kernels_are_slow_on_demand_by_the_clock_of_events() {
    let gpu = open("checks=on,threads=1");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    let time = || {
        let (start, end) = (gpu.new_event(), gpu.new_event());
        let record = |event: Handle| {
            assert_eq!(cu!(gpu, cuEventRecord(event => Handle, ptr::null_mut() => Handle)), 0);
        };
        record(start);
        assert_eq!(shift(&gpu, ptr::null_mut(), x, y), 0);
        record(end);
        assert_eq!(cu!(gpu, cuEventSynchronize(end => Handle)), 0);
        let mut time = 0f32;
        let code = cu!(gpu, cuEventElapsedTime_v2(&mut time => *mut f32, start => Handle, end => Handle));
        assert_eq!(code, 0);
        time
    };
    let fastest = || (0..3).map(|_| time()).fold(f32::INFINITY, f32::min);
    let fast = fastest();
    gpu.configure("slow_kernels=100000");
    let slow = fastest();
    // So large a factor cannot be noise, and nothing really waited.
    assert!(slow > 50.0 * fast, "{slow} ms, not {fast}");
}

#[test]
fn the_libraries_have_the_names_that_programs_look_for() {
    let folder = vitrum_standin::libraries();
    let target = |name: &str| fs::canonicalize(folder.join(name)).unwrap();
    assert_eq!(target("libcuda.so.1"), target("libcuda.so"));
    for name in ["libcublasLt.so.13", "libcublasLt.so.12"] {
        assert_eq!(target(name), target("libcublasLt.so"));
    }
}

#[test]
fn the_cache_that_a_program_clears_is_small() {
    let gpu = open("checks=on");
    let mut bytes = 0;
    assert_eq!(cu!(gpu, cuDeviceGetAttribute(&mut bytes => *mut c_int, 38 => c_int, 0 => c_int)), 0);
    assert_eq!(bytes, 64 << 10);
}

#[test]
fn a_launch_that_no_card_would_take_is_refused() {
    let gpu = open("checks=on");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    let args = [arg(x), arg(y), arg(64u32)];
    assert_eq!(gpu.launch(SHIFT, 0, 64, 256, &args), 1);
    assert_eq!(gpu.launch(SHIFT, 1, 2048, 256, &args), 1);
    assert_eq!(gpu.launch(SHIFT, 1, 64, 100 << 10, &args), 1, "more shared memory than was allowed");
    let function = gpu.function(SHIFT);
    assert_eq!(cu!(gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, 228 << 10 => c_int)), 1);
    let carveout =
        |percent: c_int| cu!(gpu, cuFuncSetAttribute(function => Handle, 9 => c_int, percent => c_int));
    assert_eq!([-2, -1, 0, 100, 101].map(carveout), [1, 0, 0, 0, 1], "a part of the memory that is no part");
    gpu.configure("sm=80");
    assert_eq!(cu!(gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, 164 << 10 => c_int)), 1);
    assert_eq!(cu!(gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, 163 << 10 => c_int)), 0);
}

#[test]
fn a_card_has_the_limits_of_its_architecture() {
    let gpu = open("checks=on");
    let function = gpu.function(SHIFT);
    // KB of shared memory of a block and of a multiprocessor, blocks and threads of a multiprocessor.
    for (sm, [of_block, of_multiprocessor, blocks, threads]) in [
        (80, [163, 164, 32, 2048]),
        (86, [99, 100, 16, 1536]),
        (87, [163, 164, 16, 1536]),
        (89, [99, 100, 24, 1536]),
        (90, [227, 228, 32, 2048]),
        (100, [227, 228, 32, 2048]),
        (103, [227, 228, 32, 2048]),
        (120, [99, 100, 24, 1536]),
        (121, [99, 100, 24, 1536]),
    ] {
        gpu.configure(&format!("sm={sm}"));
        let attribute = |which: c_int| {
            let mut value = 0;
            assert_eq!(
                cu!(gpu, cuDeviceGetAttribute(&mut value => *mut c_int, which => c_int, 0 => c_int)),
                0
            );
            value
        };
        assert_eq!((attribute(75), attribute(76)), (sm / 10, sm % 10));
        let shared = [97, 81].map(attribute);
        assert_eq!(shared, [of_block << 10, of_multiprocessor << 10], "sm_{sm}");
        assert_eq!([106, 39].map(attribute), [blocks, threads], "sm_{sm}");
        let allow =
            |bytes: c_int| cu!(gpu, cuFuncSetAttribute(function => Handle, 8 => c_int, bytes => c_int));
        assert_eq!((allow(of_block << 10), allow((of_block << 10) + 1)), (0, 1), "sm_{sm}");
        // One block of 64 threads and 1 KB, plus the 1 KB that the system reserves: as many as the smallest
        // limit allows.
        let mut fit = 0;
        let code = cu!(
            gpu,
            cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut fit => *mut c_int, function => Handle, 64 => c_int, 1024 => usize
            )
        );
        assert_eq!((code, fit), (0, blocks.min(threads / 64).min(of_multiprocessor / 2)), "sm_{sm}");
    }
}

#[test]
fn freed_and_discarded_memory_is_not_read() {
    let gpu = open("checks=on");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    assert_eq!(cu!(gpu, standin_discard(x => u64, 256 => usize)), 0);
    assert_ne!(shift_now(&gpu, ptr::null_mut(), x, y), 0);
    assert!(gpu.report().contains("uninitialised"), "{}", gpu.report());
    assert_eq!(cu!(gpu, standin_reset()), 0);
    gpu.free(x);
    assert_ne!(shift_now(&gpu, ptr::null_mut(), x, y), 0);
    assert!(gpu.report().contains("out of bounds"), "{}", gpu.report());
}

#[test]
fn a_barrier_that_is_left_out_is_missed() {
    let gpu = open("checks=on");
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    let source = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/bugs/race_in_block.cu")).unwrap();
    let line = 1 + source.lines().position(|line| line.contains("if (!broken) block_sync();")).unwrap();
    gpu.configure(&format!("skip_barrier=standin/bugs/race_in_block.cu:{line}"));
    assert_ne!(shift_now(&gpu, ptr::null_mut(), x, y), 0);
    assert!(gpu.report().contains("race:"), "{}", gpu.report());
}

#[test]
fn counters_say_what_a_launch_moved() {
    let file = std::env::temp_dir().join(format!("standin-counters-{}.json", std::process::id()));
    let _ = fs::remove_file(&file);
    let gpu = open(&format!("checks=on,counters={}", file.display()));
    let (x, y) = (gpu.upload(&values()), gpu.upload(&[0f32; 64]));
    assert_eq!(shift_now(&gpu, ptr::null_mut(), x, y), 0);
    let line = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    // Two warps read and write 64 floats: 256 bytes are 8 sectors; each word of shared memory has its own bank.
    for part in [
        r#""kernel":"race_in_block_mended""#,
        r#""global_read":{"instructions":2,"bytes":256,"sectors":8,"unique_sectors":8}"#,
        r#""global_write":{"instructions":2,"bytes":256,"sectors":8,"unique_sectors":8}"#,
        r#""shared_read":{"instructions":2,"wavefronts":2,"ideal":2}"#,
        r#""shared_write":{"instructions":4,"wavefronts":4,"ideal":4}"#,
        r#""block_barriers":2"#,
    ] {
        assert!(line.contains(part), "{part} not in {line}");
    }
}
