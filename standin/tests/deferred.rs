//! Work that runs later than it is submitted: what a host may not count on, each with a corrected version, under
//! several orders.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use common::{Gpu, Handle, arg, role, run_again};

/// A kernel of the planted bugs that copies 64 values from `x` to `y`, shifted by 32.
const SHIFT: &str = "race_in_block_mended";
const BYTES: usize = 256;
const NOT_READY: c_int = 600;

/// Rounds of each case: in some of them the GPU begins early, as a real one does.
const ROUNDS: usize = 12;
const SEEDS: [u32; 3] = [1, 2, 3];

fn open(options: &str) -> Gpu {
    Gpu::open(&vitrum_standin::libraries().join("bugs"), options)
}

fn shift(gpu: &Gpu, stream: Handle, x: u64, y: u64) {
    assert_eq!(gpu.launch_on(stream, SHIFT, 1, 64, 256, &[arg(x), arg(y), arg(64u32)]), 0);
}

fn to_card(gpu: &Gpu, to: u64, from: *const c_void, stream: Handle) {
    let code =
        cu!(gpu, cuMemcpyHtoDAsync_v2(to => u64, from => *const c_void, BYTES => usize, stream => Handle));
    assert_eq!(code, 0);
}

fn from_card(gpu: &Gpu, to: *mut c_void, from: u64, stream: Handle) {
    let code =
        cu!(gpu, cuMemcpyDtoHAsync_v2(to => *mut c_void, from => u64, BYTES => usize, stream => Handle));
    assert_eq!(code, 0);
}

fn record(gpu: &Gpu, event: Handle, stream: Handle) {
    assert_eq!(cu!(gpu, cuEventRecord(event => Handle, stream => Handle)), 0);
}

fn wait(gpu: &Gpu, stream: Handle) {
    assert_eq!(cu!(gpu, cuStreamSynchronize(stream => Handle)), 0);
}

/// The values at a page-locked address.
fn values_at(at: *mut c_void) -> &'static mut [f32] {
    // SAFETY: 64 values of page-locked memory, which the test does not free before it has read them.
    unsafe { slice::from_raw_parts_mut(at.cast(), 64) }
}

/// Streams, memory, and the values that a round works with.
struct Bench {
    gpu: Gpu,
    a: Handle,
    b: Handle,
    x: u64,
    y: u64,
    host: *mut c_void,
}

impl Bench {
    fn new(options: &str) -> Self {
        let gpu = open(options);
        gpu.function(SHIFT); // loads it
        let (a, b) = (gpu.new_stream(), gpu.new_stream());
        let (x, y) = (gpu.upload(&[0f32; 64]), gpu.upload(&[0f32; 64]));
        let host = gpu.pinned(BYTES);
        Self { gpu, a, b, x, y, host }
    }

    /// Fills `x` with values of this round.
    fn set(&self, round: usize) -> Vec<f32> {
        let values: Vec<f32> = (0..64).map(|i| (100 * round + i) as f32).collect();
        to_card(&self.gpu, self.x, values.as_ptr().cast(), self.a);
        wait(&self.gpu, self.a);
        values
    }
}

fn shifted(values: &[f32]) -> Vec<f32> {
    [&values[32..], &values[..32]].concat()
}

/// A mistake of a host, or (if not `broken`) the same done correctly. Returns what the host got and what it
/// counted on.
type Mistake = fn(&Bench, usize, bool) -> (Vec<f32>, Vec<f32>);

