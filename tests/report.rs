//! A run's page and event files, the comparison of runs, and the commands that explain the program, from outside.

use crate::support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::{metrics, names, path, train, vitrum};

fn events(run: &str) -> Vec<String> {
    names(run).into_iter().filter(|name| name.starts_with("events.out.tfevents.")).collect()
}

#[test]
fn a_run_has_a_page_that_changes_nothing_and_can_be_made_again() {
    let (with, without) = (path("with"), path("without"));
    let done = vitrum(&train(&with, &["optim.lr=3e-3"])).ok();
    assert!(done.stderr.contains("report.html"), "{}", done.stderr);
    vitrum(&train(&without, &["optim.lr=3e-3", "train.report=false", "train.tensorboard=false"])).ok();
    assert_eq!(metrics(&with), metrics(&without));
    assert!(!Path::new(&without).join("report.html").exists() && events(&without).is_empty());
    assert_eq!(events(&with).len(), 1);

    let read = |name: &str| fs::read_to_string(Path::new(&with).join(name)).unwrap();
    let page = read("report.html");
    for part in
        ["Loss", "validation, EMA", "Confusion", "Calibration", "augmented", "Recipe, with every default"]
    {
        assert!(page.contains(part), "{part}");
    }
    // Every validation picture is in one cell.
    let details: Value = serde_json::from_str(&read("report.json")).unwrap();
    let cells: Vec<[u64; 3]> = serde_json::from_value(details["confusion"].clone()).unwrap();
    assert_eq!(cells.iter().map(|cell| cell[2]).sum::<u64>(), 40);
    let right: u64 = cells.iter().filter(|cell| cell[0] == cell[1]).map(|cell| cell[2]).sum();
    let last = metrics(&with).into_iter().rev().find_map(|line| line.get("eval").cloned()).unwrap();
    assert!((right as f64 / 40.0 - last["top1"].as_f64().unwrap()).abs() < 1e-9);
    let steps = read("results.csv").lines().count();
    assert_eq!(steps, 1 + 6, "a row for each step with a line");

    let again = vitrum(&["report", &with]).ok();
    assert_eq!(again.stdout.trim(), Path::new(&with).join("report.html").display().to_string());
    assert_eq!(read("report.html"), page);

    let both = path("both.html");
    vitrum(&["report", &with, &without, "--out", &both]).ok();
    let both = fs::read_to_string(both).unwrap();
    assert!(both.contains("2 runs") && both.contains("train.report") && !both.contains("optim.lr<"));
    vitrum(&["report", &path("nowhere")]).exits(1).says(&["nowhere", "No such file"]);
}

#[test]
fn a_resumed_run_begins_a_new_event_file_and_ends_with_a_whole_page() {
    let run = path("resumed");
    vitrum(&train(&run, &["train.steps=8", "schedule.kind=constant"])).ok();
    vitrum(&["train", "--resume", &run, "--set", "train.steps=16"]).ok();
    assert_eq!(events(&run).len(), 2);
    let page = fs::read_to_string(Path::new(&run).join("report.html")).unwrap();
    assert!(page.contains("After 16 updates"));
}

#[test]
fn the_program_explains_its_settings_recipes_and_itself() {
    let one = vitrum(&["settings", "optim.lr"]).ok().stdout;
    assert!(one.contains("optim.lr\n") && one.contains("default   0.001") && one.contains("--lr"), "{one}");
    vitrum(&["settings", "optim.lrr"]).exits(2).says(&["optim.lrr", "`optim.lr`"]);
    let all = vitrum(&["settings", "--json"]).ok().json();
    let keys = all["sections"].as_array().unwrap().iter().map(|s| s["settings"].as_array().unwrap().len());
    assert!(keys.sum::<usize>() > 110);
    let listed = vitrum(&["recipes"]).ok().stdout;
    assert!(listed.contains("b16/cifar10-differential\n") && listed.contains("expect"), "{listed}");
    assert!(listed.lines().all(|line| line.chars().count() <= 120));
    // A recipe that is shown is a recipe.
    let mine = path("mine.toml");
    fs::write(&mine, vitrum(&["recipes", "show", "mini/cifar10"]).ok().stdout).unwrap();
    vitrum(&["recipes", "show", "mini/cifar"]).exits(2).says(&["`vitrum recipes` lists them"]);
    assert!(fs::read_to_string(&mine).unwrap().contains("[model]"));
    assert!(vitrum(&["completions", "bash"]).ok().stdout.contains("complete -F"));
    let pages = path("man");
    vitrum(&["man", &pages]).ok();
    assert!(names(&pages).contains(&"vitrum-train.1".to_string()));
    assert!(vitrum(&["train", "--help"]).ok().stdout.contains("Examples:\n  # the demo"));
}
