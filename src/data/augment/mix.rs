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
