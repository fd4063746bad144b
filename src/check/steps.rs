//! Whole training steps on a device, compared with the CPU's and with a second run of the same steps.
//!
//! `selftest` checks operations one by one. Only this check sees how they work together: their order, buffers
//! that are used twice, recorded steps that are replayed, masks, the update.

use std::time::Instant;

use crate::backend::{Arena, Device, Precision, Residual};
use crate::dist::Collective;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::rng::{Domain, Stream};

use crate::train::{DataShape, Setup, Trainer};

/// Steps of a check: enough for a recorded step to be replayed, and for the warm-up to end.
pub const STEPS: usize = 12;

/// A small ViT with every kind of mask, in batches of two micro-batches.
const RECIPE: [&str; 19] = [
    "model.image=16",
    "model.patch=4",
    "model.width=64",
    "model.depth=2",
    "model.heads=2",
    "model.classes=10",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.drop_path=0.1",
    "optim.lr=1e-3",
    "optim.weight_decay=0.05",
    "optim.clip=1",
    "optim.ema=0.9",
    "schedule.warmup=4",
    "loss.label_smoothing=0.1",
    "train.batch=8",
    "train.micro_batch=4",
    "train.seed=3",
    "train.deterministic=true",
];

/// The result of a check on one device in one precision.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct StepCheck {
    /// [`crate::backend::Backend::describe`]
    pub device: String,
    pub seconds: f64,
    /// The largest relative distance of a loss or a gradient norm from the CPU's, which runs in f32 with one
    /// thread.
    #[serde(deserialize_with = "or_infinite")]
    pub distance: f64,
    pub tolerance: f64,
    /// A second run of the same steps was bit-identical: weights, losses and norms.
    pub repeats: bool,
}

/// Checks the device in every precision that it is used with, or only in the given one.
///
/// # Errors
/// The device cannot be used. A disagreement is not an error, but a [`StepCheck`] that has not passed.
pub fn check_steps(device: Device, precision: Precision) -> Result<Vec<StepCheck>> {
    let f32 = (Precision::F32, Residual::Auto, 1e-4);
    let bf16 = [(Precision::Bf16, Residual::Bf16, 0.02), (Precision::Bf16, Residual::F32, 0.02)];
    let kinds = match (device, precision) {
        (Device::Cuda(_), Precision::Auto) => [&[f32][..], &bf16].concat(),
        (_, Precision::Auto | Precision::F32) => vec![f32],
        (_, Precision::Tf32) => vec![(Precision::Tf32, Residual::Auto, 0.01)],
        (_, Precision::Bf16) => bf16.to_vec(),
    };
    let on_cpu = steps(Device::Cpu, &["train.threads=1"])?;
    let one = |(precision, residual, tolerance): (Precision, Residual, f64)| -> Result<StepCheck> {
        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let settings =
            [format!("train.precision={}", word(&precision)), format!("train.residual={}", word(&residual))];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let start = Instant::now();
        let (first, again) = (steps(device, &settings)?, steps(device, &settings)?);
        let distance = first.distance(&on_cpu);
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepCheck { repeats: first == again, device: first.device, seconds, distance, tolerance })
    };
    kinds.into_iter().map(one).collect()
}

/// JSON has no infinity; it is stored as null.
fn or_infinite<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(<Option<f64> as serde::Deserialize>::deserialize(from)?.unwrap_or(f64::INFINITY))
}

impl StepCheck {
    pub fn passed(&self) -> bool {
        self.repeats && self.distance <= self.tolerance
    }

    pub fn text(&self) -> String {
        let verdict = |good: bool| if good { "ok" } else { "FAILED" };
        let follows = verdict(self.distance <= self.tolerance);
        format!(
            "{}\n  losses and gradient norms from the CPU's  {:>9.1e}  {:>9.1e}  {follows}\n  the same steps again, to the bit         \
             {:>23}\n",
            self.device,
            self.distance,
            self.tolerance,
            verdict(self.repeats)
        )
    }
}

