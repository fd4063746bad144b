//! Products that cuBLASLt refuses.

use super::Cuda;
use super::blas::{Operands, Shape};
use crate::error::{Error, Result};

pub(super) fn product(cuda: &Cuda, shape: &Shape, _: &Operands) -> Result<()> {
    Err(Error::new(format!("cuBLASLt {} has no algorithm for {}", cuda.blas.version(), shape.key())))
}
