//! `metrics.jsonl`: one JSON object per line, for machines.
//!
//! `{"step", "epoch", "loss", "lr", "grad_norm", ...}` for training, `{"step", "eval": {...}}` for
//! evaluation. One write call writes each line, so a killed run leaves at most one broken line, at the end.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::{EvalLine, EventFile, RewindLine, SpikeLine, StepLine};
use crate::error::{At, Result};
use crate::{files, terminal};

pub struct MetricsFile {
    file: File,
    path: PathBuf,
    /// Bytes of complete lines.
    length: u64,
    /// Whether the last line could not be written.
    is_broken: bool,
    /// The same numbers for TensorBoard.
    pub events: Option<EventFile>,
}

impl MetricsFile {
    /// Creates a file. With `resume_at_step`, opens the old one and removes the lines after that step: the
    /// resumed run repeats those steps and writes their lines again.
    pub fn open(path: &Path, resume_at_step: Option<u64>) -> Result<Self> {
        match resume_at_step {
            Some(step) if path.exists() => {
                let old = files::read(path)?;
                let kept = lines_up_to(&String::from_utf8_lossy(&old), step);
                files::write_atomic(path, |out| out.write_all(kept.as_bytes()))?;
            }
            _ => drop(File::create(path).at(path.display())?),
        }
        let file = OpenOptions::new().append(true).open(path).at(path.display())?;
        let length = file.metadata().at(path.display())?.len();
        Ok(Self { file, path: path.into(), length, is_broken: false, events: None })
    }

    pub fn step(&mut self, line: &StepLine) {
        self.write(line);
        self.pass_on(line.step, "train", line);
    }

    pub fn eval(&mut self, line: &EvalLine) {
        self.write(&json!({ "step": line.step, "eval": line }));
        self.pass_on(line.step, "val", line);
    }

    pub fn spike(&mut self, line: &SpikeLine) {
        self.write(&json!({ "step": line.step, "spike": line }));
    }

    pub fn rewind(&mut self, line: &RewindLine) {
        self.write(&json!({ "step": line.step, "rewind": line }));
    }

    /// Every number of a line as a scalar, `train/loss` or `val/ema/top1`.
    fn pass_on(&mut self, step: u64, group: &str, line: &impl Serialize) {
        let Some(events) = &mut self.events else { return };
        let mut values = Vec::new();
        let line = serde_json::to_value(line).expect("a line of numbers is JSON");
        scalars(group, &line, &mut values);
        values.retain(|(tag, _)| tag != "train/step");
        if let Err(error) = events.scalars(step, &values) {
            terminal::warn(&format!("{error}; no more events are written for TensorBoard"));
            self.events = None;
        }
    }

    /// Syncs all lines to the disk.
    pub fn sync(&mut self) {
        let synced = self.file.sync_data();
        self.check(synced);
    }

    /// If a line cannot be written (such as on a full disk), it is left out, with one warning. The run goes on.
    fn write(&mut self, line: &impl Serialize) {
        let mut text = serde_json::to_string(line).expect("a line of numbers can be written");
        text.push('\n');
        let written = self.file.write_all(text.as_bytes());
        match written {
            Ok(()) => self.length += text.len() as u64,
            // The next line must not continue a part of this one.
            Err(_) => drop(self.file.set_len(self.length)),
        }
        self.check(written);
    }

    fn check(&mut self, done: std::io::Result<()>) {
        if let Err(e) = &done
            && !self.is_broken
        {
            terminal::warn(&format!("{} cannot be written, and lacks lines: {e}", self.path.display()));
        }
        self.is_broken = done.is_err();
    }
}

fn scalars(tag: &str, value: &Value, found: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| scalars(&format!("{tag}/{name}"), value, found))
        }
        value => found.extend(value.as_f64().map(|number| (tag.to_string(), number))),
    }
}

/// The complete lines whose step is at most `last`; none if `last` is 0.
fn lines_up_to(text: &str, last: u64) -> String {
    let step = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
    let keep = |line: &&str| last > 0 && line.ends_with('\n') && step(line).is_some_and(|s| s <= last);
    text.split_inclusive('\n').filter(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Scores;
    use super::*;

    fn step_line(step: u64) -> StepLine {
        StepLine {
            step,
            epoch: 0.5,
            loss: f64::NAN,
            lr: 1e-3,
            grad_norm: 1.0,
            top1: 0.5,
            img_per_s: 100.0,
            data_wait: 0.0,
            mfu: None,
            skipped: 0,
            seconds: 1.0,
            gpu: None,
        }
    }

    fn eval_line(step: u64) -> EvalLine {
        let scores = Scores { loss: 0.5, top1: 0.9, top5: 1.0, map: None, images: 2000 };
        EvalLine {
            step,
            epoch: 0.5,
            scores,
            classes: 10,
            gap: Some(0.01),
            ema: Some(scores),
            best: true,
            img_per_s: 1.0,
            seconds: 1.0,
        }
    }

    fn read(path: &Path) -> Vec<Value> {
        let text = files::read_text(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_resumed_run_loses_the_lines_past_its_checkpoint_and_a_broken_last_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsFile::open(&path, None).unwrap();
        for step in [100, 200, 300] {
            metrics.step(&step_line(step));
            metrics.eval(&eval_line(step));
        }
        metrics.file.write_all(b"{\"step\": 200, \"lo").unwrap();

        let mut metrics = MetricsFile::open(&path, Some(200)).unwrap();
        metrics.step(&step_line(250));
        let steps: Vec<_> = read(&path).iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [100, 100, 200, 200, 250]);

        MetricsFile::open(&path, Some(0)).unwrap();
        assert!(read(&path).is_empty());
    }

    #[test]
    fn lines_have_the_keys_that_readers_look_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsFile::open(&path, Some(5)).unwrap();
        metrics.step(&step_line(1));
        metrics.eval(&eval_line(1));
        let lines = read(&path);
        for key in ["step", "epoch", "loss", "lr", "grad_norm", "top1", "img_per_s", "data_wait", "mfu"] {
            assert!(lines[0].get(key).is_some(), "{key}");
        }
        assert_eq!(lines[0]["loss"], Value::Null, "JSON has no NaN");
        assert_eq!(lines[1]["eval"]["top1"], 0.9);
        assert_eq!(lines[1]["eval"]["ema"]["images"], 2000);
        assert!(lines[1]["eval"].get("step").is_none());
    }
}