/// The result of a few steps.
#[derive(PartialEq)]
struct Ran {
    device: String,
    /// Loss and gradient norm of each step.
    reports: Vec<(f64, f64)>,
    weights: Vec<u8>,
    ema: Vec<u8>,
}

impl Ran {
    fn distance(&self, other: &Ran) -> f64 {
        let apart = |a: f64, b: f64| {
            let distance = (a - b).abs() / b.abs().max(f64::MIN_POSITIVE);
            if distance.is_nan() { f64::INFINITY } else { distance }
        };
        let both = self.reports.iter().zip(&other.reports);
        both.map(|(a, b)| apart(a.0, b.0).max(apart(a.1, b.1))).fold(0.0, f64::max)
    }
}

/// Trains the small model from its initial weights on noise, with a new batch in each step.
fn steps(device: Device, settings: &[&str]) -> Result<Ran> {
    let settings: Vec<String> = RECIPE.iter().chain(settings).map(|s| (*s).to_owned()).collect();
    let mut recipe = Recipe::default().with(&settings)?;
    recipe.train.steps = Some(STEPS as u64);
    let setup = Setup::open(&recipe, device, DataShape::labels(STEPS * recipe.train.batch))?;
    let (layout, classes) = (setup.parts.slot, setup.parts.model.config.classes);
    let described = setup.backend.describe();
    let mut trainer = Trainer::new(setup, Collective::ALONE, None)?;

    let mut free = (0..2).map(|_| trainer.backend.new_slot(layout)).collect::<Result<Vec<_>>>()?;
    let mut reports = Vec::new();
    for step in 0..STEPS {
        let mut slot = free.pop().expect("a step gives back the slot before it");
        let mut draws = Stream::new(7, Domain::Demo, step as u64, 0);
        slot.images_u8_mut().iter_mut().for_each(|pixel| *pixel = draws.next_u32() as u8);
        slot.labels_mut().iter_mut().for_each(|label| *label = draws.below(classes) as i32);
        let (back, report) = trainer.step(slot)?;
        free.extend(back);
        reports.push((report.loss, report.grad_norm));
    }
    let [weights, ema] = [Arena::Params, Arena::Ema].map(|arena| trainer.backend.read_arena(arena));
    Ok(Ran { device: described, reports, weights: weights?, ema: ema? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(reports: &[(f64, f64)]) -> Ran {
        Ran { device: "a device".into(), reports: reports.to_vec(), weights: vec![1], ema: vec![2] }
    }

    #[test]
    fn the_largest_distance_counts_and_what_is_no_number_is_far() {
        let cpu = ran(&[(2.0, 1.0), (1.0, 4.0)]);
        assert_eq!(cpu.distance(&cpu), 0.0);
        assert_eq!(ran(&[(2.0, 1.0), (1.0, 5.0)]).distance(&cpu), 0.25);
        assert_eq!(ran(&[(2.0, f64::NAN), (1.0, 4.0)]).distance(&cpu), f64::INFINITY);
    }

    #[test]
    fn a_proof_fails_by_distance_and_by_bits() {
        let good = StepCheck {
            device: "a device".into(),
            seconds: 1.0,
            distance: 1e-5,
            tolerance: 1e-4,
            repeats: true,
        };
        assert!(good.passed() && !good.text().contains("FAILED"));
        for bad in [StepCheck { distance: 1e-3, ..good.clone() }, StepCheck { repeats: false, ..good }] {
            assert!(!bad.passed());
            assert_eq!(bad.text().matches("FAILED").count(), 1, "{}", bad.text());
        }
    }

    /// Another seed gives another run, and the comparison must notice it.
    #[test]
    fn other_steps_are_far_from_these() {
        let [these, others] = [&["train.threads=1"][..], &["train.threads=1", "train.seed=4"]]
            .map(|s| steps(Device::Cpu, s).unwrap());
        assert!(these != others && others.distance(&these) > 0.02, "{}", others.distance(&these));
        assert!(these.reports.iter().all(|(loss, norm)| loss.is_finite() && *norm > 0.0));
    }
}
