//! Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) in the forms of big_vision and timm. The loader
//! only fills the slot's tables; the device mixes.

use crate::backend::{MixBox, Slot};
use crate::recipe::{AugmentSection, MixLaw, MixMode};
use crate::rng::{Domain, Stream};

/// Decides how batch `slot.position` is mixed. Partners come from groups of `mix_group`. `mix_mode` decides
/// which samples share a draw. Draws of pairs and elements are keyed by the sample of the global batch, so the
/// number of ranks changes none; a group lies within a rank.
pub fn fill(slot: &mut Slot, augment: &AugmentSection, seed: u64, rank: usize) {
    slot.clear_mix();
    if !augment.mixes() {
        return;
    }
    let image = slot.layout().image;
    let samples = slot.layout().samples;
    let group = if augment.mix_group == 0 { samples } else { augment.mix_group };
    let shared = Mix::draw(augment, image, &mut Stream::new(seed, Domain::Mix, slot.position, 0));
    for i in 0..samples {
        let first = i / group * group;
        let (place, len) = (i - first, group.min(samples - first));
        let partner = match augment.mix_law {
            MixLaw::BigVision => (place + len - 1) % len,
            MixLaw::Timm => len - 1 - place,
        };
        let own = |place: usize| {
            let key = 1 + (rank * samples + first + place) as u64;
            Mix::draw(augment, image, &mut Stream::new(seed, Domain::Mix, slot.position, key))
        };
        let mix = match augment.mix_mode {
            MixMode::Batch => shared,
            // Both samples of a pair use the first one's draws.
            MixMode::Pair => own(place.min(partner)),
            MixMode::Elem => own(place),
        };
        let Some(mix) = mix else { continue };
        slot.partner_mut()[i] = (first + partner) as u32;
        slot.lambda_mut()[i] = mix.target;
        slot.boxes_mut()[i] = mix.cut;
        slot.pixel_lambda_mut()[i] = mix.pixels;
    }
}

/// One draw.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mix {
    /// Weight of the sample's own target.
    target: f32,
    /// Weight of the sample's own pixels outside the box.
    pixels: f32,
    cut: MixBox,
}

impl Mix {
    /// `None`: not mixed.
    fn draw(augment: &AugmentSection, image: (usize, usize), draws: &mut Stream) -> Option<Self> {
        if !draws.chance(augment.mix_prob) {
            return None;
        }
        let cuts = augment.cutmix > 0.0 || augment.cutmix_minmax.1 > 0.0;
        let lambda = |alpha: f64, draws: &mut Stream| {
            let a = draws.beta(alpha);
            match augment.mix_law {
                MixLaw::BigVision => a.max(1.0 - a),
                MixLaw::Timm => a,
            }
        };
        if augment.mix_chain {
            let mixed = lambda(augment.mixup, draws);
            let (cut, kept) = cut_box(augment, image, draws);
            // CutMix of mixtures: the box shows the partner's mixture, which is this one with the weights
            // exchanged.
            let target = kept * mixed + (1.0 - kept) * (1.0 - mixed);
            return Some(Self { target: target as f32, pixels: mixed as f32, cut });
        }
        if cuts && (augment.mixup <= 0.0 || draws.chance(augment.mix_switch)) {
            let (cut, kept) = cut_box(augment, image, draws);
            return Some(Self { target: kept as f32, pixels: 1.0, cut });
        }
        let lambda = lambda(augment.mixup, draws) as f32;
        Some(Self { target: lambda, pixels: lambda, cut: MixBox::default() })
    }
}

