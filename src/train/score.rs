//! What a model's logits are worth: loss, top-1, top-5, accuracy per class; with one label per picture or with lists of
//! them.
//!
//! A list may hold several classes: a picture counts as right if the likeliest class is any of them. A picture with an
//! empty list counts for nothing (Beyer et al. 2020, "Are we done with ImageNet?", arXiv:2006.07159).

use std::path::Path;

use serde_json::{Value, json};

use crate::data::{Dataset, imagenet};
use crate::error::{At, Error, Result};
use crate::{fail, files};

/// The true classes of every picture, in the model's numbering.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth(Vec<Vec<usize>>);

impl Truth {
    /// The data set's own labels, matched to a model of `classes` classes: by name where it has names, as ImageNet
    /// where both speak of that, else by number.
    pub fn of(data: &Dataset, classes: usize, names: Option<&[String]>) -> Result<Truth> {
        let number = numbering(data, classes, names)?;
        Ok(Truth((0..data.len()).map(|i| data.labels(i).map(|label| number[label]).collect()).collect()))
    }

    /// Labels from a file, in place of the data set's own. Either text, a line for each picture with its classes (names
    /// or numbers, a comma or a tab between several, nothing for a picture that is to be left out), or a JSON list of
    /// numbers or of lists of numbers. The order is that of the data set; of ImageNet's validation set, that of the
    /// numbers in the pictures' names.
    pub fn read(path: &Path, data: &Dataset, classes: usize, names: Option<&[String]>) -> Result<Truth> {
        let text = files::read_text(path)?;
        let listed = if text.trim_start().starts_with('[') {
            from_json(&text, classes)
        } else {
            let line = |(i, line): (usize, &str)| {
                from_line(line, classes, names).map_err(|e| e.at(format!("line {}", i + 1)))
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
            .hint("give one line (or list) for each picture, in the order of the data set"));
        }
        Ok(Truth((0..data.len()).map(|i| listed[place(i)].clone()).collect()))
    }
}

/// The model's number of each class of the data set.
fn numbering(data: &Dataset, classes: usize, names: Option<&[String]>) -> Result<Vec<usize>> {
    let own = data.classes();
    if let (None, imagenet::CLASSES) = (names, classes)
        && let Some(numbers) = own.iter().map(|name| imagenet::class_of(name)).collect::<Option<Vec<_>>>()
    {
        return Ok(numbers);
    }
    if own.len() != classes {
        return Err(Error::new(format!("the data set has {} classes, the model {classes}", own.len()))
            .hint("evaluate on the data set that the model was trained for"));
    }
    let Some(names) = names else { return Ok((0..classes).collect()) };
    let renamed = data.clone().with_classes(names)?;
    debug_assert_eq!(renamed.classes(), names);
    Ok(own.iter().map(|name| names.iter().position(|n| n == name).unwrap_or(0)).collect())
}

fn from_line(line: &str, classes: usize, names: Option<&[String]>) -> Result<Vec<usize>> {
    let class = |word: &str| {
        let named = names.and_then(|names| names.iter().position(|name| name == word));
        let synset = || imagenet::class_of(word).filter(|_| classes == imagenet::CLASSES && names.is_none());
        let number = || word.parse::<usize>().ok().filter(|class| *class < classes);
        named.or_else(synset).or_else(number).ok_or_else(|| {
            Error::new(format!("`{word}` is no class of the model"))
                .hint(format!("give names, or numbers from 0 to {}", classes - 1))
        })
    };
    line.split([',', '\t']).map(str::trim).filter(|word| !word.is_empty()).map(class).collect()
}

fn from_json(text: &str, classes: usize) -> Result<Vec<Vec<usize>>> {
    let class = |value: &Value| match value.as_u64() {
        Some(class) if class < classes as u64 => Ok(class as usize),
        _ => Err(Error::new(format!("{value} is no class of the model, which has {classes}"))),
    };
    let value: Value = serde_json::from_str(text).at("JSON")?;
    let Value::Array(pictures) = value else { fail!("not a list") };
    let picture = |value: &Value| match value {
        Value::Array(list) => list.iter().map(class).collect(),
        one => Ok(vec![class(one)?]),
    };
    pictures.iter().map(picture).collect()
}

/// Sums over the pictures seen so far.
#[derive(Clone, Debug)]
pub struct Score {
    /// Pictures that count, and those that have no label.
    pub images: usize,
    pub unlabelled: usize,
    loss: f64,
    top1: usize,
    top5: usize,
    /// Pictures of each class, and hits among them; pictures with several labels count for their first.
    per_class: Vec<(usize, usize)>,
}

impl Score {
    pub fn new(classes: usize) -> Self {
        Self { images: 0, unlabelled: 0, loss: 0.0, top1: 0, top5: 0, per_class: vec![(0, 0); classes] }
    }

