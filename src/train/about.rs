//! The facts that a checkpoint holds about itself: its origin and its accuracy.

use serde_json::{Value, json};

use crate::weights::CheckpointMeta;

use super::directory::{host, now, utc_stamp};

/// `vitrum 0.1.0`, with the commit if the build knew it.
pub fn made_by() -> String {
    let version = concat!("vitrum ", env!("CARGO_PKG_VERSION"));
    option_env!("VITRUM_COMMIT").map_or(version.into(), |commit| format!("{version} ({commit})"))
}

/// The bytes of the running program, or its name where they cannot be read: ranks must run the same one.
pub fn program() -> Vec<u8> {
    std::fs::read("/proc/self/exe").unwrap_or_else(|_| made_by().into())
}

/// The facts for `checkpoint.json`: the weights' metadata, plus command, machine and time, which may differ after
/// a resume.
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

/// This process's command line, quoted for a shell.
fn command_line() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    let quoted = |word: String| match word.chars().all(plain) && !word.is_empty() {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    std::env::args_os().map(|word| quoted(word.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
}
