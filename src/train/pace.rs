//! How fast a run goes, and how long it will take.

use std::time::Instant;

use crate::report::format;

/// A run that takes longer is told how long, as soon as that is known: after one slow step, or after some quick ones.
const LONG_RUN: f64 = 600.0;
const SLOW_STEP: f64 = 20.0;
const QUICK_STEPS: u64 = 10;

/// Times since the last line of the log, in this process.
pub(super) struct Pace {
    pub(super) since: Instant,
    pub(super) steps: u64,
    /// Seconds since then that were not spent on steps (evaluation, checkpoints).
    pub(super) outside: f64,
    /// The loader's waiting time at that line.
    pub(super) waited: f64,
}

impl Pace {
    pub(super) fn new(waited: f64) -> Self {
        Self { since: Instant::now(), steps: 0, outside: 0.0, waited }
    }
}

/// The first steps of a process.
pub(super) struct FirstSteps {
    before: u64,
    seconds_of_first: f64,
}

impl FirstSteps {
    /// `before`: steps that were done by an earlier process.
    pub(super) fn new(before: u64) -> Self {
        Self { before, seconds_of_first: 0.0 }
    }

    /// What is said of a long run, once, when `step` of `steps` is done, `seconds` after this process began to train.
    pub(super) fn how_long(&mut self, step: u64, steps: u64, seconds: f64) -> Option<String> {
        let of_a_step = match step - self.before {
            1 if seconds >= SLOW_STEP => seconds,
            // It has timed algorithms and loaded kernels, too.
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
        let text = format!("about {} to go, {} a step", format::seconds(left), format::seconds(of_a_step));
        (left >= LONG_RUN).then(|| format!("{text}; Ctrl-C saves the run, and `--resume` goes on with it"))
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
        assert!(text.starts_with("about 3 h 00 min to go, 30 s a step"), "{text}");
    }
}
