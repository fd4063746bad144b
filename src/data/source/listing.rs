//! Turns records with labels as words into numbered classes and splits, for every kind of source.

use std::collections::HashMap;

use crate::data::split::Split;
use crate::error::Result;

use super::strays::{count, named};
use super::{Item, Parts, Source, Store};

/// How the words of labels are interpreted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Labels {
    /// Class names. If all are whole numbers, they are sorted as numbers.
    Names,
    /// Class names; or class indices, if all are whole numbers that start at 0 and skip no more numbers than
    /// they use.
    NamesOrIndices,
    /// Class names in the given order.
    Given,
}

/// Records as a source lists them: an item's labels are indices into a list of words.
#[derive(Debug, Default)]
pub(super) struct Listing {
    words: Vec<String>,
    places: HashMap<String, usize>,
    records: Vec<(Option<Split>, Item)>,
    /// Whether samples may have several labels, or none.
    pub(super) several: bool,
    /// Sentences about what was left out or decided.
    pub(super) notes: Vec<String>,
}

impl Listing {
    pub(super) fn new(several: bool) -> Self {
        Self { several, ..Self::default() }
    }

    /// The label for a word.
    pub(super) fn label(&mut self, word: &str) -> usize {
        if let Some(place) = self.places.get(word) {
            return *place;
        }
        self.words.push(word.to_owned());
        self.places.insert(word.to_owned(), self.words.len() - 1);
        self.words.len() - 1
    }

    /// Adds a class of this name; two classes may share a name, for [`Labels::Given`].
    pub(super) fn give(&mut self, name: String) {
        self.words.push(name);
    }

    pub(super) fn push(&mut self, split: Option<Split>, item: Item) {
        self.records.push((split, item));
    }

    /// Adds a note on `names`, if there are any.
    pub(super) fn note<S: AsRef<str>>(&mut self, names: &[S], what: &str, why: &str) {
        if !names.is_empty() {
            let verb = if names.len() == 1 { "is" } else { "are" };
            let note = format!("{} {verb} left out, {why}: {}", count(names.len(), what), named(names));
            self.notes.push(note);
        }
    }

    /// The finished source. Records without a split belong to training if others have one.
    pub(super) fn finish(mut self, labels: Labels, store: Store) -> Result<Source> {
        let (classes, numbers) = self.classes(labels);
        let is_split = self.records.iter().any(|(split, _)| split.is_some());
        let mut parts = Parts { is_split, ..Parts::default() };
        let (mut seen, mut taught) = (vec![false; classes.len()], vec![false; classes.len()]);
        for (split, mut item) in std::mem::take(&mut self.records) {
            item.label = numbers.get(item.label).copied().unwrap_or(0);
            if let Some(several) = &mut item.several {
                several.iter_mut().for_each(|label| *label = numbers[*label as usize] as u32);
            }
            let split = split.unwrap_or(Split::Train);
            for label in item.labels() {
                seen[label] = true;
                taught[label] |= split == Split::Train;
            }
            parts.lists[split as usize].push(item);
        }
        let [train, val, test] = &mut parts.lists;
        if val.is_empty() && !test.is_empty() {
            *val = std::mem::take(test);
            parts.test_is_val = true;
            if !train.is_empty() {
                let records = count(val.len(), "record");
                self.notes
                    .push(format!("no validation part: the test part ({records}) is taken in its place"));
            }
        } else if !test.is_empty() {
            let (records, verb) = (count(test.len(), "record"), if test.len() == 1 { "is" } else { "are" });
            let of = "of the test part";
            let left = "left out of training and validation";
            self.notes.push(format!("{records} {of} {verb} {left}; `--split test` measures a model on it"));
        }
        let without: Vec<&String> = classes.iter().zip(&seen).filter(|(_, s)| !**s).map(|(c, _)| c).collect();
        if !without.is_empty() && without.len() < classes.len() {
            let verb = if without.len() == 1 { "has" } else { "have" };
            self.notes.push(format!(
                "{} {verb} no picture: {}",
                count(without.len(), "class"),
                named(&without)
            ));
        }
        let untaught = (0..classes.len()).filter(|class| seen[*class] && !taught[*class]);
        let untaught: Vec<&String> = untaught.map(|class| &classes[class]).collect();
        if !untaught.is_empty() && !parts.lists[Split::Train as usize].is_empty() {
            let verb = if untaught.len() == 1 { "has" } else { "have" };
            let classes = count(untaught.len(), "class");
            self.notes.push(format!("{classes} {verb} no training picture: {}", named(&untaught)));
        }
        let name = store.path().display().to_string();
        Ok(Source { classes, parts, store, name, is_multi_label: self.several, notes: self.notes })
    }

