//! The one error type: what went wrong, where, and what to do about it.
//!
//! Failures of the outside world (files, devices, input) are [`Error`]s; our own mistakes are `assert!`s.
//! Messages are lower case, put literals in backticks, have no full stop at the end, and name the file,
//! tensor, record or key. A hint says what the user can type or change.

use std::fmt;

/// Shorthand used by every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Decides the exit code of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Exit 1: the work could not be done; the message explains why.
    Failure,
    /// Exit 2: the command line or the recipe is wrong, or asks for something that is not built yet.
    Usage,
    /// Exit 130 (interrupt) or 143 (terminate), after a checkpoint was written if there was anything to save.
    Stopped(i32),
}

/// A message for the user, with an optional hint.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Error {
    /// The work could not be done (exit 1).
    pub fn new(message: impl Into<String>) -> Self {
        Self { kind: Kind::Failure, message: message.into(), hint: None }
    }

    /// The user asked for something that does not exist or makes no sense (exit 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, message: message.into(), hint: None }
    }

    /// A `signal` stopped the work; a run saves its state before it ends.
    pub fn stopped(signal: i32, message: impl Into<String>) -> Self {
        Self { kind: Kind::Stopped(signal), message: message.into(), hint: None }
    }

    /// What the user can do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts a place in front of the message: `place: message`.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// The same message as a failure (exit 1), for a wrong value that came from a file and not from the user.
    pub fn into_failure(mut self) -> Self {
        self.kind = Kind::Failure;
        self
    }

    /// What went wrong and where, without the hint.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the user can do about it, if that is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The exit code of the command line: 1 failure, 2 wrong usage, 128 + the signal's number.
    pub fn exit_code(&self) -> i32 {
        match self.kind {
            Kind::Failure => 1,
            Kind::Usage => 2,
            Kind::Stopped(signal) => 128 + signal,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Adds the place to a foreign error: `fs::read(p).at(p.display())?`.
pub trait At<T> {
    /// Turns an error into a failure with the message `place: error`.
    fn at(self, place: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> At<T> for std::result::Result<T, E> {
    fn at(self, place: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::new(format!("{place}: {e}")))
    }
}

/// Returns early with a formatted [`Error`] (exit 1).
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => { return Err($crate::error::Error::new(format!($($arg)*))) };
}
