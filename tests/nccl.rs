//! Ranks on GPUs find each other and exchange bytes, as separate processes on the stand-in GPU; what cannot work is
//! refused with a sentence.
//!
//! `cargo build -p vitrum-standin` puts the libraries next to the program. Without them, each test prints a line and
//! passes.

use crate::support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{Done, command, finish, path, stand_in, train, wait};
use vitrum::backend::Device;
use vitrum::dist::{Collective, Joining};

/// The variables of torchrun for one of its processes.
fn torchrun(command: &mut Command, rank: usize, size: usize, local_rank: usize) {
    let id = format!("test-{}", std::process::id());
    command.env("TORCHELASTIC_RUN_ID", id).env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
    command.env("LOCAL_RANK", local_rank.to_string()).env("VITRUM_JOIN_TIMEOUT", "60");
}

fn start(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

// ---- Bytes ------------------------------------------------------------------------------------------------

/// Runs `test` of this binary as `size` ranks, on one stand-in GPU each.
fn ranks(standin: &Path, test: &str, size: usize, options: &str) -> Vec<Done> {
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..size)
        .map(|rank| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", &format!("nccl::{test}"), "--nocapture"]);
            torchrun(&mut command, rank, size, rank);
            command.env("LD_LIBRARY_PATH", standin).env("VITRUM_TEST_FOLDER", folder.path());
            command.env("VITRUM_STANDIN", format!("cards={size},nccl_timeout=60,{options}"));
            start(command)
        })
        .collect();
    let done: Vec<Done> = children.into_iter().map(wait).collect();
    assert!(done.iter().all(|done| done.stdout.contains("running 1 test")), "there is no test `{test}`");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left of the meeting");
    done
}

/// Where the ranks of this process meet, if [`ranks`] started it.
fn meeting() -> Option<PathBuf> {
    std::env::var_os("VITRUM_TEST_FOLDER").map(PathBuf::from)
}

fn join(out: &Path, device: Device) -> (Collective, Device) {
    Collective::join(&Joining { device, out: Some(out), deterministic: true }).unwrap()
}

#[test]
fn ranks_on_gpus_exchange_bytes_as_ranks_on_cpus_do() {
    if let Some(out) = meeting() {
        return exchange(&out);
    }
    let Some(standin) = stand_in() else { return };
    for (size, options) in [(2, ""), (4, "defer=3"), (2, "nccl_progress=3"), (2, "defer=off")] {
        for (rank, done) in ranks(&standin, "ranks_on_gpus_exchange_bytes_as_ranks_on_cpus_do", size, options)
            .iter()
            .enumerate()
        {
            assert_eq!(done.code, 0, "rank {rank} of {size}, {options}: {}", done.stderr);
            assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
        }
    }
}

fn exchange(out: &Path) {
    let asked = [Device::Auto, Device::Cuda(0)];
    let (ranks, device) = join(out, asked[std::process::id() as usize % 2]);
    let (rank, size) = (ranks.rank, ranks.size);
    assert_eq!(device, Device::Cuda(rank), "the GPU of the local rank");
    assert_eq!(ranks.comm().unwrap().size(), size);
    assert_eq!(std::env::var("NCCL_ALGO").unwrap(), "Ring", "a deterministic run fixes the order of sums");

    ranks.barrier().unwrap();
    assert_eq!(
        ranks.gather_number(rank as u64 * 7).unwrap(),
        (0..size as u64).map(|r| r * 7).collect::<Vec<_>>()
    );
    ranks.agree("a recipe", b"recipe").unwrap();
    let error = ranks.agree("a recipe", if rank == 1 { b"another" } else { b"the one" }).unwrap_err();
    assert!(error.message().contains("rank 1 has a recipe other than rank 0's"));

    // Nothing, a little, and more than fits at once.
    let content =
        |rank: usize, bytes: usize| -> Vec<u8> { (0..bytes).map(|i| (i * 31 + rank * 7) as u8).collect() };
    for bytes in [0, 1, 1000, 5 << 20] {
        let mut told = if rank == 0 { content(9, bytes) } else { content(rank, 77) };
        ranks.broadcast(&mut told).unwrap();
        assert!(told == content(9, bytes), "broadcast of {bytes}");

        let mut all = vec![0; bytes * size];
        ranks.all_gather(&content(rank, bytes), &mut all).unwrap();
        assert!(
            all == (0..size).flat_map(|r| content(r, bytes)).collect::<Vec<_>>(),
            "all_gather of {bytes}"
        );

        let part = |from: usize, to: usize| content(from * 16 + to, bytes);
        let parts: Vec<u8> = (0..size).flat_map(|to| part(rank, to)).collect();
        let mut own = vec![0; parts.len()];
        ranks.all_to_all(&parts, &mut own).unwrap();
        assert!(
            own == (0..size).flat_map(|from| part(from, rank)).collect::<Vec<_>>(),
            "all_to_all of {bytes}"
        );
    }
    ranks.leave().unwrap();
    assert!(ranks.comm().is_none(), "the communicator has ended");
}

