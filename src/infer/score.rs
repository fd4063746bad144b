//! Scores of a model's logits: loss, top-1, top-5 and accuracy per class, for one label or a list of labels
//! per picture. For sigmoid models on multi-label pictures also mAP and F1.
//!
//! With a list of labels, a picture counts as right if the most probable class is any of them. A picture with
//! an empty list does not count (Beyer et al. 2020, "Are we done with ImageNet?", arXiv:2006.07159).

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Value, json};

use crate::backend::LossKind;
use crate::data::classes::{Known, Matching};
use crate::data::{Dataset, imagenet};
use crate::error::{At, Error, Result};
use crate::{fail, files};

/// The true classes of every picture, in the model's numbering.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    labels: Vec<Vec<usize>>,
    /// The data set is multi-label, so no label at all is a valid answer. False for labels from a file.
    several: bool,
    /// How the data set's classes were matched to the model's. `None` for labels from a file.
    pub matching: Option<Matching>,
}

impl Truth {
    /// The data set's own labels, matched to a model of `classes` classes: [`crate::data::classes`].
    pub fn of(data: &Dataset, classes: usize, names: Option<&[String]>) -> Result<Truth> {
        let matching = Known::new(classes, names).matching(data.classes()).map_err(|e| e.at(data.name()))?;
        let labels = |i: usize| data.labels(i).map(|label| matching.numbers[label]).collect();
        let labels = (0..data.len()).map(labels).collect();
        Ok(Truth { labels, several: data.is_multi_label(), matching: Some(matching) })
    }

    /// Labels from a file, which replace the data set's own. The file is text or JSON. Text has one line per
    /// picture with its classes: names or numbers, separated by commas or tabs; an empty line skips the
    /// picture. JSON is a list of classes, or of lists of classes; the order is that of the data set, for ImageNet's
    /// validation set that of the numbers in the pictures' names. A JSON object gives classes by pictures' names.
    pub fn read(path: &Path, data: &Dataset, classes: usize, names: Option<&[String]>) -> Result<Truth> {
        let text = files::read_text(path)?;
        let known = Known::new(classes, names);
        let labels = match text.trim_start().as_bytes().first() {
            Some(b'{') => by_name(&text, data, classes, &known).map_err(|e| e.at(path.display()))?,
            _ => Self::in_order(path, &text, data, classes, &known)?,
        };
        if labels.iter().all(Vec::is_empty) {
            return Err(Error::new(format!("{}: no picture has a label", path.display()))
                .hint("give one line (or list) with classes per picture; an empty one skips a picture"));
        }
        Ok(Truth { labels, several: false, matching: None })
    }

    /// The labels of a list, one entry per picture.
    fn in_order(
        path: &Path,
        text: &str,
        data: &Dataset,
        classes: usize,
        known: &Known,
    ) -> Result<Vec<Vec<usize>>> {
        let listed = if text.trim_start().starts_with('[') {
            from_json(text, classes, known)
        } else {
            let line = |(i, line): (usize, &str)| {
                from_line(line, classes, known).map_err(|e| e.at(format!("line {}", i + 1)))
            };
            text.lines().enumerate().map(line).collect()
        };
        let listed: Vec<Vec<usize>> = listed.map_err(|e| e.at(path.display()))?;
        let numbers: Option<Vec<usize>> =
            (0..data.len()).map(|i| imagenet::validation_number(&data.record_name(i))).collect();
        let place = |i: usize| numbers.as_ref().map_or(i, |numbers| numbers[i] - 1);
        let fits = match &numbers {
            Some(numbers) => numbers.iter().all(|number| *number <= listed.len()),
            None => listed.len() == data.len(),
        };
        if !fits {
            return Err(Error::new(format!(
                "{}: labels for {} pictures, but {} has {}",
                path.display(),
                listed.len(),
                data.name(),
                data.len()
            ))
            .hint("give one line (or list) per picture, in the order of the data set"));
        }
        Ok((0..data.len()).map(|i| listed[place(i)].clone()).collect())
    }
}