const MISTAKES: &[(&str, Mistake)] = &[
    ("read before the wait", |t, round, broken| {
        let values = t.set(round);
        shift(&t.gpu, t.a, t.x, t.y);
        from_card(&t.gpu, t.host, t.y, t.a);
        if !broken {
            wait(&t.gpu, t.a);
        }
        let got = values_at(t.host).to_vec();
        wait(&t.gpu, t.a);
        (got, shifted(&values))
    }),
    ("page-locked memory rewritten too early", |t, round, broken| {
        let values: Vec<f32> = (0..64).map(|i| (round + i) as f32).collect();
        values_at(t.host).copy_from_slice(&values);
        to_card(&t.gpu, t.x, t.host, t.a);
        if !broken {
            wait(&t.gpu, t.a);
        }
        values_at(t.host).fill(-1.0);
        wait(&t.gpu, t.a);
        (t.gpu.download(t.x, 64), values)
    }),
    ("page-locked memory written after the copy was submitted", |t, round, broken| {
        let values: Vec<f32> = (0..64).map(|i| (round + i) as f32).collect();
        values_at(t.host).fill(-1.0);
        if !broken {
            values_at(t.host).copy_from_slice(&values);
        }
        to_card(&t.gpu, t.x, t.host, t.a);
        values_at(t.host).copy_from_slice(&values);
        wait(&t.gpu, t.a);
        (t.gpu.download(t.x, 64), values)
    }),
    ("result read after waiting for another stream", |t, round, broken| {
        let values = t.set(round);
        shift(&t.gpu, t.a, t.x, t.y);
        from_card(&t.gpu, t.host, t.y, t.a);
        wait(&t.gpu, if broken { t.b } else { t.a });
        let got = values_at(t.host).to_vec();
        wait(&t.gpu, t.a);
        (got, shifted(&values))
    }),
    ("result read after an event that was recorded before it", |t, round, broken| {
        let values = t.set(round);
        let event = t.gpu.new_event();
        shift(&t.gpu, t.a, t.x, t.y);
        if broken {
            record(&t.gpu, event, t.a);
        }
        from_card(&t.gpu, t.host, t.y, t.a);
        if !broken {
            record(&t.gpu, event, t.a);
        }
        assert_eq!(cu!(t.gpu, cuEventSynchronize(event => Handle)), 0);
        let got = values_at(t.host).to_vec();
        wait(&t.gpu, t.a);
        assert_eq!(cu!(t.gpu, cuEventDestroy_v2(event => Handle)), 0);
        (got, shifted(&values))
    }),
    ("a copy before the event that fills its source", |t, round, broken| {
        // The order of two streams; without it, a race is reported too, which ends the test. Here the copy reads
        // page-locked memory, which no check can see.
        let values = t.set(round);
        let event = t.gpu.new_event();
        from_card(&t.gpu, t.host, t.x, t.a);
        record(&t.gpu, event, t.a);
        if !broken {
            assert_eq!(cu!(t.gpu, cuStreamWaitEvent(t.b => Handle, event => Handle, 0 => u32)), 0);
        }
        to_card(&t.gpu, t.y, t.host, t.b);
        wait(&t.gpu, t.b);
        wait(&t.gpu, t.a);
        assert_eq!(cu!(t.gpu, cuEventDestroy_v2(event => Handle)), 0);
        (t.gpu.download(t.y, 64), values)
    }),
];

#[test]
fn every_mistake_of_a_host_shows_and_its_mended_twin_does_not() {
    for (name, mistake) in MISTAKES {
        for seed in SEEDS {
            let bench = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
            let shows = |broken: bool| {
                (1..=ROUNDS).any(|round| {
                    let (got, want) = mistake(&bench, round, broken);
                    got.iter().map(|v| v.to_bits()).ne(want.iter().map(|v| v.to_bits()))
                })
            };
            assert!(shows(true), "{name}: not noticed with seed {seed}");
            assert!(!shows(false), "{name}: the mended twin, with seed {seed}");
        }
    }
}

#[test]
fn a_seed_repeats_its_order_and_others_have_others() {
    let order = |seed: u32| {
        let bench = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        let rounds = (1..=ROUNDS).map(|round| {
            let (got, want) = MISTAKES[3].1(&bench, round, true);
            got == want
        });
        rounds.collect::<Vec<bool>>()
    };
    let all: Vec<Vec<bool>> = (1..9).map(order).collect();
    assert_eq!(all, (1..9).map(order).collect::<Vec<_>>());
    assert!(all.iter().any(|one| *one != all[0]), "{all:?}");
}

#[test]
fn nothing_is_deferred_on_request() {
    let t = Bench::new("checks=on,threads=1,defer=off");
    for (_, mistake) in MISTAKES.iter().filter(|(name, _)| name.contains("read") || name.contains("early")) {
        let (got, want) = mistake(&t, 1, true);
        assert_eq!(got, want);
    }
    // Errors are those of the call.
    let args = [arg(0u64), arg(t.y), arg(64u32)];
    assert_eq!(t.gpu.launch_on(t.a, SHIFT, 1, 64, 256, &args), 700);
}

