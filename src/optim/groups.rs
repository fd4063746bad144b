//! Which parameters share a learning rate and a decay: name patterns first, then the recipe's defaults.
//!
//! A pattern may use timm's names (`blocks.0.attn.qkv.weight`) or flax's (`.*/query/kernel`), so that groups
//! can be copied from either. In flax, q, k and v are separate tensors; here they are [`Part`]s of one
//! tensor. Parts may differ in everything except in being frozen.

use regex_lite::Regex;

use crate::error::{Error, Result};
use crate::recipe::{DecayOn, GroupSection, OptimSection};
use crate::vit::names::flax_parts;
use crate::vit::params::{Param, ParamKind};

use super::layers;

/// What is one tensor in flax: a whole parameter, or the q, k or v part of a fused one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// Our name first, then flax's names in both numberings.
    pub(crate) names: Vec<String>,
    /// Which equal part of the tensor's output channels this is.
    pub(crate) index: usize,
    pub(crate) count: usize,
}

/// The parts of a parameter, in memory order.
pub(crate) fn parts(param: &Param) -> Vec<Part> {
    let flax = flax_parts(&param.name);
    let count = flax.len();
    let part = |(index, names): (usize, Vec<String>)| Part {
        names: std::iter::once(param.name.clone()).chain(names).collect(),
        index,
        count,
    };
    flax.into_iter().enumerate().map(part).collect()
}

/// The compiled patterns of `optim.groups`.
pub(crate) struct Patterns(Vec<Regex>);

impl Patterns {
    /// Compiles the patterns. An error names the pattern that is not a regular expression.
    pub(crate) fn new(groups: &[GroupSection]) -> Result<Patterns> {
        let compile = |(i, group): (usize, &GroupSection)| {
            whole(&group.pattern).map_err(|e| {
                Error::usage(format!("{}: not a regular expression: {e}", place(i, group)))
                    .hint("a pattern looks like `head/.*` or `blocks\\.\\d+\\.norm1\\..*`")
            })
        };
        Ok(Patterns(groups.iter().enumerate().map(compile).collect::<Result<_>>()?))
    }

    /// The first group whose pattern matches one of the names.
    pub(crate) fn first(&self, names: &[String]) -> Option<usize> {
        (0..self.0.len()).find(|i| self.matches(*i, names))
    }

    pub(crate) fn matches(&self, group: usize, names: &[String]) -> bool {
        names.iter().any(|name| self.0[group].is_match(name))
    }
}

/// A pattern that must match the whole name.
fn whole(pattern: &str) -> std::result::Result<Regex, regex_lite::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// The name of a group in messages.
pub(crate) fn place(index: usize, group: &GroupSection) -> String {
    format!("`optim.groups[{index}]` (pattern `{}`)", group.pattern)
}

/// Whether the recipe freezes a parameter. A frozen parameter has no gradient and no moments, and is not in
/// the clipped norm. Usable before there is a layout, in order to make one. A tensor is frozen as a whole.
/// [`super::Optimizer::new`] reports invalid patterns.
pub fn is_frozen(optim: &OptimSection, param: &Param) -> bool {
    if layers::is_held(optim, param) {
        return true;
    }
    if !optim.groups.iter().any(|group| group.frozen) {
        return false;
    }
    let patterns: Vec<_> = optim.groups.iter().map(|group| whole(&group.pattern).ok()).collect();
    let frozen = |part: &Part| {
        let hit = |pattern: &Option<Regex>| {
            pattern.as_ref().is_some_and(|p| part.names.iter().any(|name| p.is_match(name)))
        };
        patterns.iter().position(hit).is_some_and(|i| optim.groups[i].frozen)
    };
    parts(param).iter().all(frozen)
}

/// Whether a parameter is decayed by default, without a group.
pub(crate) fn is_decayed(decay_on: DecayOn, param: &Param) -> bool {
    match decay_on {
        DecayOn::All => true,
        DecayOn::Kernels => param.kind.is_kernel(),
        DecayOn::Timm => {
            param.shape.len() > 1 && !matches!(param.kind, ParamKind::ExtraToken | ParamKind::PosEmbed)
        }
    }
}
