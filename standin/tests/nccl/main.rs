//! libnccl.so.2 between processes: collectives, messages, splits, captured steps with the right bits; and each mistake
//! of a program, or of a rank, caught where a correct twin passes.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
#[macro_use]
mod ranks;

use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::time::{Duration, Instant};

use common::Handle;
use ranks::*;

// ---- A captured step --------------------------------------------------------------------------------------

/// More than a piece of the shared memory for each rank.
const BUCKET: usize = (600 << 10) + 64;

const STEP: &str = "a_captured_step_has_the_right_bits_and_each_of_its_bugs_is_caught";

#[test]
fn a_captured_step_has_the_right_bits_and_each_of_its_bugs_is_caught() {
    if let Some(rank) = Rank::here() {
        rank.run(step);
    }
    for (size, options) in [(2, "defer=1"), (2, "defer=3"), (4, "defer=2"), (2, "defer=off")] {
        pass(STEP, "right", size, options);
    }
    caught(STEP, "bucket still written", 2, "", &["race between streams"]);
    caught(STEP, "mismatched", 2, "", &["differs: rank", "calls ncclAllReduce of", "ncclReduceScatter of"]);
    caught(STEP, "offset", 2, "", &["ncclReduceScatter in place at the wrong offset"]);
    caught(STEP, "unjoined", 2, "", &[]);
    caught(STEP, "destroyed first", 2, "", &["ncclCommDestroy: 2 of its operations are in live graphs"]);
    caught(STEP, "read too early", 2, "", &["race between streams"]);
}

/// Copies gradients, sums and scatters them on a second stream, gathers the sums; captured, and replayed five times.
fn step(rank: &Rank) {
    let (r, size, gpu) = (rank.rank, rank.size, &rank.gpu);
    let comm = rank.join();
    let (compute, side) = (gpu.new_stream(), gpu.new_stream());
    let (ready, done) = (gpu.new_event(), gpu.new_event());
    let source = gpu.upload(&values(BUCKET, r));
    let bucket = gpu.upload(&vec![0f32; BUCKET]);
    let copy = gpu.upload(&vec![0f32; BUCKET]);
    let (bytes, shard) = (BUCKET * 4, BUCKET / size);
    let at = |rank: usize| bucket + (rank * shard * 4) as u64;

    let code = cu!(gpu, cuStreamBeginCapture_v2(compute => Handle, 1 => c_int));
    assert_eq!(code, 0);
    rank.copy(bucket, source, bytes, compute);
    rank.record(ready, compute);
    rank.wait_for(side, ready);
    if rank.is("bucket still written") {
        rank.copy(bucket, source, bytes, compute);
    }
    if rank.is("offset") {
        assert_eq!(rank.reduce_scatter(bucket, at((r + 1) % size), shard, comm, side), 4);
    }
    if rank.is("mismatched") && r == 1 {
        assert_eq!(rank.all_reduce(bucket, bucket, BUCKET, F32, SUM, comm, side), OK);
    } else {
        assert_eq!(rank.reduce_scatter(bucket, at(r), shard, comm, side), OK);
    }
    assert_eq!(rank.all_gather(at(r), bucket, shard, comm, side), OK);
    if rank.is("read too early") {
        rank.copy(copy, bucket, bytes, compute);
    }
    rank.record(done, side);
    if !rank.is("unjoined") {
        rank.wait_for(compute, done);
    }
    let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
    let code = cu!(gpu, cuStreamEndCapture(compute => Handle, &mut graph => *mut Handle));
    if rank.is("unjoined") {
        assert_eq!(code, 904);
        return;
    }
    assert_eq!(code, 0);
    assert_eq!(cu!(gpu, cuGraphInstantiateWithFlags(&mut exec => *mut Handle, graph => Handle, 0 => u64)), 0);
    assert_eq!(cu!(gpu, cuGraphDestroy(graph => Handle)), 0);
    let mut code = 0;
    for _ in 0..5 {
        if code == 0 {
            code = cu!(gpu, cuGraphLaunch(exec => Handle, compute => Handle));
        }
    }
    if code == 0 {
        code = rank.synchronize(compute);
    }
    let race = rank.is("bucket still written") || rank.is("read too early");
    if race || rank.is("mismatched") {
        // One rank's report ends the other one's wait, too.
        let state = rank.state(comm);
        assert!(code == 719 || state != OK, "{code}, {state}");
        return;
    }
    assert_eq!(code, 0);
    let got = gpu.download::<f32>(bucket, BUCKET);
    let want: Vec<f32> =
        (0..BUCKET).map(|i| if i < shard * size { sum(i, size) } else { value(i, r) }).collect();
    assert!(bits(&got) == bits(&want), "the bits of sums in rank order");
    if rank.is("destroyed first") {
        assert_eq!(rank.destroy(comm), 3);
    }
    assert_eq!(cu!(gpu, cuGraphExecDestroy(exec => Handle)), 0);
    assert_eq!(rank.destroy(comm), OK);
}