#[test]
fn time_is_measured_between_points_that_were_passed() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        let [start, end] = [t.gpu.new_event(), t.gpu.new_event()];
        let elapsed = || {
            let mut time = -1f32;
            let code =
                cu!(t.gpu, cuEventElapsedTime_v2(&mut time => *mut f32, start => Handle, end => Handle));
            (code, time)
        };
        assert_eq!(elapsed().0, 400, "neither was recorded");
        let mut early = 0;
        for _ in 0..ROUNDS {
            record(&t.gpu, start, t.a);
            shift(&t.gpu, t.a, t.x, t.y);
            record(&t.gpu, end, t.a);
            early += u32::from(elapsed().0 == NOT_READY);
            assert_eq!(cu!(t.gpu, cuEventSynchronize(end => Handle)), 0);
            let (code, time) = elapsed();
            assert!(code == 0 && time > 0.0, "{code}: {time}");
        }
        assert!(early > 0, "seed {seed}");
    }
}

#[test]
fn a_poll_says_now_and_then_that_work_is_done() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        let event = t.gpu.new_event();
        assert_eq!(cu!(t.gpu, cuEventQuery(event => Handle)), 0, "never recorded");
        let ask_event = || cu!(t.gpu, cuEventQuery(event => Handle));
        let ask_stream = || cu!(t.gpu, cuStreamQuery(t.a => Handle));
        for (round, ask) in [&ask_event as &dyn Fn() -> c_int, &ask_stream].into_iter().enumerate() {
            let mut waited = 0;
            for more in 0..ROUNDS {
                let values = t.set(round + more);
                shift(&t.gpu, t.a, t.x, t.y);
                from_card(&t.gpu, t.host, t.y, t.a);
                record(&t.gpu, event, t.a);
                loop {
                    match ask() {
                        0 => break,
                        NOT_READY => waited += 1,
                        other => panic!("{other}"),
                    }
                }
                // It is a wait: the result is there, and other streams may use it.
                assert_eq!(values_at(t.host), shifted(&values));
                shift(&t.gpu, t.b, t.y, t.x);
                wait(&t.gpu, t.b);
            }
            assert!(waited > 0, "seed {seed}");
        }
    }
}

#[test]
fn errors_come_with_the_next_wait_and_stay() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        let event = t.gpu.new_event();
        // What is wrong with the launch itself is said at once, and breaks nothing.
        assert_eq!(t.gpu.launch_on(t.a, SHIFT, 0, 64, 256, &[arg(t.x), arg(t.y), arg(64u32)]), 1);
        shift(&t.gpu, t.a, t.x, t.y);
        shift(&t.gpu, t.a, 0, t.y);
        record(&t.gpu, event, t.a);
        // Work after the error never runs.
        from_card(&t.gpu, t.host, t.y, t.a);
        assert_eq!(cu!(t.gpu, cuEventSynchronize(event => Handle)), 700);
        let report = t.gpu.report();
        assert!(report.contains(SHIFT) && report.contains("launch 2"), "{report}");
        assert_eq!(cu!(t.gpu, cuStreamSynchronize(t.b => Handle)), 700);
        assert_eq!(cu!(t.gpu, cuStreamQuery(t.a => Handle)), 700);
        assert_eq!(t.gpu.wait(), 700);
        assert!(values_at(t.host).iter().all(|v| v.to_bits() == u32::MAX), "half of a copy");
    }
}

#[test]
fn pageable_memory_is_staged_and_filled_before_the_call_returns() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        for round in 0..ROUNDS {
            let mut values: Vec<f32> = (0..64).map(|i| (round * i) as f32).collect();
            let want = shifted(&values);
            to_card(&t.gpu, t.x, values.as_ptr().cast(), t.a);
            values.fill(-1.0);
            shift(&t.gpu, t.a, t.x, t.y);
            from_card(&t.gpu, values.as_mut_ptr().cast(), t.y, t.a);
            assert_eq!(values, want);
            wait(&t.gpu, t.a);
        }
        // Registered memory is page-locked until it is not.
        let mut plain = vec![1f32; 64];
        let at = plain.as_mut_ptr().cast::<c_void>();
        assert_eq!(cu!(t.gpu, cuMemHostRegister_v2(at => *mut c_void, BYTES => usize, 0 => u32)), 0);
        let shows = (0..ROUNDS).any(|_| {
            values_at(at).fill(1.0);
            to_card(&t.gpu, t.x, at, t.a);
            values_at(at).fill(2.0);
            wait(&t.gpu, t.a);
            t.gpu.download::<f32>(t.x, 64) == [2f32; 64]
        });
        assert!(shows, "seed {seed}");
        assert_eq!(cu!(t.gpu, cuMemHostUnregister(at => *mut c_void)), 0);
        to_card(&t.gpu, t.x, at, t.a);
        plain.fill(3.0);
        wait(&t.gpu, t.a);
        assert_eq!(t.gpu.download::<f32>(t.x, 64), [2f32; 64]);
    }
}

