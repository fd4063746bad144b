//! `vitrum report`: a run's page, or one page that compares runs.

use std::path::PathBuf;

use super::print;
use crate::error::Result;
use crate::files;
use crate::report::{RunPage, comparison, runs_in};

#[derive(clap::Args)]
pub struct Args {
    /// Directories of runs, or folders of sweeps
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The page to write [default: report.html in the run, comparison.html for several]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let runs = runs_in(&args.runs)?;
    let (html, beside) = match runs.as_slice() {
        [run] => {
            if args.out.is_none() {
                return print(&RunPage::write(&run.dir)?.display().to_string());
            }
            (run.html(), PathBuf::from("report.html"))
        }
        runs => (comparison(runs), PathBuf::from("comparison.html")),
    };
    let path = args.out.unwrap_or(beside);
    files::write_atomic(&path, |out| out.write_all(html.as_bytes()))?;
    print(&path.display().to_string())
}