/// A class by its name, or its number.
fn class_of(word: &str, classes: usize, known: &Known) -> Result<usize> {
    let number = || word.parse::<usize>().ok().filter(|class| *class < classes);
    known.find(word).or_else(number).ok_or_else(|| {
        let error = match known.of_one_name(word) {
            Some(same) => Error::new(same),
            None => Error::new(format!("`{word}` is not a class of the model")),
        };
        error.hint(format!("give names, or numbers from 0 to {}", classes - 1))
    })
}

fn from_line(line: &str, classes: usize, known: &Known) -> Result<Vec<usize>> {
    let words = line.split([',', '\t']).map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| class_of(word, classes, known)).collect()
}

/// The classes of a picture: one, or a list of them.
fn from_value(value: &Value, classes: usize, known: &Known) -> Result<Vec<usize>> {
    let class = |value: &Value| match value {
        Value::String(word) => class_of(word.trim(), classes, known),
        value => match value.as_u64() {
            Some(class) if class < classes as u64 => Ok(class as usize),
            _ => Err(Error::new(format!("{value} is not a class of the model, which has {classes}"))
                .hint(format!("give names, or numbers from 0 to {}", classes - 1))),
        },
    };
    match value {
        Value::Array(list) => list.iter().map(class).collect(),
        one => Ok(vec![class(one)?]),
    }
}

fn from_json(text: &str, classes: usize, known: &Known) -> Result<Vec<Vec<usize>>> {
    let value: Value = serde_json::from_str(text).at("JSON")?;
    let Value::Array(pictures) = value else { fail!("not a list") };
    let picture = |(i, value): (usize, &Value)| {
        from_value(value, classes, known).map_err(|e| e.at(format!("entry {i} of the list")))
    };
    pictures.iter().enumerate().map(picture).collect()
}

/// From a JSON object: each picture by its path in the data set or, if no two pictures share it, by its file name.
fn by_name(text: &str, data: &Dataset, classes: usize, known: &Known) -> Result<Vec<Vec<usize>>> {
    let listed: serde_json::Map<String, Value> = serde_json::from_str(text).at("JSON")?;
    let file_name = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let names: Vec<String> = (0..data.len()).map(|i| data.record_name(i)).collect();
    let mut pictures: HashMap<String, usize> = HashMap::new();
    names.iter().for_each(|name| *pictures.entry(file_name(name)).or_default() += 1);
    let of = |name: &String| {
        let alone = Some(file_name(name)).filter(|file| pictures[file] == 1);
        let value = listed.get(name).or_else(|| listed.get(&alone?)).ok_or_else(|| {
            Error::new(format!("no entry for the picture `{name}`")).hint(
                "name each picture by its path in the data set, or by its file name if no two share it; an empty list \
                 skips a picture",
            )
        })?;
        from_value(value, classes, known).map_err(|e| e.at(format!("`{name}`")))
    };
    names.iter().map(of).collect()
}

/// Sums over the pictures seen so far.
#[derive(Clone, Debug)]
pub struct Score {
    kind: LossKind,
    /// Number of pictures with a label; below, the number without.
    pub images: usize,
    /// Number of pictures without a label, which do not count in the scores.
    pub unlabelled: usize,
    loss: f64,
    /// Number of pictures in `loss`.
    measured: usize,
    top1: usize,
    top5: usize,
    /// Pictures and hits of each class. A picture with several labels counts for each of them.
    per_class: Vec<(usize, usize)>,
    /// For a sigmoid model on multi-label pictures: per class, each picture's logit and whether it has the
    /// class.
    answers: Option<Vec<Vec<(f32, bool)>>>,
}

