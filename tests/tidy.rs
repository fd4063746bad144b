//! Rules for sources and documentation as texts: modules say what they own, forward and backward correspond
//! line by line, imports point one way, and what the documentation mentions exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use vitrum::recipe::Recipe;
use vitrum::train::sweep::Axis;

/// Files with more than [`MOST_LINES`] lines that are older than the rule, and their limits. Entries shrink
/// and disappear; new ones need a reason.
const OVERSIZE: [(&str, usize); 0] = [];
const MOST_LINES: usize = 700;

/// What each room may import from the others, besides `error`, `files`, `rng`, `seal` and itself.
const IMPORTS: [(&str, &[&str]); 14] = [
    ("backend", &[]),
    ("bench", &["backend", "data", "dist", "recipe", "report", "train", "vit"]),
    ("check", &["backend", "dist", "infer", "recipe", "train", "vit", "weights"]),
    (
        "cli",
        &[
            "backend", "bench", "check", "data", "dist", "infer", "recipe", "report", "selftest", "train",
            "vit", "weights",
        ],
    ),
    ("data", &["backend", "recipe"]),
    ("dist", &["backend"]),
    ("infer", &["backend", "data", "recipe", "vit", "weights"]),
    ("optim", &["backend", "recipe", "vit"]),
    ("recipe", &["backend", "vit"]),
    ("report", &[]),
    ("selftest", &["backend"]),
    ("train", &["backend", "data", "dist", "infer", "optim", "recipe", "report", "vit", "weights"]),
    ("vit", &["backend"]),
    ("weights", &["backend", "recipe", "vit"]),
];

/// Rooms that forbid unsafe code, and the only places that contain any.
const SAFE_ROOMS: [&str; 9] = ["bench", "check", "cli", "infer", "optim", "recipe", "report", "train", "vit"];
const UNSAFE_PLACES: [&str; 7] = [
    "src/backend/cpu/",
    "src/backend/cuda/",
    "src/data/shard.rs",
    "src/data/jpeg/",
    "src/data/augment/",
    "src/dist/mpi.rs",
    "src/files.rs",
];

/// Steps of the forward pass that need no backward: pixels have no gradient.
const WITHOUT_GRADIENT: [(&str, usize, &str); 1] = [("stem", 1, "patchify")];

#[test]
fn every_module_says_what_it_owns() {
    for (path, text) in rust() {
        assert!(text.starts_with("//! "), "{path} does not open with `//!`");
    }
}

#[test]
fn nothing_is_left_unfinished() {
    // Split in two, so that this file does not contain them.
    for macro_name in ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!(")) {
        for (path, text) in rust() {
            assert!(!text.contains(&macro_name), "{path} has `{macro_name}`");
        }
    }
}

#[test]
fn files_have_one_subject() {
    for (path, text) in rust() {
        let lines = text.lines().count();
        match OVERSIZE.iter().find(|(name, _)| *name == path) {
            None => assert!(lines <= MOST_LINES, "{path} has {lines} lines: it should be two files"),
            Some((_, most)) => {
                assert!(lines <= *most, "{path} has {lines} lines, and had {most}: it must not grow");
                assert!(lines > MOST_LINES, "{path} is small enough now: remove it from `OVERSIZE`");
            }
        }
    }
    for (name, _) in OVERSIZE {
        assert!(root().join(name).exists(), "`OVERSIZE` names `{name}`, which is gone");
    }
}

/// Cargo does not look for them: each would be a program of its own.
#[test]
fn every_file_of_tests_is_built() {
    let (suite, manifest) = (read("tests/suite.rs"), read("Cargo.toml"));
    let mut count = 0;
    for (path, _) in rust() {
        let Some(name) = path.strip_prefix("tests/").and_then(|file| file.strip_suffix(".rs")) else {
            continue;
        };
        let is_module =
            suite.contains(&format!("\nmod {name};\n")) || suite.contains(&format!("\"{name}.rs\""));
        let is_program = manifest.contains(&format!("\nname = \"{name}\"\n"));
        assert!(
            name.contains('/') || is_module != is_program,
            "{path} is neither in tests/suite.rs nor in Cargo.toml"
        );
        count += 1;
    }
    assert!(count > 20, "only {count} files were found");
}

// ---- Rooms ----

#[test]
fn imports_point_one_way() {
    let import = Regex::new(r"(?m)^\s*(?:pub )?use crate::(\w+)").unwrap();
    let shared = ["error", "files", "rng", "seal", "signals", "terminal", "watch", "fail"];
    for (path, text) in rust() {
        let Some((room, allowed)) =
            IMPORTS.iter().find(|(room, _)| path.starts_with(&format!("src/{room}/")))
        else {
            continue;
        };
        // Tests may import from any room.
        if path.ends_with("/tests.rs") {
            continue;
        }
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        for import in import.captures_iter(text) {
            let other = &import[1];
            let fits = other == *room || shared.contains(&other) || allowed.contains(&other);
            assert!(fits, "{path} imports `{other}`, which `{room}` is not to know");
        }
    }
}

