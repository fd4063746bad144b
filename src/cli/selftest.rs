//! `vitrum selftest`: every operation of this machine's device against float64, then whole training steps against the CPU's
//! and against themselves.

use super::{On, print, print_json};
use serde_json::{Value, json};

use crate::backend::{Options, Precision, decide};
use crate::error::{Error, Result};
use crate::selftest;
use crate::train::proof::{Proof, STEPS, prove};

/// What `--filter` calls the whole steps.
const TRAINING: &str = "training";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub on: On,
    /// Only in this precision: f32, tf32 or bf16 (default: every one that the device is used in)
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Precision::Auto)]
    pub precision: Precision,
    /// Only cases whose line, as in `attention_backward: ...`, holds this text; `training` for the whole steps
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let options = Options { precision: args.precision, ..Options::default() };
    let device = decide(args.on.device, &options)?;
    let filter = args.filter.as_deref();
    let reports = match filter {
        Some(TRAINING) => Vec::new(),
        filter => selftest::check(device, &options, filter)?,
    };
    if !args.json {
        reports.iter().try_for_each(|report| print(&report.table()))?;
    }
    let proofs = match filter {
        None | Some(TRAINING) => prove(device, args.precision)?,
        Some(_) => Vec::new(),
    };
    if args.json {
        let mut all = selftest::json(&reports);
        if let (Value::Null, Some(first)) = (&all["device"], proofs.first()) {
            all["device"] = json!(first.device);
        }
        all["passed"] = json!(all["passed"] == true && proofs.iter().all(Proof::passed));
        all["training"] = json!(proofs);
        print_json(&all)?;
    } else if !proofs.is_empty() {
        print(&training_table(&proofs))?;
    }
    selftest::verdict(&reports)?;
    match proofs.iter().find(|proof| !proof.passed()) {
        None => Ok(()),
        Some(failed) => {
            Err(Error::new(format!("training steps are not what they should be on {}", failed.device))
                .hint("compute on the CPU with `--device cpu`, and report this table"))
        }
    }
}

fn training_table(proofs: &[Proof]) -> String {
    let title = format!("training, {STEPS} steps of a small model");
    let head = format!("{title:<42}  {:>9}  {:>9}\n", "distance", "tolerance");
    let seconds: f64 = proofs.iter().map(|proof| proof.seconds).sum();
    let lines: String = proofs.iter().map(Proof::text).collect();
    format!("{head}{lines}\nin {seconds:.1} s\n")
}