impl Score {
    /// For a model of `classes` classes that was trained with the loss `kind`.
    pub fn new(classes: usize, kind: LossKind, truth: &Truth) -> Self {
        let several = truth.several && kind == LossKind::Sigmoid;
        Self {
            kind,
            images: 0,
            unlabelled: 0,
            loss: 0.0,
            measured: 0,
            top1: 0,
            top5: 0,
            per_class: vec![(0, 0); classes],
            answers: several.then(|| vec![Vec::new(); classes]),
        }
    }

    /// Number of the model's classes.
    pub fn classes(&self) -> usize {
        self.per_class.len()
    }

    /// Counts one picture.
    pub fn add(&mut self, truth: &Truth, picture: usize, logits: &[f32]) {
        let classes = &truth.labels[picture];
        for (class, answers) in self.answers.iter_mut().flatten().enumerate() {
            answers.push((logits[class], classes.contains(&class)));
        }
        if !classes.is_empty() || self.answers.is_some() {
            self.measured += 1;
            self.loss += match self.kind {
                LossKind::Softmax => softmax_loss(logits, classes),
                LossKind::Sigmoid => sigmoid_loss(logits, classes),
            };
        }
        if classes.is_empty() {
            self.unlabelled += 1;
            return;
        }
        let best = largest(logits);
        let hit = classes.contains(&best[0]);
        self.images += 1;
        self.top1 += usize::from(hit);
        self.top5 += usize::from(best.iter().any(|class| classes.contains(class)));
        // A label that a file lists twice is one.
        for class in classes.iter().collect::<BTreeSet<_>>() {
            self.per_class[*class].0 += 1;
            self.per_class[*class].1 += usize::from(hit);
        }
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.images.max(1) as f64
    }

    /// Share of labelled pictures whose best class is a true one.
    pub fn top1(&self) -> f64 {
        self.mean(self.top1 as f64)
    }

    /// Share of labelled pictures with a true class among the best five.
    pub fn top5(&self) -> f64 {
        self.mean(self.top5 as f64)
    }

    /// The mean loss. Softmax: cross-entropy; several labels have equal shares. Sigmoid: binary
    /// cross-entropy, summed over classes.
    pub fn loss(&self) -> f64 {
        self.loss / self.measured.max(1) as f64
    }

    /// Scores for a sigmoid model on multi-label pictures: the average precision, averaged over the classes
    /// that occur, and F1 over all answers, which are yes from a probability of `threshold`.
    pub fn several(&self, threshold: f64) -> Option<Several> {
        let answers = self.answers.as_ref()?;
        let precisions: Vec<f64> = answers.iter().filter_map(|of| average_precision(of.clone())).collect();
        let (mut hits, mut wrong, mut missed) = (0usize, 0usize, 0usize);
        for (logit, has) in answers.iter().flatten() {
            let yes = 1.0 / (1.0 + f64::from(-logit).exp()) >= threshold;
            hits += usize::from(yes && *has);
            wrong += usize::from(yes && !has);
            missed += usize::from(!yes && *has);
        }
        Some(Several {
            map: precisions.iter().sum::<f64>() / precisions.len().max(1) as f64,
            f1: 2.0 * hits as f64 / (2 * hits + wrong + missed).max(1) as f64,
            threshold,
        })
    }

    /// Every class that has pictures.
    pub fn per_class(&self) -> impl Iterator<Item = OfClass> {
        let seen = self.per_class.iter().enumerate().filter(|(_, (images, _))| *images > 0);
        seen.map(|(class, (images, hits))| OfClass {
            class,
            images: *images,
            top1: *hits as f64 / *images as f64,
            ap: self.answers.as_ref().and_then(|answers| average_precision(answers[class].clone())),
        })
    }

