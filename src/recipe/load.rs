//! Reads a recipe: a built-in name or a file, then `--set path=value`. An error points at the wrong key.
//!
//! Only the types in `mod.rs` say which keys exist. This file asks them through serde: a key that cannot
//! exist makes serde list the valid keys ([`keys_of`]), and an invalid word makes it list the alternatives of
//! an enum ([`alternatives_of`]). So a new field needs no second entry here.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::meant::meant;
use super::{Duration, Recipe};
use crate::error::{Error, Result};
use crate::files;
use crate::terminal;

/// The recipes inside the program: name and text.
pub const BUILT_IN: [(&str, &str); 11] = [
    ("demo", include_str!("../../recipes/demo.toml")),
    ("demo-hard", include_str!("../../recipes/demo-hard.toml")),
    ("mini/cifar10", include_str!("../../recipes/mini/cifar10.toml")),
    ("b16/imagenet21k", include_str!("../../recipes/b16/imagenet21k.toml")),
    ("finetune", include_str!("../../recipes/finetune.toml")),
    ("b16/cifar10", include_str!("../../recipes/b16/cifar10.toml")),
    ("b16/cifar10-differential", include_str!("../../recipes/b16/cifar10-differential.toml")),
    ("b16/cifar100", include_str!("../../recipes/b16/cifar100.toml")),
    ("b16/imagenet2012", include_str!("../../recipes/b16/imagenet2012.toml")),
    ("b16/oxford_flowers", include_str!("../../recipes/b16/oxford_flowers.toml")),
    ("b16/oxford_pets", include_str!("../../recipes/b16/oxford_pets.toml")),
];

/// Other code bases' names for some keys.
const ALIASES: [(&str, &str, &str); 7] = [
    ("model", "patch_size", "patch"),
    ("model", "hidden_size", "width"),
    ("model", "num_layers", "depth"),
    ("model", "num_heads", "heads"),
    ("model", "mlp_dim", "mlp"),
    ("model", "dropout_rate", "dropout"),
    ("model", "attention_dropout_rate", "attention_dropout"),
];

/// The first line of the recipe in a run directory, and the text before its name.
const WRITTEN: &str = "# Every setting of one run";
const OF: &str = " of `";

/// A recipe, its origin, and the adjustments that made it fit.
#[derive(Clone, Debug)]
pub struct RecipeFile {
    /// The settings, checked.
    pub recipe: Recipe,
    /// `mini/cifar10`, or the file's name without `.toml`; for a run's own recipe, the name that the run
    /// began with.
    pub name: String,
    /// The keys that the file or an override sets, such as `model.image`; all others have their defaults.
    pub given: Vec<String>,
    /// Sentences for the user, for example about a warm-up that was shortened with the run.
    pub notes: Vec<String>,
}

impl Recipe {
    /// [`Recipe::read`], with its notes on stderr.
    pub fn load(name_or_path: Option<&str>, overrides: &[String]) -> Result<Recipe> {
        let loaded = Self::read(name_or_path, overrides)?;
        loaded.notes.iter().for_each(|note| terminal::note(note));
        Ok(loaded.recipe)
    }

    /// A built-in recipe (default: `demo`) or a TOML file, with `path=value` overrides, checked.
    ///
    /// # Errors
    /// Exit 2: no such recipe; a key that is unknown, of the wrong type, or given twice; values that make no
    /// sense together. In a file, the message shows the line.
    pub fn read(name_or_path: Option<&str>, overrides: &[String]) -> Result<RecipeFile> {
        let wanted = name_or_path.unwrap_or("demo");
        let (name, source, text) = find(wanted)?;
        let table = parse(&text, &source)?;
        let written = deserialize(&table)?;
        let mut given: Vec<String> = table.iter().flat_map(keys_given).collect();
        let (mut recipe, set) = override_table(table, overrides)?;
        given.extend(set.iter().cloned());
        let checked = fit_warmup(&mut recipe, &written, &set).and_then(|notes| {
            recipe.validate()?;
            Ok(notes)
        });
        let notes = checked.map_err(|e| quote(e, &text, &source, &set))?;
        Ok(RecipeFile { recipe, name, given, notes })
    }

