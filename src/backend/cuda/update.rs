//! The step's report, the global norm, and the optimiser over the flat buffers (kernels/report.cu, kernels/update.cu).

use super::Cuda;
use super::driver::Address;
use crate::backend::{Mat, StepReport, Update};
use crate::error::{Error, Result};

/// What the update keeps on the device between steps: tables of segments, made at the first update.
#[derive(Default)]
pub(super) struct State {}

/// [`crate::backend::Backend::begin_report`]
pub(super) fn begin_report(_: &mut Cuda) -> Result<()> {
    Err(Error::new("begin_report: not written yet"))
}

/// [`crate::backend::Backend::add_to_report`]
pub(super) fn add_to_report(_: &mut Cuda, _samples: Mat) -> Result<()> {
    Err(Error::new("add_to_report: not written yet"))
}

/// [`crate::backend::Backend::update`]
pub(super) fn update(_: &mut Cuda, _: &Update) -> Result<()> {
    Err(Error::new("update: not written yet"))
}

/// [`crate::backend::Backend::report`]
pub(super) fn report(_: &mut Cuda) -> Result<StepReport> {
    Err(Error::new("report: not written yet"))
}

/// Writes `count` weights as bf16.
pub(super) fn cast_to_bf16(_: &Cuda, _weights: Address, _copy: Address, _count: usize) -> Result<()> {
    Err(Error::new("cast_to_bf16: not written yet"))
}

/// Exchanges `count` values.
pub(super) fn swap(_: &Cuda, _a: Address, _b: Address, _count: usize) -> Result<()> {
    Err(Error::new("swap: not written yet"))
}
