//! `vitrum predict`: the likeliest classes of single pictures.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// JPEG or PNG files
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    /// How many classes to show
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub top: u16,
    /// Write attention maps as PNG files (not built yet)
    #[arg(long, value_name = "DIR")]
    pub attention: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.attention.is_some() {
        return Err(not_built("vitrum predict --attention").hint("leave it out to get the classes"));
    }
    Err(not_built("vitrum predict"))
}
