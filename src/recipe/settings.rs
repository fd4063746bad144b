//! Every key of a recipe as data, for `vitrum settings` and `docs/settings.md`.
//!
//! Meaning, range and the values of an enum are the documentation of the recipe's types, which `build.rs` reads;
//! types and words are what serde accepts; defaults are those of [`Recipe::default`].

use regex_lite::Regex;
use serde::Serialize;
use toml::{Table, Value};

use super::load::{BUILT_IN, all_keys, alternatives_of, dotted, expected_at, keys_of, unknown};
use super::{FinetuneSection, GroupSection, Recipe, WeightsSection};
use crate::error::Result;

/// A field or a variant, and its documentation.
struct Member {
    name: &'static str,
    /// A field's type.
    of: &'static str,
    doc: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/settings.rs"));

/// One key of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// `train.steps`
    pub key: String,
    /// What it does.
    pub meaning: String,
    /// The values that it takes, in words.
    #[serde(rename = "type")]
    pub kind: String,
    /// A TOML value, or what decides if the key is not set.
    pub default: String,
    /// The range of a number, as in `[0, 1)` or `from 1 up`.
    pub range: Option<String>,
    /// The words that it takes, if it takes only certain words.
    pub words: Vec<Word>,
    /// The built-in recipes that set it, and their values.
    pub recipes: Vec<SetIn>,
}

/// One word that a key takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Word {
    /// As a recipe has it.
    pub word: String,
    /// What it does.
    pub meaning: String,
}

/// A recipe that sets a key.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SetIn {
    /// The recipe's name.
    pub recipe: String,
    /// The TOML value.
    pub value: String,
}

/// A section of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Section {
    /// `train`
    pub name: String,
    /// What it is about, and which commands use it.
    pub about: String,
    /// Its keys, in the order in which a recipe is written.
    pub settings: Vec<Setting>,
}

/// Every key of a recipe, by section.
pub fn sections() -> Vec<Section> {
    let recipes: Vec<(&str, Value)> = BUILT_IN
        .iter()
        .map(|(name, text)| (*name, Value::Table(text.parse().expect("a built-in recipe is TOML"))))
        .collect();
    let defaults = defaults();
    let section = |member: &Member| {
        let mut settings = Vec::new();
        collect(&[member.name.into()], bare(member.of), &defaults, &recipes, &mut settings);
        Section { name: member.name.into(), about: plain(member.doc), settings }
    };
    members("Recipe").iter().map(section).collect()
}

