//! Our names (timm's) beside flax's: one table, read in both directions.
//!
//! flax stores `y = x @ kernel + bias` with heads as axes of their own: q, k, v kernels are [D, H, Dh], `out` is
//! [H, Dh, D], the patch kernel is [ph, pw, 3, D]. We store a dense layer as [out, in], q, k, v as one matrix of
//! [3·D, D] (rows: q, k, v; head-major inside), the patch kernel as [D, 3, ph, pw]. Every conversion moves values and
//! computes none.

use super::tensor::{Tensor, transpose};

/// How flax code counted its sub-modules; the published files predate linen and count over all classes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// `LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3`: the published `.npz` files.
    Published,
    /// `LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0`: vit_jax as it saves today.
    Linen,
    /// Linen with `pos_embedding` at top level, without a row for the class token: big_vision.
    BigVision,
}

/// How a tensor's values lie in flax, seen from ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Same,
    /// [in, out] ↔ [out, in]
    Dense,
    /// [ph, pw, 3, D] ↔ [D, 3, ph, pw]
    Patch,
    /// [D, H, Dh] ↔ [H·Dh, D]: rows `part` of `parts` of our tensor.
    Heads {
        part: usize,
        parts: usize,
    },
    /// [H, Dh] ↔ [H·Dh]
    HeadsBias {
        part: usize,
        parts: usize,
    },
    /// [H, Dh, D] ↔ [D, H·Dh]
    HeadsOut,
}

use Form::{Dense, HeadsOut, Patch, Same};

const fn heads(part: usize, parts: usize) -> Form {
    Form::Heads { part, parts }
}

const fn heads_bias(part: usize, parts: usize) -> Form {
    Form::HeadsBias { part, parts }
}

/// (ours, flax in linen numbering, form); several rows of one of our names are its parts, in order.
type Row = (&'static str, &'static str, Form);

/// Outside the blocks.
const STEM_AND_HEAD: [Row; 29] = [
    ("cls_token", "cls", Same),
    ("pos_embed", "pos_embedding", Same),
    ("patch_embed.proj.weight", "embedding/kernel", Patch),
    ("patch_embed.proj.bias", "embedding/bias", Same),
    ("norm.weight", "Transformer/encoder_norm/scale", Same),
    ("norm.bias", "Transformer/encoder_norm/bias", Same),
    ("attn_pool.latent", "MAPHead_0/probe", Same),
    ("attn_pool.q.weight", "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel", heads(0, 1)),
    ("attn_pool.q.bias", "MAPHead_0/MultiHeadDotProductAttention_0/query/bias", heads_bias(0, 1)),
    ("attn_pool.kv.weight", "MAPHead_0/MultiHeadDotProductAttention_0/key/kernel", heads(0, 2)),
    ("attn_pool.kv.weight", "MAPHead_0/MultiHeadDotProductAttention_0/value/kernel", heads(1, 2)),
    ("attn_pool.kv.bias", "MAPHead_0/MultiHeadDotProductAttention_0/key/bias", heads_bias(0, 2)),
    ("attn_pool.kv.bias", "MAPHead_0/MultiHeadDotProductAttention_0/value/bias", heads_bias(1, 2)),
    ("attn_pool.proj.weight", "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel", HeadsOut),
    ("attn_pool.proj.bias", "MAPHead_0/MultiHeadDotProductAttention_0/out/bias", Same),
    ("attn_pool.norm.weight", "MAPHead_0/LayerNorm_0/scale", Same),
    ("attn_pool.norm.bias", "MAPHead_0/LayerNorm_0/bias", Same),
    ("attn_pool.mlp.fc1.weight", "MAPHead_0/MlpBlock_0/Dense_0/kernel", Dense),
    ("attn_pool.mlp.fc1.bias", "MAPHead_0/MlpBlock_0/Dense_0/bias", Same),
    ("attn_pool.mlp.fc2.weight", "MAPHead_0/MlpBlock_0/Dense_1/kernel", Dense),
    ("attn_pool.mlp.fc2.bias", "MAPHead_0/MlpBlock_0/Dense_1/bias", Same),
    ("pre_logits.weight", "pre_logits/kernel", Dense),
    ("pre_logits.bias", "pre_logits/bias", Same),
    ("head.weight", "head/kernel", Dense),
    ("head.bias", "head/bias", Same),
    // No flax model has these; the names let patterns be written in flax's style everywhere.
    ("fc_norm.weight", "fc_norm/scale", Same),
    ("fc_norm.bias", "fc_norm/bias", Same),
    ("head_dist.weight", "head_dist/kernel", Dense),
    ("head_dist.bias", "head_dist/bias", Same),
];

