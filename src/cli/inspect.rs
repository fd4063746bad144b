//! `vitrum inspect`: what is this file or folder? Reads headers only.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{print, print_json};
use crate::data::Split;
use crate::data::dataset::{MANIFEST, Manifest};
use crate::error::{Error, Result};
use crate::report::format;
use crate::weights;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint, a run directory or a packed data set
    pub path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let what = describe(&args.path)?;
    if args.json { print_json(&what) } else { print(&text(&what)) }
}

/// A folder with `dataset.json`, or with folders that have one, is a data set; everything else should be weights.
fn describe(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Err(Error::new(format!("{}: there is no such file or folder", path.display())));
    }
    if path.join(MANIFEST).is_file() {
        return describe_packed(path);
    }
    let split = |split: Split| {
        let folders = split.folders().iter().map(|name| path.join(name));
        folders.into_iter().find(|folder| folder.join(MANIFEST).is_file())
    };
    match (split(Split::Train), split(Split::Val)) {
        (None, None) => weights::describe(path),
        (train, val) => {
            let one = |folder: Option<PathBuf>| folder.map(|folder| describe_packed(&folder)).transpose();
            Ok(json!({ "kind": "data set", "path": shown(path), "train": one(train)?, "val": one(val)? }))
        }
    }
}

fn describe_packed(folder: &Path) -> Result<Value> {
    let manifest = Manifest::read(folder)?;
    let file = |name: &str| folder.join(name).metadata().map(|m| m.len()).unwrap_or(0);
    let missing: Vec<&str> =
        manifest.shards.iter().map(|s| s.file.as_str()).filter(|name| !folder.join(name).is_file()).collect();
    if let Some(name) = missing.first() {
        return Err(Error::new(format!("{}: shard `{name}` is missing", folder.display()))
            .hint("pack the data set again"));
    }
    Ok(json!({
        "kind": "data set",
        "path": shown(folder),
        "format": manifest.format,
        "image": manifest.image,
        "records": manifest.records,
        "skipped": manifest.skipped,
        "classes": manifest.classes.len(),
        "class_names": manifest.classes,
        "shards": manifest.shards.len(),
        "bytes": manifest.shards.iter().map(|s| file(&s.file)).sum::<u64>(),
    }))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// One `key: value` line per fact, nested ones as `train.records`.
fn text(what: &Value) -> String {
    let mut lines = Vec::new();
    add_lines("", what, &mut lines);
    lines.join("\n")
}

fn add_lines(key: &str, value: &Value, lines: &mut Vec<String>) {
    let text = match value {
        Value::Null => return,
        Value::Object(fields) => {
            for (name, inner) in fields {
                let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                add_lines(&path, inner, lines);
            }
            return;
        }
        Value::String(text) => text.clone(),
        Value::Array(items) => match items.as_slice() {
            [Value::Number(height), Value::Number(width)] if height.is_u64() => format!("{height}x{width}"),
            items => short_list(items),
        },
        Value::Number(number) => match (key.rsplit('.').next(), number.as_u64()) {
            (Some("bytes"), Some(bytes)) => format::bytes(bytes),
            (Some("params" | "records"), Some(count)) => format::thousands(count),
            _ => number.to_string(),
        },
        Value::Bool(truth) => if *truth { "yes" } else { "no" }.into(),
    };
    lines.push(format!("{key}: {text}"));
}

/// The first few, and how many there are.
fn short_list(items: &[Value]) -> String {
    const SHOWN: usize = 10;
    let text = |item: &Value| item.as_str().map_or_else(|| item.to_string(), str::to_string);
    let mut list = items.iter().take(SHOWN).map(text).collect::<Vec<_>>().join(", ");
    if items.len() > SHOWN {
        list += &format!(", ... ({} in all)", items.len());
    }
    list
}