/// A box as timm draws it, and the share of the picture outside it.
fn cut_box(augment: &AugmentSection, (height, width): (usize, usize), draws: &mut Stream) -> (MixBox, f64) {
    let (least, most) = augment.cutmix_minmax;
    let (y0, y1, x0, x1) = if most > 0.0 {
        // `rand_bbox_minmax`: uniform sides, entirely inside.
        let mut side = |n: usize| {
            let (low, high) = ((n as f32 * least) as usize, (n as f32 * most) as usize);
            let cut = low + draws.below(high.saturating_sub(low).max(1));
            let start = draws.below((n - cut).max(1));
            (start, start + cut)
        };
        let ((y0, y1), (x0, x1)) = (side(height), side(width));
        (y0, y1, x0, x1)
    } else {
        let ratio = (1.0 - draws.beta(augment.cutmix)).sqrt();
        let (cut_h, cut_w) = ((height as f64 * ratio) as usize, (width as f64 * ratio) as usize);
        let (cy, cx) = (draws.below(height), draws.below(width));
        let span = |c: usize, cut: usize, n: usize| (c.saturating_sub(cut / 2), (c + cut / 2).min(n));
        let ((y0, y1), (x0, x1)) = (span(cy, cut_h, height), span(cx, cut_w, width));
        (y0, y1, x0, x1)
    };
    let outside = 1.0 - ((y1 - y0) * (x1 - x0)) as f64 / (height * width) as f64;
    (MixBox { y0: y0 as u16, x0: x0 as u16, y1: y1 as u16, x1: x1 as u16 }, outside)
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::batch::PlainMemory;
    use crate::backend::{Pixels, SlotLayout, TargetKind};
    use crate::data::reference::json;

    fn slot(samples: usize) -> Slot {
        let layout = SlotLayout { samples, image: (1, 1), pixels: Pixels::U8, targets: TargetKind::Labels };
        Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout)
    }

    #[test]
    fn lambda_follows_big_visions_law() {
        let Some(reference) = json("augment/mix_big_vision_law.json") else { return };
        let mut slot = slot(2);
        for (alpha, law) in reference.as_object().unwrap() {
            let augment = AugmentSection { mixup: alpha.parse().unwrap(), ..Default::default() };
            let n = 20_000;
            let mut lambdas: Vec<f64> = (0..n)
                .map(|batch| {
                    slot.position = batch;
                    fill(&mut slot, &augment, 11, 0);
                    assert_eq!(slot.lambda()[0], slot.lambda()[1], "one for the batch");
                    f64::from(slot.lambda()[0])
                })
                .collect();
            lambdas.sort_by(f64::total_cmp);
            let mean = lambdas.iter().sum::<f64>() / n as f64;
            assert!((mean - law["mean"].as_f64().unwrap()).abs() < 0.005, "alpha {alpha}: mean {mean}");
            for (q, expected) in law["quantiles"].as_object().unwrap() {
                let at = lambdas[(q.parse::<f64>().unwrap() * n as f64) as usize];
                let expected = expected.as_f64().unwrap();
                assert!(
                    (at - expected).abs() < 0.012,
                    "alpha {alpha}, quantile {q}: {at}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn partners_come_from_the_group_and_the_share_of_mixed_batches_is_kept() {
        let mut slot = slot(7);
        let augment = AugmentSection { mixup: 0.2, mix_prob: 0.5, mix_group: 3, ..Default::default() };
        let mut mixed = 0;
        for batch in 0..1000 {
            slot.position = batch;
            fill(&mut slot, &augment, 1, 0);
            if slot.lambda()[0] < 1.0 || slot.partner()[0] != 0 {
                assert_eq!(slot.partner(), [2, 0, 1, 5, 3, 4, 6]);
                mixed += 1;
            } else {
                assert_eq!(slot.partner(), [0, 1, 2, 3, 4, 5, 6]);
            }
        }
        assert!((430..570).contains(&mixed), "{mixed} of 1000 batches");
        fill(&mut slot, &AugmentSection::default(), 1, 0);
        assert!(slot.lambda().iter().all(|l| *l == 1.0), "mixup is off by default");
    }

    fn timm() -> AugmentSection {
        AugmentSection { mix_law: MixLaw::Timm, mixup: 0.8, cutmix: 1.0, ..Default::default() }
    }

    fn sized(samples: usize, image: (usize, usize)) -> Slot {
        let layout = SlotLayout { samples, image, pixels: Pixels::U8, targets: TargetKind::Labels };
        Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout)
    }

    #[test]
    fn a_batch_gets_one_of_both_and_pairs_and_elements_draw_for_themselves() {
        let mut slot = sized(6, (24, 30));
        let share = |b: &MixBox| f32::from(b.y1 - b.y0) * f32::from(b.x1 - b.x0) / (24.0 * 30.0);
        let mut cut = 0;
        for batch in 0..600 {
            slot.position = batch;
            fill(&mut slot, &timm(), 1, 0);
            assert_eq!(slot.partner(), [5, 4, 3, 2, 1, 0]);
            assert!(slot.lambda().iter().all(|l| *l == slot.lambda()[0]));
            let area = share(&slot.boxes()[0]);
            if area > 0.0 {
                cut += 1;
                assert!((slot.lambda()[0] - (1.0 - area)).abs() < 1e-6, "λ is what the box leaves");
                assert_eq!(slot.pixel_lambda()[0], 1.0);
            }
        }
        assert!((240..330).contains(&cut), "{cut} of 600 are cut");
        for (mode, distinct) in [(MixMode::Pair, 3), (MixMode::Elem, 6)] {
            fill(&mut slot, &AugmentSection { mix_mode: mode, cutmix: 0.0, ..timm() }, 1, 0);
            let mut lambdas = slot.lambda().to_vec();
            if mode == MixMode::Pair {
                assert!((0..6).all(|i| lambdas[i] == lambdas[5 - i]));
            }
            lambdas.sort_by(f32::total_cmp);
            lambdas.dedup();
            assert_eq!(lambdas.len(), distinct, "{mode:?}");
        }
        let own = AugmentSection { mix_mode: MixMode::Elem, ..timm() };
        fill(&mut slot, &own, 1, 0);
        let first = slot.lambda().to_vec();
        fill(&mut slot, &own, 1, 1);
        assert!(first != slot.lambda(), "ranks draw for themselves");
    }

    #[test]
    fn boxes_follow_timms_law() {
        let mut slot = sized(1, (32, 32));
        let mut outside = Vec::new();
        for batch in 0..4000 {
            slot.position = batch;
            fill(&mut slot, &AugmentSection { mixup: 0.0, ..timm() }, 1, 0);
            outside.push(f64::from(slot.lambda()[0]));
        }
        // Uniform λ would give a half. Sides are cut to whole pixels and at the border: 0.700 by simulating
        // `rand_bbox`.
        let mean = outside.iter().sum::<f64>() / outside.len() as f64;
        assert!((mean - 0.700).abs() < 0.02, "mean {mean}");
        let fixed = AugmentSection { mixup: 0.0, cutmix_minmax: (0.25, 0.75), ..timm() };
        for batch in 0..500 {
            slot.position = batch;
            fill(&mut slot, &fixed, 1, 0);
            let b = slot.boxes()[0];
            assert!((8..24).contains(&(b.y1 - b.y0)) && (8..24).contains(&(b.x1 - b.x0)) && b.y1 <= 32);
        }
    }

    /// Chained by hand: mixup of everything, then CutMix of the result.
    #[test]
    fn a_chain_is_cutmix_of_mixtures() {
        let mut slot = sized(4, (8, 8));
        let chain = AugmentSection { mix_chain: true, ..timm() };
        for batch in 0..50 {
            slot.position = batch;
            fill(&mut slot, &chain, 3, 0);
            let (a, b) = (f64::from(slot.pixel_lambda()[0]), slot.boxes()[0]);
            let kept = 1.0 - f64::from(b.y1 - b.y0) * f64::from(b.x1 - b.x0) / 64.0;
            // The target's own share: of the sample's own mixture outside the box, of the partner's inside.
            let expected = kept * a + (1.0 - kept) * (1.0 - a);
            assert!((f64::from(slot.lambda()[0]) - expected).abs() < 1e-6);
        }
    }
}
