//! The names of the splits of a data set. Folders, archives, shards, tables, packed folders and `--split` all
//! ask here.

/// A split of a data set: what a model is trained on, what its training is watched by, and what it is measured on in
/// the end.
// `--help` would show the documentation of each value.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Split {
    #[value(alias = "training")]
    Train = 0,
    #[value(aliases = ["valid", "validation", "dev"])]
    Val = 1,
    #[value(alias = "testing")]
    Test = 2,
}

impl Split {
    /// All splits, in this order.
    pub const ALL: [Split; 3] = [Split::Train, Split::Val, Split::Test];

    /// The names of each split, the preferred one first.
    const fn words(self) -> &'static [&'static str] {
        match self {
            Split::Train => &["train", "training", "trainset"],
            Split::Val => &["val", "valid", "validation", "dev", "valset"],
            Split::Test => &["test", "testing", "testset"],
        }
    }

    /// `train`, `val` or `test`.
    pub const fn name(self) -> &'static str {
        self.words()[0]
    }

    /// The split that a name indicates by its whole words in any case: `Train`, `imagenet-val-0003.tar`,
    /// `val2017`. None if it indicates no split, or two.
    pub fn of(name: &str) -> Option<Split> {
        let mut found = None;
        for split in name.split(|c: char| !c.is_alphanumeric()).filter_map(Self::of_word) {
            if found.is_some_and(|before| before != split) {
                return None;
            }
            found = Some(split);
        }
        found
    }

    /// The split that a single word names: the name of a folder, or the value of a column.
    pub fn of_word(word: &str) -> Option<Split> {
        // `train2017` and `val00` are numbered; `latest` and `carnival` are other words.
        let word = word.trim().trim_end_matches(|c: char| c.is_ascii_digit()).to_lowercase();
        Self::ALL.into_iter().find(|split| split.words().contains(&word.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_speak_of_parts_by_whole_words() {
        for (name, split) in [
            ("train", Some(Split::Train)),
            ("Training", Some(Split::Train)),
            ("VALID", Some(Split::Val)),
            ("dev", Some(Split::Val)),
            ("imagenet-validation-0003.tar", Some(Split::Val)),
            ("my_data.test.tar", Some(Split::Test)),
            ("val2017", Some(Split::Val)),
            ("animals-latest-0.tar", None),
            ("carnival-0.tar", None),
            ("trainset.tar", Some(Split::Train)),
            ("valset-0.tar", Some(Split::Val)),
            ("trainer", None),
            ("train-val-0.tar", None),
            ("", None),
            ("2017", None),
        ] {
            assert_eq!(Split::of(name), split, "{name}");
        }
        assert_eq!(Split::of_word("train-0"), None);
    }
}
