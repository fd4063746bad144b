//! Class names in a `config.json`: `id2label` and `label2id` of transformers, `label_names` of timm.
//!
//! Each is a list in the order of the logits, an object from number to name, or an object from name to number.
//! Names that contradict each other or the head are not used, and a note says why.

use std::collections::BTreeMap;

use serde_json::Value;

/// The keys, the libraries' own first.
const KEYS: [&str; 4] = ["id2label", "label2id", "label_names", "labels"];

/// The most names of a message.
const SHOWN: usize = 3;

/// Names by class number, or why there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Names {
    names: BTreeMap<usize, String>,
    /// The keys that they come from.
    keys: Vec<&'static str>,
    problem: Option<String>,
}

/// The name of a class that has no other.
pub(in crate::weights) fn placeholder(class: usize) -> String {
    format!("LABEL_{class}")
}

impl Names {
    /// From all of these objects' keys together.
    pub(super) fn read(objects: &[&Value]) -> Self {
        let mut out = Self::default();
        for key in KEYS {
            for value in objects.iter().map(|object| &object[key]).filter(|value| !value.is_null()) {
                if let Err(why) = out.add(key, value) {
                    out.problem.get_or_insert(why);
                }
            }
        }
        out
    }

    fn add(&mut self, key: &'static str, value: &Value) -> Result<(), String> {
        let mut used = false;
        for (class, name) in pairs(key, value)? {
            // Libraries write these where nobody gave names.
            if name == placeholder(class) {
                continue;
            }
            used = true;
            match self.names.get(&class) {
                Some(other) if *other != name => {
                    let before = self.keys.first().filter(|before| **before != key);
                    let of = before.map_or(String::new(), |before| format!("`{before}` and "));
                    return Err(format!("{of}`{key}` give class {class} two names, `{other}` and `{name}`"));
                }
                _ => drop(self.names.insert(class, name)),
            }
        }
        if used && !self.keys.contains(&key) {
            self.keys.push(key);
        }
        Ok(())
    }

    /// One name for each of a head's `classes`, and a note. Both may be absent.
    pub(in crate::weights) fn of_head(&self, classes: usize) -> (Option<Vec<String>>, Option<String>) {
        if classes == 0 {
            return (None, None);
        }
        let unused = |why: String| (None, Some(format!("config.json: its class names are not used: {why}")));
        if let Some(why) = &self.problem {
            return unused(why.clone());
        }
        let Some((last, _)) = self.names.last_key_value() else { return (None, None) };
        let keys = self.keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" and ");
        if *last >= classes {
            let counted = if self.names.keys().copied().eq(1..=classes) { ", counted from 1" } else { "" };
            return unused(format!(
                "{keys} {} classes up to number {last}{counted}, and the head has {classes}, numbered from 0",
                if self.keys.len() == 1 { "names" } else { "name" }
            ));
        }
        let of = |class: usize| self.names.get(&class).cloned().unwrap_or_else(|| placeholder(class));
        let nameless: Vec<usize> = (0..classes).filter(|class| !self.names.contains_key(class)).collect();
        let note = (!nameless.is_empty()).then(|| {
            let shown: Vec<String> =
                nameless.iter().take(SHOWN).map(|class| format!("`{}`", placeholder(*class))).collect();
            let more = nameless.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!(
                "config.json: {keys} without a name for {} of {classes} classes: called {}{more}",
                nameless.len(),
                shown.join(", ")
            )
        });
        (Some((0..classes).map(of).collect()), note)
    }
}