    /// Parses a recipe's text, as in a run directory; `source` names it in errors.
    pub fn from_toml(text: &str, source: &str) -> Result<Recipe> {
        let recipe = deserialize(&parse(text, source)?)?;
        recipe.validate().map_err(|e| quote(e, text, source, &[]))?;
        Ok(recipe)
    }

    /// This recipe with overrides. The model and the length of the run may be missing: `replay` gets them
    /// elsewhere.
    pub fn with(&self, overrides: &[String]) -> Result<Recipe> {
        let table = Table::try_from(self).expect("a recipe is a table");
        let (recipe, _) = override_table(table, overrides)?;
        recipe.validate_settings()?;
        Ok(recipe)
    }

    /// The whole recipe as TOML with every default. It loads as an equal recipe.
    pub fn to_toml(&self) -> String {
        self.to_toml_of("")
    }

    /// The same for a run directory. It includes the recipe's name, and loads under that name.
    pub fn to_toml_of(&self, name: &str) -> String {
        let body = toml::to_string(self).expect("a recipe can be written as TOML");
        let plain = !name.is_empty() && !name.contains(|c: char| c == '`' || c.is_control());
        let of = if plain { format!("{OF}{name}`") } else { String::new() };
        format!("{WRITTEN}{of}, written by vitrum {}.\n\n{body}", env!("CARGO_PKG_VERSION"))
    }
}

impl RecipeFile {
    /// Whether the file or an override sets `key`, such as `model.image`.
    pub fn gives(&self, key: &str) -> bool {
        self.given.iter().any(|given| given == key)
    }
}

/// `section.key` for each key of a section.
fn keys_given((section, keys): (&String, &Value)) -> Vec<String> {
    let keys = keys.as_table().into_iter().flat_map(Table::keys);
    keys.map(|key| format!("{section}.{key}")).collect()
}

/// Name for the run directory, name for messages, text.
fn find(wanted: &str) -> Result<(String, String, String)> {
    if let Some((name, text)) = BUILT_IN.into_iter().find(|(name, _)| *name == wanted) {
        return Ok((name.into(), format!("the built-in recipe `{name}`"), text.into()));
    }
    let path = Path::new(wanted);
    if is_model(path) {
        return Err(Error::usage(format!("{wanted}: a model, not a recipe"))
            .hint(format!("`vitrum finetune --weights {wanted} --data DIR` trains it further")));
    }
    if path.is_file() {
        let stem = path.file_stem().map_or_else(|| wanted.into(), |s| s.to_string_lossy().into_owned());
        let text = files::read_text(path)?;
        let own = text.strip_prefix(WRITTEN).and_then(|rest| rest.strip_prefix(OF)?.split_once('`'));
        return Ok((own.map_or(stem, |(name, _)| name.to_owned()), wanted.into(), text));
    }
    let names = BUILT_IN.map(|(name, _)| name);
    let known = format!("the built-in recipes are {}; or give the path of a .toml file", list(&names));
    let hint = match nearest(wanted, &names) {
        Some(name) => format!("did you mean `{name}`? {known}"),
        None => known,
    };
    let what = if wanted.ends_with(".toml") { "no file" } else { "no recipe" };
    Err(Error::usage(format!("there is {what} `{wanted}`")).hint(hint))
}

/// A weights file, or a folder that contains one or was written by a run.
fn is_model(path: &Path) -> bool {
    let is_weights = |end: &std::ffi::OsStr| {
        ["safetensors", "npz", "pth", "pt", "bin", "ckpt", "onnx"].iter().any(|known| end == *known)
    };
    let inside = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "config.json",
        "checkpoints",
    ];
    match path.is_dir() {
        true => inside.iter().any(|name| path.join(name).exists()),
        false => path.is_file() && path.extension().is_some_and(is_weights),
    }
}

// ---- The file ----

