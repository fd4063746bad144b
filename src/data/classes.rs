//! Matches a data set's classes to a model's.
//!
//! If both sides have names, they are matched by name: exactly, then ignoring case and taking `_` or `-` as a
//! space, then by one of several names (`tench, Tinca tinca`). WordNet ids and English names are matched
//! through ImageNet's list ([`imagenet`]). Otherwise they are matched by number if both sides are whole
//! numbers, or else by position if there are as many. Two lists that disagree, of names or of numbers, do not
//! match, because nothing says which of them is wrong.

use std::collections::HashMap;

use super::imagenet;
use crate::error::{Error, Result};

/// How classes were matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// By the classes' names.
    Name,
    /// By numbers that the names contain, such as ImageNet's.
    Number,
    /// By their order.
    Place,
}

/// The model's number of each class of the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Matching {
    /// The model's number, for each class of the data in its order.
    pub numbers: Vec<usize>,
    /// How they were matched.
    pub by: By,
}

impl Matching {
    /// For people: what was matched to what.
    pub fn line(&self, classes: usize) -> String {
        let how = match self.by {
            By::Name => "by name",
            By::Number => "by number",
            By::Place => "by position: the data's first class is the model's first, and so on",
        };
        format!("classes  {} of the data are among the model's {classes}, {how}", self.numbers.len())
    }
}

/// A model's classes, looked up by name. If two classes share a name, the name finds neither.
pub struct Known<'a> {
    names: Option<&'a [String]>,
    classes: usize,
    exact: HashMap<&'a str, Option<usize>>,
    spellings: HashMap<String, Option<usize>>,
    /// The class by the WordNet id of the ImageNet class that the name means.
    synsets: HashMap<usize, usize>,
}

impl<'a> Known<'a> {
    /// For a model with `classes` classes; a model of 1,000 unnamed classes is taken to be ImageNet's.
    pub fn new(classes: usize, names: Option<&'a [String]>) -> Self {
        let mut known = Self {
            names,
            classes,
            exact: HashMap::new(),
            spellings: HashMap::new(),
            synsets: HashMap::new(),
        };
        let note = |spellings: &mut HashMap<String, Option<usize>>, spelling: String, class: usize| {
            let entry = spellings.entry(spelling).or_insert(Some(class));
            if *entry != Some(class) {
                *entry = None;
            }
        };
        for class in 0..classes {
            let name = names.map(|names| names[class].as_str());
            if let Some(name) = name {
                known.exact.entry(name).and_modify(|of| *of = None).or_insert(Some(class));
                spellings(name).into_iter().for_each(|s| note(&mut known.spellings, s, class));
            }
            let synset = match name {
                Some(name) => imagenet::class_of(name),
                None => Some(class).filter(|_| classes == imagenet::CLASSES),
            };
            if let Some(synset) = synset {
                known.synsets.insert(synset, class);
                imagenet::english(synset)
                    .into_iter()
                    .for_each(|english| note(&mut known.spellings, spelling(english), class));
            }
        }
        known
    }

