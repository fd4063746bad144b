//! timm's state dict, which is also our own layout. Old spellings are read too.

use super::{LayoutKind, Plan, Shapes, Source};
use crate::error::Result;
use crate::fail;
use crate::vit::names::Form;

pub(super) fn plan(shapes: &Shapes) -> Result<Plan> {
    let mut plan = Plan::new(LayoutKind::Timm);
    let shapes = plan.without_pretext(shapes);
    // DeiT's and DeiT-III's own.
    plan.imagenet |= shapes.keys().any(|name| name == "dist_token" || name.ends_with(".gamma_1"));
    for (name, shape) in &shapes {
        let source = Source { file_name: name.clone(), layer: None, shape: shape.clone(), form: Form::Same };
        if let Some(previous) = plan.sources.insert(own_name(name), vec![source]) {
            fail!("`{}` and `{name}` are the same tensor", previous[0].file_name);
        }
    }
    plan.finish()
}

/// DeiT-III's LayerScale and the representation layer of timm before 0.6.
fn own_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("pre_logits.fc.") {
        return format!("pre_logits.{rest}");
    }
    for n in ["1", "2"] {
        if let Some(block) = name.strip_suffix(&format!(".gamma_{n}")) {
            return format!("{block}.ls{n}.gamma");
        }
    }
    name.to_string()
}
