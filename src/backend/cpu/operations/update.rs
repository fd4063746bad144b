//! The sums of a step's report, and the update.

use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, reduce, update};
use crate::backend::sample_metric::LOSS;
use crate::backend::{Update, ops};
use crate::error::Result;

pub(super) fn begin_report(cpu: &mut CpuBackend) -> Result<()> {
    cpu.sums = [0.0; 3];
    cpu.outcome = update::Outcome::default();
    Ok(())
}

pub(super) fn add_to_report(cpu: &mut CpuBackend, op: &ops::AddToReport) -> Result<()> {
    let ops::AddToReport { samples } = *op;
    let samples = Access::new(&mut cpu.arenas).read(samples);
    for r in 0..samples.rows {
        for (sum, value) in cpu.sums.iter_mut().zip(samples.row(r)) {
            *sum += f64::from(*value);
        }
    }
    Ok(())
}

pub(super) fn update(cpu: &mut CpuBackend, update: &Update) -> Result<()> {
    let loss = cpu.sums[LOSS];
    cpu.outcome = match reduce::update(cpu, update, loss)? {
        Some(outcome) => outcome,
        None => {
            let buffers = cpu.arenas.for_update().buffers(update);
            update::update(&cpu.compute, update, buffers, loss.is_finite())
        }
    };
    Ok(())
}
