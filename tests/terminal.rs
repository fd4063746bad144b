//! A closed terminal, a full disk, a closed pipe and signals: the worst that they do to a command is to end
//! it.

use crate::support;

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::{Done, command, finish, is_ignored, names, path, stripes, train, vitrum, wait};

/// A disk without room.
fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").expect("Linux has /dev/full")
}

/// A short run, made once.
fn trained() -> &'static str {
    static RUN: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    RUN.get_or_init(|| {
        let out = path("trained");
        vitrum(&train(&out, &["train.steps=4", "train.eval_every=4"])).ok();
        out
    })
}

/// Runs the program in a shell; `{}` stands for its path.
fn shell(line: &str, args: &[String]) -> Done {
    let words: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
    let program = format!("'{}' {}", env!("CARGO_BIN_EXE_vitrum"), words.join(" "));
    let mut shell = std::process::Command::new("sh");
    shell.arg("-c").arg(line.replace("{}", &program)).env("VITRUM_CACHE", path("cache"));
    finish(shell)
}

#[test]
fn a_run_goes_on_and_is_saved_where_nobody_can_read_what_it_says() {
    let steps = ["train.steps=4", "train.eval_every=4"];
    let saved = |out: &str| Path::new(out).join("checkpoints/step-4/model.safetensors").is_file();
    let out = path("full");
    let mut run = command(&train(&out, &steps));
    assert_eq!(run.stdout(full()).stderr(full()).status().unwrap().code(), Some(0));
    assert!(saved(&out));
    for (name, line) in [("closed", "{} >&- 2>&-"), ("no-stderr", "{} 2>&-"), ("no-reader", "{} 2>&1 | true")]
    {
        let out = path(name);
        shell(line, &train(&out, &steps)).ok();
        assert!(saved(&out), "{line}");
    }
}

/// Every command that prints data, and one that prints only for people.
#[test]
fn no_print_panics() {
    let run = trained().to_string();
    let picture = format!("{}/val/down/002.png", stripes());
    let owned = |words: &[&str]| -> Vec<String> { words.iter().map(ToString::to_string).collect() };
    let commands = [
        owned(&["inspect", &run]),
        owned(&["eval", "--weights", &run, "--data", stripes()]),
        owned(&["eval", "--weights", &run, "--data", stripes(), "--json"]),
        owned(&["predict", "--weights", &run, &picture]),
        owned(&["plan", "demo"]),
        owned(&["doctor"]),
        owned(&["--help"]),
        owned(&["train", "--no-such-flag"]),
    ];
    for args in &commands {
        for line in ["{} 2>/dev/full", "{} 2>&-", "{} >&-", "{} >&- 2>&-", "{} 2>&1 | true"] {
            let done = shell(line, args);
            assert!(done.code <= 2 && !done.stderr.contains("panicked"), "{line} {args:?}: {}", done.stderr);
        }
        let done = shell("{} >/dev/full", args);
        assert!(!done.stderr.contains("panicked"), "{args:?}: {}", done.stderr);
        // Failing to write data is reported as a failure.
        let prints = !matches!(args[0].as_str(), "train" | "--help");
        assert!(!prints || (done.code == 1 && done.stderr.contains("stdout")), "{args:?}: {}", done.stderr);
    }
}

