//! Pooling, scaling and the loss (kernels/pool.cu, kernels/activation.cu, kernels/loss.cu).

use super::Cuda;
use super::dense::elementwise_grid;
use super::launch::{
    LossArgs, LossTerms, PoolArgs, PoolBackwardArgs, PoolShape, ScaleArgs, stream_variant, variant,
};
use crate::backend::{Dtype, LossKind, Mat, Pool, Slot, TargetKind, ops};
use crate::error::{Error, Result};

fn pool_shape(pool: Pool, x: Mat, y: Mat) -> PoolShape {
    let (tokens, first, last) = match pool {
        Pool::Token { tokens, index } => (tokens, index, index + 1),
        Pool::Mean { tokens, first } => (tokens, first, tokens),
    };
    assert_eq!((x.rows, x.cols), (y.rows * tokens, y.cols), "pool: {x} → {y}");
    assert!(first < last && last <= tokens, "pool: rows {first}..{last} of {tokens}");
    let [samples, tokens, width, first, last] = [y.rows, tokens, y.cols, first, last].map(|n| n as u32);
    PoolShape { samples, tokens, width, first, last }
}

pub(super) fn pool(cuda: &mut Cuda, op: &ops::Pool) -> Result<()> {
    let ops::Pool { pool, x, y } = *op;
    let args = PoolArgs { shape: pool_shape(pool, x, y), x: cuda.view(x), y: cuda.view(y) };
    cuda.launch(stream_variant!(x.dtype, y.dtype, "pool"), elementwise_grid(y.rows, y.cols), 0, &args)
}

pub(super) fn pool_backward(cuda: &mut Cuda, op: &ops::PoolBackward) -> Result<()> {
    let ops::PoolBackward { pool, d_y, d_x, write } = *op;
    let args = PoolBackwardArgs {
        shape: pool_shape(pool, d_x, d_y),
        d_y: cuda.view(d_y),
        d_x: cuda.view(d_x),
        add: u32::from(write.adds()),
    };
    cuda.launch(
        stream_variant!(d_x.dtype, d_y.dtype, "pool_backward"),
        elementwise_grid(d_x.rows, d_x.cols),
        0,
        &args,
    )
}

pub(super) fn scale(cuda: &mut Cuda, op: &ops::Scale) -> Result<()> {
    let ops::Scale { x, factor } = *op;
    let args = ScaleArgs { x: cuda.view(x), factor };
    cuda.launch(variant!(x.dtype, "scale"), elementwise_grid(x.rows, x.cols), 0, &args)
}

/// Shared memory in front of the logits.
const LOSS_SCRATCH: usize = 512;

pub(super) fn loss(cuda: &mut Cuda, op: &ops::Loss) -> Result<()> {
    let ops::Loss { loss, logits, d_logits, samples } = *op;
    let micro = cuda.micro;
    let classes = logits.cols;
    cuda.classes = Some(classes);
    let slot = cuda.batch.slot.as_ref().expect("loss: no batch is bound");
    check_labels(slot, classes)?;
    let dense = match slot.layout().targets {
        TargetKind::Labels => 0,
        TargetKind::Dense { classes: given } => {
            assert_eq!(given, classes, "targets and logits differ in classes");
            1
        }
    };
    assert_eq!(
        (d_logits.rows, d_logits.cols),
        (logits.rows, classes),
        "loss: {logits} and {d_logits} differ"
    );
    let expected = (micro.samples, micro.samples, 3);
    assert_eq!((logits.rows, samples.rows, samples.cols), expected, "loss: one row per sample");
    assert!(micro.first + micro.samples <= slot.layout().samples, "loss: micro-batch outside the batch");
    if let Some(weights) = loss.class_weights {
        let shape = (weights.rows, weights.cols, weights.dtype);
        assert_eq!(shape, (1, classes, Dtype::F32), "loss: one weight for each class");
    }

    let staged = LOSS_SCRATCH + 2 * classes.next_multiple_of(8);
    let fits = logits.dtype == Dtype::Bf16 && staged <= cuda.properties().shared_memory as usize;
    let threads = match (classes, logits.dtype) {
        (..=1024, _) => 128,
        (1025..=4096, _) | (_, Dtype::F32) => 256,
        _ => 512,
    };
    let kernel = match (loss.kind, loss.class_weights) {
        (LossKind::Softmax, None) => variant!(logits.dtype, "loss_softmax"),
        (LossKind::Softmax, Some(_)) => variant!(logits.dtype, "loss_softmax_weighted"),
        (LossKind::Sigmoid, None) => variant!(logits.dtype, "loss_sigmoid"),
        (LossKind::Sigmoid, Some(_)) => variant!(logits.dtype, "loss_sigmoid_weighted"),
    };
    let args = LossArgs {
        params: cuda.step_params.address(),
        terms: LossTerms {
            scale: 1.0 / micro.mean_over as f64,
            smoothing: loss.label_smoothing,
            classes: classes as u32,
            dense,
            first: micro.first as u32,
            weights: cuda.at_or_null(loss.class_weights),
        },
        staged: u32::from(fits),
        logits: cuda.view(logits),
        d_logits: cuda.view(d_logits),
        samples: cuda.view(samples),
    };
    let shared = if fits { staged } else { LOSS_SCRATCH } as u32;
    cuda.launch(kernel.with_threads(threads), [micro.samples as u32, 1, 1], shared, &args)
}

/// Fails on a label that is not one of `classes`; -1 means no class. A recorded loss cannot fail, so every
/// batch is checked when it is bound.
pub(super) fn check_labels(slot: &Slot, classes: usize) -> Result<()> {
    if slot.layout().targets != TargetKind::Labels {
        return Ok(());
    }
    match slot.labels()[..slot.count].iter().find(|l| **l < -1 || **l >= classes as i32) {
        Some(label) => Err(Error::new(format!("label {label} in a batch for a model of {classes} classes"))
            .hint("set `model.classes` to the number of classes of the data")),
        None => Ok(()),
    }
}