// ---- Other operations -------------------------------------------------------------------------------------

const OPERATIONS: &str = "every_operation_computes_what_it_says";

#[test]
fn every_operation_computes_what_it_says() {
    if let Some(rank) = Rank::here() {
        rank.run(operations);
    }
    pass(OPERATIONS, "all", 2, "");
    pass(OPERATIONS, "all", 4, "defer=5");
    pass(OPERATIONS, "all", 1, "");
}

fn operations(rank: &Rank) {
    let (r, size, gpu) = (rank.rank, rank.size, &rank.gpu);
    let comm = rank.join();
    let stream = gpu.new_stream();
    let (mut own, mut count) = (-1, -1);
    assert_eq!(nc!(rank, ncclCommUserRank(comm => Handle, &mut own => *mut c_int)), OK);
    assert_eq!(nc!(rank, ncclCommCount(comm => Handle, &mut count => *mut c_int)), OK);
    assert_eq!((own as usize, count as usize), (r, size));

    // Reductions of each type.
    let floats = gpu.upload(&values(1000, r));
    let doubles = gpu.upload(&values(1000, r).iter().map(|v| f64::from(*v) / 3.0).collect::<Vec<_>>());
    let bytes = gpu.upload(&(0..1000).map(|i| (i * 7 + r * 31) as u8).collect::<Vec<_>>());
    let ints = gpu.upload(&(0..1000).map(|i| i * 1000 - r as i32).collect::<Vec<_>>());
    let halves = gpu.upload(&values(1000, r).iter().map(|v| (v.to_bits() >> 16) as u16).collect::<Vec<_>>());
    let out = gpu.upload(&[0f64; 1000]);
    let reduce = |from: u64, dtype: c_int, op: c_int| {
        assert_eq!(rank.all_reduce(from, out, 1000, dtype, op, comm, stream), OK);
        assert_eq!(rank.synchronize(stream), 0);
    };
    let fold = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
        (0..1000).map(|i| (1..size).fold(value(i, 0), |a, rank| f(a, value(i, rank)))).collect()
    };
    for (op, want) in [(SUM, fold(&|a, b| a + b)), (MAX, fold(&f32::max)), (MIN, fold(&f32::min))] {
        reduce(floats, F32, op);
        assert_eq!(bits(&gpu.download::<f32>(out, 1000)), bits(&want), "{op}");
    }
    reduce(doubles, F64, SUM);
    let want = |i: usize| {
        (1..size).fold(f64::from(value(i, 0)) / 3.0, |a, rank| a + f64::from(value(i, rank)) / 3.0)
    };
    assert_eq!(gpu.download::<f64>(out, 1000), (0..1000).map(want).collect::<Vec<_>>());
    reduce(bytes, U8, SUM);
    let want = |i: usize| (0..size).fold(0u8, |a, rank| a.wrapping_add((i * 7 + rank * 31) as u8));
    assert_eq!(gpu.download::<u8>(out, 1000), (0..1000).map(want).collect::<Vec<_>>());
    reduce(ints, I32, MIN);
    let want = |i: usize| i as i32 * 1000 - (size as i32 - 1);
    assert_eq!(gpu.download::<i32>(out, 1000), (0..1000).map(want).collect::<Vec<_>>());
    reduce(halves, BF16, SUM);
    for (i, got) in gpu.download::<u16>(out, 1000).into_iter().enumerate() {
        let got = f32::from_bits(u32::from(got) << 16);
        assert!((got - sum(i, size)).abs() < 0.03, "{i}: {got} and {}", sum(i, size));
    }

    // Operations of one communicator run in the order of their calls, whatever the host waits for first.
    let (first, second) = (gpu.new_stream(), gpu.new_stream());
    let [a, b] = [0, 1].map(|_| gpu.upload(&values(1000, r)));
    assert_eq!(rank.all_reduce(a, a, 1000, F32, SUM, comm, first), OK);
    assert_eq!(rank.all_reduce(b, b, 500, F32, MAX, comm, second), OK);
    for stream in if r % 2 == 0 { [first, second] } else { [second, first] } {
        assert_eq!(rank.synchronize(stream), 0);
    }
    let want = |op: &dyn Fn(f32, f32) -> f32, count: usize| bits(&fold(op)[..count]);
    assert_eq!(bits(&gpu.download::<f32>(a, 1000)), want(&|a, b| a + b, 1000));
    assert_eq!(bits(&gpu.download::<f32>(b, 500)), want(&f32::max, 500));

    // A broadcast from the last rank, a gathering of all, an exchange of parts as one group.
    let whole = gpu.upload(&vec![0f32; 1000 * size]);
    let code = nc!(rank, ncclBroadcast(floats => u64, out => u64, 1000 => usize, F32 => c_int,
        (size - 1) as c_int => c_int, comm => Handle, stream => Handle));
    assert_eq!(code, OK);
    assert_eq!(rank.all_gather(floats, whole, 1000, comm, stream), OK);
    assert_eq!(rank.synchronize(stream), 0);
    assert_eq!(gpu.download::<f32>(out, 1000), values(1000, size - 1));
    assert_eq!(
        gpu.download::<f32>(whole, 1000 * size),
        (0..size).flat_map(|r| values(1000, r)).collect::<Vec<_>>()
    );
    let code = rank.group(|| {
        for other in 0..size {
            let at = whole + (other * 4000) as u64;
            assert_eq!(rank.send(floats, 1000 - other, other, comm, stream), OK);
            assert_eq!(rank.receive(at, 1000 - r, other, comm, stream), OK);
        }
    });
    assert_eq!(code, OK);
    assert_eq!(rank.synchronize(stream), 0);
    for (other, got) in gpu.download::<f32>(whole, 1000 * size).chunks(1000).enumerate() {
        assert_eq!(got[..1000 - r], values(1000, other)[..1000 - r]);
    }
    // Messages that are larger than what fits between two ranks, two in one direction.
    if size > 1 {
        let many = 100_000;
        let (from, to) = (gpu.upload(&values(2 * many, r)), gpu.upload(&vec![0f32; 2 * many]));
        let (next, before) = ((r + 1) % size, (r + size - 1) % size);
        let code = rank.group(|| {
            for half in [0, many] {
                assert_eq!(rank.send(from + (half * 4) as u64, many, next, comm, stream), OK);
                assert_eq!(rank.receive(to + (half * 4) as u64, many, before, comm, stream), OK);
            }
        });
        assert_eq!((code, rank.synchronize(stream)), (OK, 0));
        assert!(gpu.download::<f32>(to, 2 * many) == values(2 * many, before));
    }

    // Halves of the ranks, in the opposite order; nobody's part has none.
    let mut part = ptr::null_mut();
    let split = |color: usize, key: usize, part: &mut Handle| {
        nc!(rank, ncclCommSplit(comm => Handle, color as c_int => c_int, key as c_int => c_int, part => *mut Handle,
            ptr::null() => *const Config))
    };
    assert_eq!(split(r % 2, size - r, &mut part), OK);
    let members: Vec<usize> = (0..size).rev().filter(|other| other % 2 == r % 2).collect();
    assert_eq!(rank.all_gather(floats, whole, 1000, part, stream), OK);
    assert_eq!(rank.synchronize(stream), 0);
    let want: Vec<f32> = members.iter().flat_map(|r| values(1000, *r)).collect();
    assert_eq!(gpu.download::<f32>(whole, want.len()), want);
    let mut none = ptr::null_mut();
    let code = if r == 0 {
        nc!(rank, ncclCommSplit(comm => Handle, -1 => c_int, 0 => c_int, &mut none => *mut Handle, ptr::null() => *const Config))
    } else {
        split(0, 0, &mut none)
    };
    assert_eq!((code, none.is_null()), (OK, r == 0));
    assert_eq!(rank.destroy(part), OK);
    assert_eq!(nc!(rank, ncclCommFinalize(comm => Handle)), OK);
    assert_eq!(rank.destroy(comm), OK);
}

