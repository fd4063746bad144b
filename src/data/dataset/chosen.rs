//! Parts of a data set: a few samples, held-out validation samples, or each class equally often.

use super::Dataset;
use crate::error::{Error, Result};
use crate::rng::{Domain, Permutation};

impl Dataset {
    /// Keeps `n` samples, drawn by a fixed key: neither sorted nor interleaved classes bias them.
    pub fn take(mut self, n: usize) -> Self {
        let order = Permutation::new(self.len(), 0, Domain::Split, 0);
        let n = n.clamp(1, self.len());
        self.chosen = Some((0..n).map(|i| self.place(order.at(i))).collect());
        self
    }

    /// Training and held-out samples. `share` of them are held out, chosen by a hash of their names, so that
    /// neither the order nor the number of the others moves a sample from one side to the other. Either side
    /// may be empty.
    pub fn hold_out(self, share: f64) -> (Self, Self) {
        let (held, kept): (Vec<usize>, Vec<usize>) =
            (0..self.len()).partition(|index| is_held_out(&self.record_name(*index), share));
        let with = |chosen: Vec<usize>| {
            let places = chosen.iter().map(|index| self.place(*index)).collect();
            Self { chosen: Some(places), ..self.clone() }
        };
        (with(kept), with(held))
    }

    /// Makes training draw equally often from each class that has samples, however many there are.
    ///
    /// # Errors
    /// Samples have several classes.
    pub fn balanced(mut self) -> Result<Self> {
        if self.is_multi_label() {
            return Err(Error::usage(format!("{}: its samples may have several classes", self.name))
                .hint("remove `data.balance`: it needs samples with exactly one class each"));
        }
        let mut of_class = vec![Vec::new(); self.classes.len()];
        (0..self.len()).for_each(|index| of_class[self.label(index)].push(self.place(index)));
        of_class.retain(|places| !places.is_empty());
        self.of_classes = Some(of_class.iter().map(Vec::len).collect());
        self.chosen = Some(of_class.concat());
        Ok(self)
    }
}

/// Whether a record of this name belongs to the `share` that is held out of the training data.
pub(in crate::data) fn is_held_out(name: &str, share: f64) -> bool {
    let hash = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
    (hash >> 11) as f64 / (1u64 << 53) as f64 <= share && share > 0.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{Place, Split};
    use super::*;
    use crate::data::order::Order;

    /// A folder of 40 pictures of `many` and 5 of `few`, and an empty class between.
    fn data(folder: &std::path::Path) -> Dataset {
        for (class, count) in [("few", 5), ("many", 40), ("none", 0)] {
            std::fs::create_dir_all(folder.join(class)).unwrap();
            let png = crate::data::encode_png(crate::data::picture::View::new(&[9; 3], 1, 1)).unwrap();
            (0..count)
                .for_each(|i| std::fs::write(folder.join(format!("{class}/{i:02}.png")), &png).unwrap());
        }
        Place::find(folder.to_str().unwrap()).unwrap().open(Split::Train).unwrap()
    }

    fn names(data: &Dataset) -> Vec<String> {
        (0..data.len()).map(|index| data.record_name(index)).collect()
    }

    #[test]
    fn names_decide_what_is_held_out() {
        let temp = tempfile::tempdir().unwrap();
        let whole = data(temp.path());
        let (kept, held) = whole.clone().hold_out(0.2);
        assert_eq!(kept.len() + held.len(), 45);
        assert!((3..=16).contains(&held.len()), "{}", held.len());
        let (kept, held) = (names(&kept), names(&held));
        assert!(held.iter().all(|name| !kept.contains(name)));
        // Adding or removing a picture moves no other.
        std::fs::remove_file(temp.path().join("many/03.png")).unwrap();
        std::fs::copy(temp.path().join("many/04.png"), temp.path().join("few/new.png")).unwrap();
        let (_, after) = data_again(temp.path()).hold_out(0.2);
        let known = |name: &&String| *name != "many/03.png" && *name != "few/new.png";
        assert!(names(&after).iter().filter(known).eq(held.iter().filter(known)));
        assert_eq!(whole.clone().hold_out(0.0).1.len(), 0);
        assert_eq!(whole.hold_out(1.0).0.len(), 0);
    }

    fn data_again(folder: &std::path::Path) -> Dataset {
        Place::find(folder.to_str().unwrap()).unwrap().open(Split::Train).unwrap()
    }

    #[test]
    fn every_class_is_drawn_as_often_as_the_others() {
        let temp = tempfile::tempdir().unwrap();
        let balanced = data(temp.path()).balanced().unwrap();
        assert_eq!(balanced.parts(), [(5, 1.0), (40, 1.0)]);
        let order = Order::new(&balanced.parts(), 3, 0, 1);
        let mut drawn = BTreeMap::<String, usize>::new();
        for n in 0..1000 {
            *drawn.entry(balanced.record_name(order.at(n).record)).or_default() += 1;
        }
        let of = |class: &str| {
            drawn.iter().filter(|(name, _)| name.starts_with(class)).map(|(_, n)| n).sum::<usize>()
        };
        assert_eq!([of("few"), of("many")], [500, 500]);
        // Within a class, every picture comes once per epoch of that class.
        assert!(drawn.iter().all(|(name, n)| if name.starts_with("few") {
            *n == 100
        } else {
            (12..=13).contains(n)
        }));
        let labels = (0..45).map(|index| (balanced.record_name(index), balanced.label(index)));
        assert!(
            labels
                .into_iter()
                .all(|(name, label)| balanced.classes()[label] == name.split('/').next().unwrap())
        );
    }
}
