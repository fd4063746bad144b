//! Computes the weights of `loss.class_weights` from the training data.

use crate::backend::LossKind;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::recipe::{ClassWeights, Recipe};

/// C weights in the order of the classes of `train`, the records that the run trains on. `None`: no weights
/// are set.
pub fn of(recipe: &Recipe, train: &Dataset) -> Option<Vec<f32>> {
    match &recipe.loss.class_weights {
        ClassWeights::Balanced => Some(balanced(recipe.loss.kind, &train.class_counts(), train.len())),
        _ => given(recipe),
    }
}

/// The recipe's list of weights, if it has one, for callers without records to count.
pub fn of_list(recipe: &Recipe) -> Result<Option<Vec<f32>>> {
    if recipe.loss.class_weights == ClassWeights::Balanced {
        return Err(Error::usage(
            "`loss.class_weights = \"balanced\"` counts the training records, but this command has none",
        )
        .hint("give the weights as numbers, such as `--set loss.class_weights=[1,2,0.5]`"));
    }
    Ok(given(recipe))
}

fn given(recipe: &Recipe) -> Option<Vec<f32>> {
    match &recipe.loss.class_weights {
        ClassWeights::Given(weights) => Some(weights.iter().map(|w| *w as f32).collect()),
        ClassWeights::None | ClassWeights::Balanced => None,
    }
}

/// Weights of classes with `counts` records each, out of `records` in total.
///
/// Softmax: N/(K·n), where K is the number of classes with records, as in scikit-learn's
/// `compute_class_weight("balanced")`. The mean weight over all records is 1. Sigmoid: (N-n)/n, as PyTorch
/// advises for `pos_weight`: records with a class and records without it get equal total weight. If either
/// kind is missing, the weight is 1.
fn balanced(kind: LossKind, counts: &[usize], records: usize) -> Vec<f32> {
    let present = counts.iter().filter(|n| **n > 0).count();
    let of = |n: usize| match kind {
        _ if n == 0 => 1.0,
        LossKind::Softmax => records as f64 / (present as f64 * n as f64),
        LossKind::Sigmoid if n >= records => 1.0,
        LossKind::Sigmoid => (records - n) as f64 / n as f64,
    };
    counts.iter().map(|n| of(*n) as f32).collect()
}

/// A line for the header: the smallest and the largest weight, with their classes.
pub fn line(weights: &[f32], classes: &[String]) -> String {
    let by = |a: &usize, b: &usize| weights[*a].total_cmp(&weights[*b]);
    // The first class wins ties.
    let least = (0..weights.len()).min_by(by);
    let most = (0..weights.len()).rev().max_by(by);
    let shown = |class: Option<usize>| {
        class.map_or("none".into(), |c| format!("{} (`{}`)", rounded(weights[c]), classes[c]))
    };
    format!("loss     class weights from {} to {}; evaluations do not use them", shown(least), shown(most))
}

/// Formats a weight with three digits.
fn rounded(weight: f32) -> String {
    match weight {
        0.01..100.0 => format!("{weight:.3}").trim_end_matches('0').trim_end_matches('.').into(),
        100.0..1e6 => format!("{weight:.0}"),
        _ => format!("{weight:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balanced_weights_are_those_of_scikit_learn_and_pytorch() {
        // compute_class_weight("balanced", classes=[0, 1, 3], y=[0]*6 + [1]*3 + [3]) is [10/18, 10/9, 10/3].
        let counts = [6, 3, 0, 1];
        assert_eq!(
            balanced(LossKind::Softmax, &counts, 10),
            [10.0 / 18.0, 10.0 / 9.0, 1.0, 10.0 / 3.0].map(|w: f64| w as f32)
        );
        let mean: f32 =
            balanced(LossKind::Softmax, &counts, 10).iter().zip(counts).map(|(w, n)| w * n as f32).sum();
        assert!((mean / 10.0 - 1.0).abs() < 1e-6);
        // Samples have several classes, or all of them.
        let several = balanced(LossKind::Sigmoid, &[6, 3, 0, 10], 10);
        assert_eq!(several, [4.0 / 6.0, 7.0 / 3.0, 1.0, 1.0].map(|w: f64| w as f32));
    }

    #[test]
    fn the_header_names_the_least_and_the_largest_weight() {
        let classes = ["ant", "bee", "cat"].map(String::from);
        let line = line(&[2.0, 0.5, 1234.4], &classes);
        assert!(line.contains("from 0.5 (`bee`) to 1234 (`cat`)"), "{line}");
    }
}
