//! Rounding to bf16: to nearest, ties to even. The values stay f32.

use super::CpuBackend;
use super::arenas::Access;
use super::compute::Compute;
use super::simd::{Simd, Task};
use super::sums::CHUNK;
use super::view::{Rows, RowsMut};
use crate::backend::Mat;

impl CpuBackend {
    /// Rounds a matrix in place.
    pub(in crate::backend) fn round_to_bf16(&mut self, at: Mat) {
        round(&self.compute, None, Access::new(&mut self.arenas).write(at));
    }

    /// `to = bf16(from)`
    pub(in crate::backend) fn copy_as_bf16(&mut self, from: Mat, to: Mat) {
        assert_eq!((from.rows, from.cols), (to.rows, to.cols), "{from} and {to} differ in shape");
        let mut a = Access::new(&mut self.arenas);
        let from = a.read(from);
        round(&self.compute, Some(from), a.write(to));
    }
}

/// From another matrix, or in place.
fn round(c: &Compute, from: Option<Rows>, to: RowsMut) {
    c.for_each_item(to.blocks(CHUNK), |(start, to)| c.isa.run(Values { from, start, to }));
}

struct Values<'a> {
    from: Option<Rows<'a>>,
    start: usize,
    to: RowsMut<'a>,
}

impl Task for Values<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for r in 0..self.to.rows {
            let to = self.to.row(r);
            if let Some(from) = self.from {
                to.copy_from_slice(from.row(self.start + r));
            }
            for value in to {
                *value = rounded(*value);
            }
        }
    }
}

/// `half` uses a branch for this, which prevents vectorisation.
#[inline(always)]
fn rounded(value: f32) -> f32 {
    let bits = value.to_bits();
    let even = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let kept = if value.is_nan() { bits | 0x40_0000 } else { even };
    f32::from_bits(kept & 0xFFFF_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let below = f32::from_bits(0x3F80_7FFF);
        let [tie_down, tie_up] = [0x3F80_8000, 0x3F81_8000].map(f32::from_bits);
        let edges =
            [0.0, -0.0, 1e-45, -1e-40, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let spread = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for value in edges.into_iter().chain([below, tie_down, tie_up]).chain(spread) {
            let expected = half::bf16::from_f32(value).to_f32();
            assert_eq!(rounded(value).to_bits(), expected.to_bits(), "{value:e}");
        }
    }
}
