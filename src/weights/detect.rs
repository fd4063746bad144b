//! Detects which model is in a file: sizes from shapes, the rest from the file's metadata. The user's
//! settings override both.

use regex_lite::Regex;

use super::headers::Stored;
use super::hub::{Hub, SizeOf, Usual};
use super::layouts::{LayoutKind, Plan, Shapes};
use super::tensor::shape_text;
use crate::backend::{Gelu, LossKind};
use crate::error::{Error, Result};
use crate::fail;
use crate::vit::config::{DropPathMode, ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin};
use crate::vit::names::block_of;

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

/// How the error for an unknown number of heads begins.
pub(super) const NO_HEADS: &str = "the number of heads is not in the file";

/// Pixels per side; a wrong number must not overflow a product.
const MAX_SIDE: usize = 1 << 16;
/// Width, mlp, classes; far beyond any model, for the same reason.
const MAX_WIDTH: usize = 1 << 22;
const MAX_DEPTH: usize = 1 << 12;

impl ModelOverrides {
    const KEYS: [&str; 13] = [
        "model.heads",
        "model.gelu",
        "model.ln_eps",
        "model.pool",
        "model.norm",
        "model.posemb",
        "model.posemb_join",
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
                "model.heads" => {
                    out.heads =
                        Some(value.parse().ok().filter(|h| *h > 0).ok_or_else(|| wrong("give a number"))?)
                }
                "model.ln_eps" => out.ln_eps = Some(value.parse().map_err(|_| wrong("give a number"))?),
                "model.image" => {
                    out.image = Some(parse_image(value).ok_or_else(|| wrong("give `H` or `HxW`"))?)
                }
                "model.gelu" => out.gelu = Some(choice(value).ok_or_else(|| wrong("`tanh` or `erf`"))?),
                "model.pool" => {
                    out.pool = Some(choice(value).ok_or_else(|| wrong("`token`, `gap` or `map`"))?)
                }
                "model.norm" => {
                    out.norm = Some(choice(value).ok_or_else(|| wrong("`before` or `after` the pooling"))?)
                }
                "model.posemb" => {
                    out.posemb = Some(choice(value).ok_or_else(|| wrong("`learned` or `sincos2d`"))?)
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

/// The sizes from the shapes.
#[derive(Debug)]
pub(super) struct Sizes {
    pub(super) width: usize,
    pub(super) depth: usize,
    pub(super) mlp: usize,
    pub(super) classes: usize,
    pub(super) patch: (usize, usize),
    pub(super) rep_size: usize,
    pub(super) extra_tokens: usize,
    pub(super) posemb_rows: Option<usize>,
    layer_scale: bool,
    qkv_bias: bool,
    map: bool,
    fc_norm: bool,
}

impl Sizes {
    pub(super) fn of(shapes: &Shapes) -> Result<Self> {
        let matrix = |name: &str| match shapes.get(name).map(Vec::as_slice) {
            Some(&[rows, cols]) => Ok((rows, cols)),
            Some(other) => {
                Err(Error::new(format!("tensor `{name}` has shape {}, not two axes", shape_text(other))))
            }
            None => Err(Error::new(format!("no tensor `{name}`"))),
        };
        let (width, patch) = match shapes.get("patch_embed.proj.weight").map(Vec::as_slice) {
            Some(&[d, _, ph, pw]) => (d, (ph, pw)),
            Some(other) => fail!("the patch kernel has shape {}, not four axes", shape_text(other)),
            None => fail!("no patch kernel (`patch_embed.proj.weight`, in flax `embedding/kernel`)"),
        };
        if patch.0.max(patch.1) > MAX_SIDE {
            fail!("a patch of {} x {} pixels", patch.0, patch.1);
        }
        let posemb_rows = match shapes.get("pos_embed").map(Vec::as_slice) {
            None => None,
            Some(&[1, rows, _]) => Some(rows),
            Some(other) => {
                fail!("the position embedding has shape {}, not [1, tokens, D]", shape_text(other))
            }
        };
        let sizes = Self {
            width,
            patch,
            depth: depth(shapes)?,
            mlp: matrix("blocks.0.mlp.fc1.weight")?.0,
            // None: features without a classifier.
            classes: if shapes.contains_key("head.weight") { matrix("head.weight")?.0 } else { 0 },
            rep_size: if shapes.contains_key("pre_logits.weight") {
                matrix("pre_logits.weight")?.0
            } else {
                0
            },
            extra_tokens: ["cls_token", "dist_token"].iter().filter(|t| shapes.contains_key(**t)).count(),
            posemb_rows,
            layer_scale: shapes.contains_key("blocks.0.ls1.gamma"),
            // If only some blocks have one, the others' are missing.
            qkv_bias: shapes.keys().any(|n| n.ends_with(".attn.qkv.bias")),
            map: shapes.contains_key("attn_pool.latent"),
            fc_norm: shapes.contains_key("fc_norm.weight"),
        };
        // Both halves of a gated layer are in one tensor, which has a plain layer's name.
        if matrix("blocks.0.mlp.fc2.weight").is_ok_and(|(_, cols)| sizes.mlp == 2 * cols) {
            fail!(
                "`blocks.0.mlp.fc1.weight` has twice the rows that `blocks.0.mlp.fc2.weight` takes: the model has a \
                 gated MLP (SwiGLU: DINOv2-g, EVA-02), which is not supported"
            );
        }
        let widest = sizes.width.max(sizes.mlp).max(sizes.classes).max(sizes.rep_size);
        if widest > MAX_WIDTH || sizes.depth > MAX_DEPTH {
            fail!("{} blocks and a layer of {widest} are not a plausible model", sizes.depth);
        }
        Ok(sizes)
    }

    /// Whether the position embedding can belong to pictures of this size.
    fn hold(&self, config: &ModelConfig, image: (usize, usize)) -> bool {
        let ((h, w), (ph, pw)) = (image, self.patch);
        let patches = (h / ph) * (w / pw);
        let fits = |rows: usize| rows == patches || rows == patches + self.extra_tokens;
        h % ph == 0 && w % pw == 0 && patches > 0 && learned_rows(config, self).is_none_or(fits)
    }

    fn pool(&self) -> PoolKind {
        match () {
            () if self.map => PoolKind::Map,
            // timm has this norm only with average pooling.
            () if self.extra_tokens > 0 && !self.fc_norm => PoolKind::Token,
            () => PoolKind::Gap,
        }
    }
}

/// Blocks are numbered from 0 without gaps.
fn depth(shapes: &Shapes) -> Result<usize> {
    let blocks: std::collections::BTreeSet<usize> =
        shapes.keys().filter_map(|n| block_of(n, "blocks.", '.')).map(|(i, _)| i).collect();
    match blocks.iter().enumerate().find(|(expected, found)| expected != *found) {
        Some((missing, _)) => fail!("block {missing} is missing"),
        None if blocks.is_empty() => {
            fail!("no blocks (`blocks.0...`, in flax `Transformer/encoderblock_0/...`)")
        }
        None => Ok(blocks.len()),
    }
}

/// A model's configuration, and what had to be assumed.
#[derive(Debug)]
pub(super) struct Detected {
    pub(super) config: ModelConfig,
    /// Whether the image size is known, not only the number of patches.
    pub(super) grid_known: bool,
    /// Whether neither the file nor the user gives the number of heads.
    pub(super) heads_assumed: bool,
}

/// `stored` is the configuration in the file's own metadata, `hub` what the files beside it say.
pub(super) fn detect(
    plan: &Plan,
    stored: Option<Stored>,
    hub: &Hub,
    overrides: &ModelOverrides,
) -> Result<Detected> {
    let sizes = Sizes::of(&plan.shapes)?;
    let from_metadata = stored.is_some();
    let grid_from_metadata = stored.as_ref().is_some_and(|s| s.grid_known);
    let mut config = match stored {
        Some(stored) => check_stored(stored.config, &sizes)?,
        None => from_sizes(&sizes, plan.kind),
    };
    let o = overrides;
    check_sizes(hub, &sizes)?;
    let usual = if from_metadata { Usual::default() } else { hub.usual };
    let heads = o.heads.or(hub.heads).or(plan.heads).or(usual.heads);
    check_heads(plan.heads, from_metadata.then_some(config.heads), hub, o, sizes.width)?;
    config.heads = heads.unwrap_or(config.heads);
    config.gelu = o.gelu.or(hub.gelu).or(usual.gelu).unwrap_or(config.gelu);
    config.ln_eps = o.ln_eps.or(hub.ln_eps).or(usual.ln_eps).unwrap_or(config.ln_eps);
    config.pool = o.pool.or(hub.pool).unwrap_or(config.pool);
    config.norm = o.norm.unwrap_or(config.norm);
    config.posemb = o.posemb.unwrap_or(config.posemb);

    let heads_known = from_metadata || heads.is_some();
    if !heads_known {
        config.heads = usual_heads(&sizes)?;
    }

    let image = o.image.or(hub.image).or(hub.pictures.filter(|image| sizes.hold(&config, *image)));
    if !from_metadata {
        config.posemb_join = join(&config, &sizes, plan, image);
    }
    config.posemb_join = o.posemb_join.unwrap_or(config.posemb_join);
    let grid_known = settle_grid(&mut config, &sizes, grid_from_metadata, image)?;
    // The file's values are not the user's mistake.
    validate(&config).map_err(|e| if *o == ModelOverrides::default() { e.into_failure() } else { e })?;
    Ok(Detected { config, grid_known, heads_assumed: !heads_known })
}

/// Sizes in a `config.json` must equal those of the tensors.
fn check_sizes(hub: &Hub, sizes: &Sizes) -> Result<()> {
    for (key, said, of) in &hub.sizes {
        let found = match of {
            SizeOf::Width => sizes.width,
            SizeOf::Depth => sizes.depth,
            SizeOf::Mlp => sizes.mlp,
            SizeOf::Patch => sizes.patch.0.min(sizes.patch.1),
            // A model without a classifier may still give the number of its data's classes.
            SizeOf::Classes if sizes.classes == 0 => continue,
            SizeOf::Classes => sizes.classes,
        };
        if *said != found {
            return Err(Error::new(format!("config.json: `{key}` is {said}, the tensors say {found}")).hint(format!(
                "if config.json is another model's than the weights, move it away; else correct `{key}` in it to {found}"
            )));
        }
    }
    Ok(())
}

/// `fixed` heads are in the shapes of the tensors; `stored` are in the metadata, where only the user overrules them.
fn check_heads(
    fixed: Option<usize>,
    stored: Option<usize>,
    hub: &Hub,
    o: &ModelOverrides,
    width: usize,
) -> Result<()> {
    if let (Some(fixed), Some(asked)) = (fixed, o.heads)
        && fixed != asked
    {
        return Err(Error::usage(format!("`model.heads` is {asked}, the tensors say {fixed}"))
            .hint("leave it out: the file's q kernels have their heads as an axis"));
    }
    let Some(said) = hub.heads.filter(|_| o.heads.is_none()) else { return Ok(()) };
    let (known, which) = match (fixed, stored) {
        (Some(fixed), _) => (fixed, "the tensors say"),
        (None, Some(stored)) => (stored, "the file's own metadata says"),
        (None, None) if width.is_multiple_of(said) => return Ok(()),
        (None, None) => {
            let near = (1..=width).filter(|h| width.is_multiple_of(*h)).min_by_key(|h| h.abs_diff(said));
            return Err(Error::new(format!(
                "config.json: {said} heads, which do not divide the width {width} of the tensors"
            ))
            .hint(format!(
                "if config.json is another model's than the weights, move it away; else give the number, as in `--set model.heads={}`",
                near.unwrap_or(1)
            )));
        }
    };
    if said == known {
        return Ok(());
    }
    Err(Error::new(format!("config.json: {said} heads, {which} {known}")).hint(format!(
        "if config.json is another model's than the weights, move it away; else use `--set model.heads={known}`"
    )))
}

/// The number of heads by the width, if nothing gives it: heads of size 64, except for the sizes beyond L.
fn usual_heads(sizes: &Sizes) -> Result<usize> {
    let width = sizes.width;
    match width {
        1152 | 1408 | 1664 => Ok(16),
        1280 if sizes.patch == (14, 14) => Ok(16),
        1536 => Err(Error::new(format!("{NO_HEADS}, and models of width 1536 have 16 or 24"))
            .hint("give it, as in `--set model.heads=16`")),
        _ if width.is_multiple_of(64) => Ok(width / 64),
        _ => Err(Error::new(format!("{NO_HEADS}, and its width {width} is not a multiple of 64")).hint(
            format!(
                "give it, as in `--set model.heads={}`",
                (1..=width / 8).rev().find(|h| width.is_multiple_of(*h)).unwrap_or(1)
            ),
        )),
    }
}

/// [`ModelConfig::validate`], which also accepts a model without a classifier here.
pub(super) fn validate(config: &ModelConfig) -> Result<()> {
    ModelConfig { classes: config.classes.max(1), ..config.clone() }.validate()
}

/// The defaults of a layout at the sizes of a file; grid and heads are decided later.
fn from_sizes(sizes: &Sizes, kind: LayoutKind) -> ModelConfig {
    let (gelu, ln_eps, init) = kind.defaults();
    ModelConfig {
        image: sizes.patch,
        patch: sizes.patch,
        width: sizes.width,
        depth: sizes.depth,
        heads: 1,
        mlp: sizes.mlp,
        qkv_bias: sizes.qkv_bias,
        classes: sizes.classes,
        pool: sizes.pool(),
        norm: if sizes.fc_norm { NormPlace::After } else { NormPlace::Before },
        extra_tokens: sizes.extra_tokens,
        posemb: if sizes.posemb_rows.is_some() { Posemb::Learned } else { Posemb::Sincos2d },
        posemb_join: PosembJoin::After,
        rep_size: sizes.rep_size,
        // The file has the scale but not its initial value.
        layer_scale: if sizes.layer_scale { 1e-4 } else { 0.0 },
        gelu,
        ln_eps,
        dropout: 0.0,
        attention_dropout: 0.0,
        drop_path: 0.0,
        drop_path_mode: DropPathMode::Linear,
        init,
        head_bias: 0.0,
    }
}

/// The metadata must match the tensors in the file; nothing larger than them may be built from it.
fn check_stored(config: ModelConfig, sizes: &Sizes) -> Result<ModelConfig> {
    let pairs = [
        ("width", config.width, sizes.width),
        ("depth", config.depth, sizes.depth),
        ("mlp", config.mlp, sizes.mlp),
        ("classes", config.classes, sizes.classes),
        ("patch height", config.patch.0, sizes.patch.0),
        ("patch width", config.patch.1, sizes.patch.1),
        ("rep_size", config.rep_size, sizes.rep_size),
        ("extra_tokens", config.extra_tokens, sizes.extra_tokens),
    ];
    for (key, said, found) in pairs {
        if said != found {
            fail!("the metadata says {key} {said}, the tensors say {found}");
        }
    }
    if config.image.0.max(config.image.1) > MAX_SIDE {
        fail!("the metadata says an image of {} x {} pixels", config.image.0, config.image.1);
    }
    Ok(config)
}

/// Whether extra tokens have rows: by the layout's rule, else by the number of rows.
fn join(config: &ModelConfig, sizes: &Sizes, plan: &Plan, image: Option<(usize, usize)>) -> PosembJoin {
    let (extra, rows) = (sizes.extra_tokens, learned_rows(config, sizes));
    let patches_of = |image: (usize, usize)| (image.0 / sizes.patch.0) * (image.1 / sizes.patch.1);
    plan.join.unwrap_or(match (rows, image) {
        _ if extra == 0 => PosembJoin::After,
        (None, _) => PosembJoin::Before,
        (Some(rows), Some(image)) if rows == patches_of(image) => PosembJoin::Before,
        (Some(rows), None) if square(rows) && !square(rows.saturating_sub(extra)) => PosembJoin::Before,
        _ => PosembJoin::After,
    })
}

fn learned_rows(config: &ModelConfig, sizes: &Sizes) -> Option<usize> {
    if config.posemb == Posemb::Learned { sizes.posemb_rows } else { None }
}

fn square(n: usize) -> bool {
    n > 0 && n.isqrt().pow(2) == n
}

/// If the image size is not given, finds it from the rows of the position embedding. True if it is known.
fn settle_grid(
    config: &mut ModelConfig,
    sizes: &Sizes,
    from_metadata: bool,
    image: Option<(usize, usize)>,
) -> Result<bool> {
    let rows = learned_rows(config, sizes);
    if let Some(image) = image {
        config.image = image;
    } else if !from_metadata {
        let with_rows = if config.posemb_join == PosembJoin::After { sizes.extra_tokens } else { 0 };
        let patches = rows.map_or(1, |rows| rows.saturating_sub(with_rows).max(1));
        let side = patches.isqrt();
        let known = rows.is_some() && square(patches);
        // If the grid is not known, one row of patches gives the right number of tokens.
        let grid = if known { (side, side) } else { (1, patches) };
        config.image = (grid.0 * sizes.patch.0, grid.1.saturating_mul(sizes.patch.1));
        return Ok(known);
    }
    if let Some(rows) = rows {
        check_rows(config, rows)?;
    }
    Ok(true)
}

/// The position embedding must have one row per token.
pub(super) fn check_rows(config: &ModelConfig, rows: usize) -> Result<()> {
    let ((h, w), (ph, pw)) = (config.image, config.patch);
    if h % ph != 0 || w % pw != 0 || rows == config.posemb_rows() {
        return Ok(()); // an image that the patch does not divide is refused by `validate`
    }
    Err(Error::new(format!(
        "the position embedding has {rows} rows; an image of {h}x{w} with patch {ph}x{pw} needs {}",
        config.posemb_rows()
    ))
    .hint("use pictures of the size that the model was trained on; `vitrum finetune` resizes the embedding"))
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
            ("model.gelu", "relu", "`tanh` or `erf`, as in `--set model.gelu=tanh`"),
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
