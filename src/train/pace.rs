//! A run's speed and its remaining time.

use std::time::Instant;

use crate::report::format;

/// Runs longer than this many seconds print an estimate, after one slow step or a few fast ones.
const LONG_RUN: f64 = 600.0;
const SLOW_STEP: f64 = 20.0;
const QUICK_STEPS: u64 = 10;

/// Time since the last line of the log, in this process.
pub(super) struct Pace {
    pub(super) since: Instant,
    pub(super) steps: u64,
    /// Seconds since then that went to evaluation and checkpoints instead of steps.
    pub(super) outside: f64,
    /// The loader's total waiting time at that line.
    pub(super) waited: f64,
}

impl Pace {
    pub(super) fn new(waited: f64) -> Self {
        Self { since: Instant::now(), steps: 0, outside: 0.0, waited }
    }
}

/// The timing of a process's first steps.
pub(super) struct FirstSteps {
    before: u64,
    seconds_of_first: f64,
}

impl FirstSteps {
    /// `before`: steps that an earlier process did.
    pub(super) fn new(before: u64) -> Self {
        Self { before, seconds_of_first: 0.0 }
    }

    /// The estimate for a long run, returned once. `step` of `steps` are done, `seconds` after this process
    /// began to train.
    pub(super) fn how_long(&mut self, step: u64, steps: u64, seconds: f64) -> Option<String> {
        let of_a_step = match step - self.before {
            1 if seconds >= SLOW_STEP => seconds,
            // The first step also times algorithms and loads kernels, so it does not count.
            1 => {
                self.seconds_of_first = seconds;
                return None;
            }
            QUICK_STEPS if self.seconds_of_first > 0.0 => {
                (seconds - self.seconds_of_first) / (QUICK_STEPS - 1) as f64
            }
            _ => return None,
        };
        let left = of_a_step * (steps - step) as f64;
        let text = format!("about {} to go, {} per step", format::seconds(left), format::seconds(of_a_step));
        (left >= LONG_RUN).then(|| format!("{text}; Ctrl-C saves the run, `--resume` continues it"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_told_once_how_long_it_takes() {
        let told = |seconds: fn(u64) -> f64| -> Vec<u64> {
            let mut first = FirstSteps::new(5);
            (6..=105).filter(|step| first.how_long(*step, 105, seconds(step - 5)).is_some()).collect()
        };
        assert_eq!(told(|done| 30.0 * done as f64), [6], "slow steps: at once");
        assert_eq!(told(|done| 7.0 * done as f64), [15], "quick ones, when some are done");
        assert!(told(|done| done as f64).is_empty(), "a short run");
        assert!(told(|done| 15.0 + done as f64).is_empty(), "a slow start of a short run");
        let text = FirstSteps::new(0).how_long(1, 361, 30.0).unwrap();
        assert!(text.starts_with("about 3 h 00 min to go, 30 s per step"), "{text}");
    }
}