/// The keys whose names begin with `path`: one key, a section, or all for an empty path.
///
/// # Errors
/// Exit 2: there is no such key; the hint names the nearest.
pub fn sections_at(path: &str) -> Result<Vec<Section>> {
    let below = |key: &str| {
        path.is_empty()
            || key.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let mut found = sections();
    found.iter_mut().for_each(|section| section.settings.retain(|setting| below(&setting.key)));
    found.retain(|section| !section.settings.is_empty());
    if found.is_empty() {
        let path: Vec<String> = path.split('.').map(str::to_string).collect();
        // A key without its section is not far from one with it.
        let same: Vec<String> =
            all_keys().iter().filter(|key| key.last() == path.last()).map(|k| dotted(k)).collect();
        return Err(match same.first() {
            Some(key) => crate::error::Error::usage(format!("unknown key `{}`", dotted(&path)))
                .hint(format!("did you mean `vitrum settings {key}`?")),
            None => unknown(&path),
        });
    }
    Ok(found)
}

/// A recipe with all defaults, and one of each section that it may lack.
fn defaults() -> Value {
    let mut recipe = Recipe {
        finetune: Some(FinetuneSection::default()),
        weights: Some(WeightsSection::default()),
        ..Recipe::default()
    };
    recipe.optim.groups = vec![GroupSection::default()];
    Value::Table(Table::try_from(recipe).expect("a recipe is a table"))
}

/// Appends the keys of the section at `path`, a struct of type `of`.
fn collect(
    path: &[String],
    of: &str,
    defaults: &Value,
    recipes: &[(&str, Value)],
    settings: &mut Vec<Setting>,
) {
    for member in members(of) {
        let path = [path, &[member.name.to_string()]].concat();
        let element = [&path[..], &["[0]".to_string()]].concat();
        let has_sections = keys_of(&element).is_some();
        let is_section = keys_of(&path).is_some();
        let doc = plain(member.doc);
        let (meaning, default) = match doc.split_once("Default: ") {
            Some((meaning, default)) => {
                (meaning.trim().to_string(), Some(default.trim_end_matches('.').to_string()))
            }
            None => (doc, None),
        };
        let shown = |value: &Value| match value {
            // A list of groups is shown key by key.
            _ if has_sections => "[]".to_string(),
            value => value.to_string(),
        };
        let words = alternatives_of(&path).unwrap_or_default();
        let set = |(name, recipe): &(&str, Value)| {
            Some(SetIn { recipe: name.to_string(), value: at(recipe, &path)?.to_string() })
        };
        settings.push(Setting {
            key: dotted(&path),
            kind: kind(&path, &words, is_section, has_sections),
            default: at(defaults, &path).map(shown).or(default).unwrap_or_else(|| "not set".into()),
            range: range(&meaning),
            words: words
                .into_iter()
                .zip(members(bare(member.of)))
                .map(|(word, of)| Word { word, meaning: plain(of.doc) })
                .collect(),
            recipes: recipes.iter().filter_map(set).collect(),
            meaning,
        });
        if has_sections {
            collect(&element, bare(member.of), defaults, recipes, settings);
        }
    }
}

/// The values that a key takes.
fn kind(path: &[String], words: &[String], is_section: bool, has_sections: bool) -> String {
    if is_section {
        return format!("a section with the keys of `{}`", path[path.len() - 1]);
    }
    if has_sections {
        return "a list of sections".into();
    }
    if !words.is_empty() {
        return "one of these words".into();
    }
    let of = expected_at(path);
    if of != "a list" {
        return of;
    }
    match expected_at(&[path, &["[0]".to_string()]].concat()).as_str() {
        "text" => "a list of texts".into(),
        "a number" => "a list of numbers".into(),
        _ => "a list of whole numbers from 0 up".into(),
    }
}

/// The range that a description names.
fn range(meaning: &str) -> Option<String> {
    const NUMBER: &str = r"-?[0-9]+(?:\.[0-9]+)?";
    let forms = [
        format!(r"\b[iI]n ([\[(]{NUMBER}, {NUMBER}[\])])"),
        format!(r"\b({NUMBER} to {NUMBER})\b"),
        format!(r"\b(from {NUMBER} up)\b"),
        format!(r"\b(above {NUMBER})\b"),
        format!(r"\b(at most {NUMBER})\b"),
    ];
    forms.iter().find_map(|form| {
        let form = Regex::new(form).expect("a regular expression");
        Some(form.captures(meaning)?[1].to_string())
    })
}

fn members(of: &str) -> &'static [Member] {
    TYPES.iter().find(|(name, _)| *name == of).map_or(&[], |(_, members)| members)
}

/// `X` of `Option<X>` and `Vec<X>`.
fn bare(of: &str) -> &str {
    ["Option<", "Vec<"].iter().find_map(|outer| of.strip_prefix(outer)?.strip_suffix('>')).unwrap_or(of)
}

fn at<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, segment| match segment.as_str() {
        "[0]" => value.get(0),
        key => value.get(key),
    })
}

