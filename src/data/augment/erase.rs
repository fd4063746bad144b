//! Random erasing (Zhong et al. 2020) as timm does it. A box and a seed travel with the batch. The device
//! draws the contents of the box after normalisation, so that they are normally distributed there.

use crate::backend::{MixBox, Slot};
use crate::recipe::{AugmentSection, EraseMode};
use crate::rng::Stream;

/// Aspect of a box: height over width.
const ASPECT: (f64, f64) = (0.3, 1.0 / 0.3);

/// Draws a sample's box; empty if the sample is not erased.
pub fn draw(augment: &AugmentSection, (height, width): (usize, usize), draws: &mut Stream) -> MixBox {
    const ATTEMPTS: usize = 10;
    if !draws.chance(augment.erase) {
        return MixBox::default();
    }
    let area = (height * width) as f64;
    let (least, most) = (f64::from(augment.erase_area.0), f64::from(augment.erase_area.1));
    for _ in 0..ATTEMPTS {
        let target = area * (least + (most - least) * draws.uniform_f64());
        let aspect = (ASPECT.0.ln() + (ASPECT.1.ln() - ASPECT.0.ln()) * draws.uniform_f64()).exp();
        let h = (target * aspect).sqrt().round_ties_even() as usize;
        let w = (target / aspect).sqrt().round_ties_even() as usize;
        if w < width && h < height {
            let (y, x) = (draws.below(height - h + 1), draws.below(width - w + 1));
            let [y0, x0, y1, x1] = [y, x, y + h, x + w].map(|v| v as u16);
            return MixBox { y0, x0, y1, x1 };
        }
    }
    MixBox::default()
}

/// Writes the boxes of a batch's samples and the seeds of their noise into the slot.
pub fn enter(slot: &mut Slot, augment: &AugmentSection, boxes: impl Iterator<Item = (MixBox, u32)>) {
    for (i, (cut, seed)) in boxes.enumerate() {
        slot.erase_mut()[i] = crate::backend::Erase {
            cut,
            seed,
            mode: match augment.erase_mode {
                EraseMode::Const => 0,
                EraseMode::Rand => 1,
                EraseMode::Pixel => 2,
            },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::seeded;

    #[test]
    fn boxes_have_timms_law() {
        let augment = AugmentSection { erase: 0.25, ..Default::default() };
        let (mut erased, mut shares) = (0, Vec::new());
        for seed in 0..8000 {
            let cut = draw(&augment, (60, 80), &mut seeded(seed));
            let (h, w) = (usize::from(cut.y1 - cut.y0), usize::from(cut.x1 - cut.x0));
            if h * w > 0 {
                assert!(cut.y1 <= 60 && cut.x1 <= 80 && h < 60 && w < 80);
                erased += 1;
                shares.push((h * w) as f64 / 4800.0);
            }
        }
        assert!((1850..2150).contains(&erased), "{erased} of 8000");
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        // Uniform on [0.02, 1/3], less the boxes that do not fit.
        assert!((0.15..0.18).contains(&mean), "mean share {mean}");
        assert!(shares.iter().all(|s| (0.015..0.345).contains(s)));
        let never = AugmentSection::default();
        assert!((0..100).all(|s| draw(&never, (8, 8), &mut seeded(s)) == MixBox::default()));
    }
}