#[test]
fn the_model_names_no_device() {
    let device = Regex::new(r"(?i)\b(cpu|cuda|gpu|avx\w*)\b").unwrap();
    for (path, text) in rust().into_iter().filter(|(path, _)| path.starts_with("src/vit/")) {
        if let Some(found) = device.find(&text) {
            panic!("{path} names `{}`", found.as_str());
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_belongs() {
    for room in SAFE_ROOMS {
        let path = format!("src/{room}/mod.rs");
        assert!(read(&path).contains("\n#![forbid(unsafe_code)]\n"), "{path} does not forbid unsafe code");
    }
    let site = Regex::new(r"(?m)^[^/\n]*\bunsafe (fn|impl|trait|\{)").unwrap();
    for (path, text) in rust().into_iter().filter(|(path, _)| path.starts_with("src/")) {
        let belongs = UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
        assert!(belongs || !site.is_match(&text), "{path} has unsafe code");
    }
    // The map names the same places and rooms.
    let map = read("ARCHITECTURE.md");
    let sentences =
        map.split("- **Unsafe code** ").nth(1).and_then(|rest| rest.split("\n- ").next()).unwrap();
    let mut named: Vec<&str> = sentences.split('`').skip(1).step_by(2).collect();
    let mut expected = [&UNSAFE_PLACES[..], &SAFE_ROOMS].concat();
    named.sort_unstable();
    expected.sort_unstable();
    assert_eq!(named, expected);
}

#[test]
fn every_room_is_on_the_map() {
    let map = read("ARCHITECTURE.md");
    let heading = Regex::new(r"(?m)^### `src/(\w+)`$").unwrap();
    let named: BTreeSet<String> = heading.captures_iter(&map).map(|h| h[1].to_string()).collect();
    let mut rooms = BTreeSet::new();
    for entry in fs::read_dir(root().join("src")).unwrap().map(|entry| entry.unwrap()) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            assert!(IMPORTS.iter().any(|(room, _)| *room == name), "`IMPORTS` lacks the room `{name}`");
            rooms.insert(name);
        } else {
            let known = name == "lib.rs" || map.contains(&format!("`{name}`"));
            assert!(known, "ARCHITECTURE.md does not name `src/{name}`");
        }
    }
    assert_eq!(named, rooms, "headings of ARCHITECTURE.md, folders of src");
}

// ---- The model ----

/// A numbered line of a pass: the number, and the operation that it calls.
type Step = (usize, String);

#[test]
fn forward_and_backward_lie_side_by_side() {
    let forward = passes("src/vit/forward.rs");
    let backward = passes("src/vit/backward.rs");
    assert!(forward.len() >= 5, "numbered functions of the forward pass: {:?}", forward.keys());
    assert_eq!(forward.keys().collect::<Vec<_>>(), backward.keys().collect::<Vec<_>>());
    for (function, steps) in &forward {
        let mut expected = Vec::new();
        for branch in branches(steps, |before, after| after > before) {
            let numbers: Vec<usize> = branch.iter().map(|(number, _)| *number).collect();
            assert_eq!(numbers, (1..=branch.len()).collect::<Vec<_>>(), "forward.rs, fn {function}");
            let with_gradient = |(number, operation): &&Step| {
                !WITHOUT_GRADIENT.contains(&(function.as_str(), *number, operation.as_str()))
            };
            expected.push(branch.iter().filter(with_gradient).rev().cloned().collect::<Vec<_>>());
        }
        let found = branches(&backward[function], |before, after| after < before);
        assert_eq!(found, expected, "fn {function}: backward.rs, and forward.rs read backwards");
    }
}

/// The numbered steps of each function that has any. Every operation of such a function must have a number.
fn passes(path: &str) -> BTreeMap<String, Vec<Step>> {
    // Attention and MLP are steps of a block and have their own steps.
    let head = Regex::new(r"^(?:pub\(super\) fn (attention|mlp)|fn (\w+))").unwrap();
    let call = Regex::new(r"\b(?:b\.(\w+)|recompute::(matmul)_gelu)\(|^    (attention|mlp)\(").unwrap();
    let number = Regex::new(r"// (\d+)$").unwrap();
    let mut functions: BTreeMap<String, Vec<Step>> = BTreeMap::new();
    let (mut function, mut open) = (None, None);
    for line in read(path).lines() {
        if let Some(head) = head.captures(line) {
            function = head.get(1).or(head.get(2)).map(|name| name.as_str().to_string());
        }
        if line == "}" {
            function = None;
        }
        let Some(function) = &function else { continue };
        if let Some(call) = call.captures(line) {
            assert_eq!(open, None, "{path}, fn {function}: an operation without a number before `{line}`");
            // `matmul` and `matmul_backward` are the two directions of one operation; `scale` is its own.
            let name = call.get(1).or(call.get(2)).or(call.get(3)).expect("one of the three").as_str();
            let operation = name.strip_suffix("_backward").unwrap_or(name).to_string();
            open = Some(operation);
        }
        if let Some(number) = number.captures(line) {
            let operation = open.take().unwrap_or_else(|| panic!("{path}: a number without a call: {line}"));
            functions.entry(function.clone()).or_default().push((number[1].parse().unwrap(), operation));
        }
    }
    assert_eq!(open, None, "{path}: the last operation has no number");
    functions
}

/// Splits steps where their numbers start again: at the arms of a `match`.
fn branches(steps: &[Step], goes_on: fn(usize, usize) -> bool) -> Vec<Vec<Step>> {
    steps.chunk_by(|before, after| goes_on(before.0, after.0)).map(<[Step]>::to_vec).collect()
}

// ---- Documentation ----

#[test]
fn documented_commands_parse() {
    let mut count = 0;
    for (path, text) in documents() {
        for line in shell_lines(&path, &text) {
            if let Some(words) = vitrum_words(&line) {
                parses(&words).unwrap_or_else(|e| panic!("{path}: `{line}`: {e}"));
                count += 1;
            }
        }
    }
    assert!(count >= 15, "only {count} commands were found in the documentation");
}

/// The words after the program's name, if the line calls it.
fn vitrum_words(line: &str) -> Option<Vec<String>> {
    let words: Vec<String> = line.split_whitespace().map(str::to_string).collect();
    let start = match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["vitrum", ..] => 1,
        ["cargo", "run", "--release", "--", ..] => 4,
        _ => return None,
    };
    Some(words[start..].to_vec())
}

