//! The lines of a `metrics.jsonl`, read back: curves by key, and a table for spreadsheets.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::files;

/// A curve: a step and a value each, in the order of the steps. Values are finite.
pub(super) type Curve = Vec<(f64, f64)>;

/// All numbers of a run, by step and key. Keys of evaluations are `val.loss`, `ema.loss`, ...; those of training have
/// no prefix.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct History {
    rows: BTreeMap<u64, BTreeMap<String, f64>>,
    /// In the order in which they first occur.
    keys: Vec<String>,
}

impl History {
    /// Reads a file. A last line that a killed run left unfinished is skipped.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = files::read(path)?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    fn parse(text: &str) -> Self {
        let mut history = Self::default();
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let Some(step) = line.get("step").and_then(Value::as_u64) else { continue };
            match line.get("eval") {
                Some(scores) => history.add(step, "val.", scores),
                None => history.add(step, "", &line),
            }
        }
        history
    }

    fn add(&mut self, step: u64, prefix: &str, numbers: &Value) {
        for (name, value) in numbers.as_object().into_iter().flatten().filter(|(name, _)| *name != "step") {
            match value {
                Value::Object(_) => self.add(step, &format!("{name}."), value),
                value => {
                    let number = value.as_f64().or(value.as_bool().map(|truth| f64::from(u8::from(truth))));
                    let Some(number) = number else { continue };
                    let key = format!("{prefix}{name}");
                    if !self.keys.contains(&key) {
                        self.keys.push(key.clone());
                    }
                    self.rows.entry(step).or_default().insert(key, number);
                }
            }
        }
    }

    /// Every key, in the order of the file.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(String::as_str)
    }

    /// The curve of a key; empty if no line has it.
    pub(super) fn curve(&self, key: &str) -> Curve {
        let points = self.rows.iter().filter_map(|(step, row)| Some((*step as f64, *row.get(key)?)));
        points.filter(|(_, value)| value.is_finite()).collect()
    }

    /// The last value of a key.
    pub(super) fn last(&self, key: &str) -> Option<f64> {
        self.rows.values().rev().find_map(|row| row.get(key).copied())
    }

    /// The last step.
    pub(super) fn steps(&self) -> u64 {
        self.rows.keys().next_back().copied().unwrap_or(0)
    }

    /// The contents of `results.csv`: one row per step, one column per key.
    pub(super) fn csv(&self) -> String {
        let mut text = String::from("step");
        self.keys.iter().for_each(|key| write!(text, ",{key}").expect("text can be written"));
        for (step, row) in &self.rows {
            write!(text, "\n{step}").expect("text can be written");
            for key in &self.keys {
                let value = row.get(key).map_or(String::new(), f64::to_string);
                write!(text, ",{value}").expect("text can be written");
            }
        }
        text + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_one_step_are_one_row_and_what_is_not_finite_is_left_out() {
        let history = History::parse(
            "{\"step\":10,\"loss\":2.5,\"mfu\":null}\n\
             {\"step\":10,\"eval\":{\"top1\":0.5,\"ema\":{\"top1\":0.25},\"best\":true}}\n\
             {\"step\":20,\"loss\":1.5,\"gpu\":{\"memory\":7}}\n{\"step\":30,\"lo",
        );
        assert_eq!(history.curve("loss"), [(10.0, 2.5), (20.0, 1.5)]);
        assert_eq!((history.last("ema.top1"), history.last("mfu"), history.steps()), (Some(0.25), None, 20));
        let csv = "step,loss,val.top1,ema.top1,val.best,gpu.memory\n10,2.5,0.5,0.25,1,\n20,1.5,,,,7\n";
        assert_eq!(history.csv(), csv);
    }
}
