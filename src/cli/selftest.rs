//! `vitrum selftest`: every operation of this machine's device against float64.

use super::{On, print, print_json};
use crate::backend::Options;
use crate::error::Result;
use crate::selftest;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let report = selftest::check(args.on.device, &Options::default())?;
    if args.json {
        print_json(&report.json())?
    } else {
        print(&report.table())?
    }
    report.verdict()
}
