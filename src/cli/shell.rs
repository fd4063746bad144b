//! `vitrum completions` and `vitrum man`: what the shell knows about the program, from the definition of its command
//! line.

use std::path::PathBuf;

use clap_complete::Shell;

use super::{command, print};
use crate::error::{At, Result};
use crate::files;
use crate::terminal;

#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell that will read them
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the completions.
pub fn completions(args: CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "vitrum", &mut script);
    print(&String::from_utf8_lossy(&script))
}

#[derive(clap::Args)]
pub struct ManArgs {
    /// The folder to write them to, such as ~/.local/share/man/man1
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// Writes `vitrum.1` and one page for each command.
pub fn man(args: ManArgs) -> Result<()> {
    files::create_dir(&args.dir)?;
    clap_mangen::generate_to(command(), &args.dir).at(args.dir.display())?;
    let first = args.dir.join("vitrum.1");
    terminal::say(&format!("man pages in {}: `man {}` shows the first", args.dir.display(), first.display()));
    Ok(())
}
