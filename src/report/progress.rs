//! How far the run is: a bar on a terminal, plain lines elsewhere.
//!
//! On a terminal only evaluations and messages stay on the screen, steps move the bar. In a file or a pipe, and in
//! `log.txt`, each reported step is a line.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{EvalLine, Log, StepLine, format};

/// The progress of one run.
pub struct Progress {
    log: Log,
    bar: Option<ProgressBar>,
    total: u64,
    start: u64,
    began: Instant,
}

impl Progress {
    /// A run of `total` steps, of which `start` were done before. Messages go through `log`, above the bar.
    pub fn new(log: &Log, total: u64, start: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(total, start));
        log.set_bar(bar.clone());
        Self { log: log.clone(), bar, total, start, began: Instant::now() }
    }

    /// Moves the bar; cheap enough for every step.
    pub fn tick(&self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// Reports training since the last such line.
    pub fn step(&self, line: &StepLine) {
        let text = format!("{}   eta {}", line.text(self.total), format::seconds(self.eta(line.step)));
        match &self.bar {
            None => self.log.line(&text),
            Some(bar) => {
                self.log.file_line(&text);
                bar.set_position(line.step);
                // A narrow terminal cuts the end off: the pace is the least of it.
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

    /// Takes the bar away. Dropping does the same.
    pub fn finish(self) {}

    /// Seconds, at the mean pace of this process.
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
    // Five frames a second are enough to see it move.
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
    bar.set_style(style);
    bar.set_position(start);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
