//! Reads what the documentation of a recipe's types says, so that `vitrum settings` can show it: a key has one
//! description, at its field.

use std::fmt::Write as _;
use std::fs;

/// The files that declare sections of a recipe, and the enums that are values in them.
const SOURCES: [&str; 10] = [
    "src/recipe/mod.rs",
    "src/recipe/augment.rs",
    "src/recipe/optim.rs",
    "src/recipe/class_weights.rs",
    "src/recipe/micro_batch.rs",
    "src/vit/config.rs",
    "src/vit/rope.rs",
    "src/backend/memory.rs",
    "src/backend/operands.rs",
    "src/backend/options.rs",
];

/// `(type, members)`; a member has a name, a type (empty for a variant) and its documentation.
type Documented = (String, Vec<(String, String, String)>);

/// The table that `src/recipe/settings.rs` includes.
pub(crate) fn rust() -> String {
    let mut text = String::from("static TYPES: &[(&str, &[Member])] = &[\n");
    for path in SOURCES {
        println!("cargo::rerun-if-changed={path}");
        let source = fs::read_to_string(path).unwrap_or_else(|why| panic!("{path}: {why}"));
        for (name, members) in read(&source) {
            writeln!(text, "    ({name:?}, &[").unwrap();
            for (member, of, doc) in members {
                writeln!(text, "        Member {{ name: {member:?}, of: {of:?}, doc: {doc:?} }},").unwrap();
            }
            text += "    ]),\n";
        }
    }
    text + "];\n"
}

/// Every public struct and enum of a source that rustfmt has formatted.
fn read(source: &str) -> Vec<Documented> {
    let mut found: Vec<Documented> = Vec::new();
    let (mut inside, mut doc) = (false, String::new());
    for line in source.lines() {
        let opens = ["pub struct ", "pub enum "].iter().find_map(|start| line.strip_prefix(start));
        if let Some(name) = opens.and_then(|rest| rest.strip_suffix(" {")) {
            found.push((name.to_string(), Vec::new()));
            (inside, doc) = (true, String::new());
            continue;
        }
        inside &= line != "}";
        let Some(line) = line.strip_prefix("    ").filter(|line| inside && !line.starts_with(' ')) else {
            continue;
        };
        if let Some(more) = line.strip_prefix("///") {
            let space = if doc.is_empty() { "" } else { " " };
            write!(doc, "{space}{}", more.trim()).unwrap();
        } else if line.starts_with(|c: char| c.is_alphabetic()) {
            let line = line.trim_end_matches([',', '{', ' ']);
            let (name, of) = match line.strip_prefix("pub ").and_then(|field| field.split_once(": ")) {
                Some((name, of)) => (name, of),
                None => (line.split('(').next().unwrap_or(line), ""),
            };
            let members = &mut found.last_mut().expect("a member is inside a type").1;
            members.push((name.to_string(), of.to_string(), std::mem::take(&mut doc)));
        }
    }
    found
}