/// Inside `blocks.{i}.` and `Transformer/encoderblock_{i}/`.
const BLOCK: [Row; 16] = [
    ("norm1.weight", "LayerNorm_0/scale", Same),
    ("norm1.bias", "LayerNorm_0/bias", Same),
    ("attn.qkv.weight", "MultiHeadDotProductAttention_0/query/kernel", heads(0, 3)),
    ("attn.qkv.weight", "MultiHeadDotProductAttention_0/key/kernel", heads(1, 3)),
    ("attn.qkv.weight", "MultiHeadDotProductAttention_0/value/kernel", heads(2, 3)),
    ("attn.qkv.bias", "MultiHeadDotProductAttention_0/query/bias", heads_bias(0, 3)),
    ("attn.qkv.bias", "MultiHeadDotProductAttention_0/key/bias", heads_bias(1, 3)),
    ("attn.qkv.bias", "MultiHeadDotProductAttention_0/value/bias", heads_bias(2, 3)),
    ("attn.proj.weight", "MultiHeadDotProductAttention_0/out/kernel", HeadsOut),
    ("attn.proj.bias", "MultiHeadDotProductAttention_0/out/bias", Same),
    ("norm2.weight", "LayerNorm_1/scale", Same),
    ("norm2.bias", "LayerNorm_1/bias", Same),
    ("mlp.fc1.weight", "MlpBlock_0/Dense_0/kernel", Dense),
    ("mlp.fc1.bias", "MlpBlock_0/Dense_0/bias", Same),
    ("mlp.fc2.weight", "MlpBlock_0/Dense_1/kernel", Dense),
    ("mlp.fc2.bias", "MlpBlock_0/Dense_1/bias", Same),
];

/// The published numbers beside linen's, inside a block.
const PUBLISHED: [(&str, &str); 3] = [
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    ("MlpBlock_3/", "MlpBlock_0/"),
];

const BLOCK_PREFIX: &str = "Transformer/encoderblock_";
const VIT_JAX_POSEMB: &str = "Transformer/posembed_input/pos_embedding";

