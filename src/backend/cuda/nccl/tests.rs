//! Ranks as separate processes on the stand-in GPU, through the functions that a run uses. Without the stand-in's
//! libraries, each test prints a line and passes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::backend::cuda::driver::Buffer;

const F32: Element = Element::F32;

/// More than one piece of what the stand-in moves at once.
const COUNT: usize = 300_000;

// ---- Processes --------------------------------------------------------------------------------------------

/// A process that is one of the ranks.
struct Rank {
    role: String,
    rank: usize,
    size: usize,
    folder: PathBuf,
}

impl Rank {
    /// This process, if [`ranks`] started it.
    fn here() -> Option<Self> {
        let text = std::env::var("VITRUM_TEST_RANK").ok()?;
        let mut parts = text.split('/');
        let mut next = || parts.next().unwrap().to_string();
        let (role, rank, size) = (next(), next().parse().unwrap(), next().parse().unwrap());
        Some(Self { role, rank, size, folder: std::env::var_os("VITRUM_TEST_FOLDER").unwrap().into() })
    }

    fn is(&self, role: &str) -> bool {
        self.role == role
    }

    /// The id that rank 0 made, through a file.
    fn id(&self) -> Id {
        let (path, part) = (self.folder.join("id"), self.folder.join("part"));
        if self.rank == 0 {
            let id = Id::new().unwrap();
            std::fs::write(&part, id.0).unwrap();
            std::fs::rename(part, path).unwrap();
            return id;
        }
        loop {
            match std::fs::read(&path) {
                Ok(bytes) => return Id(bytes.try_into().unwrap()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn join(&self, gpu: &Gpu) -> Comm {
        Comm::join(gpu, &self.id(), self.rank, self.size, &mut || Ok(())).unwrap()
    }

    fn values(&self, rank: usize) -> Vec<f32> {
        (0..COUNT).map(|i| ((i * 7919 + rank * 104_729) % 1000) as f32 * 1e-3 - 0.5).collect()
    }

    /// Sums in rank order.
    fn sums(&self) -> Vec<f32> {
        (1..self.size).fold(self.values(0), |mut sums, rank| {
            sums.iter_mut().zip(self.values(rank)).for_each(|(sum, value)| *sum += value);
            sums
        })
    }
}

fn upload(gpu: &Gpu, values: &[f32]) -> Buffer {
    let buffer = gpu.allocate(values.len() * 4).unwrap();
    gpu.upload(buffer.address, bytemuck::cast_slice(values)).unwrap();
    buffer
}

fn download(gpu: &Gpu, at: Address, count: usize) -> Vec<u32> {
    let mut bytes = vec![0; count * 4];
    gpu.download(at, &mut bytes).unwrap();
    bytemuck::pod_collect_to_vec(&bytes)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The folder of the stand-in's libraries.
fn stand_in() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.parent()?.join("standin");
    if folder.join("libnccl.so.2").exists() {
        return Some(folder);
    }
    println!("skipped: no stand-in GPU; `cargo build -p vitrum-standin` builds it");
    None
}

/// What a rank left.
struct Done {
    success: bool,
    said: String,
}

/// Runs `test` as `size` ranks, and waits for all.
fn ranks(standin: &Path, test: &str, role: &str, size: usize, options: &str) -> Vec<Done> {
    let folder = tempfile::tempdir().unwrap();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("backend::cuda::nccl::tests::{test}"), "--nocapture"]);
        command.env("LD_LIBRARY_PATH", standin).env("VITRUM_TEST_FOLDER", folder.path());
        command.env("VITRUM_TEST_RANK", format!("{role}/{rank}/{size}"));
        command.env("VITRUM_STANDIN", format!("bus={rank},nccl_timeout=60,{options}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..size).map(start).collect();
    let end = Instant::now() + Duration::from_secs(90);
    let finish = |mut child: Child| {
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let done = child.wait_with_output().unwrap();
        Done { success: done.status.success(), said: String::from_utf8_lossy(&done.stderr).into_owned() }
    };
    children.into_iter().map(finish).collect()
}

/// All ranks succeed and the stand-in reports nothing.
#[track_caller]
fn pass(test: &str, role: &str, size: usize, options: &str) {
    let Some(standin) = stand_in() else { return };
    for (rank, done) in ranks(&standin, test, role, size, options).into_iter().enumerate() {
        assert!(done.success && !done.said.contains("stand-in GPU:"), "{role}, rank {rank}: {}", done.said);
    }
}

// ---- Tests ------------------------------------------------------------------------------------------------

#[test]
fn a_captured_step_has_the_right_bits() {
    if let Some(rank) = Rank::here() {
        return step(&rank);
    }
    let test = "a_captured_step_has_the_right_bits";
    pass(test, "right", 2, "");
    pass(test, "right", 4, "defer=3");
    pass(test, "right", 2, "defer=2,nccl_progress=2");
}

/// A backward on the compute stream, a reduce-scatter, an update of the own part and an all-gather on the communication
/// stream; once eagerly, then captured and replayed. The buffers, the graph and the communicator end in an order that
/// their owner did not think about.
fn step(rank: &Rank) {
    let gpu = Gpu::open(0).unwrap();
    let comm = rank.join(&gpu);
    assert_eq!((comm.rank(), comm.size()), (rank.rank, rank.size));
    let part = COUNT / rank.size;
    let at = |buffer: &Buffer| buffer.address + (rank.rank * part * 4) as u64;
    let (from, bucket) = (upload(&gpu, &rank.values(rank.rank)), upload(&gpu, &vec![0.0; COUNT]));
    let (ready, done) = (gpu.new_event().unwrap(), gpu.new_event().unwrap());
    let work = || {
        gpu.copy(bucket.address, from.address, COUNT * 4)?;
        gpu.record_event(&ready, Stream::Compute)?;
        gpu.wait_event(Stream::Communication, &ready)?;
        comm.group(&gpu, Stream::Communication, |group| {
            group.reduce_scatter(bucket.address, at(&bucket), part, F32)
        })?;
        comm.group(&gpu, Stream::Communication, |group| {
            group.all_gather(at(&bucket), bucket.address, part, F32)
        })?;
        gpu.record_event(&done, Stream::Communication)?;
        gpu.wait_event(Stream::Compute, &done)
    };
    work().unwrap();
    let graph = gpu.capture(work).unwrap();
    let end = gpu.new_event().unwrap();
    for _ in 0..3 {
        gpu.replay(&graph).unwrap();
    }
    gpu.record_event(&end, Stream::Compute).unwrap();
    comm.wait(&end).unwrap();
    let summed = part * rank.size;
    assert!(
        download(&gpu, bucket.address, summed) == bits(&rank.sums())[..summed],
        "bits of sums in rank order"
    );
    // The graph keeps the communicator.
    drop(comm);
    gpu.replay(&graph).unwrap();
    gpu.synchronize(Stream::Compute).unwrap();
    drop(graph);
}

#[test]
fn parts_travel_as_messages() {
    if let Some(rank) = Rank::here() {
        return exchange(&rank);
    }
    pass("parts_travel_as_messages", "right", 4, "");
}

fn exchange(rank: &Rank) {
    let gpu = Gpu::open(0).unwrap();
    let comm = rank.join(&gpu);
    let part = COUNT / rank.size;
    let (from, to) = (upload(&gpu, &rank.values(rank.rank)), upload(&gpu, &vec![0.0; COUNT]));
    let at = |buffer: &Buffer, r: usize| buffer.address + (r * part * 4) as u64;
    comm.group(&gpu, Stream::Compute, |group| {
        for r in 0..rank.size {
            group.send(at(&from, r), part, F32, r)?;
            group.receive(at(&to, r), part, F32, r)?;
        }
        Ok(())
    })
    .unwrap();
    gpu.synchronize(Stream::Compute).unwrap();
    for r in 0..rank.size {
        let want = &bits(&rank.values(r))[rank.rank * part..][..part];
        assert!(download(&gpu, at(&to, r), part) == want, "part of rank {r}");
    }
}

#[test]
fn an_error_of_another_rank_ends_a_wait_and_nothing_hangs_afterwards() {
    if let Some(rank) = Rank::here() {
        return failure_of_another(&rank);
    }
    let Some(standin) = stand_in() else { return };
    let test = "an_error_of_another_rank_ends_a_wait_and_nothing_hangs_afterwards";
    for (role, fault, text) in
        [("dies", "1:2:die", "rank 1, which is dead"), ("fails", "1:2:error", "rank 1 has failed")]
    {
        let done = ranks(&standin, test, role, 2, &format!("nccl_fault={fault}"));
        assert!(done[0].success, "{role}: {}", done[0].said);
        let said = [text, "rank 1 is dead"].iter().any(|text| done[0].said.contains(text));
        assert!(said && done[0].said.contains("NCCL's code 6"), "{role}: {}", done[0].said);
    }
}

fn failure_of_another(rank: &Rank) {
    let gpu = Gpu::open(0).unwrap();
    let comm = rank.join(&gpu);
    let from = upload(&gpu, &rank.values(rank.rank));
    let event = gpu.new_event().unwrap();
    let sum = || {
        comm.group(&gpu, Stream::Communication, |group| {
            group.all_reduce(from.address, from.address, COUNT, F32)
        })?;
        gpu.record_event(&event, Stream::Communication)?;
        comm.wait(&event)
    };
    let start = Instant::now();
    // The other one may fail while this one has not seen yet that the first sum is done.
    let error = sum().and_then(|()| sum()).unwrap_err();
    eprintln!("{}", error.message());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(has_failed());
    // Buffers, streams and the communicator are dropped here, while the GPU of rank 0 waits for ever.
    drop((from, event, comm, gpu));
    exit_now(0);
}

#[test]
fn ranges_outside_of_buffers_and_wrong_places_are_refused() {
    if let Some(rank) = Rank::here() {
        return refused(&rank);
    }
    let Some(standin) = stand_in() else { return };
    let test = "ranges_outside_of_buffers_and_wrong_places_are_refused";
    for (role, text) in [
        ("outside", "are not in a buffer of the GPU"),
        ("freed", "are not in a buffer of the GPU"),
        ("place", "all_gather in place at the wrong offset"),
    ] {
        let done = ranks(&standin, test, role, 1, "");
        assert!(!done[0].success && done[0].said.contains(text), "{role}: {}", done[0].said);
    }
}

fn refused(rank: &Rank) {
    let gpu = Gpu::open(0).unwrap();
    let comm = rank.join(&gpu);
    let buffer = upload(&gpu, &[0.0; 64]);
    let (at, count) = match rank.role.as_str() {
        "outside" => (buffer.address, 65),
        "place" => (buffer.address + 4, 32),
        _ => (buffer.address, 32),
    };
    let whole = buffer.address;
    if rank.is("freed") {
        drop(buffer);
    }
    let done = comm.group(&gpu, Stream::Compute, |group| group.all_gather(at, whole, count, F32));
    eprintln!("{:?}", done.map_err(|e| e.message().to_string()));
}
