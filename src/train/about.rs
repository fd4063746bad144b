//! What a checkpoint says about itself: where it comes from, and how good it is.

use serde_json::{Value, json};

use crate::weights::CheckpointMeta;

use super::directory::{host, now, utc_stamp};

/// `vitrum 0.1.0`, and the commit where the build knew one.
pub fn made_by() -> String {
    let version = concat!("vitrum ", env!("CARGO_PKG_VERSION"));
    option_env!("VITRUM_COMMIT").map_or(version.into(), |commit| format!("{version} ({commit})"))
}

/// For `checkpoint.json`: what the weights' own metadata says, and what differs between a run that was interrupted and
/// one that was not: command, machine and time.
pub fn facts(meta: &CheckpointMeta) -> Value {
    json!({
        "format": "vitrum-checkpoint-1",
        "step": meta.step,
        "epoch": meta.epoch,
        "top1": meta.top1,
        "recipe": meta.recipe,
        "data": meta.data,
        "made_by": meta.made_by,
        "command": command_line(),
        "host": host(),
        "written": utc_stamp(now()),
    })
}

/// As a shell takes it.
fn command_line() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    let quoted = |word: String| match word.chars().all(plain) && !word.is_empty() {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    std::env::args_os().map(|word| quoted(word.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
}
