//! What a checkpoint says about itself besides its tensors: how to feed it, its class names, its origin.

use serde::{Deserialize, Serialize};

use super::layouts::LayoutKind;
use crate::backend::{LossKind, Normalise};
use crate::recipe::EvalResize;

/// Stored as JSON under [`META_KEY`]; the image size is in the model's configuration. Unknown keys are
/// ignored and missing ones have defaults, so that old and new checkpoints can be read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointMeta {
    /// One name per class, in the order of the logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Vec<String>>,
    /// What happens to pixels before the model reads them.
    pub normalise: Normalise,
    /// How pictures are prepared for evaluation.
    pub resize: EvalResize,
    /// The share of the resized picture's side that is kept.
    pub crop_ratio: f32,
    /// The head's training loss, which decides how its logits become probabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossKind>,
    /// Whether pictures are turned by their EXIF orientation.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub exif: bool,
    /// The license that the origin of the weights names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// The recipe's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Its training data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Finished updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Finished passes over the training data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<f64>,
    /// Validation top-1 in [0, 1] at that step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    /// The program that wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub made_by: Option<String>,
}

/// Metadata key of the model's configuration (JSON of `ModelConfig`).
pub const MODEL_KEY: &str = "vitrum.model";
/// Metadata key of [`CheckpointMeta`].
pub const META_KEY: &str = "vitrum.meta";

impl Default for CheckpointMeta {
    fn default() -> Self {
        Self::of_layout(LayoutKind::Vitrum)
    }
}

impl CheckpointMeta {
    /// For a file without such data: the protocol of the code that its layout comes from.
    pub(super) fn of_layout(kind: LayoutKind) -> Self {
        let (resize, crop_ratio) = kind.eval_protocol();
        Self {
            classes: None,
            normalise: Normalise::INCEPTION,
            resize,
            crop_ratio,
            loss: None,
            exif: false,
            license: None,
            recipe: None,
            data: None,
            step: None,
            epoch: None,
            top1: None,
            made_by: None,
        }
    }
}
