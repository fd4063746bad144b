//! `vitrum recipes`: the built-in recipes, and the text of each.

use serde_json::json;

use super::{print, print_json};
use crate::error::{Error, Result};
use crate::recipe::{BUILT_IN, BuiltIn, built_in};
use crate::terminal::{columns, wrap};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
    /// Print one JSON object
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(clap::Subcommand)]
pub enum What {
    /// Print a recipe: its head says what it expects and costs
    Show {
        /// The recipe's name, such as `mini/cifar10`
        name: String,
    },
}

pub fn run(args: Args) -> Result<()> {
    let recipes = built_in();
    match args.what {
        None if args.json => print_json(&json!({ "recipes": recipes })),
        None => print(&recipes.iter().map(entry).collect::<Vec<_>>().join("\n")),
        Some(What::Show { name }) => {
            let Some(((_, text), about)) =
                BUILT_IN.iter().zip(&recipes).find(|((known, _), _)| *known == name)
            else {
                return Err(Error::usage(format!("there is no built-in recipe `{name}`"))
                    .hint("`vitrum recipes` lists them"));
            };
            match args.json {
                true => print_json(&json!({ "recipe": about, "toml": text })),
                false => print(text),
            }
        }
    }
}

/// The recipe's name, and below it what it is, what it expects and what it costs.
fn entry(recipe: &BuiltIn) -> String {
    let mut text = format!("{}\n", recipe.name);
    for (name, value) in
        [("", &recipe.title), ("expect", &recipe.expect), ("cost", &recipe.cost), ("run", &recipe.run)]
    {
        let indent = if name.is_empty() { 2 } else { 10 };
        for (i, line) in wrap(value, columns() - indent).iter().enumerate() {
            let name = if i == 0 { name } else { "" };
            text += &match indent {
                2 => format!("  {line}\n"),
                _ => format!("  {name:<8}{line}\n"),
            };
        }
    }
    text
}

/// The names of the built-in recipes, for help texts.
pub(super) fn names_help() -> String {
    let names = BUILT_IN.map(|(name, _)| name).join(", ");
    format!(
        "Built-in recipes: {names}. `vitrum recipes` says what each expects and costs. Any other recipe is the path of a \
         .toml file; `vitrum settings` lists the keys that it may have."
    )
}