    /// The class with this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        if let Some(class) = self.exact.get(name) {
            return *class;
        }
        if let Some(synset) = imagenet::class_of(name) {
            return self.synsets.get(&synset).copied().or_else(|| self.find_english(synset));
        }
        spellings(name).iter().find_map(|spelling| self.spellings.get(spelling).copied().flatten())
    }

    /// If several classes share this name, so that it finds none: a sentence that says so.
    pub fn of_one_name(&self, name: &str) -> Option<String> {
        let names = self.names.filter(|_| self.find(name).is_none())?;
        let wanted = spelling(name);
        let has = |other: &str| other == name || spellings(other).contains(&wanted);
        let same: Vec<String> =
            (0..names.len()).filter(|class| has(&names[*class])).map(|class| class.to_string()).collect();
        let numbers = same.join(", ");
        (same.len() > 1)
            .then(|| format!("the model has {} classes called `{name}`: numbers {numbers}", same.len()))
    }

    /// Finds a WordNet id by its English name, for models with English names. Two of ImageNet's names stand for two
    /// classes each; for these the position decides.
    fn find_english(&self, synset: usize) -> Option<usize> {
        let wanted = spelling(imagenet::english(synset)?);
        let at_its_place =
            self.names.and_then(|names| names.get(synset)).filter(|_| self.classes == imagenet::CLASSES);
        if at_its_place.is_some_and(|name| spellings(name).contains(&wanted)) {
            return Some(synset);
        }
        self.spellings.get(&wanted).copied().flatten()
    }

    /// Matches a data set's classes.
    pub fn matching(&self, own: &[String]) -> Result<Matching> {
        let found: Vec<Option<usize>> = own.iter().map(|name| self.find(name)).collect();
        if let Some(numbers) = found.iter().copied().collect::<Option<Vec<usize>>>() {
            let mut first: HashMap<usize, &String> = HashMap::new();
            for (number, name) in numbers.iter().zip(own) {
                if let Some(other) = first.insert(*number, name) {
                    return Err(Error::new(format!(
                        "the data's classes `{other}` and `{name}` are both the model's class number {number}"
                    ))
                    .hint("put their pictures into one class"));
                }
            }
            return Ok(Matching { numbers, by: By::Name });
        }
        let whole = |names: &[String]| names.iter().map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>();
        let own_numbers = whole(own);
        let theirs = self.names.map(whole);
        let numbers = match (&own_numbers, &theirs) {
            (Some(own), None) => own.iter().map(|n| Some(*n).filter(|n| *n < self.classes)).collect(),
            (Some(own), Some(Some(theirs))) => {
                own.iter().map(|n| theirs.iter().position(|other| other == n)).collect()
            }
            _ => None,
        };
        if let Some(numbers) = numbers {
            return Ok(Matching { numbers, by: By::Number });
        }
        // Years, say, that are others than the model's are names that disagree.
        let both_named = matches!((&own_numbers, &theirs), (None, Some(None)) | (Some(_), Some(Some(_))));
        if own.len() == self.classes && !both_named {
            return Ok(Matching { numbers: (0..self.classes).collect(), by: By::Place });
        }
        Err(self.refuse(own, &found))
    }

    fn refuse(&self, own: &[String], found: &[Option<usize>]) -> Error {
        let missing = own.iter().zip(found).find(|(_, class)| class.is_none()).map_or("", |(name, _)| name);
        if let Some(same) = self.of_one_name(missing) {
            return Error::new(format!("{same}; the data set's class `{missing}` could be any of them"))
                .hint("give the model's classes different names, or `vitrum eval` the pictures' classes by number with `--labels FILE`");
        }
        let error = match self.names {
            Some(names) => {
                let taken = |class: usize| found.contains(&Some(class));
                let own = match (0..names.len()).find(|class| !taken(*class)) {
                    Some(free) => format!("it has `{}` and {} in all", names[free], self.classes),
                    None => format!("all its {} classes are in the data, too", self.classes),
                };
                Error::new(format!("the data set has a class `{missing}` that the model lacks ({own})"))
            }
            None => Error::new(format!(
                "the data set has {} classes (one is `{missing}`), but the model has {} without names",
                own.len(),
                self.classes
            )),
        };
        error.hint("evaluate on data with the class names that the model was trained on, or on some of them")
    }
}

/// A name for people: WordNet ids in English, and the classes of an ImageNet model without names.
pub fn shown(class: usize, classes: usize, names: Option<&[String]>) -> String {
    let english = |synset: usize| imagenet::english(synset).map(String::from);
    match names.and_then(|names| names.get(class)) {
        // The folder's own words after an id are kept.
        Some(name) => {
            imagenet::class_of(name).filter(|_| !name.contains('_')).and_then(english).unwrap_or(name.clone())
        }
        None => english(class).filter(|_| classes == imagenet::CLASSES).unwrap_or_else(|| class.to_string()),
    }
}

