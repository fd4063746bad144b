//! Models that share most of their names with a Vision Transformer but compute something else: one table, by
//! characteristic names.

use super::Shapes;
use crate::error::{Error, Result};

/// One kind of model.
struct Other {
    /// Parts of names, any of which identifies it. Without `.weight`.
    marks: &'static [&'static str],
    /// What the model has or is.
    what: &'static str,
}

const fn other(what: &'static str, marks: &'static [&'static str]) -> Other {
    Other { marks, what }
}

/// In this order: the first match names the model.
const OTHERS: [Other; 20] = [
    other(
        "this is a hybrid (a ResNet in front of a Vision Transformer)",
        &[
            "conv_root",
            "gn_root",
            "block1/unit",
            "patch_embed.backbone.",
            "embeddings.patch_embeddings.backbone.",
        ],
    ),
    other(
        "this is an MLP-Mixer, not a Vision Transformer",
        &["MixerBlock_", "token_mixing", "channel_mixing", "pre_head_layer_norm", "mlp_tokens."],
    ),
    other(
        "this is a Swin Transformer",
        &["swin.", "layers.0.blocks.0.", "downsample.reduction", "logit_scale_mlp"],
    ),
    other(
        "this is a ConvNeXt or another convolutional network",
        &["stages.0.", "downsample_layers.", "stem.conv"],
    ),
    other("this is SAM's encoder, whose attention is windowed", &["rel_pos_h", "image_encoder."]),
    other("this is a Hiera", &["pos_embed_spatial", "pos_embed_window"]),
    other(
        "this is a text model",
        &["text_model.", "token_embedding.weight", "transformer.text", "textual.", "encoder.embed_tokens"],
    ),
    other(
        "the model has relative positions (BEiT, BEiTv2, Data2Vec)",
        &["relative_position_bias", "relative_position_index"],
    ),
    other("the model has a norm inside attention (BEiT-3, EVA-02-CLIP)", &["inner_attn_ln", "attn.norm."]),
    other("this is Sapiens 2 or another model with SwiGLU in its own names", &["ffn.w12"]),
    other(
        "the model has norms of q and k (InternViT-6B, Sapiens 2, ViT-22B)",
        &["q_norm", "k_norm", "query_norm", "key_norm"],
    ),
    other("this is RADIO in NVIDIA's own names", &["patch_generator."]),
    other("this is an AIMv2", &["preprocessor.patchifier", "patchifier."]),
    other(
        "the model has rotary positions with learned frequencies in each block (mixed RoPE)",
        &["rope.freqs"],
    ),
    other("this is EVA-02 in BAAI's own names; timm's are supported", &["freqs_cos", "mlp.ffn_ln"]),
    other("this is a Perception Encoder in Meta's own names; timm's are supported", &["attn_pool.probe"]),
    other(
        "blocks are parallel or differential",
        &["attns.0.", "lambda_q1", "ffns.0.", "attn.in_proj.", ".in_proj.weight", "sub_norm"],
    ),
    other("the model has a norm after its patch embedding", &["patch_embed.norm."]),
    other("the model has attention over classes of its own (CaiT)", &["blocks_token_only.", "proj_l."]),
    other(
        "patches are embedded by several convolutions",
        &["patch_embed.conv", "patch_embed.proj.0.", "patch_embed.proj.1.", "patch_embed.stem."],
    ),
];

/// An error that names the model, if it is in the table.
pub(super) fn refuse(shapes: &Shapes) -> Result<()> {
    // MAP pooling has one norm and one projection with such names; they belong to the head.
    let of_the_model = |name: &&String| {
        (!name.starts_with("attn_pool.") || name.starts_with("attn_pool.probe"))
            && !name.contains("MAPHead_0")
    };
    for Other { marks, what } in &OTHERS {
        let given_away = |name: &&String| marks.iter().any(|mark| name.contains(mark));
        if let Some(name) = shapes.keys().filter(of_the_model).find(given_away) {
            return Err(Error::new(format!("`{name}` shows that {what}, which is not supported"))
                .hint("plain Vision Transformers are: AugReg's, DeiT's, MAE's, DINOv2's and DINOv3's, SigLIP's, CLIP's, EVA-02's"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No part of a plain model may be mistaken for another model.
    #[test]
    fn plain_models_are_in_no_row() {
        let plain = [
            "cls_token",
            "dist_token",
            "pos_embed",
            "patch_embed.proj.weight",
            "blocks.0.norm1.weight",
            "blocks.0.attn.qkv.bias",
            "blocks.0.attn.proj.weight",
            "blocks.0.mlp.fc1.weight",
            "blocks.0.ls1.gamma",
            "blocks.0.gamma_1",
            "blocks.0.attn.q_bias",
            "blocks.0.attn.k_proj.weight",
            "blocks.0.mlp.fc1_g.weight",
            "blocks.0.mlp.norm.weight",
            "reg_token",
            "norm_pre.weight",
            "vision_model.head.attention.in_proj_weight",
            "visual.transformer.resblocks.0.attn.in_proj_weight",
            "layer.0.attention.k_proj.weight",
            "embeddings.register_tokens",
            "norm.weight",
            "fc_norm.weight",
            "attn_pool.latent",
            "attn_pool.norm.weight",
            "pre_logits.fc.weight",
            "head.weight",
            "head_dist.bias",
            "Transformer/encoder_norm/scale",
            "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel",
            "embedding/kernel",
            "mask_token",
            "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight",
            "decoder_blocks.0.norm1.weight",
            "vit.embeddings.cls_token",
            "pooler.dense.weight",
            "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel",
            "module.blocks.0.norm1.weight",
        ];
        let shapes = plain.map(|name| (name.to_string(), vec![1]));
        refuse(&shapes.into_iter().collect()).unwrap();
    }

    #[test]
    fn others_are_called_by_their_names() {
        for (name, says) in [
            ("blocks.0.attn.q_norm.weight", "norms of q and k"),
            ("blocks.3.attn.relative_position_bias_table", "BEiT"),
            ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
            ("text_model.encoder.layers.0.layer_norm1.weight", "text model"),
            ("rope.freqs", "rotary"),
            ("attn_pool.probe", "Perception Encoder"),
            ("conv_root/kernel", "hybrid"),
            ("MixerBlock_0/LayerNorm_0/scale", "MLP-Mixer"),
        ] {
            let error = refuse(&[(name.to_string(), vec![1])].into_iter().collect()).unwrap_err();
            assert!(error.message().contains(says) && error.message().contains(name), "{error}");
        }
    }
}
