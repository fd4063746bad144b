//! `vitrum inspect`: says what a file or folder is. Reads headers only.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Settings, print, print_json};
use crate::data;
use crate::error::{Error, Result};
use crate::report::format;
use crate::terminal::one_line;
use crate::weights::{self, ModelOverrides};

#[derive(clap::Args)]
pub struct Args {
    /// A weights file or its short name, a checkpoint, a run directory, a data set, or `demo`
    pub path: PathBuf,
    #[command(flatten)]
    pub settings: Settings,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let what = describe(&args.path, &args.settings.model_overrides()?)?;
    if args.json { print_json(&what) } else { print(&text(&what)) }
}

/// A file is weights, and so is a folder that a run wrote. Any other folder is a data set, and so is an
/// archive.
fn describe(path: &Path, overrides: &ModelOverrides) -> Result<Value> {
    let is_demo = ["demo", "demo-hard"].iter().any(|name| path.as_os_str() == *name);
    let short_name = weights::is_model_name(path);
    if !path.exists() && !is_demo && !short_name && !data::source::is_named(path) {
        return Err(Error::new(format!("{}: there is no such file or folder", path.display())));
    }
    // A pickle counts as weights, so that `weights` refuses it with its own message.
    let model =
        |name: &str| [path.join(name), path.join(format!("{name}.index.json"))].iter().any(|p| p.exists());
    let of_a_run = path.join("checkpoints").exists()
        || ["model.safetensors", "pytorch_model.bin"].into_iter().any(model);
    let weights = of_a_run || short_name || (path.is_file() && !data::source::is_named(path));
    if weights { weights::describe(path, overrides) } else { data::describe(path) }
}

/// One `key: value` line per fact, nested ones as `train.records`.
fn text(what: &Value) -> String {
    let mut lines = Vec::new();
    add_lines("", what, &mut lines);
    lines.join("\n")
}

fn add_lines(key: &str, value: &Value, lines: &mut Vec<String>) {
    let last = key.rsplit('.').next().unwrap_or_default();
    let text = match value {
        Value::Null => return,
        Value::Object(fields) => {
            for (name, inner) in fields {
                let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                add_lines(&path, inner, lines);
            }
            return;
        }
        Value::String(text) => one_line(text).into_owned(),
        Value::Array(items) if items.is_empty() => return,
        Value::Array(items) => match items.as_slice() {
            [height, width] if ["image", "patch"].contains(&last) => format!("{height}x{width}"),
            items => short_list(items),
        },
        Value::Number(number) => match (last, number.as_u64()) {
            ("bytes", Some(bytes)) => format::bytes(bytes),
            ("params" | "records", Some(count)) => format::thousands(count),
            _ => number.to_string(),
        },
        Value::Bool(truth) => if *truth { "yes" } else { "no" }.into(),
    };
    lines.push(format!("{key}: {text}"));
}

/// The first few items, and the total.
fn short_list(items: &[Value]) -> String {
    const SHOWN: usize = 10;
    let text =
        |item: &Value| item.as_str().map_or_else(|| item.to_string(), |name| one_line(name).into_owned());
    let mut list = items.iter().take(SHOWN).map(text).collect::<Vec<_>>().join(", ");
    if items.len() > SHOWN {
        list += &format!(", ... ({} in all)", items.len());
    }
    list
}
