//! What may end a run of several days, from outside: hung disks and ranks, killed ranks, full disks. A resumed run
//! has the bits of an unbroken one.

use crate::support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use support::{
    Random, command, copy, finish, is_ignored, metrics, names, path, process, ranks, run_on_gpu, stand_in,
    stripes, train, vitrum, wait,
};

/// A run whose bits do not depend on the number of ranks, with a checkpoint every other step.
const RUN: [&str; 6] = [
    "--device=cpu",
    "train.steps=40",
    "train.micro_batch=0",
    "train.reduce_chunks=4",
    "train.checkpoint_every=2",
    "--resume",
];

fn run(out: &str, more: &[&str]) -> Vec<String> {
    train(out, &[&RUN[..], more].concat())
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const LONG: Duration = Duration::from_secs(60);

fn checkpoints(out: &str) -> Vec<String> {
    names(Path::new(out).join("checkpoints"))
}

fn is_writing(out: &str) -> bool {
    checkpoints(out).iter().any(|name| name.starts_with(".step-"))
}

fn has_saved(out: &str) -> bool {
    Path::new(out).join("checkpoints/last").exists()
}

/// All bytes of the last checkpoint's tensors and state, and the metrics.
fn result(out: &str) -> (Vec<Vec<u8>>, Vec<serde_json::Value>) {
    let last = Path::new(out).join("checkpoints/last");
    let files = ["model.safetensors", "ema.safetensors", "state.safetensors"];
    (files.map(|name| fs::read(last.join(name)).unwrap()).to_vec(), metrics(out))
}

fn unbroken(name: &str) -> (Vec<Vec<u8>>, Vec<serde_json::Value>) {
    let out = path(name);
    vitrum(&run(&out, &[])).ok().says(&["no checkpoint found: starting from the beginning"]);
    result(&out)
}

#[test]
fn a_rank_that_is_killed_at_any_moment_costs_nothing_but_time() {
    // More kills: benches/soak.py.
    const KILLS: usize = 3;
    let want = unbroken("not-killed");
    let mut random = Random(5);
    let out = path("killed");
    let (mut kills, mut while_writing) = (0, 0);
    for attempt in 0.. {
        assert!(attempt < 40, "{kills} kills");
        let Some(command) = ranks(&[(2, &run(&out, &["train.timeout=5"]))]) else { return };
        let mut child = start(command);
        let before = checkpoints(&out);
        // One kill of two hits a rank while a checkpoint is being written.
        let hit = attempt % 2 == 0;
        until("a moment to kill", LONG, || {
            (checkpoints(&out) != before && (!hit || is_writing(&out))) || child.try_wait().unwrap().is_some()
        });
        if !hit {
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
        }
        let Some(victim) = process(random.below(2) as usize, &out) else {
            assert_ne!(wait(child).code, 1, "it ended by itself, with an error");
            break;
        };
        kill_process(victim, Signal::KILL).unwrap();
        until("the end of all ranks", Duration::from_secs(20), || child.try_wait().unwrap().is_some());
        let _ = wait(child);
        until("the last rank", Duration::from_secs(5), || (0..2).all(|rank| process(rank, &out).is_none()));
        kills += 1;
        while_writing += usize::from(is_writing(&out));
        if kills >= KILLS {
            break;
        }
    }
    assert!(kills > 0, "the run always ended before it could be killed");
    println!("{kills} kills, {while_writing} of them while a checkpoint was written");
    // The rest on another number of ranks.
    vitrum(&run(&out, &[])).ok();
    assert!(result(&out) == want, "the bits of an unbroken run");
}

/// Puts a pipe that nobody fills in the place of a file: reading it never ends.
fn hang(file: &Path) {
    let pipe = file.with_extension("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::rename(pipe, file).unwrap();
}

#[test]
fn a_read_that_hangs_ends_the_run_with_a_sentence() {
    let want = unbroken("not-hung");
    for count in [1, 2] {
        let data = path(&format!("hung-data-{count}"));
        copy(Path::new(stripes()), Path::new(&data));
        let out = path(&format!("hung-{count}"));
        let place = format!("data.train={data}");
        let args = run(&out, &[&place, "train.timeout=5"]);
        let child = match count {
            1 => start(command(&args)),
            _ => start(match ranks(&[(2, &args)]) {
                Some(command) => command,
                None => return,
            }),
        };
        until("a checkpoint", LONG, || has_saved(&out));
        let file = Path::new(&data).join("train/checks/001.png");
        hang(&file);
        let done = wait(child);
        assert_ne!(done.code, 0, "{}", done.stderr);
        let done = done.says(&["waits for the data loader for ", "train --resume ", "train.timeout=SECONDS"]);
        assert!(count == 1 || done.stderr.contains("rank "), "{}", done.stderr);
        fs::remove_file(&file).unwrap();
        fs::copy(Path::new(stripes()).join("train/checks/001.png"), &file).unwrap();
        vitrum(&run(&out, &[])).ok();
        assert!(result(&out).0[0] == want.0[0], "the weights of an unbroken run");
    }
}

#[test]
fn a_rank_that_stands_still_is_named_by_the_others() {
    let out = path("still");
    let Some(command) = ranks(&[(2, &run(&out, &["train.steps=4000", "train.timeout=5"]))]) else { return };
    let mut child = start(command);
    until("a checkpoint", LONG, || has_saved(&out));
    kill_process(process(1, &out).expect("rank 1 is running"), Signal::STOP).unwrap();
    until("the end", Duration::from_secs(30), || child.try_wait().unwrap().is_some());
    let done =
        wait(child).says(&["rank 0 waits for ", "rank 1 said nothing: gone, or stopped: all ranks end"]);
    assert_ne!(done.code, 0);
    until("rank 1 ends", Duration::from_secs(10), || process(1, &out).is_none());
    assert!(fs::read_to_string(Path::new(&out).join("log.txt")).unwrap().contains("rank 1 said nothing"));
}

#[test]
fn every_signal_to_one_rank_stops_all_at_one_step() {
    for (signal, code) in [(Signal::USR1, 143), (Signal::HUP, 143), (Signal::INT, 130), (Signal::TERM, 143)] {
        if is_ignored(signal) {
            println!("skipped: this process ignores the signal {}", signal.as_raw());
            continue;
        }
        let out = path(&format!("signal-{}", signal.as_raw()));
        let Some(command) = ranks(&[(2, &run(&out, &["train.steps=4000"]))]) else { return };
        let child = start(command);
        until("a checkpoint", LONG, || has_saved(&out));
        kill_process(process(1, &out).expect("rank 1 is running"), signal).unwrap();
        let done = wait(child).exits(code).says(&["stopped at step ", "saved to "]);
        let saved = done.stderr.split("saved to ").nth(1).unwrap().lines().next().unwrap();
        assert_eq!(
            fs::canonicalize(saved).unwrap(),
            fs::canonicalize(Path::new(&out).join("checkpoints/last")).unwrap()
        );
    }
}

#[test]
fn ranks_on_a_full_disk_keep_a_whole_checkpoint_and_train_on() {
    let (disk, rescued) = (path("disk"), path("rescued"));
    fs::create_dir_all(&disk).unwrap();
    let can = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", &disk]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        println!("skipped: this machine does not let a test mount a file system");
        return;
    }
    let out = format!("{disk}/run");
    let Some(mpirun) = ranks(&[(2, &run(&out, &["train.eval_every=100"]))]) else { return };
    // The first checkpoint fits, a second one does not.
    let script = format!(
        "mount -t tmpfs -o size=500k none {disk} && \"$0\" \"$@\"; code=$?; cp -a {disk}/run {rescued}; exit $code"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "bash", "-c", &script]).arg(mpirun.get_program()).args(mpirun.get_args());
    shell.envs(mpirun.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let done = finish(shell).exits(1).says(&[
        "warning: checkpoint at step 4: ",
        "training goes on, the last whole checkpoint is ",
        "step 40/40",
        "error: checkpoint at step 40: ",
        "hint: ",
    ]);
    assert_eq!(done.stderr.matches("step 40/40").count(), 1, "{}", done.stderr);
    assert_eq!(checkpoints(&rescued), ["last", "step-2"]);
    let want = unbroken("not-full");
    vitrum(&run(&rescued, &[])).ok().says(&["from checkpoints/step-2"]);
    assert!(result(&rescued).0[0] == want.0[0], "the weights of an unbroken run");
}

#[test]
fn a_folder_that_becomes_read_only_costs_checkpoints_and_not_the_run() {
    let (disk, rescued) = (path("read-only"), path("read-only-rescued"));
    fs::create_dir_all(&disk).unwrap();
    let length = ["train.steps=600", "train.eval_every=600"];
    let program = command(&run(&format!("{disk}/run"), &length));
    let script = format!(
        "mount -t tmpfs none {disk} && mkdir -p {disk}/run/checkpoints && cd {disk} \
         && mount --bind run/checkpoints run/checkpoints || exit 77; \
         \"$0\" \"$@\" & pid=$!; \
         while kill -0 $pid && [ ! -e run/checkpoints/last ]; do sleep 0.02; done; \
         mount -o remount,bind,ro run/checkpoints || exit 77; \
         wait $pid; code=$?; cp -a run {rescued}; exit $code"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "bash", "-c", &script]).arg(program.get_program()).args(program.get_args());
    shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let done = finish(shell);
    if done.code == 77 || done.stderr.contains("unshare failed") {
        println!("skipped: this machine does not let a test make a folder read-only: {}", done.stderr);
        return;
    }
    done.exits(1).says(&[
        "warning: checkpoint at step ",
        "Read-only file system",
        "training goes on, the last whole checkpoint is ",
        "step 600/600",
        "error: checkpoint at step 600: ",
        "train --resume ",
    ]);
    vitrum(&run(&rescued, &length)).ok().says(&["resume   from checkpoints/step-"]);
    assert_eq!(fs::read_link(Path::new(&rescued).join("checkpoints/last")).unwrap(), Path::new("step-600"));
}