/// Starts a long run, waits for its first line about a step, and sends it `signal`.
fn signalled(name: &str, signal: Signal) -> (String, Done) {
    let out = path(name);
    let run = command(&train(&out, &["train.steps=100000", "train.log_every=1", "train.eval_every=50000"]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = Path::new(&out).join("metrics.jsonl");
    let start = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "no step in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
    kill_process(Pid::from_child(&run), signal).unwrap();
    (out, wait(run))
}

#[test]
fn what_asks_a_run_to_stop_saves_it() {
    for (name, signal, code) in [
        ("hup", Signal::HUP, 143),
        ("usr1", Signal::USR1, 143),
        ("term", Signal::TERM, 143),
        ("int", Signal::INT, 130),
    ] {
        // What started the tests may ignore it, as `nohup` does; then the run does, too.
        if is_ignored(signal) {
            println!("skipped: this process ignores SIG{}", name.to_uppercase());
            continue;
        }
        let (out, done) = signalled(name, signal);
        done.exits(code).says(&["--resume"]);
        assert!(Path::new(&out).join("checkpoints/last").exists(), "{name}");
    }
}

#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let out = path("nohup");
    let args = train(&out, &["train.steps=40", "train.eval_every=20", "train.log_every=1"]);
    // The shell ignores the signal, and so do the processes that it starts.
    let line = "trap '' HUP; {} & run=$!; for i in 1 2 3 4 5; do sleep 0.2; kill -HUP $run; done; wait $run";
    shell(line, &args).ok();
    assert!(Path::new(&out).join("checkpoints/step-40").exists());
}

/// A list of pictures. One of them is a pipe that nobody fills.
fn stalled(name: &str) -> String {
    let folder = path(name);
    let mut table = "path,label\n".to_owned();
    for class in ["across", "checks", "down"] {
        for name in names(format!("{}/train/{class}", stripes())) {
            table += &format!("{}/train/{class}/{name},{class}\n", stripes());
        }
    }
    table += "pipe.png,down\n";
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(format!("{folder}/list.csv"), table).unwrap();
    assert!(
        std::process::Command::new("mkfifo").arg(format!("{folder}/pipe.png")).status().unwrap().success()
    );
    format!("{folder}/list.csv")
}

#[test]
fn a_run_that_waits_for_a_read_is_saved_when_it_is_told_to_stop() {
    let (table, out) = (stalled("stalled-run-data"), path("stalled-run"));
    let set = format!("data.train={table}");
    let more = [
        "train.batch=2",
        "train.micro_batch=2",
        "train.log_every=1",
        "train.steps=1000",
        "train.eval_every=1000",
    ];
    let run = command(&train(&out, &[&[&set[..]], &more[..]].concat()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = Path::new(&out).join("metrics.jsonl");
    let lines = || std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
    let limit = Instant::now() + Duration::from_secs(60);
    let mut seen = (0, Instant::now());
    // The run stalls when its only epoch reaches the pipe.
    while seen.0 == 0 || seen.1.elapsed() < Duration::from_secs(2) {
        assert!(Instant::now() < limit, "it does not stand still: {} lines", seen.0);
        if lines() != seen.0 {
            seen = (lines(), Instant::now());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let start = Instant::now();
    kill_process(Pid::from_child(&run), Signal::TERM).unwrap();
    let done = wait(run).exits(143);
    assert!(start.elapsed() < Duration::from_secs(20), "it went on waiting");
    done.says(&["saved to ", "stopped while waiting for a read of the data", "vitrum train --resume "]);
    assert!(Path::new(&out).join("checkpoints/last").exists());
}

#[test]
fn a_pack_that_waits_for_a_read_ends_when_it_is_told_to() {
    let table = stalled("stalled");
    let pack = command(&["pack", &table, &path("stalled-packed")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    kill_process(Pid::from_child(&pack), Signal::TERM).unwrap();
    let done = wait(pack);
    assert!(start.elapsed() < Duration::from_secs(20), "it went on waiting");
    assert!([1, 143].contains(&done.code), "{}: {}", done.code, done.stderr);
}

/// What a program does that trains with the library. `out` is its run directory: [`path`] would clear the folder of
/// the tests that are running.
fn train_with_the_library(out: std::ffi::OsString) {
    let small = ["model.width=24", "model.heads=3", "train.batch=16", "train.steps=2", "train.eval_every=2"];
    let recipe = vitrum::Recipe::load(Some("demo"), &small.map(String::from)).unwrap();
    let mut options = vitrum::RunOptions::new("demo", out);
    options.device = vitrum::backend::Device::Cpu;
    if std::env::var_os("SHOW").is_some() {
        vitrum::show_messages();
    }
    assert_eq!(vitrum::train(recipe, &options).unwrap().steps, 2);
}

/// Messages are shown per process, so the test starts itself as the program that trains.
#[test]
fn the_library_prints_only_if_it_is_asked_to() {
    if let Some(out) = std::env::var_os("OUT") {
        return train_with_the_library(out);
    }
    for shows in [false, true] {
        let out = path(if shows { "library-shows" } else { "library" });
        let mut program = std::process::Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", "terminal::the_library_prints_only_if_it_is_asked_to", "--nocapture"]);
        program.env("VITRUM_CACHE", path("cache")).env("OUT", &out).env_remove("SHOW");
        if shows {
            program.env("SHOW", "1");
        }
        let done = program.output().unwrap();
        let printed = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{printed}");
        assert!(Path::new(&out).join("recipe.toml").is_file(), "it trained");
        assert_eq!(printed.contains("step"), shows, "{printed}");
        assert_eq!(printed.is_empty(), !shows, "{printed}");
    }
}
