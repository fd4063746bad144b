//! Attention of all tokens to all, and of one learned query: which kernel for which head size (kernels/attention_*.cu).

use super::Cuda;
use crate::backend::{Heads, Mask, Mat};
use crate::error::{Error, Result};

fn missing(what: &str) -> Result<()> {
    Err(Error::new(format!("{what}: not written yet")))
}

/// [`crate::backend::Backend::attention`]
pub(super) fn attention(_: &mut Cuda, _: Heads, _qkv: Mat, _o: Mat, _lse: Mat, _dropout: Mask) -> Result<()> {
    missing("attention")
}

/// [`crate::backend::Backend::attention_backward`]
pub(super) fn attention_backward(
    _: &mut Cuda,
    _: Heads,
    _qkv: Mat,
    _o: Mat,
    _lse: Mat,
    _dropout: Mask,
    _d_o: Mat,
    _d_qkv: Mat,
) -> Result<()> {
    missing("attention_backward")
}

/// [`crate::backend::Backend::probe_attention`]
pub(super) fn probe_attention(_: &mut Cuda, _: Heads, _q: Mat, _kv: Mat, _p: Mat, _o: Mat) -> Result<()> {
    missing("probe_attention")
}

/// [`crate::backend::Backend::probe_attention_backward`]
pub(super) fn probe_attention_backward(
    _: &mut Cuda,
    _: Heads,
    _q: Mat,
    _kv: Mat,
    _p: Mat,
    _d_o: Mat,
    _d_q: Mat,
    _d_kv: Mat,
) -> Result<()> {
    missing("probe_attention_backward")
}
