//! Steps that stand out: a loss or a gradient norm far above those of the steps before.
//!
//! What is compared is the loss of the whole batch and the norm of the whole gradient, so that all ranks decide
//! alike. The state is part of a checkpoint, so that a resumed run decides as an unbroken one.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::backend::{Limits, StepReport};
use crate::recipe::TrainSection;

/// What is remembered of earlier steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spikes {
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
    /// Steps in a row that stood out, or were not finite.
    pub in_a_row: u64,
    /// Ranges of batches that a rewind passed over, ascending. The n-th step takes the n-th batch outside them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<(u64, u64)>,
}

/// A step that stood out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spike {
    pub(super) loss: f64,
    /// Standard deviations of the loss above the mean of the steps before.
    pub(super) loss_score: f64,
    pub(super) grad_norm: f64,
    pub(super) norm_score: f64,
    /// Whether its update was left out.
    pub(super) skipped: bool,
}

/// A deviation is at least this share of the mean: steps that hardly differ at all do not make the next one
/// stand out.
const LEAST_DEVIATION: f64 = 1e-3;

impl Spikes {
    /// The highest loss and norm that do not stand out; infinite before enough steps were seen.
    pub(super) fn limits(&self, train: &TrainSection) -> Limits {
        let limit = |values: &VecDeque<f64>| {
            of(values, train).map_or(f64::INFINITY, |(mean, deviation)| mean + train.spike_score * deviation)
        };
        Limits { loss: limit(&self.losses), norm: limit(&self.norms) }
    }

    /// Compares a step with those before it, and remembers it.
    pub(super) fn look(&mut self, report: &StepReport, train: &TrainSection) -> Option<Spike> {
        let finite = report.loss.is_finite() && report.grad_norm.is_finite();
        let score = |values: &VecDeque<f64>, value: f64| {
            of(values, train).map_or(0.0, |(mean, deviation)| (value - mean) / deviation)
        };
        let spike = Spike {
            loss: report.loss,
            loss_score: score(&self.losses, report.loss),
            grad_norm: report.grad_norm,
            norm_score: score(&self.norms, report.grad_norm),
            skipped: report.skipped,
        };
        let limits = self.limits(train);
        let stands_out = finite && !limits.allow(report.loss, report.grad_norm);
        self.in_a_row = if stands_out || !finite { self.in_a_row + 1 } else { 0 };
        if finite && train.spike_score > 0.0 {
            // A value that stands out counts as the highest one that does not. So the window follows a loss
            // that stays high, and one spike does not hide the next.
            remember(&mut self.losses, report.loss.min(limits.loss), train.spike_window);
            remember(&mut self.norms, report.grad_norm.min(limits.norm), train.spike_window);
        }
        stands_out.then_some(spike)
    }

    /// The number of the batch for the step that follows `step` finished steps.
    pub fn batch_after(&self, step: u64) -> u64 {
        self.passed_over
            .iter()
            .fold(step, |batch, (from, to)| if batch >= *from { batch + to - from } else { batch })
    }
}

fn remember(values: &mut VecDeque<f64>, value: f64, most: usize) {
    values.push_back(value);
    while values.len() > most {
        values.pop_front();
    }
}

/// Mean and standard deviation, once the window is half full.
fn of(values: &VecDeque<f64>, train: &TrainSection) -> Option<(f64, f64)> {
    if train.spike_score == 0.0 || values.len() < train.spike_window.div_ceil(2).max(2) {
        return None;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    Some((mean, variance.sqrt().max(LEAST_DEVIATION * mean.abs()).max(f64::MIN_POSITIVE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(loss: f64, grad_norm: f64) -> StepReport {
        StepReport { loss, grad_norm, ..Default::default() }
    }

    fn settings() -> TrainSection {
        TrainSection { spike_score: 6.0, spike_window: 20, ..Default::default() }
    }

    #[test]
    fn a_spike_is_seen_and_the_next_one_too() {
        let (mut spikes, train) = (Spikes::default(), settings());
        for step in 0..30 {
            let wave = f64::from(step % 4) * 0.01;
            assert_eq!(spikes.look(&report(2.0 + wave, 1.0 - wave), &train), None, "step {step}");
        }
        let seen = spikes.look(&report(3.0, 1.0), &train).expect("the loss jumps");
        assert!(seen.loss_score > 50.0 && seen.norm_score.abs() < 3.0, "{seen:?}");
        assert_eq!(spikes.in_a_row, 1);
        assert!(spikes.look(&report(2.0, 40.0), &train).is_some_and(|seen| seen.norm_score > 50.0));
        assert!(spikes.look(&report(3.0, 1.0), &train).is_some(), "one spike does not hide the next");
        assert_eq!(spikes.in_a_row, 3);
        assert_eq!(spikes.look(&report(0.5, 0.1), &train), None, "a loss may fall");
        assert_eq!(spikes.in_a_row, 0);
        assert_eq!(
            spikes.look(&report(f64::NAN, 1.0), &train),
            None,
            "the guard for such steps reports them"
        );
        assert_eq!(spikes.in_a_row, 1);
        let again: Spikes = serde_json::from_str(&serde_json::to_string(&spikes).unwrap()).unwrap();
        assert_eq!(again, spikes);
    }

    #[test]
    fn a_loss_that_stays_high_becomes_the_rule() {
        let (mut spikes, train) = (Spikes::default(), settings());
        for step in 0..20 {
            spikes.look(&report(1.0 + f64::from(step % 3) * 0.05, 1.0), &train);
        }
        let until = (0..100).position(|_| spikes.look(&report(2.0, 1.0), &train).is_none());
        assert!(until.is_some_and(|steps| (1..20).contains(&steps)), "{until:?}");
    }

    #[test]
    fn steps_take_the_batches_outside_the_ranges() {
        let spikes = Spikes { passed_over: vec![(3, 5), (8, 9)], ..Default::default() };
        let batches: Vec<u64> = (0..8).map(|step| spikes.batch_after(step)).collect();
        assert_eq!(batches, [0, 1, 2, 5, 6, 7, 9, 10]);
    }

    #[test]
    fn without_a_score_nothing_stands_out() {
        let train = TrainSection { spike_score: 0.0, ..settings() };
        let mut spikes = Spikes::default();
        for _ in 0..40 {
            spikes.look(&report(1.0, 1.0), &train);
        }
        assert_eq!(spikes.look(&report(1e9, 1e9), &train), None);
        assert_eq!(spikes, Spikes::default());
    }
}