fn parses(words: &[String]) -> Result<(), String> {
    let program = ["vitrum".to_string()];
    let matches = vitrum::cli::command()
        .try_get_matches_from(program.iter().chain(words))
        .map_err(|e| e.to_string())?;
    let (name, arguments) = matches.subcommand().ok_or("no command")?;
    if is_refused(name) {
        return Err("this command is not built yet".into());
    }
    if !["train", "plan", "finetune"].contains(&name) {
        return Ok(());
    }
    let recipe = arguments.get_one::<String>("recipe").map(String::as_str);
    let recipe = recipe.or((name == "finetune").then_some("finetune"));
    let overrides: Vec<String> = arguments.get_many("set").into_iter().flatten().cloned().collect();
    // A reader's own file does not exist here: its settings are tried on the demo.
    let recipe = recipe.filter(|name| !name.ends_with(".toml"));
    let read =
        |more: &[String]| Recipe::read(recipe, &[&overrides, more].concat()).map_err(|e| e.to_string());
    if name != "plan" {
        for axis in arguments.get_many::<String>("sweep").into_iter().flatten() {
            let axis = Axis::parse(axis).map_err(|e| e.to_string())?;
            for value in &axis.values {
                read(&[format!("{}={value}", axis.key)])?;
            }
        }
    }
    read(&[]).map(drop)
}

/// Whether a command only answers that it is not built yet.
fn is_refused(name: &str) -> bool {
    let command = vitrum::cli::command();
    let about = command.find_subcommand(name).and_then(|c| c.get_about()).map(ToString::to_string);
    about.is_some_and(|about| about.contains("not built yet"))
}

/// Commands in a document: the lines of its `sh` blocks, or a recipe's `Run` line.
fn shell_lines(path: &str, text: &str) -> Vec<String> {
    let comment = Regex::new(r"\s+(#|\().*$").unwrap();
    let mut lines = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if path.ends_with(".toml") {
            lines.extend(line.strip_prefix("# Run").into_iter().flat_map(|run| run.split(" && ")));
        } else if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            lines.extend(line.split(" && "));
        }
    }
    lines.into_iter().map(|line| comment.replace(line.trim(), "").into_owned()).collect()
}

#[test]
fn commands_and_flags_in_running_text_exist() {
    let mention = Regex::new(r"`vitrum ([^`]+)`").unwrap();
    for (path, text) in documents() {
        for mention in mention.captures_iter(&text) {
            let words: Vec<&str> = mention[1].split_whitespace().collect();
            let command = vitrum::cli::command();
            let Some(command) = command.find_subcommand(words[0]) else {
                panic!("{path}: there is no command `vitrum {}`", words[0]);
            };
            let flags = words[1..].iter().filter_map(|word| word.strip_prefix("--"));
            for flag in flags.filter(|flag| *flag != "help") {
                let known = command.get_arguments().any(|a| a.get_long() == Some(flag));
                assert!(known, "{path}: `vitrum {}` has no flag `--{flag}`", words[0]);
            }
        }
    }
}

