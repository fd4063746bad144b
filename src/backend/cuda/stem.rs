//! From the bound batch to tokens, and back to the gradients of what was added (kernels/patchify.cu, kernels/embed.cu).

use super::Cuda;
use crate::backend::{Embed, Mat, Normalise, PatchGrid};
use crate::error::{Error, Result};

/// [`crate::backend::Backend::patchify`]
pub(super) fn patchify(_: &mut Cuda, _: PatchGrid, _: Normalise, _patches: Mat) -> Result<()> {
    Err(Error::new("patchify: not written yet"))
}

/// [`crate::backend::Backend::embed`]
pub(super) fn embed(_: &mut Cuda, _: &Embed, _x: Mat) -> Result<()> {
    Err(Error::new("embed: not written yet"))
}

/// [`crate::backend::Backend::embed_backward`]
pub(super) fn embed_backward(_: &mut Cuda, _: &Embed, _d_x: Mat) -> Result<()> {
    Err(Error::new("embed_backward: not written yet"))
}
