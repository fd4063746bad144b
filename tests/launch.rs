//! The scripts of `examples/launch`: they parse, the commands in them exist, and each starts the ranks that it says.
//! Programs that are not on every machine (srun, torchrun) are stood in for by scripts that write down how they were
//! called. What is here is used: mpirun, Slurm.

use crate::support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use support::{Done, finish, is_ignored, metrics, path, settings, wait};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/launch")
}

const SCRIPTS: [&str; 4] = ["one-machine.sh", "slurm.sbatch", "node.sh", "torchrun.sh"];

fn text(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

/// A script under its name, with `programs` (name, lines of bash) found before all others.
fn script(name: &str, scratch: &str, programs: &[(&str, &str)]) -> Command {
    let bin = Path::new(&path(scratch)).join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    for (program, lines) in programs {
        let file = bin.join(program);
        std::fs::write(&file, format!("#!/usr/bin/env bash\n{lines}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("bash");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    command.arg(folder().join(name)).env("PATH", path).stdin(Stdio::null());
    for variable in ["NODES", "NODE", "GPUS", "RANKS", "VITRUM", "MPI", "HEAD", "SLURM_CPUS_PER_TASK"] {
        command.env_remove(variable);
    }
    command
}

/// A program that writes its name and arguments to a file.
fn noted(scratch: &str) -> String {
    format!("echo \"$(basename \"$0\") $*\" >> '{}/calls'", path(scratch))
}

fn calls(scratch: &str) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(&path(scratch)).join("calls")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn output(program: &str, args: &[&str]) -> Option<Done> {
    let child =
        Command::new(program).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().ok()?;
    Some(wait(child))
}

#[test]
fn every_script_parses() {
    let found = support::names(folder());
    let mut expected = SCRIPTS.map(String::from).to_vec();
    expected.push("kubernetes.yaml".into());
    expected.sort();
    assert_eq!(found, expected, "a script without a test");
    for name in SCRIPTS {
        let file = folder().join(name);
        assert!(file.metadata().unwrap().permissions().mode() & 0o111 != 0, "{name} cannot be started");
        let file = file.to_str().unwrap();
        output("bash", &["-n", file]).unwrap().ok();
        match output("shellcheck", &[file]) {
            Some(done) => drop(done.ok()),
            None => println!("skipped: there is no shellcheck for {name}"),
        }
    }
}

/// Whether the program takes these words.
fn parses(words: &[&str], from: &str) {
    let words: Vec<&str> = ["vitrum"].into_iter().chain(words.iter().copied()).collect();
    vitrum::cli::command().try_get_matches_from(&words).unwrap_or_else(|e| panic!("{from}: {words:?}: {e}"));
}

#[test]
fn the_commands_in_scripts_and_pages_exist() {
    let mut count = 0;
    let page = include_str!("../docs/distributed.md").to_owned();
    for (name, text) in SCRIPTS.map(|name| (name, text(name))).into_iter().chain([("the page", page)]) {
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(at) = words.iter().position(|word| word.starts_with("examples/launch/")) else {
                continue;
            };
            assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(words[at]).exists(), "{name}: {line}");
            if words.get(at + 1).is_some_and(|word| *word == "train") {
                parses(&words[at + 1..], name);
                count += 1;
            }
        }
    }
    assert!(count >= 6, "only {count} commands were found");
}

#[test]
fn the_kubernetes_job_is_yaml_that_starts_every_node() {
    let program = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let file = folder().join("kubernetes.yaml").display().to_string();
    let done = output("python3", &["-c", program, &file]);
    let Some(done) = done.filter(|done| !done.stderr.contains("No module named 'yaml'")) else {
        println!("skipped: there is no python3 with PyYAML");
        return;
    };
    let job = done.ok().json();
    let spec = &job["spec"];
    assert_eq!((&job["kind"], &spec["completionMode"]), (&"Job".into(), &"Indexed".into()));
    assert_eq!(spec["completions"], spec["parallelism"], "all nodes run at the same time");
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(container["command"], serde_json::json!(["bash", "/launch/node.sh"]));
    let words: Vec<&str> =
        container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    parses(&words, "kubernetes.yaml");
    let variable = |name: &str| {
        let all = container["env"].as_array().unwrap();
        all.iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no {name}")).clone()
    };
    assert_eq!(variable("NODES")["value"], spec["completions"].to_string());
    assert_eq!(variable("GPUS")["value"], container["resources"]["limits"]["nvidia.com/gpu"].to_string());
    let field = &variable("NODE")["valueFrom"]["fieldRef"]["fieldPath"];
    assert!(field.as_str().unwrap().contains("job-completion-index"), "{field}");
    // Every mount has its volume.
    let names = |list: &serde_json::Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&container["volumeMounts"]), names(&pod["volumes"]));
}

#[test]
fn nodes_start_all_ranks_with_torchruns_variables() {
    let scratch = "nodes";
    let vitrum = format!(
        "echo \"$RANK of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE: $*\" >> '{}/calls'",
        path(scratch)
    );
    for node in ["0", "1"] {
        let mut command = script("node.sh", scratch, &[("vitrum", &vitrum)]);
        command.args(["train", "demo"]).envs([("NODES", "2"), ("NODE", node), ("GPUS", "3")]);
        finish(command).ok();
    }
    let mut found = calls(scratch);
    found.sort();
    let want: Vec<String> =
        (0..6).map(|rank| format!("{rank} of 6, local {} of 3: train demo", rank % 3)).collect();
    assert_eq!(found, want);
    finish(script("node.sh", scratch, &[])).exits(1).says(&["the number of nodes"]);
}