#[test]
fn mpirun_starts_ranks_on_gpus_too() {
    if let Some(out) = meeting() {
        let (ranks, device) = join(&out, Device::Cuda(0));
        assert_eq!((device, ranks.size), (Device::Cuda(ranks.rank), 2));
        return ranks.leave().unwrap();
    }
    let Some(standin) = stand_in() else { return };
    let folder = tempfile::tempdir().unwrap();
    for mpirun in ["mpirun.openmpi", "mpirun.mpich", "mpirun"] {
        let Ok(version) = Command::new(mpirun).arg("--version").output() else {
            println!("skipped: there is no `{mpirun}` on PATH");
            continue;
        };
        let mut command = Command::new(mpirun);
        if String::from_utf8_lossy(&version.stdout).contains("Open") {
            command.args(["--allow-run-as-root", "--oversubscribe"]);
        }
        command.args(["-n", "2"]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", "nccl::mpirun_starts_ranks_on_gpus_too", "--nocapture"]);
        command.env("LD_LIBRARY_PATH", &standin).env("VITRUM_TEST_FOLDER", folder.path());
        command.env("VITRUM_STANDIN", "cards=2").env("VITRUM_JOIN_TIMEOUT", "60");
        finish(command).ok().prints(&["running 1 test"]);
    }
}

// ---- Refusals ---------------------------------------------------------------------------------------------

/// One process of a training run under torchrun's variables, on stand-in GPUs.
fn train_as(standin: &Path, out: &str, options: &str, place: [usize; 3], more: &[&str]) -> Command {
    let mut command = command(&train(out, more));
    let [rank, size, local_rank] = place;
    torchrun(&mut command, rank, size, local_rank);
    command.env("LD_LIBRARY_PATH", standin).env("VITRUM_STANDIN", options);
    command
}

#[test]
fn missing_ranks_are_named() {
    let Some(standin) = stand_in() else { return };
    let out = path("missing");
    let begin = |rank: usize| {
        let mut command = train_as(&standin, &out, "cards=4", [rank, 4, rank], &["--device=cuda"]);
        start({
            command.env("VITRUM_JOIN_TIMEOUT", "2");
            command
        })
    };
    let [zero, two] = [0, 2].map(begin).map(wait);
    zero.exits(1).says(&["ranks 1 and 3 did not come to ", "missing within 2 s", "the same `--out DIR`"]);
    two.exits(1).says(&["rank 2: error: ranks 1 and 3 did not come to "]);
    assert!(!Path::new(&out).join("recipe.toml").exists(), "no run began");
}

#[test]
fn two_ranks_on_one_gpu_are_refused() {
    let Some(standin) = stand_in() else { return };
    let out = path("shared");
    // Each sees only one GPU, and both the same one.
    let begin =
        |rank: usize| start(train_as(&standin, &out, "cards=1,bus=65", [rank, 2, rank], &["--device=cuda"]));
    let [zero, one] = [0, 1].map(begin).map(wait);
    let text = "ranks 0 and 1 both have the GPU 0000:41:00.0 of ";
    zero.exits(2).says(&[text, "start one rank per GPU"]);
    one.exits(2).says(&[text]);
}

#[test]
fn starts_that_cannot_work_are_told_why() {
    let Some(standin) = stand_in() else { return };
    let out = path("told");
    let refused = |options: &str, place: [usize; 3], more: &[&str], code: i32, texts: &[&str]| {
        let done = finish(train_as(&standin, &out, options, place, more)).exits(code).says(texts);
        assert_eq!(done.stderr.matches("error: ").count(), 1, "{}", done.stderr);
        assert!(!Path::new(&out).join("recipe.toml").exists(), "no run began");
    };
    let cuda = &["--device=cuda"][..];
    refused(
        "cards=2",
        [0, 2, 0],
        &["--device=cuda:1"],
        2,
        &["`--device cuda:1` is one GPU, and torchrun started 2"],
    );
    refused(
        "cards=2",
        [2, 3, 2],
        cuda,
        2,
        &["rank 2 of its machine", "2 GPUs are visible", "at most 2 ranks"],
    );
    refused(
        "cards=2,nccl=21604",
        [0, 2, 0],
        cuda,
        1,
        &["2 ranks on GPUs cannot talk: NCCL is too old: version 2.16.4, 2.18.0"],
    );
    let mut unnamed = command(&["train", "demo", "--device=cuda"]);
    torchrun(&mut unnamed, 0, 2, 0);
    unnamed.env("LD_LIBRARY_PATH", &standin).env("VITRUM_STANDIN", "cards=2");
    finish(unnamed).exits(2).says(&["meet in the run's directory, which needs a name", "`--out DIR`"]);

    // Without NCCL.
    let folder = PathBuf::from(path("without"));
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["libcuda.so", "libcuda.so.1", "libcublasLt.so", "libcublasLt.so.13"] {
        std::os::unix::fs::symlink(standin.join(name), folder.join(name)).unwrap();
    }
    let mut command = train_as(&folder, &out, "cards=2", [0, 2, 0], cuda);
    command.env_remove("VIRTUAL_ENV").env_remove("CONDA_PREFIX");
    finish(command).exits(1).says(&[
        "2 ranks on GPUs cannot talk: NCCL",
        "was not found",
        "pip install nvidia-nccl",
    ]);
}

#[test]
fn doctor_tells_about_nccl() {
    let Some(standin) = stand_in() else { return };
    let doctor = |options: &str| {
        let mut command = command(&["doctor"]);
        command.env("LD_LIBRARY_PATH", &standin).env("VITRUM_STANDIN", options);
        finish(command).ok().stdout
    };
    let text = doctor("");
    assert!(text.contains("\nnccl (for ranks on several GPUs): 2.27.3\n"), "{text}");
    let text = doctor("nccl=21604");
    assert!(text.contains("none: NCCL is too old: version 2.16.4, 2.18.0 is needed; `pip install"), "{text}");
}

#[test]
fn a_rank_that_ends_early_is_seen_by_the_others() {
    if let Some(out) = meeting() {
        let (ranks, _) = join(&out, Device::Cuda(0));
        let start = Instant::now();
        let error = (0..100).find_map(|_| ranks.barrier().err()).expect("rank 1 ends");
        assert!(start.elapsed() < Duration::from_secs(30));
        eprintln!("{}", error.message());
        vitrum::dist::end_all(7);
        unreachable!("the process has ended");
    }
    let Some(standin) = stand_in() else { return };
    let test = "a_rank_that_ends_early_is_seen_by_the_others";
    let done = ranks(&standin, test, 2, "nccl_fault=1:5:die");
    assert_eq!(done[0].code, 7, "{}", done[0].stderr);
    assert!(done[0].stderr.contains("NCCL's code 6"), "{}", done[0].stderr);
}
