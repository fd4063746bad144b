//! The user's answers to what a weights file does not say itself: `--set KEY=VALUE`.

use regex_lite::Regex;

use crate::backend::{Gelu, LossKind};
use crate::error::{Error, Result};
use crate::vit::config::{MapTokens, NormPlace, PoolKind, Posemb, PosembJoin, RopeIndexing, RopeKind};

/// Pixels per side; a wrong number must not overflow a product.
pub(super) const MAX_SIDE: usize = 1 << 16;

/// The settings of `--set KEY=VALUE` for what a file does not say itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelOverrides {
    /// `model.heads`
    pub heads: Option<usize>,
    /// `model.gelu`
    pub gelu: Option<Gelu>,
    /// `model.ln_eps`
    pub ln_eps: Option<f32>,
    /// `model.pool`
    pub pool: Option<PoolKind>,
    /// `model.norm`
    pub norm: Option<NormPlace>,
    /// `model.posemb`
    pub posemb: Option<Posemb>,
    /// `model.posemb_join`
    pub posemb_join: Option<PosembJoin>,
    /// `model.rope`
    pub rope: Option<RopeKind>,
    /// `model.rope_theta`
    pub rope_theta: Option<f32>,
    /// `model.rope_ref`
    pub rope_ref: Option<(usize, usize)>,
    /// `model.rope_offset`
    pub rope_offset: Option<f32>,
    /// `model.rope_indexing`
    pub rope_indexing: Option<RopeIndexing>,
    /// `model.map_heads`
    pub map_heads: Option<usize>,
    /// `model.map_tokens`
    pub map_tokens: Option<MapTokens>,
    /// (H, W)
    pub image: Option<(usize, usize)>,
    /// `weights.exclude`: tensors of the file with such a name are left out.
    pub exclude: Vec<Pattern>,
    /// `data.mean`, `data.std`: for pixels in [0, 1].
    pub mean: Option<[f64; 3]>,
    /// The divisor that goes with `mean`.
    pub std: Option<[f64; 3]>,
    /// `loss.kind`: the loss that the head was trained with.
    pub loss: Option<LossKind>,
    /// `weights.rename`: the first match in a tensor's name is replaced by the text (`$1`: the first group's
    /// match); the rules are applied one after the other.
    pub rename: Vec<(Pattern, String)>,
}

/// A regular expression; equal to another with the same text.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl Pattern {
    fn new(text: &str, key: &str) -> Result<Self> {
        let regex = Regex::new(text).map_err(|e| {
            Error::usage(format!("`{key}`: `{text}` is not a regular expression: {e}"))
                .hint(format!("as in `--set '{key}={}'`", example(key)))
        })?;
        Ok(Self(regex))
    }

    pub(super) fn is_match(&self, name: &str) -> bool {
        self.0.is_match(name)
    }

    pub(super) fn replace<'a>(&self, name: &'a str, by: &str) -> std::borrow::Cow<'a, str> {
        self.0.replace(name, by)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl ModelOverrides {
    const KEYS: [&str; 20] = [
        "model.heads",
        "model.gelu",
        "model.ln_eps",
        "model.pool",
        "model.norm",
        "model.posemb",
        "model.posemb_join",
        "model.rope",
        "model.rope_theta",
        "model.rope_ref",
        "model.rope_offset",
        "model.rope_indexing",
        "model.map_heads",
        "model.map_tokens",
        "model.image",
        "data.mean",
        "data.std",
        "loss.kind",
        "weights.rename",
        "weights.exclude",
    ];

    /// From the pairs of `--set`, such as (`model.heads`, `4`). Patterns accumulate; for other keys the last
    /// one wins. An unknown key or an invalid value is a usage error.
    pub fn from_sets(sets: &[(String, String)]) -> Result<Self> {
        let mut out = Self::default();
        for (key, value) in sets {
            let wrong = |expected: &str| {
                Error::usage(format!("`{key}` is `{value}`"))
                    .hint(format!("{expected}, as in `--set {key}={}`", example(key)))
            };
            match key.as_str() {
                "model.heads" | "model.map_heads" => {
                    let heads =
                        Some(value.parse().ok().filter(|h| *h > 0).ok_or_else(|| wrong("give a number"))?);
                    if key == "model.heads" { out.heads = heads } else { out.map_heads = heads }
                }
                "model.rope" => {
                    out.rope = Some(choice(value).ok_or_else(|| wrong("`none`, `dinov3` or `eva`"))?)
                }
                "model.rope_theta" => {
                    out.rope_theta = Some(value.parse().map_err(|_| wrong("give a number"))?)
                }
                "model.rope_offset" => {
                    out.rope_offset = Some(value.parse().map_err(|_| wrong("give a number"))?)
                }
                "model.rope_ref" => {
                    out.rope_ref = Some(parse_image(value).ok_or_else(|| wrong("give a grid, `H` or `HxW`"))?)
                }
                "model.rope_indexing" => {
                    out.rope_indexing = Some(choice(value).ok_or_else(|| wrong("`ij` or `xy`"))?)
                }
                "model.map_tokens" => {
                    out.map_tokens = Some(choice(value).ok_or_else(|| wrong("`all` or `patches`"))?)
                }
                "model.ln_eps" => out.ln_eps = Some(value.parse().map_err(|_| wrong("give a number"))?),
                "model.image" => {
                    out.image = Some(parse_image(value).ok_or_else(|| wrong("give `H` or `HxW`"))?)
                }
                "model.gelu" => {
                    out.gelu = Some(choice(value).ok_or_else(|| wrong("`tanh`, `erf` or `quick`"))?)
                }
                "model.pool" => {
                    out.pool =
                        Some(choice(value).ok_or_else(|| wrong("`token`, `gap`, `map` or `token_gap`"))?)
                }
                "model.norm" => {
                    out.norm = Some(
                        choice(value).ok_or_else(|| wrong("`before` or `after` the pooling, or `none`"))?,
                    )
                }
                "model.posemb" => {
                    out.posemb = Some(choice(value).ok_or_else(|| wrong("`learned`, `sincos2d` or `none`"))?)
                }
                "model.posemb_join" => {
                    out.posemb_join = Some(
                        choice(value).ok_or_else(|| wrong("`before` or `after` the class token joins"))?,
                    )
                }
                "data.mean" => {
                    out.mean =
                        Some(three(value).ok_or_else(|| wrong("give three numbers of pixels in [0, 1]"))?)
                }
                "data.std" => {
                    let all = three(value).filter(|std| std.iter().all(|s| *s > 0.0));
                    out.std = Some(all.ok_or_else(|| wrong("give three numbers above 0"))?)
                }
                "loss.kind" => out.loss = Some(choice(value).ok_or_else(|| wrong("`softmax` or `sigmoid`"))?),
                // All of a name, as in `optim.groups`.
                "weights.exclude" => out.exclude.push(Pattern::new(&format!("^(?:{value})$"), key)?),
                "weights.rename" => {
                    let (pattern, by) = value.split_once("=>").ok_or_else(|| wrong("give `REGEX=>NEW`"))?;
                    out.rename.push((Pattern::new(pattern.trim(), key)?, by.trim().to_string()));
                }
                _ => return Err(unknown_key(key)),
            }
        }
        Ok(out)
    }
}

