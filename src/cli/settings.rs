//! `vitrum settings`: every key of a recipe.

use std::fmt::Write as _;

use serde_json::json;

use super::{print, print_json};
use crate::error::Result;
use crate::recipe::{Section, Setting, sections_at};
use crate::terminal::{columns, wrap};

#[derive(clap::Args)]
pub struct Args {
    /// A key such as `optim.lr`, or a section such as `optim` [default: all]
    #[arg(value_name = "PATH")]
    pub path: Option<String>,
    /// Print the page of the documentation
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let found = sections_at(args.path.as_deref().unwrap_or_default())?;
    if args.json {
        return print_json(&json!({ "sections": found }));
    }
    if args.markdown {
        return print(&page(&found));
    }
    let mut text = String::new();
    for section in &found {
        writeln!(text, "[{}]", section.name).unwrap();
        push(&mut text, 0, &section.about);
        text.push('\n');
        for setting in &section.settings {
            writeln!(text, "{}", setting.key).unwrap();
            facts(setting).iter().for_each(|(name, value)| {
                for (i, line) in wrap(value, columns() - 12).iter().enumerate() {
                    let name = if i == 0 { name } else { "" };
                    writeln!(text, "  {name:<10}{line}").unwrap();
                }
            });
            text.push('\n');
        }
    }
    print(text.trim_end())
}

/// What is known about a setting, with a name for each fact; the meaning has none.
fn facts(setting: &Setting) -> Vec<(String, String)> {
    let mut facts = vec![(String::new(), setting.meaning.clone())];
    facts.extend(setting.words.iter().map(|of| (of.word.clone(), of.meaning.clone())));
    let named = |name: &str, value: &str| (name.to_string(), value.to_string());
    facts.push(named("type", &setting.kind));
    facts.extend(setting.range.iter().map(|range| named("range", range)));
    facts.push(named("default", &setting.default));
    facts.extend(flag(&setting.key).map(|flag| named("flag", &flag)));
    if !setting.recipes.is_empty() {
        let set: Vec<String> =
            setting.recipes.iter().map(|of| format!("{} ({})", of.recipe, of.value)).collect();
        facts.push(named("set in", &set.join(", ")));
    }
    facts
}

/// The flag of `vitrum train` that is short for the key: its help shows the key.
fn flag(key: &str) -> Option<String> {
    let command = super::command();
    let train = command.find_subcommand("train")?;
    let wanted = format!("`--set {key}=");
    let is_short = |arg: &&clap::Arg| arg.get_help().is_some_and(|help| help.to_string().contains(&wanted));
    Some(format!("--{}", train.get_arguments().find(is_short)?.get_long()?))
}

fn push(text: &mut String, indent: usize, paragraph: &str) {
    for line in wrap(paragraph, columns() - indent) {
        writeln!(text, "{:indent$}{line}", "").unwrap();
    }
}

/// The page `docs/settings.md`.
pub fn page(sections: &[Section]) -> String {
    let mut text = String::from(
        "# Settings\n\nEvery key of a recipe. `vitrum settings` prints this page for a terminal, `vitrum settings optim.lr` \
         one key. Do not\nedit it: the text is the documentation of the types in `src/recipe`, and `vitrum settings \
         --markdown` writes it.\n\nA key is set in a recipe's file, or by `--set KEY=VALUE`. How the settings work together \
         is in\n[finetuning.md](finetuning.md), [data.md](data.md) and [numerics.md](numerics.md).\n",
    );
    for section in sections {
        write!(text, "\n## {}\n\n{}\n", section.name, section.about).unwrap();
        for setting in &section.settings {
            write!(text, "\n### `{}`\n\n{}\n", setting.key, setting.meaning).unwrap();
            let facts = facts(setting);
            let mut list = String::new();
            for (name, value) in facts.iter().filter(|(name, _)| !name.is_empty()) {
                let is_word = setting.words.iter().any(|of| of.word == *name);
                match is_word {
                    true => writeln!(list, "- `{name}`: {value}").unwrap(),
                    false if matches!(name.as_str(), "default" | "flag") && !value.contains('`') => {
                        let value = if is_words(value) { value.clone() } else { format!("`{value}`") };
                        writeln!(list, "- {name}: {value}").unwrap();
                    }
                    false => writeln!(list, "- {name}: {value}").unwrap(),
                }
            }
            write!(text, "\n{list}").unwrap();
        }
    }
    text
}

/// A sentence rather than a value.
fn is_words(value: &str) -> bool {
    value.contains(' ') && !value.starts_with(['[', '"', '{'])
}
