//! Least squares with an l2 penalty, solved in closed form: the linear classifier of big_vision's few-shot
//! evaluator.
//!
//! Features are standardised by their mean and (population) deviation + 1e-5. A constant column of 100 is the
//! bias; it is so large that the penalty hardly affects it. Targets are 1 for the true class and -1 for the
//! others. Then `W = (XᵀX + l2·I)⁻¹ Xᵀ Y`, or the equal `Xᵀ(XXᵀ + l2·I)⁻¹ Y` if there are fewer pictures than
//! features. big_vision uses an eigendecomposition in f32; this is a Cholesky factorisation in f64 of the
//! same system.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// The value of the bias column.
const BIAS: f64 = 100.0;

/// Pictures as rows of features, with their classes.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Features per picture.
    pub width: usize,
    /// `[N, width]`
    pub features: Vec<f32>,
    /// `[N]`: the class of each picture.
    pub labels: Vec<usize>,
}

impl Samples {
    /// N
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no picture.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The features of one picture.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.features[index * self.width..][..self.width]
    }

    /// Some of the samples, in the order given.
    pub fn choose(&self, indices: &[usize]) -> Samples {
        Samples {
            width: self.width,
            features: indices.iter().flat_map(|i| self.row(*i)).copied().collect(),
            labels: indices.iter().map(|i| self.labels[*i]).collect(),
        }
    }
}

/// The parts of a problem that do not depend on the penalty.
pub struct Problem {
    mean: Vec<f64>,
    /// Includes the 1e-5.
    deviation: Vec<f64>,
    /// `[N, width + 1]`, standardised, the bias last.
    x: Vec<f64>,
    labels: Vec<usize>,
    classes: usize,
    /// `XᵀX` or `XXᵀ`, whichever is smaller. Only the lower triangle is used.
    gram: Vec<f64>,
}

/// A linear classifier over standardised features.
pub struct Classifier {
    mean: Vec<f64>,
    deviation: Vec<f64>,
    /// `[C, width + 1]`
    weights: Vec<f64>,
}

impl Problem {
    /// Standardises the features and computes the Gram matrix, for labels below `classes`.
    pub fn new(samples: &Samples, classes: usize) -> Problem {
        let (n, width) = (samples.len(), samples.width);
        let mut mean = vec![0.0; width];
        for i in 0..n {
            mean.iter_mut().zip(samples.row(i)).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        mean.iter_mut().for_each(|sum| *sum /= n as f64);
        let mut deviation = vec![0.0; width];
        for i in 0..n {
            for ((sum, x), mean) in deviation.iter_mut().zip(samples.row(i)).zip(&mean) {
                *sum += (f64::from(*x) - mean).powi(2);
            }
        }
        deviation.iter_mut().for_each(|sum| *sum = (*sum / n as f64).sqrt() + 1e-5);
        let x: Vec<f64> = (0..n).flat_map(|i| standardised(samples.row(i), &mean, &deviation)).collect();
        let d = width + 1;
        let gram = if n >= d { gram(&transposed(&x, n, d), d, n) } else { gram(&x, n, d) };
        Problem { mean, deviation, x, labels: samples.labels.clone(), classes, gram }
    }

    /// The least-squares solution under a penalty `l2` > 0.
    pub fn solve(&self, l2: f64) -> Result<Classifier> {
        let (n, d) = (self.labels.len(), self.mean.len() + 1);
        let size = n.min(d);
        let mut factor = self.gram.clone();
        (0..size).for_each(|i| factor[i * size + i] += l2);
        if !cholesky(&mut factor, size) {
            return Err(Error::new(format!("the system of {size} equations cannot be solved with l2 {l2}"))
                .hint("give a larger penalty, such as `--l2 1024`"));
        }
        let column = |class: usize| -> Vec<f64> {
            let y = |i: usize| if self.labels[i] == class { 1.0 } else { -1.0 };
            if n >= d {
                let mut right = vec![0.0; d];
                (0..n).for_each(|i| add_scaled(&mut right, y(i), &self.x[i * d..][..d]));
                substitute(&factor, size, &mut right);
                return right;
            }
            let mut dual: Vec<f64> = (0..n).map(y).collect();
            substitute(&factor, size, &mut dual);
            let mut weights = vec![0.0; d];
            (0..n).for_each(|i| add_scaled(&mut weights, dual[i], &self.x[i * d..][..d]));
            weights
        };
        let weights = (0..self.classes).into_par_iter().flat_map_iter(column).collect();
        Ok(Classifier { mean: self.mean.clone(), deviation: self.deviation.clone(), weights })
    }
}

impl Classifier {
    /// The class with the largest output. The first class wins ties.
    pub fn predict(&self, row: &[f32]) -> usize {
        let x = standardised(row, &self.mean, &self.deviation);
        let outputs = self.weights.chunks_exact(x.len()).map(|weights| dot(weights, &x));
        let best = outputs.enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
        best.map_or(0, |(class, _)| class)
    }

    /// The share of samples whose class is predicted correctly.
    pub fn accuracy(&self, samples: &Samples) -> f64 {
        let right = |i: &usize| self.predict(samples.row(*i)) == samples.labels[*i];
        (0..samples.len()).into_par_iter().filter(right).count() as f64 / samples.len().max(1) as f64
    }
}

fn standardised(row: &[f32], mean: &[f64], deviation: &[f64]) -> Vec<f64> {
    let standard = row.iter().zip(mean).zip(deviation).map(|((x, m), s)| (f64::from(*x) - m) / s);
    standard.chain([BIAS]).collect()
}

fn transposed(x: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; x.len()];
    for (i, row) in x.chunks_exact(cols).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| out[j * rows + i] = *value);
    }
    out
}

