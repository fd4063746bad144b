//! The learning rate as a function of the number of finished updates.
//!
//! Everything is computed in f64 with the formulas of vit_jax, big_vision and timm. The first update uses `t
//! = 0`, whose rate is 0 with a warm-up. The rate at `t = total` is never used.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::recipe::{Duration, ScheduleKind, ScheduleSection};

/// The length of a run, and what converts epochs and examples into updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLength {
    /// Number of updates.
    pub steps: u64,
    /// Samples per update, over all ranks and micro-batches.
    pub batch: usize,
    /// Samples per epoch; 0 if unknown.
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

/// The curve between warm-up and cool-down.
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
    /// Resolves the recipe's section for a run of this length. Usage errors name the key under `schedule`.
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
                "`schedule.warmup` is {warmup}, but the schedule has only {total} steps"
            ))
            .hint("use `--set schedule.warmup=10%`, or a longer run"));
        }
        let cooldown = steps("cooldown", section.cooldown, run)?;
        let curve = curve(section)?;
        if matches!(curve, Curve::Timm { .. }) {
            if warmup.saturating_add(cooldown) >= total {
                return Err(Error::usage(format!(
                    "`schedule.warmup` and `schedule.cooldown` are {warmup} and {cooldown} steps, which leave \
                     nothing of {total} for the cosine"
                ))
                .hint("use `--set schedule.cooldown=10%`, or a longer run"));
            }
        } else if cooldown > 0 && total < run.steps {
            return Err(Error::usage(format!(
                "`schedule.cooldown` reaches 0 after {total} steps, but the run has {}",
                run.steps
            ))
            .hint("remove `schedule.total`, or make it as long as the run"));
        }
        Ok(Schedule { curve, warmup, cooldown, total })
    }

    /// The rate after `t` updates for the base rate `base`. With `base = 1`, the relative schedule of
    /// big_vision.
    pub fn value(&self, t: u64, base: f64) -> f64 {
        let [updates, warmup, total] = [t, self.warmup, self.total].map(|n| n as f64);
        let cooldown = self.cooldown as f64;
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
            // timm's cosine starts at update 0, during the warm-up, unless `warmup_prefix` is set. It ends where the
            // cool-down begins, which stays at its end.
            Curve::Timm { least, prefix, .. } => {
                let start = if *prefix { warmup } else { 0.0 };
                let progress = ((updates - start) / (total - cooldown - start)).min(1.0);
                least + (base - least) * cosine(progress)
            }
        };
        match self.curve {
            Curve::Timm { .. } => rate,
            _ => rate * share(updates, warmup) * share(total - updates, cooldown),
        }
    }
}

/// Half a cosine, from 1 at 0 to 0 at 1.
fn cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (PI * progress).cos())
}

/// `min(1, done / length)`; 1 if the length is 0.
fn share(done: f64, length: f64) -> f64 {
    if length > 0.0 { (done / length).min(1.0) } else { 1.0 }
}

