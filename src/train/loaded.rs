//! A model from a weights file, on a device and ready to run: what `eval`, `predict` and `grad` start from.

use std::path::Path;

use crate::backend::{self, Backend, Device, Loss, Micro, Slot, StepKeys, StepReport};
use crate::error::Result;
use crate::vit::{Mode, Vit};
use crate::weights::{self, CheckpointMeta, ModelFile, ModelOverrides};

/// Weights, model and device.
pub struct Loaded {
    pub backend: Box<dyn Backend>,
    pub model: Vit,
    pub meta: CheckpointMeta,
}

impl Loaded {
    /// Reads the file and puts its weights on the device, for passes of `batch` samples of `image` (height, width);
    /// `None` takes the size that the file was made for.
    pub fn open(
        path: &Path,
        overrides: &ModelOverrides,
        device: Device,
        batch: usize,
        mode: Mode,
        image: Option<(usize, usize)>,
    ) -> Result<Self> {
        let mut file = weights::open(path, overrides)?;
        if let Some(image) = image {
            file.set_image(image)?;
        }
        file.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let mut backend = backend::select(device, 0)?;
        let model = Vit::new(file.config.clone(), file.meta.normalise, batch, mode, |_| false);
        backend.allocate(&model.plan())?;
        load_weights(&file, &model, &mut *backend)?;
        Ok(Self { backend, model, meta: file.meta })
    }
}

/// Writes a file's weights into the model's parameters, and fills in its fixed tables.
pub fn load_weights(file: &ModelFile, model: &Vit, backend: &mut dyn Backend) -> Result<()> {
    weights::load_into(file, &model.layout, |param, values| backend.write(param.mat(), values))?;
    model.init_tables(backend)
}

/// Loss and gradients of one whole batch, without masks and without an update.
pub fn gradients(b: &mut dyn Backend, model: &Vit, loss: Loss, batch: Slot) -> Result<StepReport> {
    b.bind_batch(batch)?;
    b.begin_step(StepKeys { seed: 0, step: 0 })?;
    b.begin_report()?;
    b.begin_micro(Micro {
        first: 0,
        samples: model.micro_batch,
        global_first: 0,
        accumulate: false,
        mean_over: model.micro_batch,
    })?;
    model.forward(b, false)?;
    model.loss(b, loss)?;
    model.backward(b, false)?;
    b.report()
}
