//! ImageNet-1k's classes, for weights files that do not name their classes, or name them unlike the data's
//! folders. Every published 1,000-class head has the order of the sorted WordNet ids.

use std::sync::LazyLock;

/// WordNet ids and first lemmas of ILSVRC 2012, in the order of the classes, after WordNet's licence.
static LIST: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| {
    let lines = include_str!("imagenet_classes.txt").lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once(' ')).collect()
});

/// Bytes of a WordNet id, as in `n01440764`.
const ID_LEN: usize = 9;

/// Classes of ImageNet-1k.
pub const CLASSES: usize = 1000;

/// The class of a folder named after a WordNet id, as `n01440764` or `n01440764_tench`.
pub fn class_of(name: &str) -> Option<usize> {
    let id = name.get(..ID_LEN)?;
    let rest = &name[ID_LEN..];
    if !(rest.is_empty() || rest.starts_with(|c: char| !c.is_alphanumeric())) {
        return None;
    }
    LIST.binary_search_by_key(&id, |(synset, _)| synset).ok()
}

/// The English name of a class.
pub fn english(class: usize) -> Option<&'static str> {
    LIST.get(class).map(|(_, lemma)| *lemma)
}

/// The picture number in a name such as `val/n01440764/ILSVRC2012_val_00000293.JPEG`, from 1: lists of labels
/// for the validation set are in this order.
pub fn validation_number(record: &str) -> Option<usize> {
    let rest = &record[record.find("ILSVRC2012_val_")? + "ILSVRC2012_val_".len()..];
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    rest[..digits].parse().ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_named_after_wordnet_ids_have_the_published_class_numbers() {
        assert_eq!(LIST.len(), CLASSES);
        assert!(LIST.is_sorted());
        assert_eq!([0, 11, 999].map(english), [Some("tench"), Some("goldfinch"), Some("toilet tissue")]);
        assert_eq!(english(1000), None);
        assert_eq!(class_of("n01440764"), Some(0));
        assert_eq!(class_of("n01443537_goldfish"), Some(1));
        assert_eq!(class_of("n15075141"), Some(999));
        for other in ["tench", "n00000000", "n014407640", "", "é01440764"] {
            assert_eq!(class_of(other), None, "{other}");
        }
        assert_eq!(validation_number("n01440764/ILSVRC2012_val_00000293.JPEG"), Some(293));
        assert_eq!(validation_number("n01440764/10026.JPEG"), None);
    }
}
