//! A model from a weights file, on a device and ready to run. Used by `eval`, `predict`, `grad` and others.

use std::path::Path;

use crate::backend::{
    self, Backend, Device, Loss, LossKind, Micro, Pixels, Slot, SlotLayout, StepKeys, StepReport, TargetKind,
};
use crate::data;
use crate::data::pictures::Named;
use crate::error::{Error, Result};
use crate::fail;
use crate::vit::{LastBlock, Mode, Vit};
use crate::weights::{self, AdaptTarget, CheckpointMeta, ModelFile, ModelOverrides, RepLayer};

use super::protocol::Protocol;

/// Weights, model and device.
pub struct LoadedModel {
    /// The device, with the weights in its memory.
    pub backend: Box<dyn Backend>,
    /// The architecture, bound to buffers for one picture or a batch.
    pub model: Vit,
    /// What the file says about classes and the preparation of pictures.
    pub meta: CheckpointMeta,
    /// Why pictures cannot be prepared as the file says, if so.
    pub unprepared: Option<String>,
    /// What was assumed about the file, in sentences.
    pub notes: Vec<String>,
}

impl LoadedModel {
    /// Loads a weights file, a run's directory or a model folder, to classify one picture at a time.
    ///
    /// # Errors
    /// The weights cannot be read, or they are not a supported model; the device cannot be opened.
    pub fn load(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        let (overrides, options) = (ModelOverrides::default(), backend::DeviceOptions::default());
        Self::open(path.as_ref(), &overrides, (device, &options), 1, Mode::Infer, None)
    }

    /// Reads the file and writes its weights to the device, for passes of `batch` samples of size `image`
    /// (height, width). `None` uses the file's own size.
    pub fn open(
        path: &Path,
        overrides: &ModelOverrides,
        (device, options): (Device, &backend::DeviceOptions),
        batch: usize,
        mode: Mode,
        image: Option<(usize, usize)>,
    ) -> Result<Self> {
        let file = match (mode, image) {
            (_, Some(image)) => {
                let mut file = weights::open(path, overrides)?;
                file.set_image(image)?;
                file
            }
            (Mode::Infer, None) => open_at(path, overrides, weights::open)?.with_known_image()?,
            (Mode::Train, None) => weights::open(path, overrides)?.with_known_image()?,
        };
        Self::on_device(file, (device, options), batch, mode)
    }

    /// The same for features. The file need not have a classifier; without one it gets a classifier of a
    /// single class.
    pub fn open_backbone(
        path: &Path,
        overrides: &ModelOverrides,
        device: Device,
        batch: usize,
    ) -> Result<Self> {
        let mut file = open_at(path, overrides, weights::open_backbone)?.with_known_image()?;
        if file.config.classes == 0 {
            let one = AdaptTarget { classes: Some(1), rep_layer: RepLayer::Keep, ..AdaptTarget::default() };
            file = weights::adapt(file, &one)?.0;
        }
        Self::on_device(file, (device, &backend::DeviceOptions::default()), batch, Mode::Infer)
    }

    fn on_device(
        file: ModelFile,
        (device, options): (Device, &backend::DeviceOptions),
        batch: usize,
        mode: Mode,
    ) -> Result<Self> {
        let mut backend = backend::select(device, options)?;
        let model = Vit::new(
            file.config.clone(),
            file.meta.normalise,
            batch,
            mode,
            backend.storage(),
            LastBlock::default(),
            |_| false,
        );
        let mut plan = model.plan();
        plan.set_batch(slot_layout(&model));
        backend.allocate(&plan)?;
        load_weights(&file, &model, &mut *backend)?;
        let unprepared = file.unprepared.map(|why| format!("{}: {why}", file.path.display()));
        Ok(Self { backend, model, meta: file.meta, unprepared, notes: file.notes })
    }

    /// The protocol that the file's metadata or layout implies.
    ///
    /// # Errors
    /// The file requires a preparation that is not built.
    pub fn protocol(&self) -> Result<Protocol> {
        match &self.unprepared {
            Some(why) => Err(Error::new(format!("pictures cannot be prepared as the file requires: {why}"))
                .hint("choose another way to prepare them, such as `--protocol timm`")),
            None => Ok(Protocol {
                resize: self.meta.resize,
                crop_ratio: self.meta.crop_ratio,
                asked: None,
                drop_last: false,
            }),
        }
    }

    /// All classes of a picture file, the likeliest first. The picture is prepared as the weights file says.
    ///
    /// # Errors
    /// The file is not a picture; the weights file names a preparation that is not supported.
    pub fn classify(&mut self, picture: impl AsRef<Path>) -> Result<Vec<Prediction>> {
        let protocol = self.protocol()?;
        self.predict(picture.as_ref(), protocol)
    }

    /// The predictions for one picture: all classes, the most probable first.
    pub fn predict(&mut self, picture: &Path, protocol: Protocol) -> Result<Vec<Prediction>> {
        self.predict_named(&Named::File(picture.to_owned()), protocol)
    }