fn spelling(name: &str) -> String {
    let words = name.to_lowercase().replace(['_', '-'], " ");
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The whole name, then each of several.
fn spellings(name: &str) -> Vec<String> {
    let parts = name.split(',').filter(|_| name.contains(',')).map(spelling);
    std::iter::once(spelling(name)).chain(parts).filter(|s| !s.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Vec<String> {
        text.split(';').map(str::to_string).collect()
    }

    fn matched(own: &str, classes: usize, names: Option<&str>) -> Result<(Vec<usize>, By)> {
        let names = names.map(list);
        let matching = Known::new(classes, names.as_deref()).matching(&list(own))?;
        Ok((matching.numbers, matching.by))
    }

    #[test]
    fn names_come_first_and_some_of_them_will_do() {
        assert_eq!(matched("ant;bee;cat", 3, Some("cat;ant;bee")).unwrap(), (vec![1, 2, 0], By::Name));
        assert_eq!(matched("bee;cat", 3, Some("cat;ant;bee")).unwrap(), (vec![2, 0], By::Name));
        assert_eq!(
            matched("Great_White;tinca tinca", 2, Some("tench, Tinca tinca;great white")).unwrap().0,
            [1, 0]
        );
        assert_eq!(matched("1;0", 2, Some("0;1")).unwrap(), (vec![1, 0], By::Name));
        let error = matched("ant;bee;cat", 3, Some("ant;bee;cow")).unwrap_err();
        assert!(error.message().contains("`cat`") && error.message().contains("`cow`"), "{error}");
        assert!(matched("ant;bee", 2, Some("dog;cow")).is_err(), "two lists of names that disagree");
        assert!(matched("ANT;ant ", 2, Some("Ant;cow")).is_err(), "two classes are one of the model's");
        let error = matched("ant;cow", 3, Some("ant;Ant;cow")).map(|_| ());
        assert!(error.is_ok(), "an exact name comes first");
        let error = matched("ant;cow", 3, Some("ant;ant;cow")).unwrap_err();
        assert!(error.message().contains("2 classes called `ant`: numbers 0, 1;"), "{error}");
        let error = matched("cow;ANT", 3, Some("ant;Ant;cow")).unwrap_err();
        assert!(error.message().contains("2 classes called `ANT`: numbers 0, 1;"), "{error}");
    }

    #[test]
    fn then_whole_numbers_then_places() {
        assert_eq!(matched("0;1;10;11;2", 12, None).unwrap(), (vec![0, 1, 10, 11, 2], By::Number));
        assert_eq!(matched("07;2", 3, Some("2;5;7")).unwrap(), (vec![2, 0], By::Number));
        assert!(matched("2002;2003;2004", 3, Some("2001;2002;2003")).is_err(), "numbers that disagree");
        assert_eq!(matched("1;2;3", 3, None).unwrap(), (vec![0, 1, 2], By::Place), "counted from 1");
        assert_eq!(matched("ant;bee", 2, None).unwrap(), (vec![0, 1], By::Place));
        assert_eq!(matched("0;1", 2, Some("ant;bee")).unwrap(), (vec![0, 1], By::Place));
        assert!(matched("1985;2004", 3, None).is_err());
        assert!(matched("ant;bee", 3, None).is_err());
    }

    #[test]
    fn wordnet_ids_and_english_names_are_the_same_classes() {
        let both = (vec![1, 0], By::Name);
        assert_eq!(matched("n01443537;n01440764_tench", 1000, None).unwrap(), both);
        assert_eq!(matched("goldfish;tench", 1000, None).unwrap(), both);
        let mut english: Vec<String> = (0..1000).map(|i| format!("class {i}")).collect();
        english[0] = "tench, Tinca tinca".into();
        english[1] = "goldfish, Carassius auratus".into();
        let english = english.join(";");
        assert_eq!(matched("n01443537;n01440764", 1000, Some(&english)).unwrap(), both);
        assert!(matched("n01443537;n02012849", 1000, Some(&english)).is_err(), "a crane is not among them");
        // Some of the classes, in another order than ImageNet's.
        assert_eq!(matched("n01443537;n01440764", 2, Some("tench;goldfish")).unwrap(), both);
        assert_eq!(matched("goldfish;tench", 3, Some("n01440764;n01443537;n02012849")).unwrap(), both);
        // Two classes are called crane: the position tells them apart.
        let all: Vec<String> = (0..1000).map(|i| imagenet::english(i).unwrap().to_string()).collect();
        let cranes = matched("n02012849;n03126707", 1000, Some(&all.join(";"))).unwrap();
        assert_eq!(cranes, (vec![134, 517], By::Name));
    }

    #[test]
    fn people_read_english() {
        assert_eq!(shown(11, 1000, None), "goldfinch");
        assert_eq!(shown(11, 12, None), "11");
        let names = list("n01440764;ant;n01443537_my_fish");
        assert_eq!([0, 1, 2].map(|i| shown(i, 3, Some(&names))), ["tench", "ant", "n01443537_my_fish"]);
    }
}
