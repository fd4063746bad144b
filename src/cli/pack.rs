//! `vitrum pack`: pictures into a packed data set.

use super::not_built;
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    Err(not_built("vitrum pack").hint(format!("called with {:?}", args.rest)))
}
