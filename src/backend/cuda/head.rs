//! Pooling, scaling and the loss (kernels/pool.cu, kernels/activation.cu, kernels/loss.cu).

use super::Cuda;
use crate::backend::{Loss, Mat, Pool};
use crate::error::{Error, Result};

/// [`crate::backend::Backend::pool`]
pub(super) fn pool(_: &mut Cuda, _: Pool, _x: Mat, _y: Mat) -> Result<()> {
    Err(Error::new("pool: not written yet"))
}

/// [`crate::backend::Backend::pool_backward`]
pub(super) fn pool_backward(_: &mut Cuda, _: Pool, _d_y: Mat, _d_x: Mat, _fresh: bool) -> Result<()> {
    Err(Error::new("pool_backward: not written yet"))
}

/// [`crate::backend::Backend::scale`]
pub(super) fn scale(_: &mut Cuda, _x: Mat, _factor: f32) -> Result<()> {
    Err(Error::new("scale: not written yet"))
}

/// [`crate::backend::Backend::loss`]
pub(super) fn loss(_: &mut Cuda, _: Loss, _logits: Mat, _d_logits: Mat, _samples: Mat) -> Result<()> {
    Err(Error::new("loss: not written yet"))
}