#[test]
fn a_copy_from_pageable_memory_on_the_default_stream_is_not_waited_for() {
    // The manual: the call may return before the last part of the copy has arrived.
    let t = Bench::new("checks=on,threads=1");
    let values = [5f32; 64];
    let from = values.as_ptr().cast::<c_void>();
    assert_eq!(cu!(t.gpu, cuMemcpyHtoD_v2(t.x => u64, from => *const c_void, BYTES => usize)), 0);
    shift(&t.gpu, t.a, t.x, t.y);
    assert_eq!(t.gpu.wait(), 719);
    assert!(t.gpu.report().contains("race between streams"), "{}", t.gpu.report());
}

#[test]
fn what_is_destroyed_in_flight_is_destroyed_later() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        for round in 1..=ROUNDS {
            let values = t.set(round);
            let (stream, event) = (t.gpu.new_stream(), t.gpu.new_event());
            // A graph of one launch.
            let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
            assert_eq!(cu!(t.gpu, cuStreamBeginCapture_v2(stream => Handle, 1 => c_int)), 0);
            shift(&t.gpu, stream, t.x, t.y);
            assert_eq!(cu!(t.gpu, cuStreamEndCapture(stream => Handle, &mut graph => *mut Handle)), 0);
            let code = cu!(t.gpu, cuGraphInstantiateWithFlags(
                &mut executable => *mut Handle, graph => Handle, 0 => u64));
            assert_eq!(code, 0);
            assert_eq!(cu!(t.gpu, cuGraphLaunch(executable => Handle, stream => Handle)), 0);
            record(&t.gpu, event, stream);
            assert_eq!(cu!(t.gpu, cuStreamWaitEvent(t.b => Handle, event => Handle, 0 => u32)), 0);
            // All of them, before anything has run.
            assert_eq!(cu!(t.gpu, cuGraphDestroy(graph => Handle)), 0);
            assert_eq!(cu!(t.gpu, cuGraphExecDestroy(executable => Handle)), 0);
            assert_eq!(cu!(t.gpu, cuEventDestroy_v2(event => Handle)), 0);
            assert_eq!(cu!(t.gpu, cuStreamDestroy_v2(stream => Handle)), 0);
            from_card(&t.gpu, t.host, t.y, t.b);
            wait(&t.gpu, t.b);
            assert_eq!(values_at(t.host), shifted(&values));
        }
        // Waiting for the context includes streams that are no more.
        let stream = t.gpu.new_stream();
        shift(&t.gpu, stream, t.x, t.y);
        assert_eq!(cu!(t.gpu, cuStreamDestroy_v2(stream => Handle)), 0);
        assert_eq!(t.gpu.wait(), 0);
        shift(&t.gpu, t.a, t.y, t.x);
        wait(&t.gpu, t.a);
    }
}

#[test]
fn memory_is_freed_when_nothing_uses_it() {
    for seed in SEEDS {
        let t = Bench::new(&format!("checks=on,threads=1,defer={seed}"));
        // cuMemFree waits for all work.
        let (x, values) = (t.gpu.upload(&[4f32; 64]), [4f32; 64]);
        shift(&t.gpu, t.a, x, t.y);
        t.gpu.free(x);
        wait(&t.gpu, t.a);
        assert_eq!(t.gpu.download::<f32>(t.y, 64), values);
        // cuMemFreeAsync frees in the order of its stream.
        let allocate = || {
            let mut x = 0u64;
            let code = cu!(t.gpu, cuMemAllocAsync(&mut x => *mut u64, BYTES => usize, t.a => Handle));
            assert_eq!(code, 0);
            to_card(&t.gpu, x, values.as_ptr().cast(), t.a);
            x
        };
        let free = |x: u64| assert_eq!(cu!(t.gpu, cuMemFreeAsync(x => u64, t.a => Handle)), 0);
        let x = allocate();
        shift(&t.gpu, t.a, x, t.y);
        free(x);
        wait(&t.gpu, t.a);
        let x = allocate();
        free(x);
        shift(&t.gpu, t.a, x, t.y);
        assert_eq!(t.gpu.wait(), 700, "seed {seed}");
        let report = t.gpu.report();
        assert!(report.contains("out of bounds") && report.contains("freed by cuMemFreeAsync"), "{report}");
    }
}