#[test]
fn a_node_hands_signals_on_and_ends_with_the_code_of_its_ranks() {
    if is_ignored(Signal::TERM) {
        println!("skipped: this process ignores SIGTERM");
        return;
    }
    let scratch = "signals";
    // Rank 0 takes a while to save.
    let vitrum = format!(
        "trap 'sleep 0.2; echo saved >> {0}/calls; exit 143' TERM\ntouch {0}/up-$RANK\nwhile :; do sleep 0.02; done",
        path(scratch)
    );
    let mut command = script("node.sh", scratch, &[("vitrum", &vitrum)]);
    command
        .envs([("NODES", "1"), ("NODE", "0"), ("GPUS", "2")])
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let child = command.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while !(0..2).all(|rank| Path::new(&path(scratch)).join(format!("up-{rank}")).exists()) {
        assert!(Instant::now() < end, "the ranks do not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait(child).exits(143);
    assert_eq!(calls(scratch), ["saved", "saved"]);
    let fails = "[ \"$RANK\" != 1 ] || exit 7";
    let mut command = script("node.sh", "fails", &[("vitrum", fails)]);
    command.envs([("NODES", "1"), ("NODE", "0"), ("GPUS", "3")]);
    finish(command).exits(7);
}

#[test]
fn a_batch_script_of_slurm_ends_all_tasks_together_and_goes_back_into_the_queue_after_a_signal() {
    let scratch = "slurm";
    let (srun, scontrol) = (noted(scratch) + "\nexit ${CODE:-0}", noted(scratch));
    let run = |code: &str| {
        let mut command = script("slurm.sbatch", scratch, &[("srun", &srun), ("scontrol", &scontrol)]);
        command.args(["train", "demo"]).envs([("CODE", code), ("SLURM_JOB_ID", "17")]);
        command.envs([("SLURM_CPUS_PER_TASK", "12"), ("MPI", "pmix")]);
        finish(command)
    };
    run("0").ok();
    let srun = "srun --kill-on-bad-exit=1 --cpus-per-task=12 --mpi=pmix vitrum train demo";
    assert_eq!(calls(scratch), [srun]);
    run("1").exits(1);
    assert_eq!(calls(scratch)[1..], [srun], "a run that failed is not started again");
    run("143").exits(143);
    assert_eq!(calls(scratch)[2..], [srun, "scontrol requeue 17"]);
}

#[test]
fn torchrun_starts_the_program_itself() {
    let scratch = "torchrun";
    let torchrun = noted(scratch);
    let mut one = script("torchrun.sh", scratch, &[("torchrun", &torchrun)]);
    one.args(["train", "demo"]);
    finish(one).ok();
    let mut several = script("torchrun.sh", scratch, &[("torchrun", &torchrun)]);
    several.args(["train", "demo"]).envs([("NODES", "4"), ("HEAD", "first"), ("GPUS", "8")]);
    finish(several).ok();
    let want = [
        "torchrun --no-python --nproc-per-node gpu --standalone vitrum train demo",
        "torchrun --no-python --nproc-per-node 8 --nnodes 4 --rdzv-backend c10d --rdzv-endpoint first:29400 --rdzv-id \
         vitrum vitrum train demo",
    ];
    assert_eq!(calls(scratch), want);
}

/// A run of a few steps on two ranks of the CPU.
fn short_run(out: &str) -> Vec<String> {
    let mut words = ["train", "demo", "--device", "cpu", "--out", out].map(String::from).to_vec();
    for setting in settings().into_iter().chain(["train.steps=2".into(), "augment.mix_group=0".into()]) {
        words.extend(["--set".into(), setting]);
    }
    words
}

#[test]
fn one_machine_trains_under_mpirun() {
    let out = path("one-machine");
    let none = script("one-machine.sh", "no-gpus", &[("nvidia-smi", "exit 1"), ("mpirun", "exit 9")]);
    finish(none).exits(2).says(&["no GPU was found", "RANKS=N"]);
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("skipped: there is no `mpirun` on PATH");
        return;
    }
    let mut command = script("one-machine.sh", "mpirun", &[]);
    command.args(short_run(&out)).envs([("RANKS", "2"), ("VITRUM", env!("CARGO_BIN_EXE_vitrum"))]);
    finish(command).ok().says(&["ranks    2 with 8 samples of each batch"]);
    assert_eq!(metrics(&out).last().unwrap()["step"], 2);
}

#[test]
fn slurm_trains_two_ranks() {
    if output("sinfo", &["--noheader"]).is_none_or(|done| done.code != 0 || !done.stdout.contains("idle")) {
        println!("skipped: there is no Slurm with an idle node");
        return;
    }
    let out = path("by-slurm");
    let log = path("by-slurm.log");
    let script = folder().join("slurm.sbatch").display().to_string();
    let exports = format!("--export=ALL,MPI=pmix,VITRUM={}", env!("CARGO_BIN_EXE_vitrum"));
    let mut command = Command::new("sbatch");
    command.args(["--wait", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--no-requeue"]);
    command.args([&exports, &format!("--output={log}"), &script]).args(short_run(&out));
    let done = finish(command);
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(done.code, 0, "{}\n{said}", done.stderr);
    assert!(said.contains("ranks    2 with 8 samples of each batch"), "{said}");
    assert_eq!(metrics(&out).last().unwrap()["step"], 2);
}