/// Checks syntax, then keys and types, and gives the position of each error.
fn parse(text: &str, source: &str) -> Result<Table> {
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| {
        Error::usage(place(text, source, e.span(), &lower_first(e.message())))
    })?;
    let located = |fault: Fault| {
        let span = locate(text, &fault.path, fault.at_key);
        put(fault.error, |message| place(text, source, span, message))
    };
    for (section, alias, name) in ALIASES {
        let Some(Value::Table(keys)) = table.get_mut(section) else { continue };
        let Some(value) = keys.remove(alias) else { continue };
        // Checked under the name that the user wrote, so that its position is found.
        check(&mut vec![section.into(), name.into()], &value).map_err(|mut fault| {
            fault.path[1] = alias.into();
            located(fault)
        })?;
        if keys.insert(name.into(), value).is_some() {
            let error = Error::usage(format!("`{section}.{name}` is given twice: `{alias}` is the same key"));
            return Err(located(Fault { path: vec![section.into(), alias.into()], at_key: true, error }));
        }
    }
    check(&mut Vec::new(), &Value::Table(table.clone())).map_err(located)?;
    Ok(table)
}

fn deserialize(table: &Table) -> Result<Recipe> {
    Recipe::deserialize(table.clone()).map_err(|e| Error::usage(e.message()))
}

/// Shows the line that a message about a value refers to, if the value is from the file and not from the
/// command line.
fn quote(error: Error, text: &str, source: &str, set: &[String]) -> Error {
    // Messages start with the key: `` `train.batch` is 0 ``.
    let key = literals(error.message()).into_iter().next().unwrap_or_default();
    let key = key.split(" = ").next().unwrap_or_default();
    let path: Vec<String> = key.split('.').map(str::to_string).collect();
    let span = Some(path).filter(|p| p.len() > 1 && !set.iter().any(|s| s == key));
    match span.and_then(|path| locate(text, &path, false)) {
        Some(span) => put(error, |message| place(text, source, Some(span), message)),
        None => error,
    }
}

/// The same error with another message.
fn put(error: Error, message: impl FnOnce(&str) -> String) -> Error {
    let replaced = Error::usage(message(error.message()));
    match error.hint_text() {
        Some(hint) => replaced.hint(hint),
        None => replaced,
    }
}

/// `FILE, line L, column C: message`, and the line itself with a mark under the position.
fn place(text: &str, source: &str, span: Option<std::ops::Range<usize>>, message: &str) -> String {
    let Some(span) = span.filter(|s| text.is_char_boundary(s.start)) else {
        return format!("{source}: {message}");
    };
    let before = &text[..span.start];
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |i| i + 1);
    let column = before[start..].chars().count() + 1;
    let shown = text[start..].lines().next().unwrap_or_default();
    let marked = text.get(span).unwrap_or_default().lines().next().unwrap_or_default();
    let marks = "^".repeat(marked.chars().count().max(1));
    let margin = " ".repeat(line.to_string().len());
    // Tabs stay tabs, so that the mark is under the position.
    let indent: String = before[start..].chars().map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    format!(
        "{source}, line {line}, column {column}: {message}\n  {line} | {shown}\n  {margin} | {indent}{marks}"
    )
}

