//! Detects which model is in a file: sizes from shapes, the rest from the file's metadata. The user's
//! settings override both.

use super::headers::Stored;
use super::hub::{Hub, SizeOf};
use super::layouts::{LayoutKind, Plan, Shapes};
use super::overrides::{MAX_SIDE, ModelOverrides};
use super::tensor::shape_text;
use super::usual::{Rotary, Usual};
use crate::backend::Gelu;
use crate::error::{Error, Result};
use crate::fail;
use crate::vit::config::{
    DropPathMode, MapTokens, MlpKind, ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias,
    RopeIndexing, RopeKind,
};
use crate::vit::names::block_of;

/// How the error for an unknown number of heads begins.
pub(super) const NO_HEADS: &str = "the number of heads is not in the file";

/// Width, mlp, classes; far beyond any model, for the same reason.
const MAX_WIDTH: usize = 1 << 22;
const MAX_DEPTH: usize = 1 << 12;

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
    pub(super) registers: usize,
    pub(super) posemb_rows: Option<usize>,
    layer_scale: bool,
    mlp_kind: MlpKind,
    mlp_norm: bool,
    qkv_bias: QkvBias,
    patch_bias: bool,
    norm_pre: bool,
    map: bool,
    norm: NormPlace,
    /// Whether the head reads twice the width.
    twice: bool,
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
        let fc1 = matrix("blocks.0.mlp.fc1.weight")?.0;
        // Both halves of a gated layer are in one tensor.
        let gated = matrix("blocks.0.mlp.fc2.weight").is_ok_and(|(_, cols)| fc1 == 2 * cols);
        let has = |end: &str| shapes.keys().any(|name| name.ends_with(end));
        let sizes = Self {
            width,
            patch,
            depth: depth(shapes)?,
            mlp: if gated { fc1 / 2 } else { fc1 },
            mlp_kind: if gated { MlpKind::Swiglu } else { MlpKind::Dense },
            mlp_norm: shapes.contains_key("blocks.0.mlp.norm.weight"),
            patch_bias: shapes.contains_key("patch_embed.proj.bias"),
            norm_pre: shapes.contains_key("norm_pre.weight"),
            // None: features without a classifier.
            classes: if shapes.contains_key("head.weight") { matrix("head.weight")?.0 } else { 0 },
            rep_size: if shapes.contains_key("pre_logits.weight") {
                matrix("pre_logits.weight")?.0
            } else {
                0
            },
            registers: match shapes.get("reg_token").map(Vec::as_slice) {
                None => 0,
                Some(&[1, registers, _]) if registers <= MAX_DEPTH => registers,
                Some(other) => fail!("`reg_token` has shape {}, not [1, R, D]", shape_text(other)),
            },
            extra_tokens: ["cls_token", "dist_token"].iter().filter(|t| shapes.contains_key(**t)).count(),
            posemb_rows,
            layer_scale: shapes.contains_key("blocks.0.ls1.gamma"),
            // If only some blocks have one, the others' are missing.
            qkv_bias: match () {
                () if has(".attn.qkv.bias") => QkvBias::All,
                () if has(".attn.q_bias") || has(".attn.v_bias") => QkvBias::Qv,
                () => QkvBias::None,
            },
            map: shapes.contains_key("attn_pool.latent"),
            norm: match () {
                () if shapes.contains_key("fc_norm.weight") => NormPlace::After,
                () if shapes.contains_key("norm.weight") || shapes.contains_key("norm.bias") => {
                    NormPlace::Before
                }
                () => NormPlace::None,
            },
            twice: ["pre_logits.weight", "head.weight"]
                .iter()
                .find_map(|name| matrix(name).ok())
                .is_some_and(|(_, cols)| cols == 2 * width),
        };
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
        let fits = |rows: usize| rows == patches || rows == patches + self.extra();
        h % ph == 0 && w % pw == 0 && patches > 0 && learned_rows(config, self).is_none_or(fits)
    }

    /// Tokens in front of the patches.
    fn extra(&self) -> usize {
        self.extra_tokens + self.registers
    }

    fn pool(&self) -> PoolKind {
        match () {
            () if self.map => PoolKind::Map,
            () if self.twice && self.extra_tokens == 1 => PoolKind::TokenGap,
            // timm has this norm only with average pooling.
            () if self.extra_tokens > 0 && self.norm != NormPlace::After => PoolKind::Token,
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
    let usual = match from_metadata {
        true => Usual::default(),
        false if hub.named => hub.usual.or(plan.usual),
        false => hub.usual.or(plan.usual).or(siglip(&sizes, plan.kind)),
    };
    let heads = o.heads.or(hub.heads).or(plan.heads).or(usual.heads);
    check_heads(plan.heads, from_metadata.then_some(config.heads), hub, o, sizes.width)?;
    config.heads = heads.unwrap_or(config.heads);
    config.gelu = o.gelu.or(hub.gelu).or(usual.gelu).unwrap_or(config.gelu);
    config.ln_eps = o.ln_eps.or(hub.ln_eps).or(usual.ln_eps).unwrap_or(config.ln_eps);
    config.pool = o.pool.or(hub.pool).or(usual.pool).unwrap_or(config.pool);
    config.norm = o.norm.unwrap_or(config.norm);
    settle_positions(&mut config, plan, usual.rope.filter(|_| !from_metadata), from_metadata, o)?;
    config.map_heads =
        o.map_heads.or(usual.map_heads.filter(|_| config.pool == PoolKind::Map)).or(config.map_heads);
    config.map_tokens = o.map_tokens.or(usual.map_tokens).unwrap_or(config.map_tokens);
    // Both are one function where there are no other tokens.
    if sizes.extra() == 0 || config.pool != PoolKind::Map {
        config.map_tokens = MapTokens::All;
    }
    if let Some(said) = hub.final_norm.filter(|said| *said == (sizes.norm == NormPlace::None)) {
        fail!(
            "config.json: `final_norm` is {said}, the tensors have {} norm behind the last block",
            if said { "no" } else { "a" }
        );
    }
    if hub.silu && config.mlp_kind == MlpKind::Dense {
        fail!("config.json: the activation is `silu`, and the MLP has no gate: not supported");
    }

    let heads_known = from_metadata || heads.is_some();
    if !heads_known {
        config.heads = usual_heads(&sizes, config.mlp_kind)?;
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

/// Rotary positions and the position embedding. Tensors do not show the first, and may lack the second.
fn settle_positions(
    config: &mut ModelConfig,
    plan: &Plan,
    named: Option<Rotary>,
    from_metadata: bool,
    o: &ModelOverrides,
) -> Result<()> {
    if let Some(rope) = named {
        config.rope = rope.kind;
        config.rope_theta = rope.theta;
        config.rope_ref = rope.reference;
        config.rope_offset = rope.offset;
        config.rope_indexing = rope.indexing;
    }
    config.rope = o.rope.unwrap_or(config.rope);
    config.rope_theta = o.rope_theta.or(config.rope_theta);
    config.rope_ref = o.rope_ref.or(config.rope_ref);
    config.rope_offset = o.rope_offset.unwrap_or(config.rope_offset);
    config.rope_indexing = o.rope_indexing.unwrap_or(config.rope_indexing);
    let embedded = plan.shapes.contains_key("pos_embed");
    if !from_metadata && !embedded && (config.rope != RopeKind::None || o.rope.is_some()) {
        config.posemb = Posemb::None;
    }
    config.posemb = o.posemb.unwrap_or(config.posemb);
    if from_metadata || named.is_some() || o.rope.is_some() {
        return Ok(());
    }
    let rotates = match rotary_mark(plan, config) {
        Some(mark) => mark.to_string(),
        None if !embedded && plan.kind == LayoutKind::Timm && o.posemb.is_none() => "no `pos_embed`".into(),
        None => return Ok(()),
    };
    Err(Error::new(format!(
        "{rotates} suggests rotary positions, and nothing says which: the tensors do not show them"
    ))
    .hint(
        "put the model's `config.json` beside the file, or say it: `--set model.rope=dinov3` (DINOv3), \
         `--set model.rope=eva --set model.rope_ref=16` (EVA-02, timm's `rope_reg` models) or `--set model.rope=none`",
    ))
}

/// A tensor that only models of timm's Eva class have, most of which rotate q and k.
fn rotary_mark(plan: &Plan, config: &ModelConfig) -> Option<&'static str> {
    if plan.kind != LayoutKind::Timm {
        return None;
    }
    match () {
        () if config.qkv_bias == QkvBias::Qv => Some("a bias of q and v alone"),
        () if config.mlp_norm => Some("a norm inside the MLP"),
        () if config.norm_pre && config.pool == PoolKind::Map => Some("`norm_pre` beside attention pooling"),
        () if config.norm_pre && config.norm == NormPlace::None => Some("`norm_pre` without a final norm"),
        () => None,
    }
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

/// timm's SigLIPs by their sizes: some have the tanh form, and the largest has heads of 96.
fn siglip(sizes: &Sizes, kind: LayoutKind) -> Usual {
    if kind != LayoutKind::Timm || !sizes.map || sizes.extra() > 0 {
        return Usual::default();
    }
    let patch = sizes.patch.0;
    let tanh = matches!((sizes.width, patch), (1152 | 1536, 16) | (768, 32))
        || (sizes.width, patch, sizes.posemb_rows) == (1024, 16, Some(1024));
    Usual {
        gelu: tanh.then_some(Gelu::Tanh),
        heads: (sizes.width == 1536 && patch == 16).then_some(16),
        ..Usual::default()
    }
}

/// The number of heads by the width, if nothing gives it: heads of size 64, except for the sizes beyond L.
fn usual_heads(sizes: &Sizes, mlp: MlpKind) -> Result<usize> {
    let width = sizes.width;
    match width {
        1152 | 1408 | 1664 => Ok(16),
        1280 if sizes.patch == (14, 14) => Ok(16),
        1536 if mlp == MlpKind::Swiglu => Ok(24),
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
        mlp_kind: sizes.mlp_kind,
        mlp_norm: sizes.mlp_norm,
        qkv_bias: sizes.qkv_bias,
        classes: sizes.classes,
        pool: sizes.pool(),
        norm: sizes.norm,
        map_heads: None,
        map_tokens: MapTokens::All,
        extra_tokens: sizes.extra_tokens,
        registers: sizes.registers,
        posemb: if sizes.posemb_rows.is_some() { Posemb::Learned } else { Posemb::Sincos2d },
        posemb_join: PosembJoin::After,
        rope: RopeKind::None,
        rope_theta: None,
        rope_ref: None,
        rope_offset: 0.0,
        rope_indexing: RopeIndexing::Ij,
        patch_bias: sizes.patch_bias,
        norm_pre: sizes.norm_pre,
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
        ("registers", config.registers, sizes.registers),
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
    let (extra, rows) = (sizes.extra(), learned_rows(config, sizes));
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
        let with_rows = if config.posemb_join == PosembJoin::After { sizes.extra() } else { 0 };
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
