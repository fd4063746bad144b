//! Compares two recipes key by key, as values of the keys' types and not as text.

use std::fmt;

use toml::{Table, Value};

use super::Recipe;

/// A key in which two recipes differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// `optim.groups[0].lr_mult`
    pub key: String,
    /// `None`: not set.
    pub before: Option<Value>,
    /// `None`: no longer set.
    pub now: Option<Value>,
}

impl fmt::Display for Difference {
    /// `train.batch: 16 -> 32`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| value.as_ref().map_or("not set".into(), Value::to_string);
        write!(f, "{}: {} -> {}", self.key, shown(&self.before), shown(&self.now))
    }
}

impl Recipe {
    /// The keys in which `now` differs from this recipe, by section and name.
    pub fn differences(&self, now: &Recipe) -> Vec<Difference> {
        let table = |recipe: &Recipe| Value::Table(Table::try_from(recipe).expect("a recipe is a table"));
        let mut found = Vec::new();
        compare("", Some(&table(self)), Some(&table(now)), &mut found);
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found
    }
}

fn compare(key: &str, before: Option<&Value>, now: Option<&Value>, found: &mut Vec<Difference>) {
    if before == now {
        return;
    }
    match (before, now) {
        (Some(Value::Table(before)), Some(Value::Table(now))) => {
            let added = now.keys().filter(|name| !before.contains_key(*name));
            for name in before.keys().chain(added) {
                let inside = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(&inside, before.get(name), now.get(name), found);
            }
        }
        // Lists of sections are compared element by element; a list of numbers is one value.
        (Some(Value::Array(before)), Some(Value::Array(now)))
            if before.iter().chain(now).all(Value::is_table) =>
        {
            for i in 0..before.len().max(now.len()) {
                compare(&format!("{key}[{i}]"), before.get(i), now.get(i), found);
            }
        }
        _ => found.push(Difference { key: key.into(), before: before.cloned(), now: now.cloned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_by_key_and_by_value() {
        let recipe = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
            Recipe::read(Some("demo"), &set).unwrap().recipe
        };
        let before = recipe(&["optim.lr=0.001", "optim.groups=[{pattern='a', lr_mult=2.0}]"]);
        let same = recipe(&["optim.lr=1e-3", "optim.groups=[{lr_mult=2, pattern='a'}]"]);
        assert_eq!(before.differences(&same), []);
        let now = recipe(&[
            "optim.lr=2e-3",
            "optim.groups=[{pattern='a', lr_mult=3.0}, {pattern='b'}]",
            "train.checkpoint_every=7",
        ]);
        let lines: Vec<String> = before.differences(&now).iter().map(|d| d.to_string()).collect();
        assert_eq!(
            [&lines[0], &lines[2]],
            ["optim.groups[0].lr_mult: 2.0 -> 3.0", "optim.lr: 0.001 -> 0.002"],
            "{lines:?}"
        );
        assert!(lines[1].starts_with("optim.groups[1]: not set -> {"), "{lines:?}");
        assert_eq!(lines[3], "train.checkpoint_every: not set -> 7");
    }
}