fn curve(section: &ScheduleSection) -> Result<Curve> {
    let number = |key: &str, value: f64, least: f64| {
        if value.is_finite() && value >= least {
            return Ok(value);
        }
        Err(Error::usage(format!("`schedule.{key}` is {value}"))
            .hint(format!("use a number of at least {least}")))
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
                .hint("give one multiplier per boundary"));
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

/// A duration in updates: rounded to the nearest, but at least one unless it is exactly 0 (big_vision's
/// rule).
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
            .hint(format!("use a length of at least 0: `--set schedule.{key}=10%`")));
    }
    Ok(if exact == 0.0 { 0 } else { exact.round_ties_even().max(1.0) as u64 })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;

    const RUN: RunLength = RunLength { steps: 1000, batch: 64, data_size: 12_800 };

    fn section(kind: ScheduleKind, warmup: u64) -> ScheduleSection {
        ScheduleSection { kind, warmup: Duration::Steps(warmup), ..Default::default() }
    }

    fn for_steps(section: &ScheduleSection, steps: u64) -> Schedule {
        Schedule::new(section, RunLength { steps, ..RUN }).unwrap()
    }

    fn close(got: f64, expected: f64, tolerance: f64) {
        assert!((got - expected).abs() <= tolerance, "{got}, expected {expected}");
    }

    #[test]
    fn every_schedule_has_its_golden_values() {
        use ScheduleKind::*;
        let s = for_steps(&section(Cosine, 500), 10_000);
        for (t, lr) in [(0, 0.0), (1, 6e-5), (250, 0.015), (500, 0.03), (5250, 0.015), (9999, 8.2e-10)] {
            close(s.value(t, 0.03), lr, 1e-11);
        }
        let s = for_steps(&ScheduleSection { end: 1e-5, ..section(Linear, 500) }, 10_000);
        close(s.value(5250, 0.03), 0.015005, 1e-12);
        close(s.value(9999, 0.03), 1.3157e-5, 1e-9);
        let s = for_steps(&section(Cosine, 100), 1000);
        for (t, lr) in [(50, 0.005), (99, 0.0099), (100, 0.01), (550, 0.005), (999, 3.046e-8)] {
            close(s.value(t, 0.01), lr, 1e-11);
        }
        let rsqrt = ScheduleSection { cooldown: Duration::Steps(50_000), ..section(Rsqrt, 10_000) };
        let s = for_steps(&rsqrt, 1_000_000);
        for (t, lr) in [
            (5000, 0.5),
            (10_000, 1.0),
            (20_000, std::f64::consts::FRAC_1_SQRT_2),
            (950_000, 0.1025978),
            (975_000, 0.0506370),
            (999_999, 2.0e-6),
        ] {
            close(s.value(t, 1.0), lr, 6e-8);
        }
        let timm = ScheduleSection { warmup_lr: 1e-6, min_lr: 1e-5, ..section(TimmCosine, 5) };
        let s = for_steps(&timm, 300);
        for (t, lr) in [(0, 1e-6), (1, 2.008e-4), (5, 9.993216e-4), (150, 5.05e-4), (299, 1.00271e-5)] {
            close(s.value(t, 1e-3), lr, 1e-10);
        }
    }

    #[test]
    fn every_reference_schedule_is_met() {
        let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
        let folder =
            PathBuf::from(std::env::var("VITRUM_REFERENCE").unwrap_or(default.into())).join("schedules");
        if !folder.exists() {
            println!("skipped: no {}", folder.display());
            return;
        }
        let read = |name: &str| -> Value {
            serde_json::from_str(&std::fs::read_to_string(folder.join(name)).unwrap()).unwrap()
        };
        let (jax, timm) = (read("jax_schedules.json"), read("timm_schedules.json"));
        let cases = jax.as_array().unwrap().iter().chain(timm["schedules"].as_array().unwrap());
        let mut count = 0;
        for case in cases {
            let (section, run, base) = from_reference(case["lib"].as_str().unwrap(), &case["args"]);
            let schedule = Schedule::new(&section, run).unwrap();
            let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
            let tolerance = 2e-7 * numbers("values").map(f64::abs).fold(0.0, f64::max);
            for (t, expected) in numbers("steps").zip(numbers("values")) {
                let got = schedule.value(t as u64, base);
                assert!(
                    (got - expected).abs() <= tolerance,
                    "{} at {t}: {got}, not {expected}",
                    case["args"]
                );
            }
            count += 1;
        }
        assert!(count > 0, "no schedules in {}", folder.display());
    }

    /// A recipe section from the arguments of the original function; an unknown argument fails the test.
    fn from_reference(lib: &str, args: &Value) -> (ScheduleSection, RunLength, f64) {
        let mut s = ScheduleSection::default();
        let mut run = RunLength { steps: 0, batch: 256, data_size: 0 };
        let (mut base, mut scaled) = (0.0, false);
        if lib.starts_with("timm") {
            s.kind = ScheduleKind::TimmCosine;
        } else if lib.starts_with("vit_jax") && args["decay_type"] == "linear" {
            s.end = 1e-5;
        }
        for (key, value) in args.as_object().unwrap() {
            let number = || value.as_f64().unwrap();
            match key.as_str() {
                "base" | "base_lr" => base = number(),
                "total_steps" | "t_initial" => run.steps = number() as u64,
                "batch_size" => run.batch = number() as usize,
                "data_size" => run.data_size = number() as usize,
                "decay_type" => {
                    s.kind = match value.as_str().unwrap() {
                        "cosine" => ScheduleKind::Cosine,
                        "linear" | "polynomial" => ScheduleKind::Linear,
                        "rsqrt" => ScheduleKind::Rsqrt,
                        "stair" => ScheduleKind::Stair,
                        other => panic!("decay_type {other}"),
                    }
                }
                "warmup_steps" | "warmup_t" => s.warmup = Duration::Steps(number() as u64),
                "warmup_epochs" => s.warmup = Duration::Epochs(number()),
                "warmup_examples" => s.warmup = Duration::Examples(number() as u64),
                "warmup_percent" => s.warmup = Duration::Percent(100.0 * number()),
                "cooldown_steps" => s.cooldown = Duration::Steps(number() as u64),
                "linear_end" | "end" => s.end = number(),
                "power" => s.power = number(),
                "timescale" => s.timescale = number(),
                "shift" => s.shift = number(),
                "steps" => {
                    s.boundaries = value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
                }
                "mults" => s.mults = value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect(),
                "scale_with_batchsize" => scaled = value.as_bool().unwrap(),
                "lr_min" => s.min_lr = number(),
                "warmup_lr_init" => s.warmup_lr = number(),
                "warmup_prefix" => s.warmup_prefix = value.as_bool().unwrap(),
                other => panic!("unknown argument {other}"),
            }
        }
        if s.warmup_prefix {
            // With a prefix, timm's total does not include the warm-up.
            run.steps += args["warmup_t"].as_u64().unwrap();
        }
        if scaled {
            base *= run.batch as f64 / 256.0;
        }
        (s, run, base)
    }

    #[test]
    fn durations_are_rounded_but_never_to_nothing() {
        let resolved = |duration| steps("warmup", duration, RUN).unwrap();
        assert_eq!(resolved(Duration::Steps(7)), 7);
        assert_eq!(resolved(Duration::Epochs(0.5)), 100);
        assert_eq!(resolved(Duration::Examples(1280)), 20);
        assert_eq!(resolved(Duration::Percent(10.0)), 100);
        assert_eq!(resolved(Duration::Percent(0.001)), 1, "at least one step");
        assert_eq!(resolved(Duration::Percent(0.0)), 0, "unless it is nothing");
        assert_eq!(resolved(Duration::Examples(160)), 2, "2.5 goes to the even number, as in Python");
        assert!(steps("warmup", Duration::Percent(-1.0), RUN).is_err());
        assert!(steps("warmup", Duration::Epochs(1.0), RunLength { data_size: 0, ..RUN }).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        use ScheduleKind::*;
        let message = |s: ScheduleSection| Schedule::new(&s, RUN).unwrap_err().to_string();
        let text = message(section(Cosine, 1000));
        assert!(text.contains("`schedule.warmup` is 1000") && text.contains("schedule.warmup=10%"), "{text}");
        assert!(
            message(ScheduleSection { timescale: 0.0, ..section(Rsqrt, 0) }).contains("schedule.timescale")
        );
        assert!(message(ScheduleSection { end: f64::NAN, ..section(Linear, 0) }).contains("schedule.end"));
        let stair = ScheduleSection { boundaries: vec![5, 3], mults: vec![0.1, 0.2], ..section(Stair, 0) };
        assert!(message(stair.clone()).contains("ascending"));
        assert!(message(ScheduleSection { mults: vec![], ..stair }).contains("schedule.mults"));
        let short = ScheduleSection { total: Some(Duration::Steps(500)), ..section(Constant, 0) };
        assert!(Schedule::new(&short, RUN).is_ok());
        let negative = ScheduleSection { cooldown: Duration::Steps(10), ..short };
        assert!(message(negative).contains("schedule.cooldown"), "the rate would fall below 0");
        assert!(Schedule::new(&section(Cosine, 0), RunLength { steps: 0, ..RUN }).is_err());
    }

    /// timm counts its cool-down epochs apart: they come after the cosine, at its least rate.
    #[test]
    fn the_cool_down_of_timm_stays_at_the_least_rate() {
        let timm = |prefix: bool, cooldown: u64, steps: u64| {
            let section = ScheduleSection {
                warmup_lr: 1e-6,
                min_lr: 1e-5,
                warmup_prefix: prefix,
                cooldown: Duration::Steps(cooldown),
                ..section(ScheduleKind::TimmCosine, 5)
            };
            Schedule::new(&section, RunLength { steps, ..RUN })
        };
        for prefix in [false, true] {
            let (long, short) = (timm(prefix, 10, 310).unwrap(), timm(prefix, 0, 300).unwrap());
            for t in 0..300 {
                assert_eq!(long.value(t, 1e-3), short.value(t, 1e-3), "update {t}");
            }
            for t in 300..310 {
                close(long.value(t, 1e-3), 1e-5, 1e-18);
            }
        }
        let text = timm(false, 295, 300).unwrap_err().to_string();
        assert!(text.contains("5 and 295 steps, which leave nothing of 300"), "{text}");
    }

    #[test]
    fn a_schedule_may_be_longer_than_the_run_and_a_constant_may_cool_down() {
        let long =
            ScheduleSection { total: Some(Duration::Percent(200.0)), ..section(ScheduleKind::Cosine, 0) };
        close(Schedule::new(&long, RUN).unwrap().value(1000, 1.0), 0.5, 1e-12);
        let cooled =
            ScheduleSection { cooldown: Duration::Steps(200), ..section(ScheduleKind::Constant, 100) };
        let s = Schedule::new(&cooled, RUN).unwrap();
        for (t, lr) in [(0, 0.0), (50, 0.5), (100, 1.0), (800, 1.0), (900, 0.5), (1000, 0.0)] {
            close(s.value(t, 1.0), lr, 1e-12);
        }
    }
}
