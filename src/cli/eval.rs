//! `vitrum eval`: top-1, top-5 and loss of a model on a data set.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// A packed data set, an image folder, or `demo`; takes its validation part
    #[arg(long, value_name = "DIR")]
    pub data: String,
    /// How pictures are prepared (not built yet)
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    /// Leave out a short last batch
    #[arg(long)]
    pub drop_last: bool,
    /// Class names or numbers, one line per picture, in place of the data set's own
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.protocol.is_some() {
        return Err(not_built("vitrum eval --protocol").hint("leave it out: the file's own protocol is used"));
    }
    Err(not_built("vitrum eval"))
}
