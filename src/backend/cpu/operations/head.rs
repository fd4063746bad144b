//! Pooling, scaling and the loss.

use super::same_shape;
use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, loss, pool, sums};
use crate::backend::{Mat, Micro, Pool, ops};
use crate::error::Result;

pub(super) fn pool(cpu: &mut CpuBackend, op: &ops::Pool) -> Result<()> {
    let ops::Pool { pool, x, y } = *op;
    check_pool(pool, x, y);
    let mut a = Access::new(&mut cpu.arenas);
    pool::forward(&cpu.compute, pool, a.read(x), a.write(y));
    Ok(())
}

pub(super) fn pool_backward(cpu: &mut CpuBackend, op: &ops::PoolBackward) -> Result<()> {
    let ops::PoolBackward { pool, d_y, d_x, write } = *op;
    check_pool(pool, d_x, d_y);
    let mut a = Access::new(&mut cpu.arenas);
    pool::backward(&cpu.compute, pool, a.read(d_y), a.write(d_x), !write.adds());
    Ok(())
}

pub(super) fn scale(cpu: &mut CpuBackend, op: &ops::Scale) -> Result<()> {
    let ops::Scale { x, factor } = *op;
    let x = Access::new(&mut cpu.arenas).write(x);
    cpu.compute.for_each_item(x.blocks(sums::CHUNK), |(_, mut x)| {
        (0..x.rows).for_each(|r| x.row(r).iter_mut().for_each(|x| *x *= factor));
    });
    Ok(())
}

pub(super) fn loss(cpu: &mut CpuBackend, op: &ops::Loss) -> Result<()> {
    let ops::Loss { loss, logits, d_logits, samples } = *op;
    let slot = cpu.slot.as_ref().expect("loss: no batch is bound");
    let Micro { first, samples: count, mean_over, .. } = cpu.micro;
    same_shape("loss", logits, d_logits);
    assert_eq!((logits.rows, samples.rows, samples.cols), (count, count, 3), "loss: one row per sample");
    assert!(first + count <= slot.layout().samples, "loss: micro-batch outside the batch");

    let mut a = Access::new(&mut cpu.arenas);
    let weights = loss.class_weights.map(|weights| {
        assert_eq!((weights.rows, weights.cols), (1, logits.cols), "loss: one weight for each class");
        a.read_flat(weights)
    });
    let targets = loss::Targets::new(slot, logits.cols, weights)?;
    let source = if logits == d_logits { None } else { Some(a.read(logits)) };
    let (d_logits, samples) = (a.write(d_logits), a.write(samples));
    let scale = 1.0 / mean_over as f64;
    loss::forward_backward(&cpu.compute, loss, &targets, first, scale, source, d_logits, samples);
    Ok(())
}

fn check_pool(pool: Pool, x: Mat, y: Mat) {
    let (Pool::Token { tokens, .. } | Pool::Mean { tokens, .. }) = pool;
    assert_eq!((x.rows, x.cols), (y.rows * tokens, y.cols), "pool: {x} → {y}");
}
