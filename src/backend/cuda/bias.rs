//! Bias gradients beside their products: a kernel that makes the matrix which a product reads as its `d_y` has every value
//! of it in registers or shared memory, and can sum its rows on the way.

use super::Cuda;
use crate::backend::{Dtype, Linear, Mat};

impl Cuda {
    /// Whether a kernel that could sum the rows of `d_y` does so, or leaves the bias gradient to the product: for every
    /// kernel of LayerNorm, of the join and of attention the one place where this is decided. There are kernels for what
    /// products read in bf16.
    pub(super) fn makes_bias_sums(&self, d_y: Mat) -> bool {
        d_y.dtype == Dtype::Bf16
    }

    /// The gradient of the bias of the next product, which reads `d_y`, has been made.
    pub(super) fn bias_is_made(&mut self, d_y: Mat, d_bias: Option<Mat>) {
        self.made_bias = d_bias.map(|d_bias| (d_y, d_bias));
    }

    /// The layer of a product, without its bias gradient if that has been made already.
    pub(super) fn without_made_bias(&mut self, d_y: Mat, w: &Linear) -> Linear {
        let Some(made) = self.made_bias.take() else { return *w };
        assert_eq!(Some(made), w.d_bias.map(|d_bias| (d_y, d_bias)), "matmul_backward: another d_y or bias");
        Linear { d_bias: None, ..*w }
    }
}
