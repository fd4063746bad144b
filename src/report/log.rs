//! Lines for people, on stderr and in the run's `log.txt`. They appear above the progress bar if there is
//! one.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;

use crate::error::{At, Result};
use crate::terminal;

/// A sink for lines. Clones write to the same place.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    file: Option<File>,
    /// Lines are printed above it.
    bar: Option<ProgressBar>,
}

impl Log {
    /// Writes to stderr only.
    pub fn stderr() -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { file: None, bar: None })) }
    }

    /// Writes to stderr and appends to the file at `path`.
    pub fn to_file(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path).at(path.display())?;
        Ok(Self { inner: Arc::new(Mutex::new(Inner { file: Some(file), bar: None })) })
    }

    /// A line for the terminal and the file.
    pub fn line(&self, text: &str) {
        let mut inner = self.lock();
        inner.write_terminal(text);
        inner.write_file(text);
    }

    /// `warning: text`
    pub fn warn(&self, text: &str) {
        self.line(&format!("warning: {text}"));
    }

    /// Writes a line to the file only: the terminal shows it as a bar, or showed it before the file was open.
    pub(crate) fn file_line(&self, text: &str) {
        self.lock().write_file(text);
    }

    pub(super) fn set_bar(&self, bar: Option<ProgressBar>) {
        self.lock().bar = bar;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// A closed terminal is not an error.
    fn write_terminal(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::say(text)),
            None => terminal::say(text),
        }
    }

    /// If the log cannot be written (such as on a full disk), warns once and stops logging. The run goes on.
    fn write_file(&mut self, text: &str) {
        let Some(file) = &mut self.file else { return };
        if let Err(e) = file.write_all(format!("{}\n", terminal::visible(text)).as_bytes()) {
            self.file = None;
            self.write_terminal(&format!("warning: `log.txt` cannot be written and ends here: {e}"));
        }
    }
}
