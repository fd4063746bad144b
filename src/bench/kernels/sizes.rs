//! The sizes at which operations are timed: those of the named models.

/// The sizes at which operations are timed.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    /// Activations have as many images as give about this many rows.
    pub(super) rows: usize,
    /// Samples of the loss.
    pub(super) samples: usize,
    /// Parameters of the update.
    pub(super) params: usize,
    pub(super) models: Vec<Model>,
    /// Models whose matrix products are timed, by name.
    pub(super) products: Vec<&'static str>,
    /// Attention and products use as many images as the rest. If false, one image, because they are slow on
    /// the host.
    pub(super) all_images: bool,
}

/// The properties of a model that the operations depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) image: usize,
    pub(super) patch: usize,
}

impl Model {
    pub(super) fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2) + 1
    }
}

const fn model(name: &'static str, width: usize, heads: usize, image: usize, patch: usize) -> Model {
    Model { name, width, heads, image, patch }
}

const MODELS: [Model; 6] = [
    model("Ti/16", 192, 3, 224, 16),
    model("S/16", 384, 6, 224, 16),
    model("B/16", 768, 12, 224, 16),
    model("L/16", 1024, 16, 224, 16),
    model("H/14", 1280, 16, 224, 14),
    model("B/16 at 384", 768, 12, 384, 16),
];

impl Sizes {
    /// The sizes of real runs.
    pub(super) fn real() -> Self {
        let products = vec!["Ti/16", "S/16", "B/16", "L/16", "H/14"];
        let models = MODELS.to_vec();
        Self { rows: 100_864, samples: 4096, params: 86_567_656, models, products, all_images: true }
    }

    /// A few images: enough to see which kernels are launched, and what they read and write.
    pub(super) fn few() -> Self {
        let mut models = MODELS.to_vec();
        // All heads are alike, and twelve of them would be slow on the host.
        models[5] = model("2 heads at 384", 128, 2, 384, 16);
        Self { rows: 394, samples: 8, params: 1 << 20, models, products: vec!["Ti/16"], all_images: false }
    }
}
