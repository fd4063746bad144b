//! One file per subcommand.

pub mod pack;