    /// The words of labels so far, in the order of classes.
    pub(super) fn sorted_words(&self) -> Vec<String> {
        self.order().into_iter().map(|place| self.words[place].clone()).collect()
    }

    /// Indices of the words, sorted: whole numbers by value, else by name.
    fn order(&self) -> Vec<usize> {
        let values: Option<Vec<u64>> = self.words.iter().map(|word| whole_number(word)).collect();
        let value = |i: usize| values.as_ref().map_or(0, |values| values[i]);
        let mut order: Vec<usize> = (0..self.words.len()).collect();
        order.sort_by(|a, b| (value(*a), &self.words[*a]).cmp(&(value(*b), &self.words[*b])));
        order
    }

    /// Class names, and the class of each word.
    fn classes(&mut self, labels: Labels) -> (Vec<String>, Vec<usize>) {
        if labels == Labels::Given {
            let numbers = (0..self.words.len()).collect();
            return (std::mem::take(&mut self.words), numbers);
        }
        let values: Option<Vec<u64>> = self.words.iter().map(|word| whole_number(word)).collect();
        if let (Some(values), Labels::NamesOrIndices) = (&values, labels)
            && are_indices(values)
        {
            let most = values.iter().max().copied().unwrap_or(0);
            let classes = (0..=most).map(|n| n.to_string()).collect();
            return (classes, values.iter().map(|n| *n as usize).collect());
        }
        let order = self.order();
        let mut numbers = vec![0; order.len()];
        order.iter().enumerate().for_each(|(number, place)| numbers[*place] = number);
        (order.iter().map(|place| self.words[*place].clone()).collect(), numbers)
    }
}

fn whole_number(word: &str) -> Option<u64> {
    let is_number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| word.parse().ok())?
}

/// Class indices start at 0 and skip no more numbers than they use, unlike years or the ids of another list.
fn are_indices(values: &[u64]) -> bool {
    let mut distinct = values.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    match (distinct.first(), distinct.last()) {
        (Some(0), Some(last)) => *last < 2 * distinct.len() as u64,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(words: &[&str], labels: Labels) -> Vec<String> {
        let mut listing = Listing::default();
        let places: Vec<usize> = words.iter().map(|word| listing.label(word)).collect();
        let (classes, numbers) = listing.classes(labels);
        for (word, place) in words.iter().zip(places) {
            let class = &classes[numbers[place]];
            assert!(class == word || whole_number(class) == whole_number(word), "{word}: {class}");
        }
        classes
    }

    #[test]
    fn whole_numbers_are_in_their_order_and_indices_only_where_they_are_dense() {
        assert_eq!(classes(&["10", "9", "2", "1"], Labels::Names), ["1", "2", "9", "10"]);
        assert_eq!(classes(&["10", "9", "two"], Labels::Names), ["10", "9", "two"]);
        assert_eq!(classes(&["010", "002"], Labels::Names), ["002", "010"]);
        assert_eq!(classes(&["3", "0", "1"], Labels::NamesOrIndices), ["0", "1", "2", "3"]);
        assert_eq!(classes(&["1985", "2004"], Labels::NamesOrIndices), ["1985", "2004"]);
        assert_eq!(classes(&["0", "255"], Labels::NamesOrIndices), ["0", "255"]);
        assert_eq!(classes(&["3", "1", "2"], Labels::NamesOrIndices), ["1", "2", "3"]);
        let huge = "99999999999999999999999";
        assert_eq!(classes(&["0", huge], Labels::NamesOrIndices), ["0", huge]);
    }
}