fn example(key: &str) -> &'static str {
    match key {
        "model.heads" => "12",
        "model.ln_eps" => "1e-6",
        "model.image" => "224",
        "model.gelu" => "tanh",
        "model.pool" => "gap",
        "model.posemb" => "learned",
        "model.rope" => "dinov3",
        "model.rope_theta" => "100",
        "model.rope_ref" => "16",
        "model.rope_offset" => "0",
        "model.rope_indexing" => "ij",
        "model.map_heads" => "8",
        "model.map_tokens" => "all",
        "data.mean" => "[0.485,0.456,0.406]",
        "data.std" => "[0.229,0.224,0.225]",
        "loss.kind" => "sigmoid",
        "weights.exclude" => "head_dist\\..*",
        "weights.rename" => "^module\\.=>",
        _ => "before",
    }
}

/// One of a serde enum's names.
fn choice<T: serde::de::DeserializeOwned>(value: &str) -> Option<T> {
    serde_json::from_value(value.into()).ok()
}

/// `[R,G,B]`, or without the brackets.
fn three(value: &str) -> Option<[f64; 3]> {
    let inner = value.trim().trim_start_matches('[').trim_end_matches(']');
    let numbers: Vec<f64> = inner.split(',').map(|n| n.trim().parse().ok()).collect::<Option<_>>()?;
    <[f64; 3]>::try_from(numbers).ok().filter(|three| three.iter().all(|n| n.is_finite()))
}

fn parse_image(text: &str) -> Option<(usize, usize)> {
    let (h, w) = text.split_once('x').unwrap_or((text, text));
    let side = |s: &str| s.trim().parse().ok().filter(|s| (1..=MAX_SIDE).contains(s));
    Some((side(h)?, side(w)?))
}

fn unknown_key(key: &str) -> Error {
    let keys = ModelOverrides::KEYS;
    let nearest = keys.iter().max_by(|a, b| strsim::jaro(a, key).total_cmp(&strsim::jaro(b, key)));
    Error::usage(format!("`{key}` cannot be set for a weights file")).hint(format!(
        "did you mean `{}`? There are {}; sizes come from the tensors",
        nearest.expect("there are keys"),
        keys.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(pairs: &[(&str, &str)]) -> Result<ModelOverrides> {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        ModelOverrides::from_sets(&pairs)
    }

    #[test]
    fn overrides_parse_and_wrong_ones_are_wrong_usage() {
        let o = sets(&[
            ("model.image", "16x24"),
            ("model.gelu", "erf"),
            ("model.ln_eps", "1e-12"),
            ("model.heads", "3"),
        ]);
        let o = o.unwrap();
        assert_eq!(
            (o.image, o.gelu, o.ln_eps, o.heads),
            (Some((16, 24)), Some(Gelu::Erf), Some(1e-12), Some(3))
        );

        for (key, value, hint) in [
            ("model.gelu", "relu", "`tanh`, `erf` or `quick`, as in `--set model.gelu=tanh`"),
            ("model.heads", "0", "give a number, as in `--set model.heads=12`"),
            ("model.image", "16x", "give `H` or `HxW`, as in `--set model.image=224`"),
            ("model.head", "3", "did you mean `model.heads`?"),
            ("optim.lr", "3", "did you mean"),
            ("loss.kind", "bce", "`softmax` or `sigmoid`, as in `--set loss.kind=sigmoid`"),
            ("weights.rename", "^module", "give `REGEX=>NEW`, as in `--set weights.rename=^module\\.=>`"),
            ("weights.exclude", "(", "as in `--set 'weights.exclude="),
        ] {
            let error = sets(&[(key, value)]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.hint_text().unwrap().starts_with(hint), "{error}");
        }
    }
}