/// Position of the key (or its value) in the text.
fn locate(text: &str, path: &[String], at_key: bool) -> Option<std::ops::Range<usize>> {
    use toml::de::{DeTable, DeValue};
    let document = DeTable::parse(text).ok()?;
    let (mut span, mut node): (_, Option<&DeValue<'_>>) = (document.span(), None);
    for segment in path {
        let value = match (node, index_of(segment)) {
            (Some(DeValue::Array(items)), Some(index)) => items.get(index)?,
            (inner, _) => {
                let table = match inner {
                    None => document.get_ref(),
                    Some(DeValue::Table(table)) => table,
                    Some(_) => return Some(span),
                };
                let (key, value) = table.iter().find(|(key, _)| key.get_ref() == segment)?;
                span = key.span();
                value
            }
        };
        if !at_key {
            span = value.span();
        }
        node = Some(value.get_ref());
    }
    Some(span)
}

// ---- Overrides ----

/// Applies `path=value` in order; returns the recipe and the paths that were set.
fn override_table(mut table: Table, overrides: &[String]) -> Result<(Recipe, Vec<String>)> {
    let mut set = Vec::new();
    for text in overrides {
        let (path, value) = split_override(text)?;
        let (section, key) = (&path[0], &path[1]);
        let keys = table.entry(section.clone()).or_insert_with(|| Value::Table(Table::new()));
        let keys = keys.as_table_mut().expect("sections were checked to be tables");
        // A run has one length: the later of the two settings wins. The same holds for a level and its parts.
        match (section.as_str(), key.as_str()) {
            ("train", "steps") => drop(keys.remove("epochs")),
            ("train", "epochs") => drop(keys.remove("steps")),
            // A level sets both.
            ("augment", "level") => {
                ["mixup", "randaugment"].into_iter().for_each(|key| drop(keys.remove(key)))
            }
            _ => {}
        }
        match (section.as_str(), keys.get_mut(key), value) {
            // Patterns accumulate, as in every command that reads weights.
            ("weights", Some(Value::Array(before)), Value::Array(more)) => before.extend(more),
            (_, _, value) => drop(keys.insert(key.clone(), value)),
        }
        set.push(path.join("."));
    }
    Ok((deserialize(&table)?, set))
}

/// Section and key, and the value in the key's type: TOML if that fits, else a string.
fn split_override(text: &str) -> Result<([String; 2], Value)> {
    let shape = "write `--set section.key=value`, as in `--set train.steps=1000`";
    let Some((path, value)) = text.split_once('=').map(|(p, v)| (p.trim(), v.trim())) else {
        return Err(Error::usage(format!("`--set {text}` has no value")).hint(shape));
    };
    if value.is_empty() {
        return Err(Error::usage(format!("`--set {text}` has no value")).hint(shape));
    }
    let mut segments = path.split('.').map(str::to_string);
    let (Some(section), Some(key)) = (segments.next(), segments.next()) else {
        let error = match keys_of(&[path.into()]) {
            Some(keys) => Error::usage(format!("`{path}` is a section, not a key"))
                .hint(format!("its keys are {}", list(&keys))),
            None => unknown(&[path.into()]),
        };
        return Err(error);
    };
    let alias = ALIASES.into_iter().find(|(s, alias, _)| *s == section && *alias == key);
    let key = alias.map_or(key, |(_, _, name)| name.into());
    let known = keys_of(std::slice::from_ref(&section)).is_some_and(|keys| keys.contains(&key));
    if !known {
        return Err(unknown(&[section, key]));
    }
    if segments.next().is_some() {
        return Err(Error::usage(format!("there is nothing below `{section}.{key}` to set"))
            .hint(format!("set it as a whole, as in `--set {section}.{key}=...`")));
    }
    let path = [section, key];
    let mut first_fault = None;
    // A single pattern is a list of one.
    let one = (path[0] == "weights").then(|| Value::Array(vec![Value::String(value.into())]));
    for candidate in readings(value).into_iter().chain(one) {
        match check(&mut path.to_vec(), &candidate) {
            Ok(()) => return Ok((path, candidate)),
            Err(fault) => first_fault = first_fault.or(Some(fault.error)),
        }
    }
    Err(first_fault.expect("a value has at least one reading"))
}

/// The possible meanings of a value on the command line, most likely first.
fn readings(text: &str) -> Vec<Value> {
    let toml = format!("value = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
    let number = text.parse::<f64>().ok().map(Value::Float);
    toml.and_then(|mut t| t.remove("value"))
        .into_iter()
        .chain(number)
        .chain([Value::String(text.into())])
        .collect()
}

// ---- Keys and types ----

/// An error and the path to it; array elements are `[0]`, `[1]`, ...
struct Fault {
    path: Vec<String>,
    /// Points at the key rather than at its value.
    at_key: bool,
    error: Error,
}

/// Walks to the first key that is unknown or has a value of the wrong type.
fn check(path: &mut Vec<String>, value: &Value) -> Result<(), Fault> {
    let fault = |path: &[String], at_key, error| Err(Fault { path: path.to_vec(), at_key, error });
    if let Some(known) = keys_of(path) {
        let Value::Table(table) = value else {
            let error =
                Error::usage(format!("`{}` is {}, expected a section", dotted(path), describe(value)))
                    .hint(format!("its keys are {}", list(&known)));
            return fault(path, true, error);
        };
        for (key, value) in table {
            path.push(key.clone());
            if !known.contains(key) {
                return fault(path, true, unknown(path));
            }
            check(path, value)?;
            path.pop();
        }
        return Ok(());
    }
    if let Value::Array(items) = value {
        for (index, item) in items.iter().enumerate() {
            path.push(format!("[{index}]"));
            if keys_of(path).is_some() {
                check(path, item)?;
            }
            path.pop();
        }
    }
    match Recipe::deserialize(wrap(path, value.clone())) {
        Ok(_) => Ok(()),
        Err(e) => fault(path, false, wrong_value(path, value, e.message())),
    }
}

/// The keys of the section at `path`, or `None` if it is not a section.
pub(super) fn keys_of(path: &[String]) -> Option<Vec<String>> {
    let probe = Table::from_iter([("?".to_string(), Value::Boolean(true))]);
    let error = Recipe::deserialize(wrap(path, probe.into())).err()?;
    error.message().strip_prefix("unknown field `?`").map(literals)
}

/// The words that the enum at `path` accepts, or `None` if it is not an enum.
pub(super) fn alternatives_of(path: &[String]) -> Option<Vec<String>> {
    let error = Recipe::deserialize(wrap(path, Value::String("?".into()))).err()?;
    error.message().strip_prefix("unknown variant `?`").map(literals)
}

/// A recipe that contains only `value` at `path`.
pub(super) fn wrap(path: &[String], value: Value) -> Table {
    let wrapped = path.iter().rev().fold(value, |inner, segment| match index_of(segment) {
        Some(_) => Value::Array(vec![inner]),
        None => Value::Table(Table::from_iter([(segment.clone(), inner)])),
    });
    match wrapped {
        Value::Table(table) => table,
        _ => Table::new(),
    }
}

fn index_of(segment: &str) -> Option<usize> {
    segment.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// The words between backticks.
fn literals(message: &str) -> Vec<String> {
    message.split('`').skip(1).step_by(2).map(str::to_string).collect()
}

pub(super) fn unknown(path: &[String]) -> Error {
    let error = Error::usage(format!("unknown key `{}`", dotted(path)));
    let (parent, key) = (&path[..path.len() - 1], &path[path.len() - 1]);
    let similar = strsim::normalized_damerau_levenshtein;
    // A typo in the right section is more likely than the right key in the wrong section.
    let score = |known: &[String]| {
        let (known_parent, known_key) = (&known[..known.len() - 1], &known[known.len() - 1]);
        let bonus = if known_parent == parent { 0.2 } else { 0.0 };
        (similar(key, known_key) + bonus).max(similar(&dotted(path), &dotted(known)))
    };
    let best = all_keys().into_iter().map(|known| (score(&known), known)).max_by(|a, b| a.0.total_cmp(&b.0));
    match (best, keys_of(parent)) {
        (Some((score, known)), _) if score >= 0.7 => {
            error.hint(format!("did you mean `{}`?", dotted(&known)))
        }
        (_, Some(keys)) if parent.is_empty() => error.hint(format!("the sections are {}", list(&keys))),
        (_, Some(keys)) => error.hint(format!("the keys of `{}` are {}", dotted(parent), list(&keys))),
        _ => error.hint(format!("the sections are {}", list(&keys_of(&[]).unwrap_or_default()))),
    }
}

/// Every key that a setting may have, such as `train.steps`.
pub fn keys() -> Vec<String> {
    let keys = all_keys().into_iter().filter(|key| key.len() == 2);
    keys.map(|key| dotted(&key)).collect()
}

/// Every key that a recipe may have.
pub(super) fn all_keys() -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![Vec::new()];
    while let Some(path) = open.pop() {
        let element = [path.clone(), vec!["[0]".to_string()]].concat();
        let inside = [path, element].into_iter().find_map(|p| Some((keys_of(&p)?, p)));
        let Some((keys, path)) = inside else { continue };
        for key in keys {
            let known = [path.clone(), vec![key]].concat();
            found.push(known.clone());
            open.push(known);
        }
    }
    found
}

/// Rewords serde's message for a wrong value.
fn wrong_value(path: &[String], value: &Value, message: &str) -> Error {
    let key = dotted(path);
    if let Some(words) = alternatives_of(path) {
        let given = value.as_str().map_or_else(|| describe(value), |text| format!("`{text}`"));
        let known = format!("use one of {}", list(&words));
        let hint = match value.as_str().and_then(|text| nearest(text, &words)) {
            Some(word) => format!("did you mean `{word}`? {known}"),
            None => known,
        };
        return Error::usage(format!("`{key}` cannot be {given}")).hint(hint);
    }
    // Where a list is the value, serde's message is about one of its elements.
    let found = match value {
        Value::Array(_) => {
            literals(message).first().map_or("a list".into(), |one| format!("a list with {one}"))
        }
        _ => describe(value),
    };
    let expected = expected(message, value);
    let error = Error::usage(format!("`{key}` is {found}, expected {expected}"));
    let typed = match value {
        Value::String(text) => meant(text, expected != "a number"),
        Value::Float(number) => meant(&number.to_string(), true),
        _ => Vec::new(),
    };
    let has_numbers = ["number", "duration", "pixels"].iter().any(|what| expected.contains(what));
    match has_numbers && !typed.is_empty() {
        true => error.hint(format!("write `{}`", typed.join("` or `"))),
        false => error,
    }
}

/// What serde's message for a wrong value expects, in plain words.
fn expected<'m>(message: &'m str, value: &Value) -> &'m str {
    match message.rsplit_once("expected ").map_or(message, |(_, expected)| expected) {
        // TOML has no larger ones.
        "u64" | "usize" if matches!(value, Value::Float(large) if *large > i64::MAX as f64) => {
            "a whole number from 0 to 9223372036854775807"
        }
        "u64" | "usize" | "u32" => "a whole number from 0 up",
        "i64" => "a whole number",
        "u8" => "whole numbers from 0 to 255",
        "f32" | "f64" => "a number",
        "a boolean" => "`true` or `false`",
        "a string" => "text",
        "a sequence" => "a list",
        "a tuple of size 2" => "a list of two numbers",
        "an array of length 3" => "a list of three numbers",
        other => other,
    }
}