const MESSAGES: &str = "messages_that_do_not_fit_are_caught";

#[test]
fn messages_that_do_not_fit_are_caught() {
    if let Some(rank) = Rank::here() {
        rank.run(messages);
    }
    pass(MESSAGES, "right", 2, "");
    caught(MESSAGES, "one by one", 2, "nccl_timeout=1", &["waits in ncclSend for rank"]);
    caught(
        MESSAGES,
        "other sizes",
        2,
        "nccl_timeout=2",
        &["receives 4000 bytes from rank", "which sends 3996"],
    );
    caught(MESSAGES, "two streams", 2, "", &["a group with one communicator on two streams"]);
    caught(MESSAGES, "captured in part", 2, "", &["a group that is captured in part"]);
    caught(MESSAGES, "over what is sent", 2, "", &["ncclRecv writes what ncclSend of the same group uses"]);
}

fn messages(rank: &Rank) {
    let (gpu, other) = (&rank.gpu, 1 - rank.rank);
    let comm = rank.join();
    let stream = gpu.new_stream();
    let (from, to) = (gpu.upload(&values(1000, rank.rank)), gpu.upload(&[0f32; 1000]));
    if rank.is("one by one") {
        assert_eq!(rank.send(from, 1000, other, comm, stream), OK);
        assert_eq!(rank.receive(to, 1000, other, comm, stream), OK);
        assert_eq!(rank.synchronize(stream), 719);
        return;
    }
    if rank.is("captured in part") {
        let mut pair = ptr::null_mut();
        let code = nc!(rank, ncclCommSplit(comm => Handle, 0 => c_int, 0 => c_int, &mut pair => *mut Handle,
            ptr::null() => *const Config));
        assert_eq!(code, OK);
        let captured = gpu.new_stream();
        assert_eq!(cu!(gpu, cuStreamBeginCapture_v2(captured => Handle, 1 => c_int)), 0);
        let code = rank.group(|| {
            assert_eq!(rank.all_reduce(from, from, 1000, F32, SUM, comm, captured), OK);
            assert_eq!(rank.all_reduce(to, to, 1000, F32, SUM, pair, stream), OK);
        });
        assert_eq!(code, 5);
        return;
    }
    let count = if rank.is("other sizes") && rank.rank == 0 { 999 } else { 1000 };
    let to = if rank.is("over what is sent") { from } else { to };
    let second = if rank.is("two streams") { gpu.new_stream() } else { stream };
    let code = rank.group(|| {
        assert_eq!(rank.send(from, count, other, comm, stream), OK);
        assert_eq!(rank.receive(to, 1000, other, comm, second), OK);
    });
    if rank.is("over what is sent") || rank.is("two streams") {
        assert_eq!(code, 5);
        return;
    }
    let code = rank.synchronize(stream);
    if rank.is("other sizes") {
        assert!(code == 719 || rank.state(comm) != OK);
        return;
    }
    assert_eq!(code, 0);
    assert_eq!(gpu.download::<f32>(to, 1000), values(1000, other));
    assert_eq!(rank.destroy(comm), OK);
}

