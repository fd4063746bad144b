//! `vitrum selftest`: every operation of this machine's device against float64.

use super::{On, not_built};
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(_args: Args) -> Result<()> {
    Err(not_built("vitrum selftest"))
}