#[test]
fn launches_of_one_graph_follow_each_other() {
    let t = Bench::new("checks=on,threads=1");
    let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
    assert_eq!(cu!(t.gpu, cuStreamBeginCapture_v2(t.a => Handle, 1 => c_int)), 0);
    shift(&t.gpu, t.a, t.x, t.y);
    assert_eq!(cu!(t.gpu, cuStreamEndCapture(t.a => Handle, &mut graph => *mut Handle)), 0);
    let code =
        cu!(t.gpu, cuGraphInstantiateWithFlags(&mut executable => *mut Handle, graph => Handle, 0 => u64));
    assert_eq!(code, 0);
    for stream in [t.a, t.b, t.a] {
        assert_eq!(cu!(t.gpu, cuGraphLaunch(executable => Handle, stream => Handle)), 0);
    }
    assert_eq!(t.gpu.wait(), 0, "{}", t.gpu.report());
}

#[test]
fn more_work_than_a_driver_takes_runs_in_the_meantime() {
    let t = Bench::new("checks=bounds,threads=1");
    for _ in 0..5000 {
        let code = cu!(t.gpu, cuMemsetD8Async(t.y => u64, 7 => u8, BYTES => usize, t.a => Handle));
        assert_eq!(code, 0);
    }
    from_card(&t.gpu, t.host, t.y, t.a);
    wait(&t.gpu, t.a);
    assert!(values_at(t.host).iter().all(|v| v.to_bits() == 0x0707_0707));
}

/// Page-locked memory and modules that go while a queued operation uses them: the calls, and the report.
const GONE: [(&str, &[&str]); 4] = [
    (
        "freed under a copy to the card",
        &["cuMemFreeHost: page-locked allocation 1", "the copy that cuMemcpyHtoDAsync_v2 submitted"],
    ),
    (
        "freed under a copy from the card",
        &["cuMemFreeHost: page-locked allocation 1", "the copy that cuMemcpyDtoHAsync_v2 submitted"],
    ),
    (
        "unregistered",
        &["cuMemHostUnregister: registered range 1", "the copy that cuMemcpyHtoDAsync_v2 submitted"],
    ),
    ("unloaded", &["cuLaunchKernel: function 2", "its module, module 2", "was unloaded by cuModuleUnload"]),
];

#[test]
fn what_goes_while_it_is_used_ends_with_a_report_and_later_it_may_go() {
    let this = "what_goes_while_it_is_used_ends_with_a_report_and_later_it_may_go";
    if let Some(role) = role() {
        let (which, how) = role.split_once(": ").unwrap();
        return go(which, how == "broken");
    }
    for (which, says) in GONE {
        let (aborted, said) = run_again(this, &format!("{which}: broken"));
        assert!(aborted && says.iter().all(|part| said.contains(part)), "{which}, {aborted}: {said}");
        let (aborted, said) = run_again(this, &format!("{which}: mended"));
        assert!(!aborted && !said.contains("stand-in GPU"), "{which}, {aborted}: {said}");
    }
}

fn go(which: &str, broken: bool) {
    let t = Bench::new("checks=on,threads=1");
    let mut plain = [0f32; 64];
    let registered = plain.as_mut_ptr().cast::<c_void>();
    let module = t.gpu.load();
    match which {
        "freed under a copy to the card" => to_card(&t.gpu, t.x, t.host, t.a),
        "freed under a copy from the card" => from_card(&t.gpu, t.host, t.x, t.a),
        "unregistered" => {
            let code = cu!(t.gpu, cuMemHostRegister_v2(registered => *mut c_void, BYTES => usize, 0 => u32));
            assert_eq!(code, 0);
            to_card(&t.gpu, t.x, registered, t.a);
        }
        _ => {
            let function = t.gpu.function_of(module, SHIFT);
            let args = [arg(t.x), arg(t.y), arg(64u32)];
            assert_eq!(t.gpu.launch_function(function, t.a, 1, 64, 256, &args), 0);
        }
    }
    if !broken {
        wait(&t.gpu, t.a);
    }
    let code = match which {
        "unregistered" => cu!(t.gpu, cuMemHostUnregister(registered => *mut c_void)),
        "unloaded" => cu!(t.gpu, cuModuleUnload(module => Handle)),
        _ => cu!(t.gpu, cuMemFreeHost(t.host => *mut c_void)),
    };
    assert_eq!(code, 0);
    wait(&t.gpu, t.a);
}
