//! The learning rate as a function of the number of updates already done.
//!
//! Everything is computed in f64 from the formulas of vit_jax, big_vision and timm. The first update asks for `t = 0`: with
//! a warm-up its rate is 0, and the rate at the last step, `t = total`, is never used.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::recipe::{Duration, ScheduleKind, ScheduleSection};

/// How long a run is, and what turns epochs and examples into updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLength {
    /// Updates.
    pub steps: u64,
    /// Samples of one update, over all ranks and micro-batches.
    pub batch: usize,
    /// Samples of one epoch; 0: unknown.
    pub data_size: usize,
}

/// A schedule with all its lengths in updates.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    curve: Curve,
    warmup: u64,
    cooldown: u64,
    total: u64,
}

/// What lies between warm-up and cool-down.
#[derive(Clone, Debug, PartialEq)]
enum Curve {
    Constant,
    Cosine { end: f64 },
    Polynomial { end: f64, power: f64 },
    Rsqrt { timescale: f64, shift: f64 },
    Stair { boundaries: Vec<u64>, mults: Vec<f64> },
    Timm { first: f64, least: f64, prefix: bool },
}

impl Schedule {
    /// Resolves what the recipe says for a run of this length. Usage errors name the key under `schedule`.
    pub fn new(section: &ScheduleSection, run: RunLength) -> Result<Schedule> {
        let total = match section.total {
            Some(total) => steps("total", total, run)?,
            None => run.steps,
        };
        if total == 0 {
            return Err(Error::usage("a schedule of 0 steps").hint("set `train.steps` to 1 or more"));
        }
        let warmup = steps("warmup", section.warmup, run)?;
        if warmup >= total {
            return Err(Error::usage(format!(
                "`schedule.warmup` is {warmup} of {total} steps: none is left"
            ))
            .hint("use `--set schedule.warmup=10%`, or a longer run"));
        }
        let cooldown = steps("cooldown", section.cooldown, run)?;
        if cooldown > 0 && total < run.steps {
            return Err(Error::usage(format!(
                "`schedule.cooldown` reaches 0 after {total} steps, but the run has {}",
                run.steps
            ))
            .hint("leave out `schedule.total`, or make it as long as the run"));
        }
        Ok(Schedule { curve: curve(section)?, warmup, cooldown, total })
    }

    /// The rate after `t` updates for the base rate `base`. With `base = 1`, the relative schedule of big_vision.
    pub fn value(&self, t: u64, base: f64) -> f64 {
        let [updates, warmup, total] = [t, self.warmup, self.total].map(|n| n as f64);
        let progress = ((updates - warmup) / (total - warmup)).clamp(0.0, 1.0);
        let rate = match &self.curve {
            Curve::Constant => base,
            Curve::Cosine { end } => end + (base - end) * cosine(progress),
            Curve::Polynomial { end, power } => end + (base - end) * (1.0 - progress).powf(*power),
            Curve::Rsqrt { timescale, shift } => {
                base / (1.0 + ((updates - warmup).max(0.0) + shift) / timescale).sqrt()
            }
            Curve::Stair { boundaries, mults } => match boundaries.iter().filter(|b| **b <= t).count() {
                0 => base,
                passed => base * mults[passed - 1],
            },
            Curve::Timm { first, .. } if t < self.warmup => first + updates * (base - first) / warmup,
            // timm's cosine runs from update 0, beneath the warm-up, unless asked not to.
            Curve::Timm { least, prefix, .. } => {
                let progress = if *prefix { progress } else { (updates / total).min(1.0) };
                least + (base - least) * cosine(progress)
            }
        };
        let warm = match self.curve {
            Curve::Timm { .. } => 1.0,
            _ => share(updates, warmup),
        };
        rate * warm * share(total - updates, self.cooldown as f64)
    }
}

/// Half a cosine, from 1 at 0 to 0 at 1.
fn cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (PI * progress).cos())
}

/// `min(1, done / length)`, and 1 where there is no length.
fn share(done: f64, length: f64) -> f64 {
    if length > 0.0 { (done / length).min(1.0) } else { 1.0 }
}

fn curve(section: &ScheduleSection) -> Result<Curve> {
    let number = |key: &str, value: f64, least: f64| {
        if value.is_finite() && value >= least {
            return Ok(value);
        }
        Err(Error::usage(format!("`schedule.{key}` is {value}"))
            .hint(format!("use a number from {least} on")))
    };
    Ok(match section.kind {
        ScheduleKind::Constant => Curve::Constant,
        ScheduleKind::Cosine => Curve::Cosine { end: number("end", section.end, 0.0)? },
        ScheduleKind::Linear => Curve::Polynomial {
            end: number("end", section.end, 0.0)?,
            power: number("power", section.power, 0.0)?,
        },
        ScheduleKind::Rsqrt => Curve::Rsqrt {
            timescale: number("timescale", section.timescale, 1e-6)?,
            shift: number("shift", section.shift, 0.0)?,
        },
        ScheduleKind::Stair => {
            let (boundaries, mults) = (section.boundaries.clone(), section.mults.clone());
            if boundaries.len() != mults.len() {
                return Err(Error::usage(format!(
                    "`schedule.boundaries` has {} entries and `schedule.mults` has {}",
                    boundaries.len(),
                    mults.len()
                ))
                .hint("give one multiplier for each boundary"));
            }
            if !boundaries.is_sorted() {
                return Err(Error::usage("`schedule.boundaries` is not in ascending order")
                    .hint("sort it, and `schedule.mults` with it"));
            }
            for mult in &mults {
                number("mults", *mult, 0.0)?;
            }
            Curve::Stair { boundaries, mults }
        }
        ScheduleKind::TimmCosine => Curve::Timm {
            first: number("warmup_lr", section.warmup_lr, 0.0)?,
            least: number("min_lr", section.min_lr, 0.0)?,
            prefix: section.warmup_prefix,
        },
    })
}

/// A duration in updates: rounded to the nearest, but at least one unless it is exactly nothing (big_vision's rule).
fn steps(key: &str, duration: Duration, run: RunLength) -> Result<u64> {
    let exact = match duration {
        Duration::Steps(steps) => return Ok(steps),
        Duration::Epochs(epochs) if run.data_size == 0 && epochs != 0.0 => {
            return Err(Error::usage(format!(
                "`schedule.{key}` is in epochs, but the size of the data is not known"
            ))
            .hint(format!("give it in steps: `--set schedule.{key}=100`")));
        }
        Duration::Epochs(epochs) => epochs * run.data_size as f64 / run.batch as f64,
        Duration::Examples(examples) => examples as f64 / run.batch as f64,
        Duration::Percent(percent) => percent / 100.0 * run.steps as f64,
    };
    if !(exact.is_finite() && exact >= 0.0) {
        return Err(Error::usage(format!("`schedule.{key}` is {exact} steps"))
            .hint(format!("use a length from 0 on: `--set schedule.{key}=10%`")));
    }
    Ok(if exact == 0.0 { 0 } else { exact.round_ties_even().max(1.0) as u64 })
}
