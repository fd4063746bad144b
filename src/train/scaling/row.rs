//! One line of a plan, or of a measurement under mpirun: the same figures in the same words.

use serde_json::{Value, json};

use crate::report::{format, table};

/// One line of a plan or of a measurement: a step on some number of ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// N
    pub ranks: usize,
    /// Samples of a step on each rank.
    pub batch: usize,
    /// Seconds of a step.
    pub step: f64,
    /// Seconds of communication behind computation; `None` where it was not measured.
    pub hidden: Option<f64>,
    /// Seconds of communication that are waited for.
    pub exposed: f64,
    /// Bytes that each rank allocates.
    pub memory: usize,
    /// Ranks of a node, whose loaders share its cores.
    pub per_node: usize,
    /// Seconds of the same step on one rank by itself, over those of this one.
    pub efficiency: f64,
    /// Seconds of all steps of the run, without evaluations and checkpoints.
    pub to_train: Option<f64>,
}

impl Row {
    /// Images per second of all ranks.
    pub fn img_per_s(&self) -> f64 {
        (self.ranks * self.batch) as f64 / self.step
    }

    /// Images per second that the loaders of a node have to deliver.
    pub fn loader(&self) -> f64 {
        (self.per_node * self.batch) as f64 / self.step
    }

    /// A table for people.
    pub fn text(rows: &[Row]) -> String {
        let ms = |seconds: f64| format!("{:.2}", 1e3 * seconds);
        let count = |value: f64| format::thousands(value.round() as u64);
        let cells = |row: &Row| {
            vec![
                row.ranks.to_string(),
                row.batch.to_string(),
                ms(row.step),
                row.hidden.map_or("-".into(), ms),
                ms(row.exposed),
                format::bytes(row.memory as u64),
                count(row.loader()),
                count(row.img_per_s()),
                format!("{:.1} %", 100.0 * row.efficiency),
                row.to_train.map_or("-".into(), format::seconds),
            ]
        };
        let head = [
            "ranks",
            "batch of each",
            "ms/step",
            "hidden ms",
            "exposed ms",
            "memory of each",
            "loader img/s per node",
            "img/s",
            "efficiency",
            "to train",
        ];
        table(&head, &rows.iter().map(cells).collect::<Vec<_>>())
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "ranks": self.ranks,
            "batch_per_rank": self.batch,
            "ms_per_step": 1e3 * self.step,
            "communication_hidden_ms": self.hidden.map(|seconds| 1e3 * seconds),
            "communication_exposed_ms": 1e3 * self.exposed,
            "memory_bytes_per_rank": self.memory,
            "loader_img_per_s_per_node": self.loader(),
            "img_per_s": self.img_per_s(),
            "efficiency": self.efficiency,
            "seconds_to_train": self.to_train,
        })
    }
}
