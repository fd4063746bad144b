//! Progress of a run: a bar on a terminal, plain lines elsewhere.
//!
//! On a terminal, steps move the bar; evaluations and messages stay on the screen. In a file, a pipe and
//! `log.txt`, each reported step is a line.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{EvalLine, Log, StepLine, format};
use crate::terminal;

/// The progress of one run.
pub struct Progress {
    log: Log,
    bar: Option<ProgressBar>,
    total: u64,
    start: u64,
    began: Instant,
}

impl Progress {
    /// For a run of `total` steps, of which `start` are done already. Messages go through `log`, above the
    /// bar.
    pub fn new(log: &Log, total: u64, start: u64) -> Self {
        let bar = (terminal::shows_messages() && std::io::stderr().is_terminal()).then(|| bar(total, start));
        log.set_bar(bar.clone());
        Self { log: log.clone(), bar, total, start, began: Instant::now() }
    }

    /// Moves the bar; cheap enough for every step.
    pub fn tick(&self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// Reports the training since the last call.
    pub fn step(&self, line: &StepLine) {
        let text = format!("{}   eta {}", line.text(self.total), format::seconds(self.eta(line.step)));
        match &self.bar {
            None => self.log.line(&text),
            Some(bar) => {
                self.log.file_line(&text);
                bar.set_position(line.step);
                // A narrow terminal cuts off the end, so the rate, which matters least, comes last.
                bar.set_message(format!(
                    "loss {:.4}  top-1 {}  eta {}  {}",
                    line.loss,
                    format::percent(line.top1),
                    format::seconds(self.eta(line.step)),
                    format::rate(line.img_per_s),
                ));
            }
        }
    }

    /// Reports an evaluation; the line stays on the screen.
    pub fn eval(&self, line: &EvalLine) {
        self.log.line(&line.text(self.total));
    }

    /// Removes the bar. Dropping does the same.
    pub fn finish(self) {}

    /// Seconds left at this process's mean pace.
    fn eta(&self, step: u64) -> f64 {
        let done = step.saturating_sub(self.start);
        let left = self.total.saturating_sub(step);
        if done == 0 { f64::NAN } else { self.began.elapsed().as_secs_f64() / done as f64 * left as f64 }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.log.set_bar(None);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: u64, start: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("step {pos}/{len} {bar:12} {wide_msg}")
        .expect("the template is well formed")
        .progress_chars("━╸─");
    // Five frames per second are enough.
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
    bar.set_style(style);
    bar.set_position(start);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
