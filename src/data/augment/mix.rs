//! Mixup (Zhang et al. 2018) in big_vision's form. The loader only fills the slot's tables; the device mixes.

use crate::backend::Slot;
use crate::recipe::AugmentSection;
use crate::rng::{Domain, Stream};

/// Decides how batch `slot.position` is mixed: one λ = max(a, 1-a) with a ~ Beta(α, α) for the whole batch, and sample
/// i takes sample i-1 of its group as its partner, the first one the last.
pub fn fill(slot: &mut Slot, augment: &AugmentSection, seed: u64) {
    slot.clear_mix();
    if augment.mixup <= 0.0 {
        return;
    }
    let mut draws = Stream::new(seed, Domain::Mix, slot.position, 0);
    if !draws.chance(augment.mix_prob) {
        return;
    }
    let a = draws.beta(augment.mixup);
    slot.lambda_mut().fill(a.max(1.0 - a) as f32);
    let partner = slot.partner_mut();
    let group = if augment.mix_group == 0 { partner.len() } else { augment.mix_group };
    for (g, members) in partner.chunks_mut(group).enumerate() {
        let (first, len) = (g * group, members.len());
        members.iter_mut().enumerate().for_each(|(i, p)| *p = (first + (i + len - 1) % len) as u32);
    }
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
                    fill(&mut slot, &augment, 11);
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
            fill(&mut slot, &augment, 1);
            if slot.lambda()[0] < 1.0 || slot.partner()[0] != 0 {
                assert_eq!(slot.partner(), [2, 0, 1, 5, 3, 4, 6]);
                mixed += 1;
            } else {
                assert_eq!(slot.partner(), [0, 1, 2, 3, 4, 5, 6]);
            }
        }
        assert!((430..570).contains(&mixed), "{mixed} of 1000 batches");
        fill(&mut slot, &AugmentSection::default(), 1);
        assert!(slot.lambda().iter().all(|l| *l == 1.0), "mixup is off by default");
    }
}
