//! Suggestions from the literature for a model and data set of this size. Printed, never applied.
//!
//! Sources: Steiner et al. 2022 ("How to train your ViT?", arXiv:2106.10270) for augmentation and
//! regularisation by the size of data and model; google-research/vision_transformer and big_vision for the
//! settings of published transfers.

use crate::recipe::Recipe;
use crate::report::format;

/// Transfers to sets of a few thousand pictures (Pets, Flowers) took 500 steps of 512.
const FEW_IMAGES: usize = 10_000;
const MANY_EPOCHS: f64 = 100.0;
/// With fewer pictures per class, training only the head is often as good.
const FEW_PER_CLASS: usize = 25;
/// With fewer updates a new head does not learn enough.
const FEW_UPDATES: u64 = 100;
const SMALL_BATCH: usize = 32;
/// L/16 and wider.
const WIDE: usize = 1024;

/// Suggestions for fine-tuning with a complete recipe on `images` pictures, one line each.
pub fn lines(recipe: &Recipe, images: usize) -> Vec<String> {
    let (train, optim, model) = (&recipe.train, &recipe.optim, &recipe.model);
    let classes = model.classes.unwrap_or(1).max(1);
    let epochs = train.steps.unwrap_or(0) as f64 * train.batch as f64 / images.max(1) as f64;
    let mut lines = Vec::new();
    if images < FEW_IMAGES && epochs > MANY_EPOCHS && train.patience == 0 {
        lines.push(format!(
            "each of {} pictures is seen {epochs:.0} times; 500 steps of 512 were enough for sets of a few thousand: \
             train.steps=500, or train.patience=3 to stop early",
            format::thousands(images as u64)
        ));
    }
    let updates = train.steps.unwrap_or(0);
    if updates < FEW_UPDATES && train.batch > SMALL_BATCH {
        lines.push(format!(
            "{updates} updates in all: --batch {SMALL_BATCH} makes {} from the same pictures",
            updates * train.batch as u64 / SMALL_BATCH as u64
        ));
    }
    if images / classes < FEW_PER_CLASS && optim.layer_decay == 1.0 && !optim.freeze_backbone {
        lines.push(format!(
            "{} pictures per class: compare `vitrum probe`, optim.freeze_backbone=true and optim.layer_decay=0.75",
            images / classes
        ));
    }
    let augment = &recipe.augment;
    if augment.mixup > 0.0 || augment.cutmix > 0.0 || augment.randaugment.is_some() {
        lines.push("augmentation: published transfers use only crop and flip".into());
    }
    let wide = model.width.unwrap_or(0) >= WIDE;
    if wide && model.dropout == 0.0 {
        lines.push(
            "dropout: 0.1 raised L/16 on ImageNet from 84.47 to 85.05 % and lowered B/16: model.dropout=0.1; for \
             hybrids of this width also stochastic depth: model.drop_path=0.1"
                .into(),
        );
    }
    if optim.weight_decay > 0.0 {
        lines
            .push("weight decay: 0.01 is often advised; vit_jax and big_vision fine-tune without any".into());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(set: &[&str]) -> Recipe {
        let usual = ["train.steps=1000", "train.batch=512"];
        let set: Vec<String> = usual.iter().chain(set).map(ToString::to_string).collect();
        let mut recipe = Recipe::read(Some("finetune"), &set).unwrap().recipe;
        recipe.model.classes = Some(10);
        recipe
    }

    #[test]
    fn advice_follows_the_size_of_data_and_model() {
        let says = |set: &[&str], images: usize, word: &str| {
            lines(&recipe(set), images).iter().any(|line| line.contains(word))
        };
        assert!(says(&[], 3_000, "train.patience") && !says(&[], 60_000, "train.patience"));
        assert!(!says(&["train.steps=500"], 3_000, "train.patience"));
        assert!(says(&[], 100, "10 pictures per class") && !says(&[], 3_000, "per class"));
        assert!(says(&["train.steps=20"], 500, "20 updates in all: --batch 32 makes 320"));
        assert!(
            !says(&[], 500, "updates in all")
                && !says(&["train.steps=20", "train.batch=32"], 500, "updates in all")
        );
        assert!(says(&["augment.mixup=0.2"], 3_000, "augmentation") && !says(&[], 3_000, "augmentation"));
        assert!(says(&["model.width=1024"], 100, "dropout") && !says(&["model.width=768"], 100, "dropout"));
        assert!(says(&["optim.weight_decay=0.01"], 100, "weight decay") && !says(&[], 100, "weight decay"));
    }
}