    /// Counts one picture.
    pub fn add(&mut self, truth: &Truth, picture: usize, logits: &[f32]) {
        let classes = &truth.0[picture];
        let Some(first) = classes.first() else {
            self.unlabelled += 1;
            return;
        };
        let best = largest(logits);
        let hit = classes.contains(&best[0]);
        self.images += 1;
        self.top1 += usize::from(hit);
        self.top5 += usize::from(best.iter().any(|class| classes.contains(class)));
        self.per_class[*first].0 += 1;
        self.per_class[*first].1 += usize::from(hit);
        self.loss += loss(logits, classes);
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.images.max(1) as f64
    }

    pub fn top1(&self) -> f64 {
        self.mean(self.top1 as f64)
    }

    pub fn top5(&self) -> f64 {
        self.mean(self.top5 as f64)
    }

    /// Cross-entropy with the labels, each of several having an equal share.
    pub fn loss(&self) -> f64 {
        self.mean(self.loss)
    }

    /// Pictures, and the share of hits, of every class that has pictures.
    pub fn per_class(&self) -> impl Iterator<Item = (usize, usize, f64)> {
        let seen = self.per_class.iter().enumerate().filter(|(_, (images, _))| *images > 0);
        seen.map(|(class, (images, hits))| (class, *images, *hits as f64 / *images as f64))
    }

    /// For programs; `names` are the model's classes.
    pub fn json(&self, names: Option<&[String]>) -> Value {
        let class = |(class, images, top1): (usize, usize, f64)| {
            let name = names.and_then(|names| names.get(class));
            json!({ "class": class, "name": name, "images": images, "top1": top1 })
        };
        json!({
            "images": self.images,
            "unlabelled": self.unlabelled,
            "top1": self.top1(),
            "top5": self.top5(),
            "loss": self.loss(),
            "per_class": self.per_class().map(class).collect::<Vec<_>>(),
        })
    }
}

/// The five likeliest classes, the likeliest first; of equal logits the first class counts.
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

fn loss(logits: &[f32], classes: &[usize]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|z| (f64::from(*z) - top).exp()).sum();
    let below: f64 = classes.iter().map(|class| top - f64::from(logits[*class])).sum();
    sum.ln() + below / classes.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_right_if_any_of_its_labels_is_the_likeliest() {
        let truth = Truth(vec![vec![1], vec![0, 2], vec![], vec![3]]);
        let mut score = Score::new(7);
        score.add(&truth, 0, &[0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]); // right
        score.add(&truth, 1, &[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]); // right by its second label
        score.add(&truth, 2, &[9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]); // counts for nothing
        score.add(&truth, 3, &[5.0, 4.0, 3.0, 0.0, 2.0, 1.0, 0.0]); // sixth: the first of two equals
        assert_eq!((score.images, score.unlabelled), (3, 1));
        assert_eq!((score.top1(), score.top5()), (2.0 / 3.0, 2.0 / 3.0));
        assert_eq!(score.per_class().collect::<Vec<_>>(), [(0, 1, 1.0), (1, 1, 1.0), (3, 1, 0.0)]);
    }

    #[test]
    fn the_loss_is_the_cross_entropy_with_the_share_of_each_label() {
        let logits = [1.0f32, -2.0, 0.5];
        let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        let expected = |class: usize| sum.ln() - f64::from(logits[class]);
        assert!((loss(&logits, &[1]) - expected(1)).abs() < 1e-12);
        assert!((loss(&logits, &[0, 2]) - (expected(0) + expected(2)) / 2.0).abs() < 1e-12);
        assert!(loss(&[1e4, -1e4], &[1]).is_finite());
    }

    #[test]
    fn labels_are_names_numbers_or_lists_of_them() {
        let names: Vec<String> = ["great white", "7", "tench"].map(String::from).to_vec();
        let line = |text: &str| from_line(text, 3, Some(&names));
        assert_eq!(line("great white, tench").unwrap(), [0, 2]);
        assert_eq!(line("2\t0").unwrap(), [2, 0]);
        assert_eq!(line("7").unwrap(), [1], "a name comes first");
        assert!(line("").unwrap().is_empty());
        assert!(line("3").is_err() && line("shark").is_err() && line("-1").is_err());
        assert_eq!(from_line("n01443537", 1000, None).unwrap(), [1]);
        assert_eq!(from_json("[[1, 2], [], 0]", 3).unwrap(), [vec![1, 2], vec![], vec![0]]);
        for wrong in ["[3]", "[[0.5]]", "[[-1]]", "[", "[\"a\"]"] {
            assert!(from_json(wrong, 3).is_err(), "{wrong}");
        }
    }
}
