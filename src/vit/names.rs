//! Parameter names: ours (timm's) and flax's, in one table that is read in both directions. Used to read
//! files and to match patterns.
//!
//! flax stores `y = x @ kernel + bias` with heads as separate axes: q, k, v kernels are [D, H, Dh], `out` is
//! [H, Dh, D], the patch kernel is [ph, pw, 3, D]. We store a dense layer as [out, in], q, k, v as one matrix
//! of [3·D, D] (rows: q, k, v; head-major inside), the patch kernel as [D, 3, ph, pw].

/// How flax code numbers its sub-modules. The published files predate linen and count over all classes
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// `LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3`: the published `.npz` files.
    Published,
    /// `LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0`: vit_jax as it saves today.
    Linen,
    /// Linen with `pos_embedding` at top level, without a row for the class token: big_vision.
    BigVision,
}

/// The arrangement of a tensor's values in another layout, relative to ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Same,
    /// The same values as rows `part` of `parts` of our tensor: q, k and v as separate torch layers.
    Rows {
        part: usize,
        parts: usize,
    },
    /// The same values as rows `first..first + count` of `of` equal parts of their tensor.
    Slice {
        first: usize,
        count: usize,
        of: usize,
    },
    /// The same values with axes of length 1 in front.
    Leading {
        axes: usize,
    },
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

/// Names outside the blocks.
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
    ("fc_norm.weight", "Transformer/encoder_norm/scale", Same),
    ("fc_norm.bias", "Transformer/encoder_norm/bias", Same),
    ("head_dist.weight", "head_dist/kernel", Dense),
    ("head_dist.bias", "head_dist/bias", Same),
];

/// Names inside `blocks.{i}.` and `Transformer/encoderblock_{i}/`.
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

/// The published numbering and linen's, inside a block.
const PUBLISHED: [(&str, &str); 3] = [
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    ("MlpBlock_3/", "MlpBlock_0/"),
];

const BLOCK_PREFIX: &str = "Transformer/encoderblock_";
const VIT_JAX_POSEMB: &str = "Transformer/posembed_input/pos_embedding";

/// The flax tensors of one of ours, in order (q, k and v are separate tensors). For each, all names in flax
/// code, the published numbering first; a pattern may match any. One part without names if flax has no such
/// tensor.
pub(crate) fn flax_parts(own: &str) -> Vec<Vec<String>> {
    let count = to_flax(own, Numbering::Linen).len().max(1);
    let mut parts = vec![Vec::new(); count];
    for numbering in [Numbering::Published, Numbering::Linen, Numbering::BigVision] {
        for (part, (name, _)) in parts.iter_mut().zip(to_flax(own, numbering)) {
            if !part.contains(&name) {
                part.push(name);
            }
        }
    }
    parts
}

/// One of our names → its parts in flax, in order; empty if flax has no such tensor.
pub(crate) fn to_flax(own: &str, numbering: Numbering) -> Vec<(String, Form)> {
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

/// A flax name in linen numbering, as [`to_linen`] returns it → our name, and which part of it.
pub(crate) fn from_flax(linen: &str) -> Option<(String, Form)> {
    let (prefix, suffix, rows) = match block_of(linen, BLOCK_PREFIX, '/') {
        Some((block, suffix)) => (format!("blocks.{block}."), suffix, &BLOCK[..]),
        None => (String::new(), linen, &STEM_AND_HEAD[..]),
    };
    rows.iter().find(|(_, flax, _)| *flax == suffix).map(|(own, _, form)| (format!("{prefix}{own}"), *form))
}

/// Published numbering inside a block → linen's. Leaves linen names unchanged: the two sets do not overlap.
pub(crate) fn to_linen(name: &str) -> String {
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
pub(crate) fn block_of<'a>(name: &'a str, prefix: &str, separator: char) -> Option<(usize, &'a str)> {
    let (number, suffix) = name.strip_prefix(prefix)?.split_once(separator)?;
    let block: usize = number.parse().ok()?;
    // Refuse `03`, a second name of the same block.
    (block.to_string() == number).then_some((block, suffix))
}

impl Form {
    /// The index of the part of our tensor, and the number of parts.
    pub(crate) fn part(self) -> (usize, usize) {
        match self {
            Form::Rows { part, parts } | Form::Heads { part, parts } | Form::HeadsBias { part, parts } => {
                (part, parts)
            }
            _ => (0, 1),
        }
    }

    /// The shape of our part; `None` if the flax shape has the wrong rank.
    pub(crate) fn own_shape(self, flax: &[usize]) -> Option<Vec<usize>> {
        match (self, flax) {
            (Form::Same | Form::Rows { .. }, shape) => Some(shape.to_vec()),
            (Form::Slice { count, of, .. }, [rows, rest @ ..]) if rows.is_multiple_of(of) => {
                Some([&[rows / of * count], rest].concat())
            }
            (Form::Leading { axes }, shape) => Some([&vec![1; axes][..], shape].concat()),
            (Form::Dense, &[i, o]) => Some(vec![o, i]),
            (Form::Patch, &[h, w, c, d]) => Some(vec![d, c, h, w]),
            (Form::Heads { .. }, &[d, h, dh]) => Some(vec![h * dh, d]),
            (Form::HeadsBias { .. }, &[h, dh]) => Some(vec![h * dh]),
            (Form::HeadsOut, &[h, dh, d]) => Some(vec![d, h * dh]),
            _ => None,
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
    fn patterns_in_flax_style_see_every_part_in_every_numbering() {
        assert_eq!(
            flax_parts("blocks.3.mlp.fc1.weight"),
            [[
                "Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel",
                "Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel",
            ]]
        );
        let qkv = flax_parts("blocks.0.attn.qkv.bias");
        assert_eq!(qkv.len(), 3);
        assert!(
            qkv.iter().zip(["query", "key", "value"]).all(|(names, x)| names.iter().all(|n| n.contains(x)))
        );
        assert_eq!(flax_parts("pos_embed")[0].len(), 2);
        assert_eq!(flax_parts("blocks.0.ls1.gamma"), [[""; 0]]);
    }
}
