//! Checks that a set of tensors is exactly a model's parameters.

use super::layouts::Shapes;
use super::tensor::shape_text;
use crate::error::{Error, Result};
use crate::vit::params::ParamLayout;

/// The mismatches; each entry names a tensor.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Misfits {
    pub(super) missing: Vec<String>,
    pub(super) reshaped: Vec<String>,
    pub(super) unexpected: Vec<String>,
}

impl Misfits {
    pub(super) fn of(layout: &ParamLayout, shapes: &Shapes) -> Self {
        let mut out = Self::default();
        let mut known = std::collections::HashSet::new();
        // A model without a classifier has a head with no rows.
        for p in layout.parameters().filter(|p| !p.is_empty()) {
            known.insert(p.name.as_str());
            match shapes.get(&p.name) {
                None => out.missing.push(format!("`{}` {}", p.name, shape_text(&p.shape))),
                Some(shape) if *shape != p.shape => out.reshaped.push(format!(
                    "`{}` is {} and should be {}",
                    p.name,
                    shape_text(shape),
                    shape_text(&p.shape)
                )),
                Some(_) => {}
            }
        }
        out.unexpected =
            shapes.keys().filter(|n| !known.contains(n.as_str())).map(|n| format!("`{n}`")).collect();
        out
    }

    /// An error that lists all mismatches, unless everything fits.
    pub(super) fn refuse(&self) -> Result<()> {
        let sides = [
            ("missing", &self.missing),
            ("wrong shape", &self.reshaped),
            ("not part of the model", &self.unexpected),
        ];
        let sides: Vec<String> = sides
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(what, names)| format!("{what}: {}", some_of(names)))
            .collect();
        if sides.is_empty() {
            return Ok(());
        }
        let error = Error::new(format!("the tensors do not fit the model; {}", sides.join("; ")));
        // A tensor in a block changes what the model computes.
        let beside = |name: &String| !name.starts_with("`blocks.");
        let only_extra = self.missing.is_empty() && self.reshaped.is_empty();
        Err(if only_extra && self.unexpected.iter().all(beside) {
            error.hint(format!(
                "if the model works without them, leave them out with `--set 'weights.exclude={}'`",
                pattern(&self.unexpected)
            ))
        } else if only_extra {
            error.hint("`vitrum inspect` lists all of them; a model with such a part is not supported")
        } else {
            error.hint("`vitrum inspect` lists all of them")
        })
    }
}

/// First segments of the model's own names; a pattern for them would match the model.
const OF_MODELS: [&str; 9] =
    ["vit", "deit", "module", "model", "blocks", "encoder", "embeddings", "head", "norm"];

/// A regular expression for all of them: whole names, or, if there are many, their first segments.
fn pattern(names: &[String]) -> String {
    let of = |name: &String| {
        let name = name.trim_matches('`');
        match name.split_once('.').filter(|(first, _)| names.len() > 4 && !OF_MODELS.contains(first)) {
            Some((first, _)) => format!("{}\\..*", regex_lite::escape(first)),
            None => regex_lite::escape(name),
        }
    };
    let parts: std::collections::BTreeSet<String> = names.iter().map(of).collect();
    parts.into_iter().collect::<Vec<_>>().join("|")
}

fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