    /// The scores as JSON; `names` are the model's classes.
    pub fn json(&self, names: Option<&[String]>) -> Value {
        let class = |of: OfClass| {
            let name = names.and_then(|names| names.get(of.class));
            let mut out = json!({ "class": of.class, "name": name, "images": of.images, "top1": of.top1 });
            if let Some(ap) = of.ap {
                out["AP"] = ap.into();
            }
            out
        };
        json!({
            "images": self.images,
            "unlabelled": self.unlabelled,
            "top1": self.top1(),
            "top5": self.top5(),
            "loss": self.loss(),
            "loss_kind": self.kind,
            "per_class": self.per_class().map(class).collect::<Vec<_>>(),
        })
    }
}

/// The five most probable classes, the most probable first. The first class wins ties.
fn largest(logits: &[f32]) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(6);
    for (class, z) in logits.iter().enumerate() {
        let place = best.iter().position(|other| *z > logits[*other]).unwrap_or(best.len());
        if place < 5 {
            best.insert(place, class);
            best.truncate(5);
        }
    }
    best
}

/// One class's share of a score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OfClass {
    /// Number of the class, from 0.
    pub class: usize,
    /// Pictures that have it, perhaps among others.
    pub images: usize,
    /// The share of them for which the most probable class is any of the picture's.
    pub top1: f64,
    /// The class's average precision, where [`Score::several`] gives the mean.
    pub ap: Option<f64>,
}

/// Scores for multi-label pictures; see [`Score::several`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Several {
    /// Mean of the classes' average precisions.
    #[serde(rename = "mAP")]
    pub map: f64,
    /// F1 over all answers.
    pub f1: f64,
    /// The least probability of a yes.
    pub threshold: f64,
}

/// The average precision of one class: the mean, over the pictures that have it, of the precision at the
/// picture's logit. Equal logits count as one step. `None` if no picture has the class.
pub(crate) fn average_precision(mut answers: Vec<(f32, bool)>) -> Option<f64> {
    answers.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut seen, mut hits, mut sum) = (0usize, 0usize, 0.0);
    for equals in answers.chunk_by(|a, b| a.0 == b.0) {
        let new = equals.iter().filter(|(_, has)| *has).count();
        seen += equals.len();
        hits += new;
        sum += new as f64 * hits as f64 / seen as f64;
    }
    (hits > 0).then(|| sum / hits as f64)
}

fn sigmoid_loss(logits: &[f32], classes: &[usize]) -> f64 {
    let softplus = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
    let all: f64 = logits.iter().map(|z| softplus(f64::from(*z))).sum();
    all - classes.iter().map(|class| f64::from(logits[*class])).sum::<f64>()
}

