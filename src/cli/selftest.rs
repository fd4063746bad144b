//! `vitrum selftest`: every operation of this machine's device against float64.

use super::{On, print, print_json};
use crate::backend::{Options, Precision};
use crate::error::Result;
use crate::selftest;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub on: On,
    /// Only in this precision: f32, tf32 or bf16 (default: every one that the device is used in)
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Precision::Auto)]
    pub precision: Precision,
    /// Only cases whose line, as in `attention_backward: ...`, holds this text
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let options = Options { precision: args.precision, ..Options::default() };
    let reports = selftest::check(args.on.device, &options, args.filter.as_deref())?;
    if args.json {
        print_json(&selftest::json(&reports))?
    } else {
        reports.iter().try_for_each(|report| print(&report.table()))?
    }
    selftest::verdict(&reports)
}