/// All names that flax code has given to one of our tensors, in every numbering: what a group pattern may match.
/// A fused q, k, v tensor has the names of its parts. Empty where flax has none.
pub fn flax_names_of(own: &str) -> Vec<String> {
    let mut names = Vec::new();
    for numbering in [Numbering::Published, Numbering::Linen, Numbering::BigVision] {
        for (name, _) in to_flax(own, numbering) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// One of our names → its parts in flax, in order; empty where flax has no such tensor.
pub(super) fn to_flax(own: &str, numbering: Numbering) -> Vec<(String, Form)> {
    let (prefix, suffix, rows) = match block_of(own, "blocks.", '.') {
        Some((block, suffix)) => (format!("{BLOCK_PREFIX}{block}/"), suffix, &BLOCK[..]),
        None => (String::new(), own, &STEM_AND_HEAD[..]),
    };
    let rename = |flax: &str| match numbering {
        Numbering::Published if !prefix.is_empty() => {
            let renamed = PUBLISHED.iter().find_map(|(published, linen)| {
                flax.strip_prefix(linen).map(|rest| format!("{published}{rest}"))
            });
            renamed.unwrap_or_else(|| flax.to_string())
        }
        Numbering::Published | Numbering::Linen if flax == "pos_embedding" => VIT_JAX_POSEMB.to_string(),
        _ => flax.to_string(),
    };
    let parts = rows.iter().filter(|(own, _, _)| *own == suffix);
    parts.map(|(_, flax, form)| (format!("{prefix}{}", rename(flax)), *form)).collect()
}

/// A flax name in linen numbering, as [`to_linen`] gives it → our name, and which part of it.
pub(super) fn from_flax(linen: &str) -> Option<(String, Form)> {
    let (prefix, suffix, rows) = match block_of(linen, BLOCK_PREFIX, '/') {
        Some((block, suffix)) => (format!("blocks.{block}."), suffix, &BLOCK[..]),
        None => (String::new(), linen, &STEM_AND_HEAD[..]),
    };
    rows.iter().find(|(_, flax, _)| *flax == suffix).map(|(own, _, form)| (format!("{prefix}{own}"), *form))
}

/// Published numbers inside a block → linen's. Leaves linen names as they are: the two sets do not clash.
pub(super) fn to_linen(name: &str) -> String {
    if let Some((block, suffix)) = block_of(name, BLOCK_PREFIX, '/') {
        for (published, linen) in PUBLISHED {
            if let Some(rest) = suffix.strip_prefix(published) {
                return format!("{BLOCK_PREFIX}{block}/{linen}{rest}");
            }
        }
    }
    name.to_string()
}

/// Splits `blocks.3.norm1.bias` into 3 and `norm1.bias`.
pub(super) fn block_of<'a>(name: &'a str, prefix: &str, separator: char) -> Option<(usize, &'a str)> {
    let (number, suffix) = name.strip_prefix(prefix)?.split_once(separator)?;
    let block: usize = number.parse().ok()?;
    // `03` would be a second name of the same block.
    (block.to_string() == number).then_some((block, suffix))
}

impl Form {
    /// Which part of our tensor, of how many.
    pub(super) fn part(self) -> (usize, usize) {
        match self {
            Form::Heads { part, parts } | Form::HeadsBias { part, parts } => (part, parts),
            _ => (0, 1),
        }
    }

    /// The shape of our part; `None` if flax's shape has the wrong rank.
    pub(super) fn own_shape(self, flax: &[usize]) -> Option<Vec<usize>> {
        match (self, flax) {
            (Form::Same, shape) => Some(shape.to_vec()),
            (Form::Dense, &[i, o]) => Some(vec![o, i]),
            (Form::Patch, &[h, w, c, d]) => Some(vec![d, c, h, w]),
            (Form::Heads { .. }, &[d, h, dh]) => Some(vec![h * dh, d]),
            (Form::HeadsBias { .. }, &[h, dh]) => Some(vec![h * dh]),
            (Form::HeadsOut, &[h, dh, d]) => Some(vec![d, h * dh]),
            _ => None,
        }
    }

    /// The values of our part.
    pub(super) fn own_values(self, flax: Tensor) -> Vec<f32> {
        let shape = &flax.shape;
        match self {
            Form::Same | Form::HeadsBias { .. } => flax.values,
            // [ph, pw, 3, D]: a transpose gives [D, ph, pw, 3], then the channel moves in front of the pixels.
            Form::Patch => {
                let (d, channels) = (shape[3], shape[2]);
                let rows = transpose(&flax.values, flax.values.len() / d.max(1), d);
                let kernel = shape[..3].iter().product::<usize>().max(1);
                let kernels = rows.chunks(kernel).map(|k| transpose(k, k.len() / channels, channels));
                kernels.flatten().collect()
            }
            Form::Dense | Form::Heads { .. } => {
                transpose(&flax.values, shape[0], shape[1..].iter().product())
            }
            Form::HeadsOut => transpose(&flax.values, shape[0] * shape[1], shape[2]),
        }
    }

    /// Our part (values, and the shape of the part) → flax; the inverse of [`Form::own_values`].
    pub(super) fn to_flax(self, values: &[f32], own: &[usize], heads: usize) -> Tensor {
        let head_size = |width: usize| width / heads;
        match (self, own) {
            (Form::Dense, &[o, i]) => Tensor::new([i, o], transpose(values, o, i)),
            (Form::Patch, &[d, c, h, w]) => {
                let pixels_first: Vec<f32> =
                    values.chunks(c * h * w).flat_map(|k| transpose(k, c, h * w)).collect();
                Tensor::new([h, w, c, d], transpose(&pixels_first, d, h * w * c))
            }
            (Form::Heads { .. }, &[rows, d]) => {
                Tensor::new([d, heads, head_size(rows)], transpose(values, rows, d))
            }
            (Form::HeadsBias { .. }, &[rows]) => Tensor::new([heads, head_size(rows)], values.to_vec()),
            (Form::HeadsOut, &[d, cols]) => {
                Tensor::new([heads, head_size(cols), d], transpose(values, d, cols))
            }
            (Form::Same, shape) => Tensor::new(shape, values.to_vec()),
            (form, shape) => panic!("{form:?} of shape {shape:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_in_every_numbering() {
        let own = [
            "blocks.11.attn.qkv.weight",
            "blocks.0.norm2.bias",
            "pos_embed",
            "attn_pool.kv.bias",
            "head.weight",
        ];
        for own in own {
            for numbering in [Numbering::Published, Numbering::Linen, Numbering::BigVision] {
                let parts = to_flax(own, numbering);
                assert!(!parts.is_empty());
                for (i, (flax, form)) in parts.iter().enumerate() {
                    let linen = to_linen(flax).replace("Transformer/posembed_input/", "");
                    assert_eq!(from_flax(&linen), Some((own.to_string(), *form)));
                    assert_eq!(form.part(), (i, parts.len()));
                }
            }
        }
        assert_eq!(to_flax("dist_token", Numbering::Linen), []);
        assert_eq!(from_flax("Transformer/encoderblock_00/LayerNorm_0/bias"), None);
    }

    #[test]
    fn patterns_in_flax_style_see_every_numbering() {
        let names = flax_names_of("blocks.3.mlp.fc1.weight");
        assert_eq!(
            names,
            [
                "Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel",
                "Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel",
            ]
        );
        assert_eq!(flax_names_of("blocks.0.attn.qkv.bias").len(), 6);
        assert_eq!(flax_names_of("pos_embed").len(), 2);
    }
}