#[test]
fn settings_in_running_text_exist() {
    let sections = "model|data|augment|optim|schedule|loss|train|eval|finetune";
    let key = Regex::new(&format!(r"`((?:{sections})\.[a-z_0-9]+)(?: ?=[^`]*)?`")).unwrap();
    let mut count = 0;
    for (path, text) in documents() {
        for key in key.captures_iter(&text).map(|k| k[1].to_string()).filter(|k| !is_file(k)) {
            // With any value, an unknown key gives this error.
            let message = Recipe::read(None, &[format!("{key}=?")]).err().map(|e| e.message().to_string());
            let unknown = message.is_some_and(|m| m.contains("unknown key"));
            assert!(!unknown, "{path}: there is no setting `{key}`");
            count += 1;
        }
    }
    assert!(count >= 20, "only {count} settings were found in the documentation");
}

/// `loss.rs` and `model.safetensors` look like settings.
fn is_file(name: &str) -> bool {
    name.ends_with(".rs") || name.ends_with(".safetensors")
}

#[test]
fn links_and_paths_in_the_documentation_lead_somewhere() {
    let link = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let path_in_text = Regex::new(r"`((?:src|tests|docs|recipes|benches|examples)/[\w./-]*)`").unwrap();
    for (path, text) in documents().into_iter().filter(|(path, _)| path.ends_with(".md")) {
        let folder = Path::new(&path).parent().unwrap().to_owned();
        for target in link.captures_iter(&text).map(|l| l[1].to_string()) {
            if target.starts_with("https://") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let file = if file.is_empty() { PathBuf::from(&path) } else { folder.join(file) };
            assert!(root().join(&file).exists(), "{path}: the link `{target}` leads nowhere");
            if !anchor.is_empty() {
                let there = headings(&read(file.to_str().unwrap()));
                assert!(there.contains(anchor), "{path}: `{target}` names no heading of {there:?}");
            }
        }
        for named in path_in_text.captures_iter(&text).map(|p| p[1].to_string()) {
            // A name in capitals is a placeholder.
            let placeholder = named.chars().filter(char::is_ascii_uppercase).count() > 2;
            assert!(
                placeholder || root().join(&named).exists(),
                "{path} names `{named}`, which is not there"
            );
        }
    }
}

/// Anchors of a document's headings, as GitHub makes them.
fn headings(text: &str) -> BTreeSet<String> {
    let slug = |heading: &str| {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().trim().to_lowercase().replace(' ', "-")
    };
    text.lines().filter(|line| line.starts_with('#')).map(|line| slug(line.trim_start_matches('#'))).collect()
}

#[test]
fn nothing_names_one_machine() {
    // Only this file contains them.
    let folders = ["work", "root", "home"].map(|name| format!("/{name}/"));
    let hosts = ["crates.io", "pypi.org", "static.rust-lang.org", "pythonhosted.org"];
    for (path, text) in files().into_iter().filter(|(path, _)| path != "tests/tidy.rs") {
        for name in folders.iter().map(String::as_str).chain(hosts) {
            assert!(!text.contains(name), "{path} names `{name}`");
        }
        assert!(!path.ends_with(".md") || !text.contains("/tmp/"), "{path} names a temporary folder");
    }
}

// ---- Files ----

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Path and text of every Rust file.
fn rust() -> Vec<(String, String)> {
    let rust: Vec<_> = files().into_iter().filter(|(path, _)| path.ends_with(".rs")).collect();
    assert!(rust.len() > 50, "only {} Rust files were found", rust.len());
    rust
}

/// Path and text of every document: Markdown files and recipes.
fn documents() -> Vec<(String, String)> {
    let is_document =
        |path: &str| path.ends_with(".md") || (path.starts_with("recipes/") && path.ends_with(".toml"));
    let documents: Vec<_> = files().into_iter().filter(|(path, _)| is_document(path)).collect();
    assert!(documents.len() >= 10, "only {} documents were found", documents.len());
    documents
}

/// Path from the root, and text, of every text file of the project. A reader's own files (data, runs,
/// recipes) may lie beside them.
fn files() -> Vec<(String, String)> {
    let folders = ["src", "tests", "benches", "recipes", "docs", "examples", ".ci"];
    let mut paths: Vec<PathBuf> = folders.iter().flat_map(|folder| walk(&root().join(folder))).collect();
    let at_root = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    paths.extend(at_root.filter(|path| path.extension().is_some_and(|end| end == "md")));
    paths.extend(["Cargo.toml", "rustfmt.toml", ".editorconfig", ".gitignore"].map(|name| root().join(name)));
    paths.sort();
    let named = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
    // Pictures are not text.
    paths.iter().filter_map(|path| Some((named(path), fs::read_to_string(path).ok()?))).collect()
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