/// The values that the key at `path` takes: `a number`, `text`, ...
pub(super) fn expected_at(path: &[String]) -> String {
    // No key is a section of this name.
    let probe = Table::from_iter([("?".to_string(), Value::Boolean(true))]);
    let probe = Value::Table(probe);
    let error = Recipe::deserialize(wrap(path, probe.clone())).err();
    error.map_or_else(String::new, |e| expected(e.message(), &probe).to_string())
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text `{text}`"),
        Value::Integer(number) => number.to_string(),
        // With a point or an exponent: it is no whole number.
        Value::Float(number) => format!("{number:?}"),
        Value::Boolean(truth) => format!("`{truth}`"),
        Value::Datetime(date) => format!("the date {date}"),
        Value::Array(_) => "a list".into(),
        Value::Table(_) => "a table".into(),
    }
}

/// `optim.groups[0].lr_mult`
pub(super) fn dotted(path: &[String]) -> String {
    let mut text = String::new();
    for segment in path {
        if !text.is_empty() && index_of(segment).is_none() {
            text.push('.');
        }
        text.push_str(segment);
    }
    text
}

/// `` `a`, `b`, `c` ``
fn list<S: AsRef<str>>(words: &[S]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{}`", word.as_ref())).collect();
    quoted.join(", ")
}

fn nearest<S: AsRef<str>>(word: &str, known: &[S]) -> Option<String> {
    let scored = known.iter().map(|k| (strsim::jaro_winkler(word, k.as_ref()), k.as_ref()));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score >= 0.8).map(|(_, k)| k.to_string())
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

// ---- Warm-up ----

/// A shorter run keeps the shape of its schedule: if the recipe's own warm-up and cool-down no longer fit,
/// they shrink in proportion. It is an error if the user set them, or if they never fitted.
fn fit_warmup(recipe: &mut Recipe, written: &Recipe, set: &[String]) -> Result<Vec<String>> {
    let Some((total, warmup, cooldown)) = lengths(recipe) else { return Ok(Vec::new()) };
    if warmup.saturating_add(cooldown) < total || (warmup, cooldown) == (0, 0) {
        return Ok(Vec::new());
    }
    let by_user = |key: &str| set.iter().any(|path| path == key);
    let before =
        lengths(written).filter(|(total, warmup, cooldown)| warmup.saturating_add(*cooldown) < *total);
    let unchanged = recipe.train.steps == written.train.steps && recipe.train.epochs == written.train.epochs;
    if by_user("schedule.warmup") || by_user("schedule.cooldown") || (unchanged && before.is_none()) {
        let key = if warmup >= cooldown { "warmup" } else { "cooldown" };
        return Err(Error::usage(format!(
            "`schedule.{key}` is {} steps, but the run has only {total}",
            warmup.max(cooldown)
        ))
        .hint(format!("shorten it, as in `--set schedule.{key}=10%`, or raise `train.steps`")));
    }
    // If there is no length to compare with (the recipe counts in epochs): a tenth of the run.
    let shrink = |now: u64, then: Option<u64>| match (before, then) {
        (Some((old, ..)), Some(then)) => (u128::from(then) * u128::from(total) / u128::from(old)) as u64,
        _ => now.min(total / 10),
    };
    let short = (shrink(warmup, before.map(|b| b.1)), shrink(cooldown, before.map(|b| b.2)));
    let mut notes = Vec::new();
    for (name, key, from, to) in [
        ("warm-up", &mut recipe.schedule.warmup, warmup, short.0),
        ("cool-down", &mut recipe.schedule.cooldown, cooldown, short.1),
    ] {
        if from != to {
            *key = Duration::Steps(to);
            notes.push(format!("{name} shortened from {from} to {to} steps, to fit a run of {total}"));
        }
    }
    Ok(notes)
}

/// Steps of the schedule, of its warm-up and of its cool-down, as far as they are known before the data is.
fn lengths(recipe: &Recipe) -> Option<(u64, u64, u64)> {
    let (run, batch) = (recipe.train.steps, recipe.train.batch.max(1));
    let known = |duration: Duration, total: u64| match duration {
        Duration::Epochs(epochs) if epochs > 0.0 => None,
        other => Some(other.to_steps(total, batch, 0)),
    };
    let total = match recipe.schedule.total {
        None => run?,
        Some(total) => known(total, run?)?,
    };
    Some((total, known(recipe.schedule.warmup, total)?, known(recipe.schedule.cooldown, total)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<String> {
        text.split('.').map(str::to_string).collect()
    }

    /// The answers that this file parses from serde's messages.
    #[test]
    fn the_types_tell_their_keys_and_alternatives() {
        let sections = keys_of(&[]).unwrap();
        let known =
            ["model", "data", "augment", "optim", "schedule", "loss", "train", "eval", "finetune", "weights"];
        assert_eq!(sections, known);
        assert!(keys_of(&path("train")).unwrap().contains(&"steps".to_string()));
        assert!(keys_of(&path("optim.groups.[0]")).unwrap().contains(&"lr_mult".to_string()));
        assert_eq!(keys_of(&path("train.steps")), None);
        assert_eq!(alternatives_of(&path("model.pool")).unwrap(), ["token", "gap", "map", "token_gap"]);
        assert_eq!(alternatives_of(&path("data.train")), None);
    }

    #[test]
    fn every_key_that_a_default_recipe_writes_is_known() {
        let known: Vec<String> = all_keys().iter().map(|k| dotted(k)).collect();
        let table = Table::try_from(Recipe::default()).unwrap();
        for (section, keys) in table {
            for key in keys.as_table().unwrap().keys() {
                assert!(known.contains(&format!("{section}.{key}")), "{section}.{key}");
            }
        }
        assert!(known.contains(&"optim.groups[0].schedule.kind".to_string()));
    }

    #[test]
    fn aliases_name_keys_that_exist_and_are_no_keys_themselves() {
        for (section, alias, name) in ALIASES {
            let keys = keys_of(&path(section)).unwrap();
            assert!(keys.contains(&name.to_string()) && !keys.contains(&alias.to_string()), "{alias}");
        }
    }
}
