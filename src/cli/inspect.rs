//! `vitrum inspect`: what is this file or folder?

use std::path::PathBuf;

use super::not_built;
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint, a run directory or a data set
    pub path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(_args: Args) -> Result<()> {
    Err(not_built("vitrum inspect"))
}