fn softmax_loss(logits: &[f32], classes: &[usize]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|z| (f64::from(*z) - top).exp()).sum();
    let below: f64 = classes.iter().map(|class| top - f64::from(logits[*class])).sum();
    sum.ln() + below / classes.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(labels: Vec<Vec<usize>>, several: bool) -> Truth {
        Truth { labels, several, matching: None }
    }

    #[test]
    fn a_sigmoid_model_is_measured_by_its_own_loss_and_class_by_class() {
        let truth = truth(vec![vec![0, 1], vec![1], vec![], vec![0]], true);
        let mut score = Score::new(3, LossKind::Sigmoid, &truth);
        let logits = [[2.0f32, 1.0, -1.0], [0.5, 3.0, -2.0], [1.0, -1.0, -3.0], [-0.5, -2.0, -1.0]];
        (0..4).for_each(|i| score.add(&truth, i, &logits[i]));
        let bce = |z: f32, y: f64| (1.0 + f64::from(z).exp()).ln() - y * f64::from(z);
        let y = |i: usize, c: usize| f64::from(u8::from(truth.labels[i].contains(&c)));
        let expected: f64 =
            (0..4).flat_map(|i| (0..3).map(move |c| (i, c))).map(|(i, c)| bce(logits[i][c], y(i, c))).sum();
        assert!((score.loss() - expected / 4.0).abs() < 1e-9);
        assert_eq!((score.images, score.unlabelled), (3, 1));
        // Class 0: positives at ranks 1 and 4 of 2, 1, 0.5, -0.5; class 1 is perfect; class 2 has no picture.
        // Yes: 2, 0.5 and 1 of class 0, 1 and 3 of class 1: three hits, two wrong, one missed.
        let several = score.several(0.5).unwrap();
        assert_eq!((several.map, several.f1), ((0.75 + 1.0) / 2.0, 6.0 / 9.0));
        // The first picture counts for both of its classes.
        let per_class: Vec<_> = score.per_class().map(|of| (of.class, of.images, of.top1, of.ap)).collect();
        assert_eq!(per_class, [(0, 2, 1.0, Some(0.75)), (1, 2, 1.0, Some(1.0))]);
        // Equal logits say nothing: the share of positives.
        assert_eq!(average_precision(vec![(1.0, true), (1.0, false), (1.0, false), (1.0, true)]), Some(0.5));
        assert_eq!(Score::new(3, LossKind::Softmax, &truth).several(0.5), None);
    }

    #[test]
    fn a_picture_is_right_if_any_of_its_labels_is_the_likeliest() {
        let truth = truth(vec![vec![1], vec![0, 2], vec![], vec![3]], false);
        let mut score = Score::new(7, LossKind::Softmax, &truth);
        score.add(&truth, 0, &[0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]); // right
        score.add(&truth, 1, &[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]); // right by its second label
        score.add(&truth, 2, &[9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]); // counts for nothing
        score.add(&truth, 3, &[5.0, 4.0, 3.0, 0.0, 2.0, 1.0, 0.0]); // sixth: the first of two equals
        assert_eq!((score.images, score.unlabelled), (3, 1));
        assert_eq!((score.top1(), score.top5()), (2.0 / 3.0, 2.0 / 3.0));
        let per_class: Vec<_> = score.per_class().map(|of| (of.class, of.images, of.top1)).collect();
        assert_eq!(per_class, [(0, 1, 1.0), (1, 1, 1.0), (2, 1, 1.0), (3, 1, 0.0)]);
    }

    #[test]
    fn the_loss_is_the_cross_entropy_with_the_share_of_each_label() {
        let logits = [1.0f32, -2.0, 0.5];
        let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        let expected = |class: usize| sum.ln() - f64::from(logits[class]);
        assert!((softmax_loss(&logits, &[1]) - expected(1)).abs() < 1e-12);
        assert!((softmax_loss(&logits, &[0, 2]) - (expected(0) + expected(2)) / 2.0).abs() < 1e-12);
        assert!(softmax_loss(&[1e4, -1e4], &[1]).is_finite());
    }

    #[test]
    fn labels_are_names_numbers_or_lists_of_them() {
        let names: Vec<String> = ["great white", "7", "tench"].map(String::from).to_vec();
        let known = Known::new(3, Some(&names));
        let line = |text: &str| from_line(text, 3, &known);
        assert_eq!(line("great white, tench").unwrap(), [0, 2]);
        assert_eq!(line("2\t0").unwrap(), [2, 0]);
        assert_eq!(line("7").unwrap(), [1], "a name comes first");
        assert!(line("").unwrap().is_empty());
        assert!(line("3").is_err() && line("shark").is_err() && line("-1").is_err());
        assert_eq!(from_line("n01443537, tench", 1000, &Known::new(1000, None)).unwrap(), [1, 0]);
        let json = |text: &str| from_json(text, 3, &known);
        assert_eq!(json("[[1, 2], [], 0]").unwrap(), [vec![1, 2], vec![], vec![0]]);
        assert_eq!(
            json("[\"tench\", [\"Great_White\", \"7\"], \"2\"]").unwrap(),
            [vec![2], vec![0, 1], vec![2]]
        );
        for wrong in ["[3]", "[[0.5]]", "[[-1]]", "[", "[\"a\"]", "[null]"] {
            assert!(json(wrong).is_err(), "{wrong}");
        }
    }
}