/// Documentation without the links between types: a recipe's word where they name a variant.
fn plain(doc: &str) -> String {
    let link = Regex::new(r"\[`([^`]+)`\](?:\([^)]*\))?").expect("a regular expression");
    let text = link.replace_all(doc, |link: &regex_lite::Captures| {
        let name = link[1].rsplit("::").next().unwrap_or_default();
        let mut word = String::new();
        for c in name.chars() {
            if c.is_uppercase() && !word.is_empty() {
                word.push('_');
            }
            word.extend(c.to_lowercase());
        }
        format!("`{word}`")
    });
    text.trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Setting> {
        sections().into_iter().flat_map(|section| section.settings).collect()
    }

    #[test]
    fn every_key_and_every_word_is_described() {
        let settings = all();
        let described: Vec<&str> = settings.iter().map(|setting| setting.key.as_str()).collect();
        for key in all_keys().iter().map(|key| dotted(key)) {
            let has = key.matches('.').count() != 1 || described.contains(&key.as_str());
            assert!(has, "`{key}` is not listed");
        }
        for section in sections() {
            assert!(section.about.contains("`vitrum "), "{}: {}", section.name, section.about);
        }
        for setting in settings {
            assert!(setting.meaning.len() > 10 && setting.meaning.ends_with('.'), "{setting:?}");
            assert!(!setting.kind.is_empty() && !setting.default.is_empty(), "{setting:?}");
            let path: Vec<String> = setting.key.replace("[0]", ".[0]").split('.').map(String::from).collect();
            let words = alternatives_of(&path).unwrap_or_default().len();
            assert_eq!(
                setting.words.len(),
                words,
                "{}: the source lists other words than serde",
                setting.key
            );
            for word in &setting.words {
                assert!(
                    !word.meaning.is_empty() && !word.meaning.contains("::"),
                    "{}: {word:?}",
                    setting.key
                );
            }
        }
    }

    /// A value outside of the documented range is refused, and the message names the key.
    #[test]
    fn documented_ranges_are_those_that_are_enforced() {
        let (mut tried, mut wrong) = (0, Vec::new());
        for setting in all() {
            let Some(range) = &setting.range else { continue };
            if !matches!(setting.kind.as_str(), "a number" | "a whole number from 0 up")
                || setting.key.contains('[')
            {
                continue;
            }
            let number = Regex::new(r"-?[0-9]+(?:\.[0-9]+)?").unwrap();
            let ends: Vec<f64> = number.find_iter(range).map(|n| n.as_str().parse().unwrap()).collect();
            let whole = setting.kind.starts_with("a whole");
            let beyond = if whole { 1.0 } else { 0.5 };
            let mut outside = Vec::new();
            if range.starts_with("at most") {
                outside.push(ends[0] + beyond);
            } else {
                let is_open = range.starts_with('(') || range.starts_with("above");
                outside.push(if is_open { ends[0] } else { ends[0] - beyond });
                if let Some(end) = ends.get(1) {
                    outside.push(if range.ends_with(')') { *end } else { end + beyond });
                }
            }
            for value in outside.into_iter().filter(|value| !whole || *value >= 0.0) {
                let value = if whole { value.to_string() } else { format!("{value:?}") };
                let set = format!("{}={value}", setting.key);
                let name = setting.key.split('.').nth(1).unwrap();
                match Recipe::read(Some("demo"), std::slice::from_ref(&set)) {
                    Err(error) if error.message().contains(name) => tried += 1,
                    Err(error) => wrong.push(format!("{set}: {error}")),
                    Ok(_) => wrong.push(format!("{set} is accepted")),
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(tried > 40, "only {tried} values were tried");
    }

    #[test]
    fn a_description_gives_its_range() {
        for (text, expected) in [
            ("A rate, in [0, 1).", Some("[0, 1)")),
            ("A share, 0 to 0.9, of all.", Some("0 to 0.9")),
            ("Updates, from 1 up.", Some("from 1 up")),
            ("Of the base rate.", None),
        ] {
            assert_eq!(range(text).as_deref(), expected, "{text}");
        }
        assert_eq!(plain("As [`EvalResize::Center`], of [`V`](crate::V)."), "As `center`, of `v`.");
    }

    #[test]
    fn a_path_is_a_key_or_a_section_and_a_mistyped_one_gets_a_hint() {
        let keys = |path: &str| -> Vec<String> {
            let found = sections_at(path).unwrap();
            found.into_iter().flat_map(|section| section.settings).map(|setting| setting.key).collect()
        };
        assert_eq!(keys("optim.lr"), ["optim.lr"]);
        assert!(keys("optim.groups").contains(&"optim.groups[0].pattern".to_string()));
        assert!(keys("eval").iter().all(|key| key.starts_with("eval.")));
        assert!(keys("").len() > 110);
        let hint = |path: &str| sections_at(path).unwrap_err().hint_text().unwrap().to_string();
        assert!(hint("optim.lrr").contains("`optim.lr`"));
        assert!(hint("mixup").contains("`vitrum settings augment.mixup`"));
    }
}
