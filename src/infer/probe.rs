//! Measures a model's features without training it: ridge regression, few-shot, nearest neighbours.

use rayon::prelude::*;
use serde::Serialize;

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::rng::{Domain, Permutation};

use super::loaded::LoadedModel;
use super::pass::Output;
use super::protocol::Protocol;
use super::ridge::{Problem, Samples};

/// The features of a data set, in one pass. Skips pictures that cannot be decoded. Labels are the data set's
/// own.
pub fn features(model: &mut LoadedModel, data: &Dataset, protocol: Protocol) -> Result<Samples> {
    features_of(model, data, protocol, |_| ())
}

/// The same; `see` is given the number of each record that has features.
pub fn features_of(
    model: &mut LoadedModel,
    data: &Dataset,
    protocol: Protocol,
    mut see: impl FnMut(usize),
) -> Result<Samples> {
    let width = model.row_len(Output::Features);
    let mut samples = Samples { width, features: Vec::with_capacity(data.len() * width), labels: Vec::new() };
    model.pass(data, protocol, Output::Features, |record, row| {
        samples.features.extend_from_slice(row);
        samples.labels.push(data.label(record));
        see(record);
    })?;
    if samples.is_empty() {
        return Err(Error::new(format!("{}: no picture can be decoded", data.name())));
    }
    Ok(samples)
}

/// Validation accuracy under one penalty.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RidgeScore {
    /// The penalty λ on the squared weights.
    pub l2: f64,
    /// Accuracy on the tenth of the training pictures that was held out to choose the penalty. `None` if
    /// there was only one penalty.
    pub held_out: Option<f64>,
    /// Accuracy on the validation pictures, in [0, 1].
    pub top1: f64,
}

/// A linear classifier for each penalty. A held-out tenth of the training pictures decides which penalty is
/// best; the scored solutions use all training pictures.
pub fn ridge(train: &Samples, val: &Samples, classes: usize, penalties: &[f64]) -> Result<Vec<RidgeScore>> {
    let held_out = match penalties {
        [_] => vec![None],
        _ => {
            let order = Permutation::new(train.len(), 0, Domain::Split, u64::MAX);
            let shuffled: Vec<usize> = (0..train.len()).map(|i| order.at(i)).collect();
            let (tenth, rest) = shuffled.split_at((train.len() / 10).max(1));
            let (tenth, rest) = (train.choose(tenth), Problem::new(&train.choose(rest), classes));
            let score = |l2: &f64| Ok(Some(rest.solve(*l2)?.accuracy(&tenth)));
            penalties.iter().map(score).collect::<Result<Vec<_>>>()?
        }
    };
    let whole = Problem::new(train, classes);
    let score = |(l2, held_out): (&f64, Option<f64>)| {
        Ok(RidgeScore { l2: *l2, held_out, top1: whole.solve(*l2)?.accuracy(val) })
    };
    penalties.iter().zip(held_out).map(score).collect()
}

/// The score with the best held-out accuracy. The larger penalty wins ties.
pub fn chosen(scores: &[RidgeScore]) -> &RidgeScore {
    let better = |a: &RidgeScore, b: &RidgeScore| match a.held_out.partial_cmp(&b.held_out) {
        Some(order) if order.is_ne() => order,
        _ => a.l2.total_cmp(&b.l2),
    };
    scores.iter().max_by(|a, b| better(a, b)).expect("there is at least one penalty")
}

/// Few-shot accuracy: `top1[seed]` from `shots` pictures per class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FewshotScore {
    /// Training pictures per class.
    pub shots: usize,
    /// Accuracy on the validation pictures, in [0, 1], for each seed.
    pub top1: Vec<f64>,
}

impl FewshotScore {
    /// Mean accuracy over the seeds.
    pub fn mean(&self) -> f64 {
        self.top1.iter().sum::<f64>() / self.top1.len() as f64
    }
}

/// big_vision's few-shot evaluator: ridge regression on the first `shots` pictures of each class, in an order
/// that depends on the seed. The order differs from big_vision's, which comes from NumPy.
pub fn fewshot(
    train: &Samples,
    val: &Samples,
    classes: usize,
    shots: &[usize],
    seeds: u64,
    l2: f64,
) -> Result<Vec<FewshotScore>> {
    let mut of_class = vec![Vec::new(); classes];
    train.labels.iter().enumerate().for_each(|(i, label)| of_class[*label].push(i));
    let score = |shots: usize, seed: u64| {
        let first = |(class, members): (usize, &Vec<usize>)| {
            let order = Permutation::new(members.len().max(1), seed, Domain::Split, class as u64);
            (0..shots.min(members.len())).map(|i| members[order.at(i)]).collect::<Vec<_>>()
        };
        let picked: Vec<usize> = of_class.iter().enumerate().flat_map(first).collect();
        Ok(Problem::new(&train.choose(&picked), classes).solve(l2)?.accuracy(val))
    };
    let of_shots = |shots: &usize| {
        let top1 = (0..seeds).map(|seed| score(*shots, seed)).collect::<Result<_>>()?;
        Ok(FewshotScore { shots: *shots, top1 })
    };
    shots.iter().map(of_shots).collect()
}