#[test]
fn a_folder_that_cannot_be_written_costs_checkpoints_and_not_the_run() {
    let out = path("no-folder");
    let child = start(command(&run(&out, &["train.steps=400", "train.eval_every=100"])));
    until("a checkpoint", LONG, || has_saved(&out));
    // Not even root creates a folder below a file.
    let (folder, aside) = (Path::new(&out).join("checkpoints"), Path::new(&out).join("aside"));
    fs::rename(&folder, &aside).unwrap();
    fs::write(&folder, "a file").unwrap();
    until("a warning", LONG, || {
        let log = fs::read_to_string(Path::new(&out).join("log.txt")).unwrap_or_default();
        log.contains("training goes on, the last whole checkpoint is ")
    });
    fs::remove_file(&folder).unwrap();
    fs::rename(&aside, &folder).unwrap();
    wait(child).ok().says(&["warning: checkpoint at step ", "Not a directory"]);
    assert_eq!(fs::read_link(folder.join("last")).unwrap(), Path::new("step-400"));
}

/// A spike needs no accident here: among so few steps, some stand out a little.
const SENSITIVE: [&str; 3] = ["train.spike_window=10", "train.spike_score=3", "train.log_every=1"];

/// The lines of the metrics that have this key.
fn lines_with(out: &str, key: &str) -> Vec<serde_json::Value> {
    metrics(out).into_iter().filter(|line| line.get(key).is_some()).collect()
}

