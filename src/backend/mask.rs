//! Dropout masks as pure functions of their key: the same on every device, thread count and micro-batch split.
//!
//! One Philox block decides four neighbouring elements of one sample. Counter: (element / 4, sample, site, step low);
//! key: (seed low, seed high ^ step high ^ domain). Element e of the block keeps its value if its word's top 24 bits,
//! read as a number in [0, 1), are at least `rate`. `kernels/philox.cuh` must draw the same.

use super::{Mask, Micro, StepKeys};
use crate::rng::{Domain, PHILOX_ROUNDS, philox, philox_next_key, philox_round, unit};

/// Philox blocks that [`BoundMask::fill`] draws side by side.
const LANES: usize = 16;

/// A mask bound to a step and to the samples of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct BoundMask {
    rate: f32,
    site: u32,
    step: u32,
    key: [u32; 2],
    /// Index in the global batch of row 0's sample.
    first_sample: u64,
}

impl BoundMask {
    /// Binds `mask` to a step and a micro-batch.
    pub fn new(mask: Mask, keys: StepKeys, micro: Micro) -> Self {
        Self {
            rate: mask.rate,
            site: mask.site,
            step: keys.step as u32,
            key: [
                keys.seed as u32,
                (keys.seed >> 32) as u32 ^ (keys.step >> 32) as u32 ^ (Domain::Mask as u32) << 28,
            ],
            first_sample: micro.global_first + micro.first as u64,
        }
    }

    /// Whether nothing is ever dropped.
    pub fn is_none(&self) -> bool {
        self.rate == 0.0
    }

    /// `1 / (1 - rate)`
    pub fn scale(&self) -> f32 {
        1.0 / (1.0 - self.rate)
    }

    /// The factors (0 or `scale`) of elements `4·block .. 4·block + 4` of sample `sample` of the micro-batch.
    #[inline(always)]
    pub fn factors4(&self, sample: usize, block: u32) -> [f32; 4] {
        let sample = self.first_sample + sample as u64;
        let words = philox([block, sample as u32, self.site, self.step], self.key);
        let scale = self.scale();
        words.map(|w| if unit(w) < self.rate { 0.0 } else { scale })
    }

    /// The factor of one element: drop-path uses element 0.
    pub fn factor(&self, sample: usize, element: usize) -> f32 {
        self.factors4(sample, (element / 4) as u32)[element % 4]
    }

    /// The factors of elements `start .. start + out.len()` of one sample.
    #[inline(always)]
    pub fn fill(&self, sample: usize, start: usize, out: &mut [f32]) {
        let (head, rest) = out.split_at_mut(out.len().min(start.wrapping_neg() % 4));
        self.fill_slowly(sample, start, head);
        let mut element = start + head.len();
        let (groups, tail) = rest.as_chunks_mut::<{ 4 * LANES }>();
        for group in groups {
            self.fill_group(sample, (element / 4) as u32, group);
            element += group.len();
        }
        self.fill_slowly(sample, element, tail);
    }

    fn fill_slowly(&self, sample: usize, start: usize, out: &mut [f32]) {
        let mut i = 0;
        while i < out.len() {
            let element = start + i;
            let block = self.factors4(sample, (element / 4) as u32);
            for (factor, to) in block[element % 4..].iter().zip(&mut out[i..]) {
                *to = *factor;
                i += 1;
            }
        }
    }

    /// [`BoundMask::factors4`] for `LANES` blocks side by side, round by round, which compilers turn into vectors.
    #[inline(always)]
    fn fill_group(&self, sample: usize, block: u32, out: &mut [f32; 4 * LANES]) {
        let sample = (self.first_sample + sample as u64) as u32;
        let mut c0: [u32; LANES] = std::array::from_fn(|lane| block.wrapping_add(lane as u32));
        let (mut c1, mut c2, mut c3) = ([sample; LANES], [self.site; LANES], [self.step; LANES]);
        let mut key = self.key;
        for _ in 0..PHILOX_ROUNDS {
            for lane in 0..LANES {
                let counter = [c0[lane], c1[lane], c2[lane], c3[lane]];
                [c0[lane], c1[lane], c2[lane], c3[lane]] = philox_round(counter, key);
            }
            key = philox_next_key(key);
        }
        let scale = self.scale();
        for (lane, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (out, word) in out.iter_mut().zip([c0[lane], c1[lane], c2[lane], c3[lane]]) {
                *out = if unit(word) < self.rate { 0.0 } else { scale };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Write;

    fn mask(rate: f32, site: u32, step: u64, first: usize) -> BoundMask {
        let micro = Micro { first, samples: 4, global_first: 0, gradients: Write::Assign, mean_over: 4 };
        BoundMask::new(Mask { rate, site }, StepKeys { seed: 5, step }, micro)
    }

    #[test]
    fn the_rate_is_met_and_kept_values_are_scaled() {
        let mut factors = vec![0.0; 100_000];
        mask(0.3, 1, 0, 0).fill(0, 3, &mut factors);
        let dropped = factors.iter().filter(|f| **f == 0.0).count();
        assert!((dropped as f64 / 1e5 - 0.3).abs() < 0.01, "{dropped} of 100000 dropped");
        assert!(factors.iter().all(|f| *f == 0.0 || *f == 1.0 / 0.7));
    }

    #[test]
    fn filling_a_row_gives_the_factor_of_each_element() {
        let mask = mask(0.4, 7, 1 << 33, 5);
        for (start, len) in
            [(0, 64), (1, 200), (3, 2), (2, 67), (63, 129), (4, 0), (u32::MAX as usize * 4, 130)]
        {
            let mut factors = vec![f32::NAN; len];
            mask.fill(2, start, &mut factors);
            let expected: Vec<f32> = (start..start + len).map(|element| mask.factor(2, element)).collect();
            assert_eq!(factors, expected, "{len} elements from {start}");
        }
    }

    #[test]
    fn a_sample_keeps_its_mask_wherever_the_micro_batch_starts() {
        let (mut a, mut b) = (vec![0.0; 64], vec![0.0; 64]);
        mask(0.5, 1, 9, 0).fill(3, 0, &mut a);
        mask(0.5, 1, 9, 2).fill(1, 0, &mut b);
        assert_eq!(a, b);
        mask(0.5, 2, 9, 2).fill(1, 0, &mut b);
        assert_ne!(a, b, "another site draws another mask");
        mask(0.5, 1, 10, 2).fill(1, 0, &mut b);
        assert_ne!(a, b, "another step draws another mask");
    }
}
