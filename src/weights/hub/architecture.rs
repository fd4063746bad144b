//! What the name of a timm architecture implies.
//!
//! timm builds a model from its name; a file has only the tensors. The rules are those of the constructors in timm's
//! `vision_transformer.py`, `eva.py` and `deit.py`.

use crate::backend::Gelu;
use crate::error::{Error, Result};
use crate::vit::config::{MapTokens, RopeIndexing, RopeKind};
use crate::weights::usual::{Rotary, Usual};

/// Architectures that compute differently from what their tensors suggest: a part of the name, and its
/// meaning.
const OTHERWISE: [(&str, &str); 8] = [
    ("_rpn_", "norms after the branches"),
    ("rope_mixed", "rotary positions with learned frequencies in each block"),
    ("naflexvit", "batches of pictures of several sizes (NaFlex)"),
    ("samvit", "windowed attention (SAM)"),
    ("aimv2", "RMSNorm (AIMv2)"),
    ("eva02_enormous", "norms after the branches"),
    ("beit", "relative positions or norms inside its attention (BEiT)"),
    ("test_vit4", "RMSNorm"),
];

/// Architectures whose MLP has the tanh form.
const TANH: [&str; 6] = [
    "so400m_patch16_siglip",
    "giantopt",
    "vit_base_patch32_siglip_256",
    "vit_base_patch32_siglip_gap_256",
    "vit_large_patch16_siglip_512",
    "vit_large_patch16_siglip_gap_512",
];

/// Architectures whose heads are not 64 wide: a part of the name, and their number of heads. The first match counts.
const HEADS: [(&str, usize); 12] = [
    ("vit_base_patch16_gap_224", 16),
    ("vit_giant_patch14_dinov2", 24),
    ("vit_giant_patch14_reg4_dinov2", 24),
    ("vit_giant_patch14_reg1_tipsv2", 24),
    ("vit_huge_plus", 20),
    ("vit_huge", 16),
    ("deit3_huge", 16),
    ("vit_7b", 32),
    ("giantopt", 16),
    ("vit_pe_", 0),
    ("test_vit3", 3),
    ("test_vit", 2),
];

/// # Errors
/// The architecture computes something that is not supported.
pub(super) fn usual(name: &str) -> Result<Usual> {
    if let Some((_, what)) = OTHERWISE.iter().find(|(mark, _)| name.contains(mark)) {
        return Err(Error::new(format!("the architecture `{name}` has {what}, which is not supported"))
            .hint("use a plain Vision Transformer, such as `vit_base_patch16_224`"));
    }
    let any = |marks: &[&str]| marks.iter().any(|mark| name.contains(mark));
    let gelu = match () {
        () if name.contains("quickgelu") => Gelu::Quick,
        () if any(&TANH) => Gelu::Tanh,
        () => Gelu::Erf,
    };
    // EVA-CLIP's are in timm's Eva class, whose norms have 1e-6.
    let clip = name.starts_with("vit_") && name.contains("clip");
    let perception = name.starts_with("vit_pe_");
    let other_eps = clip || perception || name.contains("dinov3");
    let heads = HEADS.iter().find(|(mark, _)| name.contains(mark)).map(|(_, heads)| *heads);
    Ok(Usual {
        heads: match heads {
            Some(0) => name.contains("gigantic").then_some(16),
            heads => heads,
        },
        gelu: Some(gelu),
        ln_eps: Some(if other_eps { 1e-5 } else { 1e-6 }),
        pool: None,
        rope: Some(rotary(name)),
        map_heads: perception.then_some(8),
        map_tokens: Some(if perception || name == "test_vit3" { MapTokens::All } else { MapTokens::Patches }),
    })
}

fn rotary(name: &str) -> Rotary {
    let eva = |theta, reference, offset, indexing| Rotary {
        kind: RopeKind::Eva,
        theta,
        reference,
        offset,
        indexing,
    };
    match () {
        () if name.contains("dinov3") => Rotary::of(RopeKind::Dinov3),
        () if name.starts_with("eva02_") || name.contains("_rope_reg") => {
            eva(None, Some((16, 16)), 0.0, RopeIndexing::Ij)
        }
        () if name.contains("_rope_") => eva(Some(100.0), None, 0.0, RopeIndexing::Xy),
        () if name.starts_with("vit_pe_") => {
            let offset = if name.contains("gigantic") { 0.0 } else { 1.0 };
            eva(None, own_grid(name), offset, RopeIndexing::Xy)
        }
        () => Rotary::NONE,
    }
}

/// The grid of patches of an architecture called `..._patch14_336`.
fn own_grid(name: &str) -> Option<(usize, usize)> {
    let (_, rest) = name.split_once("_patch")?;
    let (patch, image) = rest.split_once('_')?;
    let side = image.parse::<usize>().ok()?.checked_div(patch.parse().ok()?)?;
    Some((side, side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_imply_what_timm_builds() {
        for (name, heads, gelu, ln_eps) in [
            ("vit_base_patch16_224", None, Gelu::Erf, 1e-6),
            ("vit_base_patch32_clip_quickgelu_224", None, Gelu::Quick, 1e-5),
            ("vit_huge_patch14_clip_224", Some(16), Gelu::Erf, 1e-5),
            ("eva_giant_patch14_clip_224", None, Gelu::Erf, 1e-6),
            ("vit_so400m_patch16_siglip_gap_256", None, Gelu::Tanh, 1e-6),
            ("vit_so400m_patch14_siglip_384", None, Gelu::Erf, 1e-6),
            ("vit_giantopt_patch16_siglip_256", Some(16), Gelu::Tanh, 1e-6),
            ("vit_giant_patch14_reg4_dinov2", Some(24), Gelu::Erf, 1e-6),
            ("vit_huge_plus_patch16_dinov3", Some(20), Gelu::Erf, 1e-5),
            ("vit_7b_patch16_dinov3", Some(32), Gelu::Erf, 1e-5),
            ("vit_pe_core_gigantic_patch14_448", Some(16), Gelu::Erf, 1e-5),
            ("vit_pe_core_base_patch16_224", None, Gelu::Erf, 1e-5),
        ] {
            let usual = usual(name).unwrap();
            assert_eq!((usual.heads, usual.gelu, usual.ln_eps), (heads, Some(gelu), Some(ln_eps)), "{name}");
        }
        for (name, rotary) in [
            ("vit_medium_patch16_reg4_gap_256", Rotary::NONE),
            ("eva_giant_patch14_224", Rotary::NONE),
            ("vit_small_patch16_dinov3_qkvb", Rotary::of(RopeKind::Dinov3)),
            ("eva02_base_patch14_448", Rotary { reference: Some((16, 16)), ..Rotary::of(RopeKind::Eva) }),
            (
                "vit_base_patch16_rope_224",
                Rotary { theta: Some(100.0), indexing: RopeIndexing::Xy, ..Rotary::of(RopeKind::Eva) },
            ),
            (
                "vit_pe_core_large_patch14_336",
                Rotary {
                    reference: Some((24, 24)),
                    offset: 1.0,
                    indexing: RopeIndexing::Xy,
                    ..Rotary::of(RopeKind::Eva)
                },
            ),
        ] {
            assert_eq!(usual(name).unwrap().rope, Some(rotary), "{name}");
        }
        for name in ["vit_base_patch16_rope_mixed_224", "aimv2_large_patch14_224", "beit_base_patch16_224"] {
            let error = usual(name).unwrap_err();
            assert!(error.message().contains(name) && error.message().contains("not supported"), "{error}");
        }
    }
}