/// The lower triangle of `A·Aᵀ` for `A` of `[rows, cols]`. Works on chunks of columns that stay in cache.
fn gram(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    const CHUNK: usize = 2048;
    let mut out = vec![0.0; rows * rows];
    out.par_chunks_exact_mut(rows).enumerate().for_each(|(i, out)| {
        for start in (0..cols).step_by(CHUNK) {
            let end = (start + CHUNK).min(cols);
            let part = |row: usize| &a[row * cols + start..row * cols + end];
            (0..=i).for_each(|j| out[j] += dot(part(i), part(j)));
        }
    });
    out
}

/// Eight partial sums, added in a fixed order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        sums.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (x, y))| *sum += x * y);
    }
    sums.iter().sum::<f64>() + rest
}

fn add_scaled(to: &mut [f64], factor: f64, values: &[f64]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += factor * value);
}

/// Factors a symmetric `[size, size]` matrix in place into L·Lᵀ; the lower triangle becomes L. Returns false
/// if it is not positive definite.
fn cholesky(a: &mut [f64], size: usize) -> bool {
    for j in 0..size {
        let (above, below) = a.split_at_mut((j + 1) * size);
        let row = &mut above[j * size..];
        let pivot = row[j] - dot(&row[..j], &row[..j]);
        if pivot <= 0.0 || !pivot.is_finite() {
            return false;
        }
        let root = pivot.sqrt();
        row[j] = root;
        let row = &*row;
        below.par_chunks_exact_mut(size).for_each(|other| {
            other[j] = (other[j] - dot(&other[..j], &row[..j])) / root;
        });
    }
    true
}

/// Solves L·Lᵀ·x = b in place.
fn substitute(l: &[f64], size: usize, b: &mut [f64]) {
    for i in 0..size {
        b[i] = (b[i] - dot(&l[i * size..][..i], &b[..i])) / l[i * size + i];
    }
    for i in (0..size).rev() {
        let x = b[i] / l[i * size + i];
        b[i] = x;
        b[..i].iter_mut().zip(&l[i * size..][..i]).for_each(|(b, l)| *b -= x * l);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Domain, Stream};

    fn samples(n: usize, width: usize, classes: usize) -> Samples {
        let mut s = Stream::new(3, Domain::Init, n as u64, width as u64);
        let labels: Vec<usize> = (0..n).map(|i| i % classes).collect();
        let features = (0..n * width)
            .map(|i| {
                let shift = if i % width == labels[i / width] { 2.0 } else { 0.0 };
                (s.normal() * (1.0 + (i % width) as f64) + shift) as f32
            })
            .collect();
        Samples { width, features, labels }
    }

    /// Both forms of the solution have a vanishing gradient: `Xᵀ(XW - Y) + l2·W = 0`.
    #[test]
    fn the_solution_is_where_the_penalised_error_is_least() {
        for (n, width) in [(40, 7), (9, 20), (21, 20), (20, 20)] {
            let samples = samples(n, width, 3);
            let problem = Problem::new(&samples, 3);
            for l2 in [1e-3, 1.0, 1024.0] {
                let solved = problem.solve(l2).unwrap();
                let d = width + 1;
                for class in 0..3 {
                    let w = &solved.weights[class * d..][..d];
                    let mut gradient: Vec<f64> = w.iter().map(|w| l2 * w).collect();
                    let mut scale = 1.0f64;
                    for i in 0..n {
                        let x = &problem.x[i * d..][..d];
                        let y = if samples.labels[i] == class { 1.0 } else { -1.0 };
                        add_scaled(&mut gradient, dot(w, x) - y, x);
                        scale = scale.max(dot(x, x));
                    }
                    let worst = gradient.iter().fold(0.0f64, |worst, g| worst.max(g.abs()));
                    // The conditioning of the system, in f64.
                    assert!(worst < 1e-12 * scale * n as f64, "{n} x {width}, l2 {l2}: {worst}");
                }
            }
        }
    }

    #[test]
    fn features_are_standardised_and_the_bias_is_a_hundred() {
        let samples = Samples { width: 2, features: vec![1.0, 5.0, 3.0, 5.0], labels: vec![0, 1] };
        let problem = Problem::new(&samples, 2);
        assert_eq!(problem.mean, [2.0, 5.0]);
        assert_eq!(problem.deviation, [1.0 + 1e-5, 1e-5]);
        let z = 1.0 / (1.0 + 1e-5);
        assert_eq!(problem.x, [-z, 0.0, 100.0, z, 0.0, 100.0]);
    }

    #[test]
    fn classes_that_lie_apart_are_told_apart() {
        let mut far = samples(60, 5, 3);
        (0..60).for_each(|i| far.features[i * 5 + far.labels[i]] += 100.0);
        let classifier = Problem::new(&far, 3).solve(1.0).unwrap();
        assert_eq!(classifier.accuracy(&far), 1.0);
        let few = far.choose(&[0, 1, 2]);
        assert_eq!(few.labels, [0, 1, 2]);
        assert_eq!(Problem::new(&few, 3).solve(1024.0).unwrap().accuracy(&few), 1.0);
    }
}