// ---- Ranks that fail --------------------------------------------------------------------------------------

const PEERS: &str = "ranks_that_die_hang_fail_or_compute_wrongly_are_seen_as_with_nccl";

#[test]
fn ranks_that_die_hang_fail_or_compute_wrongly_are_seen_as_with_nccl() {
    if let Some(rank) = Rank::here() {
        rank.run(peers);
    }
    pass(PEERS, "well", 2, "");
    caught(PEERS, "dies", 2, "nccl_fault=1:3:die", &["rank 0", "rank 1", "is dead"]);
    caught(PEERS, "hangs", 2, "nccl_fault=1:3:hang", &["rank 1 hangs in operation 3, on demand"]);
    let named = [
        "rank 0 waits in ncclAllReduce for rank 1, which has not come within 1 s (it is at operation 2, we are at 3)",
    ];
    caught(PEERS, "hangs long", 2, "nccl_fault=1:3:hang,nccl_timeout=1", &named);
    caught(PEERS, "fails", 2, "nccl_fault=1:3:error", &["operation 3 fails on demand", "rank 1 has failed"]);
    caught(PEERS, "flips", 2, "nccl_fault=1:3:flip", &[]);
}

/// Four sums, one of which may go wrong on rank 1.
fn peers(rank: &Rank) {
    let gpu = &rank.gpu;
    let comm = rank.join();
    let (stream, event) = (gpu.new_stream(), gpu.new_event());
    let (from, to) = (gpu.upload(&values(1000, rank.rank)), gpu.upload(&[0f32; 1000]));
    let query = || cu!(gpu, cuEventQuery(event => Handle));
    for number in 1..=4 {
        let code = rank.all_reduce(from, to, 1000, F32, SUM, comm, stream);
        if code == 6 && rank.rank == 0 && number == 3 && (rank.is("fails") || rank.is("dies")) {
            return; // rank 1 was faster
        }
        assert_eq!(code, OK);
        rank.record(event, stream);
        if number == 3 && rank.is("fails") {
            let want = if rank.rank == 1 { 2 } else { 6 };
            let end = Instant::now() + Duration::from_secs(30);
            let mut code = NOT_READY;
            while rank.state(comm) == OK && Instant::now() < end {
                code = query();
            }
            assert_eq!(rank.state(comm), want, "{code}");
            return;
        }
        if number == 3 && rank.rank == 1 && rank.is("hangs") {
            // The other one may go once it has seen this.
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                assert_eq!(query(), NOT_READY);
            }
            return;
        }
        if number == 3 && rank.rank == 1 && rank.is("hangs long") {
            while query() == NOT_READY {
                std::thread::sleep(Duration::from_millis(10));
                if rank.state(comm) != OK || rank.id.with_extension("seen").exists() {
                    return;
                }
            }
        }
        if number == 3 && rank.is("dies") {
            // Rank 1 ends here. The GPU of rank 0 waits for ever; only NCCL's state tells.
            let end = Instant::now() + Duration::from_secs(30);
            while rank.state(comm) == OK && Instant::now() < end {
                assert_eq!(query(), NOT_READY);
            }
            assert_eq!((rank.rank, rank.state(comm), query()), (0, 6, NOT_READY));
            return;
        }
        if number == 3 && rank.is("hangs") {
            let end = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                assert_eq!((query(), rank.state(comm)), (NOT_READY, OK));
                // Other threads of the host go on meanwhile.
                gpu.allocate(64).unwrap();
            }
            return;
        }
        let code = rank.synchronize(stream);
        if number == 3 && rank.is("hangs long") {
            assert_eq!((code, rank.state(comm)), (719, 3));
            std::fs::write(rank.id.with_extension("seen"), "").unwrap();
            return;
        }
        assert_eq!(code, 0);
        let got = gpu.download::<f32>(to, 1000);
        let want: Vec<f32> = (0..1000).map(|i| sum(i, rank.size)).collect();
        let flipped: u32 = got.iter().zip(&want).map(|(a, b)| (a.to_bits() ^ b.to_bits()).count_ones()).sum();
        assert_eq!(flipped, u32::from(number == 3 && rank.rank == 1 && rank.is("flips")));
    }
    assert_eq!(rank.destroy(comm), OK);
}