/// DINO's temperature (Caron et al. 2021, arXiv:2104.14294).
const TEMPERATURE: f32 = 0.07;

/// DINO's evaluation: the k nearest training pictures by cosine similarity of their features vote for their
/// classes with weight exp(cosine / 0.07). Returns the accuracy on `val`.
pub fn knn(train: &Samples, val: &Samples, classes: usize, k: usize) -> f64 {
    let (train_rows, val_rows) = (normalised(train), normalised(val));
    let width = train.width;
    let k = k.min(train.len());
    let predict = |row: &[f32]| {
        let mut near: Vec<(f32, usize)> = train_rows
            .chunks_exact(width)
            .zip(&train.labels)
            .map(|(other, label)| (dot(row, other), *label))
            .collect();
        // Sort the k neighbours, so that rounding does not depend on their order.
        near.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0));
        near.truncate(k);
        near.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut votes = vec![0.0f64; classes];
        near.iter().for_each(|(cosine, label)| votes[*label] += f64::from(cosine / TEMPERATURE).exp());
        let best = votes.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
        best.map_or(0, |(class, _)| class)
    };
    let right = |(row, label): &(&[f32], &usize)| predict(row) == **label;
    let rows: Vec<(&[f32], &usize)> = val_rows.chunks_exact(width).zip(&val.labels).collect();
    rows.par_iter().filter(|pair| right(pair)).count() as f64 / val.len().max(1) as f64
}

/// The rows, scaled to length one.
fn normalised(samples: &Samples) -> Vec<f32> {
    let unit = |i: usize| {
        let row = samples.row(i);
        let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
        row.iter().map(move |x| (f64::from(*x) / norm) as f32)
    };
    (0..samples.len()).flat_map(unit).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        sums.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (x, y))| *sum += x * y);
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// Classes around the corners of a cube, less far apart than they are wide.
    fn cloud(seed: u64, n: usize) -> Samples {
        let mut s = Stream::new(seed, Domain::Init, 0, 0);
        let labels: Vec<usize> = (0..n).map(|i| i % 3).collect();
        let features =
            (0..n * 6).map(|i| (s.normal() + if i % 6 == labels[i / 6] { 3.0 } else { 0.0 }) as f32);
        Samples { width: 6, features: features.collect(), labels }
    }

    #[test]
    fn every_method_tells_clouds_apart_and_more_pictures_help() {
        let (train, val) = (cloud(1, 600), cloud(2, 300));
        let ridge = ridge(&train, &val, 3, &[1e-2, 1.0, 1e2, 1e9]).unwrap();
        let best = chosen(&ridge);
        assert!(best.top1 > 0.9 && best.l2 < 1e9, "{ridge:?}");
        assert!(knn(&train, &val, 3, 20) > 0.85);
        let shots = fewshot(&train, &val, 3, &[1, 25], 3, 1024.0).unwrap();
        assert_eq!((shots[0].top1.len(), shots[1].shots), (3, 25));
        assert!(shots[1].mean() > shots[0].mean() && shots[1].mean() > 0.8, "{shots:?}");
        assert_ne!(shots[0].top1[0], shots[0].top1[1], "seeds choose other pictures");
        assert_eq!(shots, fewshot(&train, &val, 3, &[1, 25], 3, 1024.0).unwrap());
    }

    #[test]
    fn neighbours_vote_by_their_cosine() {
        let train = Samples { width: 2, features: vec![1.0, 0.0, 0.0, 2.0, 0.1, 3.0], labels: vec![0, 1, 1] };
        let val = Samples { width: 2, features: vec![5.0, 0.1, 0.0, 1.0], labels: vec![0, 1] };
        // One near neighbour outweighs two far ones.
        assert_eq!(knn(&train, &val, 2, 3), 1.0);
        assert_eq!(knn(&train, &val, 2, 100), 1.0, "more neighbours than pictures");
    }

    #[test]
    fn a_single_penalty_needs_no_held_out_pictures() {
        let (train, val) = (cloud(1, 60), cloud(2, 30));
        let scores = ridge(&train, &val, 3, &[1.0]).unwrap();
        assert_eq!((scores.len(), scores[0].held_out), (1, None));
        assert_eq!(chosen(&scores).l2, 1.0);
    }
}
