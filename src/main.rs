//! The executable. Everything is in [`vitrum::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vitrum::cli::main(std::env::args_os())
}