// ---- Making a communicator --------------------------------------------------------------------------------

const MAKING: &str = "a_communicator_is_made_without_blocking_and_by_the_rules";

#[test]
fn a_communicator_is_made_without_blocking_and_by_the_rules() {
    if let Some(rank) = Rank::here() {
        rank.run(making);
    }
    pass(MAKING, "right", 2, "");
    pass(MAKING, "slow calls", 2, "nccl_progress=3");
    caught(MAKING, "hurried", 2, "nccl_progress=3", &["an earlier call is still in progress"]);
    caught(MAKING, "alone", 2, "nccl_fault=1:0:hang", &[]);
    caught(MAKING, "one GPU", 2, "bus=9", &["duplicate GPU: rank"]);
    caught(MAKING, "twice", 2, "", &["rank 0 has already joined"]);
    caught(MAKING, "no config", 1, "", &["a config that was not initialised"]);
    let (ended, said) = {
        let done = ranks(MAKING, "after the end", 1, "").remove(0);
        (done.signal, done.said)
    };
    assert_eq!(ended, Some(6), "{said}");
    assert!(said.contains("a communicator that ncclCommDestroy has ended"), "{said}");
}

fn making(rank: &Rank) {
    let gpu = &rank.gpu;
    let mut config = Config::new(0);
    if rank.is("no config") {
        config.magic = 0;
        assert_eq!(rank.init(0, &config).0, 4);
        return;
    }
    let as_rank = if rank.is("twice") { 0 } else { rank.rank };
    let (code, comm) = rank.init(as_rank, &config);
    if rank.is("twice") {
        assert!(code == 5 || rank.state(comm) == IN_PROGRESS);
        return;
    }
    assert_eq!(code, IN_PROGRESS);
    if rank.is("alone") {
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            assert_eq!(rank.state(comm), IN_PROGRESS);
        }
        return;
    }
    let state = rank.state_after(comm, IN_PROGRESS);
    if rank.is("one GPU") {
        assert_eq!(state, 5);
        return;
    }
    assert_eq!(state, OK);
    let stream = gpu.new_stream();
    let (from, to) = (gpu.upload(&values(1000, rank.rank)), gpu.upload(&[0f32; 1000]));
    let slow = rank.is("slow calls") || rank.is("hurried");
    let code = rank.all_reduce(from, to, 1000, F32, SUM, comm, stream);
    assert_eq!(code, if slow { IN_PROGRESS } else { OK });
    if rank.is("hurried") {
        assert_eq!(rank.all_reduce(from, to, 1000, F32, SUM, comm, stream), 4);
        return;
    }
    assert_eq!(rank.state_after(comm, IN_PROGRESS), OK);
    assert_eq!(rank.synchronize(stream), 0);
    assert_eq!(gpu.download::<f32>(to, 1000), (0..1000).map(|i| sum(i, rank.size)).collect::<Vec<_>>());
    assert_eq!(nc!(rank, ncclCommFinalize(comm => Handle)), IN_PROGRESS);
    assert_eq!(rank.state_after(comm, IN_PROGRESS), OK);
    assert_eq!(rank.destroy(comm), OK);
    if rank.is("after the end") {
        rank.destroy(comm);
    }
}

#[test]
fn the_version_and_the_words_are_those_of_the_options() {
    if let Some(rank) = Rank::here() {
        let mut version = 0;
        assert_eq!(nc!(rank, ncclGetVersion(&mut version => *mut c_int)), OK);
        assert_eq!(version, 21_504);
        // SAFETY: the C declaration.
        let text = unsafe {
            let words: libloading::Symbol<unsafe extern "C" fn(c_int) -> *const c_char> =
                rank.nccl.get(b"ncclGetErrorString\0").unwrap();
            std::ffi::CStr::from_ptr(words(99)).to_str().unwrap()
        };
        assert_eq!(text, "unknown result code");
        let null: *const c_void = ptr::null();
        assert_eq!(nc!(rank, ncclCommDestroy(null => *const c_void)), 4);
        return;
    }
    let test = "the_version_and_the_words_are_those_of_the_options";
    caught(test, "", 1, "nccl=21504", &[]);
}
