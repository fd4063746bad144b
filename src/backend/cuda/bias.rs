//! Bias gradients computed outside their product. A kernel that makes the `d_y` of a product has every value
//! of it in registers or shared memory, and can sum its rows on the way.
//!
//! That is one of three ways to compute the gradient; the product chooses the fastest ([`super::ways`]). This
//! module times what the sums cost the kernel, and passes that price to the product with the sums. Once the
//! product has chosen another way, the kernel no longer computes the sums.

use super::blas::SetAside;
use super::driver::Address;
use super::race::race;
use super::{Arena, BLAS_WORKSPACE, Cuda};
use crate::backend::{Dtype, Linear, Mat};
use crate::error::Result;

/// Makes a matrix, with or without its row sums; returns the destination of the sums if it made them.
type Launch<'a> = dyn Fn(&Cuda, Option<Mat>) -> Result<Option<Mat>> + 'a;

/// The state of bias gradients that are made outside their product.
#[derive(Default)]
pub(super) struct BiasSums {
    /// The last one made: the matrix that its product reads, its destination, and its price.
    made: Option<(Mat, Mat, f32)>,
    /// Destinations that the product fills in a faster way.
    left_to_product: Vec<Mat>,
    /// Microseconds that the sums take, by kernel and size.
    prices: Vec<(Maker, f32)>,
}

/// A kernel that can make the sums: its operation and the matrix that it makes.
#[derive(Clone, Copy, PartialEq)]
struct Maker {
    operation: &'static str,
    rows: usize,
    cols: usize,
    stream: Dtype,
}

impl BiasSums {
    /// Starts another part of a batch, or another step.
    pub(super) fn begin(&mut self) {
        self.made = None;
    }

    /// The product of this destination has a faster way.
    pub(super) fn leave_to_product(&mut self, d_bias: Mat) {
        if !self.left_to_product.contains(&d_bias) {
            self.left_to_product.push(d_bias);
        }
    }
}

/// Makes `d_y`, which a product reads next, by `launch`. `d_bias` is where the product wants the sums,
/// `changed` is what a second launch would find changed.
pub(super) fn make(
    cuda: &mut Cuda,
    operation: &'static str,
    (d_y, stream): (Mat, Dtype),
    d_bias: Option<Mat>,
    changed: &[Mat],
    launch: &Launch,
) -> Result<()> {
    let left = |d_bias: &Mat| cuda.bias_sums.left_to_product.contains(d_bias);
    // These kernels exist only for a `d_y` in bf16.
    let wanted = d_bias.filter(|d_bias| d_y.dtype == Dtype::Bf16 && !left(d_bias));
    let maker = Maker { operation, rows: d_y.rows, cols: d_y.cols, stream };
    let price = match wanted {
        Some(d_bias) if !cuda.blas.by_rule() && !cuda.gpu.is_capturing() => {
            price(cuda, maker, d_bias, changed, launch)?
        }
        _ => 0.0,
    };
    let made = launch(cuda, wanted)?;
    cuda.bias_sums.made = made.map(|d_bias| (d_y, d_bias, price));
    Ok(())
}

/// The time that the sums add to a launch; measured once per size.
fn price(cuda: &mut Cuda, maker: Maker, d_bias: Mat, changed: &[Mat], launch: &Launch) -> Result<f32> {
    if let Some((_, price)) = cuda.bias_sums.prices.iter().find(|(of, _)| *of == maker) {
        return Ok(*price);
    }
    let places = changed.iter().chain([&d_bias]).map(|mat| (cuda.at(*mat), mat.span_bytes()));
    let places: Vec<(Address, usize)> = places.collect();
    let gpu = cuda.gpu.clone();
    let aside = SetAside::new(&gpu, &places)?;
    let cleared = (cuda.arena(Arena::Workspace).address, gpu.properties().cache.min(BLAS_WORKSPACE));
    // With the sums, and without.
    let times = race(&gpu, cleared, 2, &mut |way| match way {
        0 => Ok(launch(cuda, Some(d_bias))?.is_some()),
        _ => launch(cuda, None).map(|_| true),
    })?;
    aside.put_back()?;
    let price = if times[0].is_finite() { (times[0] - times[1]).max(0.0) } else { 0.0 };
    cuda.bias_sums.prices.push((maker, price));
    Ok(price)
}

impl Cuda {
    /// The price of the bias gradient of a product that reads `d_y`, if it was made with `d_y`.
    pub(super) fn take_made_bias(&mut self, d_y: Mat, w: &Linear) -> Option<f32> {
        let (made_d_y, made_at, price) = self.bias_sums.made.take()?;
        assert_eq!(
            Some((made_d_y, made_at)),
            w.d_bias.map(|d_bias| (d_y, d_bias)),
            "matmul_backward: another d_y or bias"
        );
        Some(price)
    }
}