#[test]
fn steps_that_stand_out_are_reported_or_skipped() {
    let (reported, skipped) = (path("reported"), path("skipped"));
    let done = vitrum(&run(&reported, &SENSITIVE)).ok();
    let spikes = lines_with(&reported, "spike");
    assert!(!spikes.is_empty() && spikes.len() < 20, "{spikes:?}");
    assert_eq!(done.stderr.matches(" deviations above the mean of 10 steps").count(), spikes.len());
    assert!(spikes.iter().all(|line| line["spike"]["skipped"] == false), "{spikes:?}");
    let done = vitrum(&run(&skipped, &[&SENSITIVE[..], &["train.on_spike=skip"]].concat())).ok();
    assert!(done.stderr.contains(": its update is left out"), "{}", done.stderr);
    let spikes = lines_with(&skipped, "spike");
    assert!(!spikes.is_empty() && spikes.iter().all(|line| line["spike"]["skipped"] == true), "{spikes:?}");
    let last = lines_with(&skipped, "loss").pop().unwrap();
    assert_eq!(last["skipped"], spikes.len(), "{last}");
    // Until the first spike both runs are the same.
    let first = spikes[0]["step"].as_u64().unwrap() as usize - 1;
    let losses =
        |out: &str| lines_with(out, "loss").iter().map(|line| line["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(&reported)[..first], losses(&skipped)[..first]);
    assert_ne!(losses(&reported)[first + 1..], losses(&skipped)[first + 1..]);
}

#[test]
fn a_run_goes_back_past_bad_batches_and_has_the_same_bits_when_it_is_resumed() {
    let more = [&SENSITIVE[..], &["train.rewind_after=1"]].concat();
    let out = path("rewound");
    let done = vitrum(&run(&out, &more)).ok().says(&[": back to checkpoints/step-"]);
    let want = result(&out);
    let rewinds = lines_with(&out, "rewind");
    assert!(!rewinds.is_empty(), "{}", done.stderr);
    for rewind in &rewinds {
        assert!(rewind["rewind"]["batches"].as_u64().unwrap() >= 1, "{rewind}");
    }
    let resumed = path("rewound-resumed");
    let stopped = (0..20).any(|_| {
        let _ = fs::remove_dir_all(&resumed);
        let child = start(command(&run(&resumed, &more)));
        until("a return", LONG, || {
            let log = fs::read_to_string(Path::new(&resumed).join("log.txt")).unwrap_or_default();
            log.contains(": back to checkpoints/step-")
        });
        let _ = kill_process(rustix::process::Pid::from_child(&child), Signal::KILL);
        wait(child).code == 128 + 9
    });
    assert!(stopped, "the run always ended before it could be killed");
    if let Some(command) = ranks(&[(2, &run(&resumed, &more))]) {
        finish(command).ok();
    } else {
        vitrum(&run(&resumed, &more)).ok();
    }
    assert!(result(&resumed).0 == want.0, "the bits of an unbroken run");
}

#[test]
fn the_gpu_s_health_is_in_the_metrics() {
    let Some(folder) = stand_in() else { return };
    if !folder.join("libnvidia-ml.so.1").is_file() {
        println!("skipped: the stand-in is older than its management library");
        return;
    }
    let out = path("health");
    let size = ["model.width=64", "model.heads=2", "train.batch=4", "train.micro_batch=4", "train.steps=2"];
    let pace = ["--device=cuda", "train.log_every=1", "train.eval_every=2", "train.deterministic=true"];
    run_on_gpu(&folder, "checks=off", &train(&out, &[&size[..], &pace].concat())).ok();
    let text = fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let gpu = &first["gpu"];
    assert_eq!((gpu["celsius"].as_u64(), gpu["mhz"].as_u64()), (Some(61), Some(1755)), "{gpu}");
    assert_eq!((gpu["memory"].as_u64(), gpu["memory_mhz"].as_u64()), (Some(1 << 30), Some(2619)), "{gpu}");
    assert_eq!((gpu["watts"].as_f64(), gpu["throttled"].as_array().map(Vec::len)), (Some(654.321), Some(0)));
}
