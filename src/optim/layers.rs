//! The layer number of a parameter, for layer-wise learning rates and for frozen layers.
//!
//! The stem is layer 0, block i is layer i + 1, the head is layer L + 1. Layer n learns at `d^(L + 1 - n)`
//! times the head's rate (Clark et al. 2020, arXiv:2003.10555; for images Bao et al. 2022, arXiv:2106.08254).
//! Code bases differ in the layer of the final norm.

use crate::error::{Error, Result};
use crate::recipe::{LayerNumbering, OptimSection};
use crate::vit::params::Param;

/// The factor of `optim.layer_decay` on a parameter's learning rate, in a model of `depth` blocks.
pub(crate) fn scale(optim: &OptimSection, param: &Param, depth: usize) -> f64 {
    let below_head = depth + 1 - number(optim.layer_numbering, param, depth);
    optim.layer_decay.powi(below_head as i32)
}

/// The layer number: 0 for the stem, `depth + 1` for the head.
fn number(numbering: LayerNumbering, param: &Param, depth: usize) -> usize {
    match numbering {
        // timm's pattern is `^norm`, which `fc_norm` and the norm of an attention pool do not match.
        LayerNumbering::Timm if param.name.starts_with("norm.") => depth,
        LayerNumbering::Timm | LayerNumbering::Beit => param.depth,
    }
}

/// Whether `optim.freeze_backbone` or `optim.freeze_blocks` freezes a parameter.
pub(crate) fn is_held(optim: &OptimSection, param: &Param) -> bool {
    let in_backbone = optim.freeze_backbone && !param.kind.is_head();
    in_backbone || (optim.freeze_blocks > 0 && param.depth <= optim.freeze_blocks)
}

/// Refuses to freeze more blocks than there are.
pub(crate) fn check(optim: &OptimSection, depth: usize) -> Result<()> {
    if optim.freeze_blocks <= depth {
        return Ok(());
    }
    Err(Error::usage(format!(
        "`optim.freeze_blocks` is {}, but the model has {depth} blocks",
        optim.freeze_blocks
    ))
    .hint(format!(
        "use 0 to {depth}; `--set optim.freeze_backbone=true` also freezes the final norm and trains only the head"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vit::config::{ModelConfig, NormPlace, PoolKind};
    use crate::vit::params::ParamLayout;

    fn config(pool: PoolKind, norm: NormPlace) -> ModelConfig {
        let extra_tokens = usize::from(pool == PoolKind::Token);
        ModelConfig { pool, norm, extra_tokens, depth: 3, ..ModelConfig::variant("Ti/16", 32, 5).unwrap() }
    }

    /// The rates of all parameters whose names start so; they must agree.
    fn scale_of(optim: &OptimSection, config: &ModelConfig, prefix: &str) -> f64 {
        let layout = ParamLayout::new(config, |_| false);
        let mut scales =
            layout.parameters().filter(|p| p.name.starts_with(prefix)).map(|p| scale(optim, p, config.depth));
        let first = scales.next().unwrap_or_else(|| panic!("no parameter `{prefix}`"));
        assert!(scales.all(|s| s == first), "{prefix}");
        first
    }

    #[test]
    fn layers_are_counted_as_timm_and_beit_count_them() {
        let halves = |numbering, pool, norm, expected: &[(&str, i32)]| {
            let optim =
                OptimSection { layer_decay: 0.5, layer_numbering: numbering, ..OptimSection::default() };
            for (prefix, power) in expected {
                let got = scale_of(&optim, &config(pool, norm), prefix);
                assert_eq!(got, 0.5f64.powi(*power), "{numbering:?}, {pool:?}, `{prefix}`");
            }
        };
        let below =
            [("cls_token", 4), ("pos_embed", 4), ("patch_embed", 4), ("blocks.0.", 3), ("blocks.2.", 1)];
        for numbering in [LayerNumbering::Timm, LayerNumbering::Beit] {
            halves(numbering, PoolKind::Token, NormPlace::Before, &below);
            halves(numbering, PoolKind::Token, NormPlace::Before, &[("head.", 0)]);
            halves(numbering, PoolKind::Gap, NormPlace::After, &[("fc_norm.", 0), ("blocks.1.", 2)]);
            halves(numbering, PoolKind::Map, NormPlace::Before, &[("attn_pool.", 0)]);
        }
        halves(LayerNumbering::Timm, PoolKind::Token, NormPlace::Before, &[("norm.", 1)]);
        halves(LayerNumbering::Beit, PoolKind::Token, NormPlace::Before, &[("norm.", 0)]);
    }

    #[test]
    fn frozen_layers_are_those_below_and_no_others() {
        let layout = ParamLayout::new(&config(PoolKind::Token, NormPlace::Before), |_| false);
        let held = |optim: &OptimSection| {
            layout.parameters().filter(|p| is_held(optim, p)).map(|p| p.name.as_str()).collect::<Vec<_>>()
        };
        assert!(held(&OptimSection::default()).is_empty());
        let two = held(&OptimSection { freeze_blocks: 2, ..OptimSection::default() });
        let below = |name: &&str| {
            ["cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1."]
                .iter()
                .any(|p| name.starts_with(p))
        };
        assert!(two.iter().all(below));
        assert_eq!(two.len(), layout.parameters().filter(|p| below(&p.name.as_str())).count());
        let backbone = held(&OptimSection { freeze_backbone: true, ..OptimSection::default() });
        let left = layout.parameters().map(|p| p.name.as_str()).filter(|n| !backbone.contains(n));
        assert_eq!(left.collect::<Vec<_>>(), ["head.weight", "head.bias"]);

        let four = OptimSection { freeze_blocks: 4, ..OptimSection::default() };
        assert_eq!(check(&four, 4).map_err(|e| e.to_string()), Ok(()));
        assert_eq!(check(&four, 3).unwrap_err().exit_code(), 2);
    }
}
