//! The message for a file of unknown layout: the closest layout, and the first name that does not fit it.

use super::{Shapes, huggingface};
use crate::error::Error;
use crate::vit::names::{block_of, flax_parts, from_flax, to_linen};

/// Whether a layout has such a name.
type Known = fn(&str) -> bool;

const LAYOUTS: [(&str, Known); 3] = [
    ("timm's", is_timm),
    ("vit_jax's", is_flax),
    ("HuggingFace's", |name| huggingface::own_name(name).is_some()),
];

fn is_flax(name: &str) -> bool {
    from_flax(&to_linen(name)).is_some() || name.ends_with("pos_embedding")
}

/// Our names are timm's; most of them are those that have a flax counterpart.
fn is_timm(name: &str) -> bool {
    let scale = block_of(name, "blocks.", '.').is_some_and(|(_, rest)| rest.starts_with("ls"));
    scale || name == "dist_token" || !flax_parts(name)[0].is_empty()
}

/// Tries the names unchanged, and without leading segments that a wrapper may have added (`module.`,
/// `model.`, `backbone.`).
pub(super) fn refuse(shapes: &Shapes) -> Error {
    let mut prefixes = vec![""];
    for name in shapes.keys().take(64) {
        for (end, _) in name.match_indices(['.', '/']).take(2) {
            if !prefixes.contains(&&name[..=end]) {
                prefixes.push(&name[..=end]);
            }
        }
    }
    let fits = |prefix: &str, known: Known| {
        shapes.keys().filter_map(|name| name.strip_prefix(prefix)).filter(|name| known(name)).count()
    };
    let tries =
        prefixes.iter().flat_map(|p| LAYOUTS.map(|(layout, known)| (fits(p, known), *p, layout, known)));
    // Of equal ones the first: a shorter prefix.
    let best = tries.fold((0, "", "", is_timm as Known), |best, one| if one.0 > best.0 { one } else { best });
    let (count, prefix, layout, known) = best;
    let some: Vec<String> = shapes.keys().take(3).map(|n| format!("`{n}`")).collect();
    let holds = if some.is_empty() { "no tensors".to_string() } else { some.join(", ") + ", ..." };
    if count == 0 {
        return Error::new(format!("not a Vision Transformer's weights: it holds {holds}")).hint(
            "known layouts are vit_jax's and big_vision's `.npz`, timm's and HuggingFace's safetensors",
        );
    }
    let message = format!(
        "not a Vision Transformer's weights, judging by its names: {count} of {} are {layout}",
        shapes.len()
    );
    let misfit = shapes.keys().find(|name| !name.strip_prefix(prefix).is_some_and(known));
    let message = match (prefix, misfit) {
        ("", Some(name)) => format!("{message}; the first that is not is `{name}`"),
        ("", None) => message,
        (prefix, Some(name)) => format!("{message} after `{prefix}`; the first that is not is `{name}`"),
        (prefix, None) => format!("{message} after `{prefix}`"),
    };
    Error::new(message).hint(if prefix.is_empty() {
        "leave tensors out with `--set weights.exclude=REGEX`, rename them with `--set weights.rename=REGEX=>NEW`".into()
    } else {
        format!("remove it with `--set 'weights.rename=^{}=>'`", regex_lite::escape(prefix))
    })
}
