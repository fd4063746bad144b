//! Batches from a safetensors file: the input of `vitrum grad` and `vitrum replay`.
//!
//! `images` f32 `[B, H, W, 3]` (already normalised) or `images_u8`, with `labels` i32 or i64 `[B]`, or
//! `targets` f32 `[B, C]`. A file for `replay` has one more axis in front, with one batch per step.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::backend::{Backend, Pixels, Slot, SlotLayout, TargetKind};
use crate::error::{At, Error, Result};
use crate::{fail, files};

/// Pixels and targets of S batches of B samples.
pub struct BatchFile {
    path: PathBuf,
    /// S
    pub steps: usize,
    pub layout: SlotLayout,
    pixels: Vec<u8>,
    labels: Vec<i32>,
    targets: Vec<f32>,
}

impl BatchFile {
    /// Reads one batch (`stacked` false) or a sequence of batches.
    pub fn open(path: &Path, stacked: bool) -> Result<Self> {
        let bytes = files::read(path)?;
        let file = SafeTensors::deserialize(&bytes).at(path.display())?;
        Self::parse(path, &file, stacked).map_err(|e| e.at(path.display()))
    }

    fn parse(path: &Path, file: &SafeTensors, stacked: bool) -> Result<Self> {
        let (images, pixels) = match (file.tensor("images"), file.tensor("images_u8")) {
            (Ok(t), _) if t.dtype() == Dtype::F32 => (t, Pixels::F32),
            (Ok(t), _) | (_, Ok(t)) if t.dtype() == Dtype::U8 => (t, Pixels::U8),
            (Ok(t), _) | (_, Ok(t)) => {
                return Err(Error::new(format!("`images` has type {:?}, not F32 or U8", t.dtype())));
            }
            _ => {
                return Err(
                    Error::new("no tensor `images` (or `images_u8`)").hint("see `vitrum grad --help`")
                );
            }
        };
        let shape = images.shape();
        let (steps, shape) = match (stacked, shape) {
            (true, [s, rest @ ..]) if rest.len() == 4 => (*s, rest),
            (false, shape) if shape.len() == 4 => (1, shape),
            _ => {
                let wanted = if stacked { "[S, B, H, W, 3]" } else { "[B, H, W, 3]" };
                return Err(Error::new(format!("`images` has shape {shape:?}, not {wanted}")));
            }
        };
        let &[samples, height, width, channels] = shape else { unreachable!("four axes were checked") };
        if channels != 3 || samples == 0 || steps == 0 || height == 0 || width == 0 {
            return Err(Error::new(format!(
                "`images` has shape {shape:?}: pictures have three channels and a size"
            )));
        }
        let total = steps * samples;
        let (mut labels, mut targets) = (Vec::new(), Vec::new());
        let kind = if let Ok(t) = file.tensor("targets") {
            let classes = *t.shape().last().unwrap_or(&0);
            if t.dtype() != Dtype::F32
                || classes == 0
                || t.shape().iter().product::<usize>() != total * classes
            {
                return Err(Error::new(format!(
                    "`targets` is {:?} {:?}, not F32 [.., B, C]",
                    t.dtype(),
                    t.shape()
                )));
            }
            targets = bytemuck::pod_collect_to_vec(t.data());
            TargetKind::Dense { classes }
        } else if let Ok(t) = file.tensor("labels") {
            labels = integers(&t)?;
            if labels.len() != total {
                return Err(Error::new(format!("`labels` has shape {:?} for {total} images", t.shape())));
            }
            TargetKind::Labels
        } else {
            return Err(Error::new("neither `labels` nor `targets`"));
        };
        let layout = SlotLayout { samples, image: (height, width), pixels, targets: kind };
        Ok(Self { path: path.into(), steps, layout, pixels: images.data().to_vec(), labels, targets })
    }

    /// Refuses labels outside `0..classes`, and targets with another number of classes.
    pub fn check_classes(&self, classes: usize) -> Result<()> {
        if let TargetKind::Dense { classes: given } = self.layout.targets
            && given != classes
        {
            fail!("{}: `targets` has {given} classes, the model has {classes}", self.path.display());
        }
        if let Some(label) = self.labels.iter().find(|l| **l < 0 || **l as usize >= classes) {
            fail!("{}: label {label}, but the model has {classes} classes", self.path.display());
        }
        Ok(())
    }

    /// Batch `step`, in a new slot of the device.
    pub fn slot(&self, backend: &dyn Backend, step: usize) -> Result<Slot> {
        let mut slot = backend.new_slot(self.layout)?;
        let (b, len) = (self.layout.samples, self.layout.image_len());
        match self.layout.pixels {
            Pixels::U8 => slot.images_u8_mut().copy_from_slice(&self.pixels[step * b * len..][..b * len]),
            Pixels::F32 => bytemuck::cast_slice_mut(slot.images_f32_mut())
                .copy_from_slice(&self.pixels[step * b * len * 4..][..b * len * 4]),
        }
        match self.layout.targets {
            TargetKind::Labels => slot.labels_mut().copy_from_slice(&self.labels[step * b..][..b]),
            TargetKind::Dense { classes: c } => {
                slot.targets_mut().copy_from_slice(&self.targets[step * b * c..][..b * c]);
            }
        }
        slot.position = step as u64;
        Ok(slot)
    }
}

fn integers(t: &TensorView) -> Result<Vec<i32>> {
    let wide: Vec<i64> = match t.dtype() {
        Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(t.data()).into_iter().map(i64::from).collect(),
        Dtype::I64 => bytemuck::pod_collect_to_vec(t.data()),
        other => return Err(Error::new(format!("`labels` has type {other:?}, not I32 or I64"))),
    };
    wide.into_iter()
        .map(|l| i32::try_from(l).map_err(|_| Error::new(format!("label {l} is out of range"))))
        .collect()
}
