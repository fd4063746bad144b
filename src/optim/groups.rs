//! Which parameters share a learning rate and a decay: name patterns first, then the recipe's defaults.
//!
//! A pattern may speak timm's names (`blocks.0.attn.qkv.weight`) or flax's (`.*/query/kernel`), so that groups can be
//! copied from either world. Flax has q, k and v as tensors of their own; here they are [`Part`]s of one tensor, which
//! may differ in everything but in being frozen.

use regex_lite::Regex;

use crate::error::{Error, Result};
use crate::recipe::{DecayOn, GroupSection, OptimSection};
use crate::vit::params::{Param, ParamKind};

use super::layers;

/// What flax would call one tensor: all of a parameter, or the q, k or v share of a fused one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// Own name first, then flax's, in both numberings.
    pub(crate) names: Vec<String>,
    /// Which of how many equal shares of the tensor's output channels.
    pub(crate) index: usize,
    pub(crate) count: usize,
}

/// The parts of a parameter, in memory order.
pub(crate) fn parts(param: &Param) -> Vec<Part> {
    let flax = flax_names(&param.name);
    let count = flax.len();
    let part = |(index, names): (usize, Vec<String>)| Part {
        names: std::iter::once(param.name.clone()).chain(names).collect(),
        index,
        count,
    };
    flax.into_iter().enumerate().map(part).collect()
}

/// The names of flax for our name: one list of aliases for each tensor that flax has. An empty list: flax has none.
fn flax_names(own: &str) -> Vec<Vec<String>> {
    let single = |name: &str| vec![vec![name.to_string()]];
    match own {
        "cls_token" => return single("cls"),
        "pos_embed" => return single("pos_embedding"),
        "attn_pool.latent" => return single("MAPHead_0/probe"),
        _ => {}
    }
    let Some((module, leaf)) = own.rsplit_once('.') else { return vec![vec![]] };
    let dense = if leaf == "weight" { "kernel" } else { leaf };
    let norm = if leaf == "weight" { "scale" } else { leaf };
    match module {
        "patch_embed.proj" => return single(&format!("embedding/{dense}")),
        "norm" | "fc_norm" => return single(&format!("Transformer/encoder_norm/{norm}")),
        "pre_logits" | "head" | "head_dist" => return single(&format!("{module}/{dense}")),
        _ => {}
    }

    // Inside a block the published files count all children together and linen counts each class by itself.
    let (place, module, numberings) = if let Some(module) = module.strip_prefix("attn_pool.") {
        ("MAPHead_0".to_string(), module, vec![[0, 0, 0]])
    } else if let Some((i, module)) = module.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        (format!("Transformer/encoderblock_{i}"), module, vec![[1, 2, 3], [0, 1, 0]])
    } else {
        return vec![vec![]];
    };
    let aliases = |name: &dyn Fn([usize; 3]) -> String| {
        numberings.iter().map(|n| format!("{place}/{}", name(*n))).collect::<Vec<_>>()
    };
    let attention = |children: &[&str]| {
        let child = |c: &&str| aliases(&|[a, ..]| format!("MultiHeadDotProductAttention_{a}/{c}/{dense}"));
        children.iter().map(child).collect::<Vec<_>>()
    };
    match module {
        "norm1" | "norm" => vec![vec![format!("{place}/LayerNorm_0/{norm}")]],
        "norm2" => vec![aliases(&|[_, n, _]| format!("LayerNorm_{n}/{norm}"))],
        "attn.qkv" => attention(&["query", "key", "value"]),
        "kv" => attention(&["key", "value"]),
        "q" => attention(&["query"]),
        "attn.proj" | "proj" => attention(&["out"]),
        "mlp.fc1" => vec![aliases(&|[.., m]| format!("MlpBlock_{m}/Dense_0/{dense}"))],
        "mlp.fc2" => vec![aliases(&|[.., m]| format!("MlpBlock_{m}/Dense_1/{dense}"))],
        _ => vec![vec![]],
    }
}

/// The compiled patterns of `optim.groups`.
pub(crate) struct Patterns(Vec<Regex>);

impl Patterns {
    /// An error names the pattern that is not a regular expression.
    pub(crate) fn new(groups: &[GroupSection]) -> Result<Patterns> {
        let compile = |(i, group): (usize, &GroupSection)| {
            whole(&group.pattern).map_err(|e| {
                Error::usage(format!("{}: not a regular expression: {e}", place(i, group)))
                    .hint("a pattern looks like `head/.*` or `blocks\\.\\d+\\.norm1\\..*`")
            })
        };
        Ok(Patterns(groups.iter().enumerate().map(compile).collect::<Result<_>>()?))
    }

    /// The first group that one of the names belongs to.
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

/// How messages name a group.
pub(crate) fn place(index: usize, group: &GroupSection) -> String {
    format!("`optim.groups[{index}]` (pattern `{}`)", group.pattern)
}

/// Whether the recipe freezes a parameter: no gradient, no moments, no part in the clipped norm. Usable before there
/// is a layout, and for it. A tensor is frozen as a whole; patterns that are wrong are reported by
/// [`super::Optimizer::new`].
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

/// Whether a parameter is decayed where no group says so.
pub(crate) fn is_decayed(decay_on: DecayOn, param: &Param) -> bool {
    match decay_on {
        DecayOn::All => true,
        DecayOn::Kernels => param.kind.is_kernel(),
        DecayOn::Timm => {
            param.shape.len() > 1 && !matches!(param.kind, ParamKind::ExtraToken | ParamKind::PosEmbed)
        }
    }
}