/// Numbers and names, whichever of an object's two sides is the number.
fn pairs(key: &str, value: &Value) -> Result<Vec<(usize, String)>, String> {
    let name = |value: &Value| match value {
        Value::String(name) => Some(name.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let number = |value: &Value| match value {
        Value::String(digits) => digits.trim().parse().ok(),
        value => value.as_u64().map(|n| n as usize),
    };
    match value {
        Value::Array(list) => {
            let named = |(class, value): (usize, &Value)| {
                name(value)
                    .map(|name| (class, name))
                    .ok_or_else(|| format!("`{key}` has {value}, not a name"))
            };
            list.iter().enumerate().map(named).collect()
        }
        Value::Object(object) => {
            type Pairs = Option<Vec<(usize, String)>>;
            let by_number = || -> Pairs {
                object.iter().map(|(k, v)| Some((k.trim().parse().ok()?, name(v)?))).collect()
            };
            let by_name = || -> Pairs { object.iter().map(|(k, v)| Some((number(v)?, k.clone()))).collect() };
            let found = match key {
                "label2id" => by_name().or_else(by_number),
                _ => by_number().or_else(by_name),
            };
            found.ok_or_else(|| format!("`{key}` does not give each number one name"))
        }
        other => Err(format!("`{key}` is {other}, neither a list nor an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(classes: usize, config: &Value) -> (Option<String>, String) {
        let (names, note) = Names::read(&[config]).of_head(classes);
        (names.map(|names| names.join(" ")), note.unwrap_or_default())
    }

    #[test]
    fn names_are_taken_however_they_are_written() {
        let good = (Some("ant bee cow".to_string()), String::new());
        for config in [
            json!({ "id2label": { "0": "ant", "2": "cow", "1": "bee" } }),
            json!({ "id2label": ["ant", "bee", "cow"] }),
            json!({ "id2label": { "ant": 0, "bee": 1, "cow": 2 } }),
            json!({ "label2id": { "bee": 1, "ant": "0", "cow": 2 } }),
            json!({ "label2id": { "0": "ant", "1": "bee", "2": "cow" } }),
            json!({ "label_names": ["ant", "bee", "cow"] }),
            json!({ "label_names": { "0": "ant", "1": "bee", "2": "cow" } }),
            json!({ "id2label": { "0": "ant", "1": "bee" }, "label2id": { "cow": 2, "bee": 1 } }),
            json!({ "id2label": ["ant", "bee", "cow"], "label2id": { "LABEL_0": 0, "LABEL_1": 1 } }),
        ] {
            assert_eq!(of(3, &config), good, "{config}");
        }
        // Two classes of one name: `label2id` can hold one of them.
        let crane = json!({ "id2label": ["crane", "ant", "crane"], "label2id": { "crane": 2, "ant": 1 } });
        assert_eq!(of(3, &crane), (Some("crane ant crane".into()), String::new()));
        assert_eq!(of(2, &json!({ "id2label": ["7", "3"] })), (Some("7 3".into()), String::new()));
        let gaps = json!({ "label_names": { "0": "ant", "2": "cow" } });
        let (names, note) = of(4, &gaps);
        assert_eq!(names.as_deref(), Some("ant LABEL_1 cow LABEL_3"));
        assert!(note.contains("2 of 4 classes: called `LABEL_1`, `LABEL_3`"), "{note}");
        for nothing in [json!({}), json!({ "id2label": { "0": "LABEL_0", "1": "LABEL_1" } })] {
            assert_eq!(of(3, &nothing), (None, String::new()));
        }
    }

    #[test]
    fn names_that_contradict_are_not_used_and_a_note_says_why() {
        for (config, why) in [
            (
                json!({ "id2label": ["ant", "bee"], "label2id": { "ant": 1, "bee": 0 } }),
                "`id2label` and `label2id` give class 1 two names, `bee` and `ant`",
            ),
            (json!({ "label2id": { "ant": 0, "bee": 0 } }), "`label2id` give class 0 two names"),
            (json!({ "id2label": { "1": "ant", "2": "bee" } }), "up to number 2, counted from 1"),
            (json!({ "id2label": ["ant", "bee", "cow"] }), "up to number 2, and the head has 2"),
            (json!({ "id2label": { "a": "ant" } }), "does not give each number one name"),
            (json!({ "id2label": ["ant", null] }), "`id2label` has null, not a name"),
            (json!({ "id2label": "ant" }), "neither a list nor an object"),
        ] {
            let (names, note) = of(2, &config);
            assert!(names.is_none() && note.contains("not used") && note.contains(why), "{config}: {note}");
        }
    }
}
