//! The sums of a step's report, and the update.

use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, update};
use crate::backend::sample_metric::LOSS;
use crate::backend::{Dtype, Update, ops};
use crate::error::Result;

pub(super) fn begin_report(cpu: &mut CpuBackend) -> Result<()> {
    cpu.sums = [0.0; 3];
    cpu.outcome = update::Outcome { grad_norm: 0.0, skipped: false };
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
    let loss_is_fine = update.limits.allow_loss(cpu.sums[LOSS] / cpu.micro.mean_over as f64);
    let arenas = cpu.arenas.for_update();
    let buffers = update::Buffers {
        params: arenas.params,
        grads: arenas.grads,
        moment1: match update.rule.first_moment() {
            Dtype::Bf16 => update::Moment1::Bf16(bytemuck::cast_slice_mut(arenas.moment1)),
            Dtype::F32 => update::Moment1::F32(bytemuck::cast_slice_mut(arenas.moment1)),
        },
        moment2: arenas.moment2,
        ema: update.ema_decay.map(|_| arenas.ema),
    };
    cpu.outcome = update::update(&cpu.compute, update, buffers, loss_is_fine);
    Ok(())
}