    /// The same for a picture of a data set.
    pub fn predict_named(&mut self, picture: &Named, protocol: Protocol) -> Result<Vec<Prediction>> {
        let pixels = self.prepared(picture, protocol)?;
        self.predict_pixels(&pixels)
    }

    /// A picture as the model sees it: `[H, W, 3]`, RGB, of its image size.
    pub fn prepared(&self, picture: &Named, protocol: Protocol) -> Result<Vec<u8>> {
        let how = (protocol.resize, protocol.crop_ratio);
        picture.read(self.model.config.image, how, self.meta.exif)
    }

    /// The same for pixels: `[H, W, 3]`, RGB, of the model's image size.
    pub fn predict_pixels(&mut self, pixels: &[u8]) -> Result<Vec<Prediction>> {
        self.forward(pixels)?;
        let mut logits = vec![0.0; self.model.config.classes];
        self.backend.read(self.model.logits(), &mut logits)?;
        Ok(likeliest(&logits, self.loss(), self.meta.classes.as_deref()))
    }

    /// What the head reads, `[D]`, for pixels `[H, W, 3]` of the model's image size.
    pub fn features_of_pixels(&mut self, pixels: &[u8]) -> Result<Vec<f32>> {
        self.forward(pixels)?;
        let mut features = vec![0.0; self.model.features().cols];
        self.backend.read(self.model.features(), &mut features)?;
        Ok(features)
    }

    /// One picture through a model that was opened for one at a time.
    fn forward(&mut self, pixels: &[u8]) -> Result<()> {
        let (height, width) = self.model.config.image;
        if pixels.len() != height * width * 3 {
            fail!("{} bytes of pixels, and the model takes {height}x{width} pixels of 3", pixels.len());
        }
        let mut slot = self.backend.new_slot(self.slot_layout())?;
        slot.images_u8_mut().copy_from_slice(pixels);
        let b = &mut *self.backend;
        b.bind_batch(slot)?;
        b.begin_step(StepKeys { seed: 0, step: 0 })?;
        b.begin_micro(Micro::whole(1))?;
        self.model.forward(b, false)
    }

    /// The loss that the head was trained with; it decides how logits become probabilities.
    pub fn loss(&self) -> LossKind {
        self.meta.loss.unwrap_or(LossKind::Softmax)
    }

    pub(super) fn slot_layout(&self) -> SlotLayout {
        slot_layout(&self.model)
    }
}

/// Reads a model for pictures of size `overrides.image`. Resizes the position embedding if it has another
/// size.
fn open_at(
    path: &Path,
    overrides: &ModelOverrides,
    open: impl Fn(&Path, &ModelOverrides) -> Result<ModelFile>,
) -> Result<ModelFile> {
    let as_it_is = open(path, overrides);
    if overrides.image.is_none() || as_it_is.is_ok() {
        return as_it_is;
    }
    // Any other fault of the file also shows without the size.
    let file = open(path, &ModelOverrides { image: None, ..overrides.clone() })?;
    let target = AdaptTarget { image: overrides.image, ..AdaptTarget::default() };
    let (mut file, notes) = weights::adapt(file, &target)?;
    file.notes.extend(notes);
    Ok(file)
}

/// One class of a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Number of the class, from 0.
    pub class: usize,
    /// The class's name, or its number if the file has no names.
    pub name: String,
    /// Softmax or sigmoid of the logits, by the loss that the head was trained with.
    pub probability: f32,
}

fn likeliest(logits: &[f32], loss: LossKind, names: Option<&[String]>) -> Vec<Prediction> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|z| f64::from(z - largest).exp()).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let prediction = |class: usize| Prediction {
        class,
        name: data::classes::shown(class, logits.len(), names),
        probability: match loss {
            LossKind::Softmax => f64::from(logits[class] - largest).exp() / sum,
            LossKind::Sigmoid => 1.0 / (1.0 + f64::from(-logits[class]).exp()),
        } as f32,
    };
    order.into_iter().map(prediction).collect()
}

/// The layout of a slot of one micro-batch.
fn slot_layout(model: &Vit) -> SlotLayout {
    SlotLayout {
        samples: model.micro_batch,
        image: model.config.image,
        pixels: Pixels::U8,
        targets: TargetKind::Labels,
    }
}

/// Writes a file's weights into the model's parameters and fills its fixed tables.
pub fn load_weights(file: &ModelFile, model: &Vit, backend: &mut dyn Backend) -> Result<()> {
    weights::load_into(file, &model.layout, |param, values| backend.write(param.mat(), values))?;
    model.init_tables(backend)
}

/// Computes loss and gradients of one whole batch, without masks and without an update.
pub fn gradients(b: &mut dyn Backend, model: &Vit, loss: Loss, batch: Slot) -> Result<StepReport> {
    b.bind_batch(batch)?;
    b.begin_step(StepKeys { seed: 0, step: 0 })?;
    b.begin_report()?;
    b.begin_micro(Micro::whole(model.micro_batch))?;
    model.forward(b, false)?;
    model.loss(b, loss)?;
    model.backward(b, false)?;
    b.report()
}
