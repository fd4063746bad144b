//! What the comment at the head of a built-in recipe says: source, expected result, cost, command, differences.

use serde::Serialize;

use super::load::BUILT_IN;

/// A built-in recipe, described by its head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BuiltIn {
    /// `b16/cifar10`
    pub name: String,
    /// What it is, in a sentence.
    pub title: String,
    /// Where its settings come from.
    pub source: String,
    /// The result to expect.
    pub expect: String,
    /// What a run costs.
    pub cost: String,
    /// The command that runs it.
    pub run: String,
    /// How it differs from its source.
    pub differs: String,
}

/// Every built-in recipe.
pub fn built_in() -> Vec<BuiltIn> {
    BUILT_IN.iter().map(|(name, text)| BuiltIn { name: name.to_string(), ..read(text) }).collect()
}

/// The comment before the first setting. A field begins with its name; lines without one continue it.
fn read(text: &str) -> BuiltIn {
    const FIELDS: [&str; 5] = ["Source", "Expect", "Cost", "Run", "Differs"];
    // The title comes before the first field.
    let mut fields: [String; 6] = Default::default();
    let mut at = 0;
    for line in text.lines().map_while(|line| line.strip_prefix('#')).map(str::trim) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let named = FIELDS.iter().position(|field| *field == word);
        at = named.map_or(at, |field| field + 1);
        let space = if fields[at].is_empty() { "" } else { " " };
        fields[at] += &format!("{space}{}", if named.is_some() { rest.trim() } else { line });
    }
    let [title, source, expect, cost, run, differs] = fields;
    BuiltIn { name: String::new(), title, source, expect, cost, run, differs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_recipe_says_what_it_expects_and_costs() {
        for of in built_in() {
            for field in [&of.title, &of.source, &of.expect, &of.cost, &of.run, &of.differs] {
                assert!(!field.is_empty(), "{of:?}");
            }
            assert!(of.run.starts_with("vitrum "), "{of:?}");
        }
        let of = read("# A title: of\n# two lines.\n# Cost    1 FLOP,\n#         no more.\n\n# [model]\n");
        assert_eq!((of.title.as_str(), of.cost.as_str()), ("A title: of two lines.", "1 FLOP, no more."));
    }
}
