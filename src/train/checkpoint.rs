//! Checkpoints: `checkpoints/step-N/{model,ema,state}.safetensors`, whole or not there at all.
//!
//! A checkpoint is written into a hidden folder, synced, and renamed; `last` and `best` are symbolic links that are
//! replaced by a rename. A run that is killed at any moment therefore finds its newest whole checkpoint, and goes on to
//! the bits of a run that was never interrupted: `state.safetensors` holds the optimiser's moments and every counter, and
//! the loader's position is the number of finished steps.

use std::fs;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::Dtype;
use serde::{Deserialize, Deserializer, Serialize};

use crate::backend::{Arena, Backend};
use crate::error::{At, Error, Result};
use crate::files;
use crate::vit::Vit;
use crate::weights::safetensors::{self, SafeTensors, View};
use crate::weights::{self, CheckpointMeta, Tensor, Tensors};

use super::Trainer;

/// Everything a run needs besides weights and moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Finished steps; also the loader's position in batches.
    pub step: u64,
    pub skipped: u64,
    pub skipped_in_a_row: u64,
    /// Best validation metric so far (larger is better), and where.
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub stale_evals: u64,
    /// Of the steps since the last line of the log: a checkpoint may fall between two lines.
    pub window: Sums,
    /// The loss of the last line of the log.
    pub last_loss: Option<f64>,
    /// The recipe of the run, to refuse a resume under another one.
    pub recipe: String,
    /// The matrix product algorithms in use ([`Backend::algorithms`]).
    pub algorithms: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub metric: f64,
}

/// What a line of the log is the mean of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    pub steps: u64,
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub top1: f64,
}

/// JSON has no NaN and holds `null` in its place.
fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Where [`RunState`] lies in the metadata of `state.safetensors`.
const STATE_KEY: &str = "vitrum.state";

/// The checkpoints of one run directory.
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// `run/checkpoints`; nothing is created yet.
    pub fn new(run: &Path) -> Self {
        Self { dir: run.join("checkpoints") }
    }

    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    /// Steps of all whole checkpoints, ascending.
    pub fn steps(&self) -> Vec<u64> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut steps: Vec<u64> = entries
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .filter(|step| self.path(*step).join("state.safetensors").exists())
            .collect();
        steps.sort_unstable();
        steps
    }

    /// Writes a checkpoint of the trainer, points `last` (and `best`) at it, and removes those that are neither.
    ///
    /// False: the weights are not finite. Nothing was written, and the last good checkpoint is still there.
    pub fn save(&self, trainer: &mut Trainer, state: &RunState, meta: &CheckpointMeta) -> Result<bool> {
        let weights = read_weights(&trainer.model, &mut *trainer.backend, Arena::Params)?;
        if !weights.values().flat_map(|t| &t.values).all(|value| value.is_finite()) {
            return Ok(false);
        }
        let hidden = self.hidden(state.step);
        let written = self.write(&hidden, trainer, &weights, state, meta).and_then(|()| {
            let target = self.path(state.step);
            if target.exists() {
                self.remove(state.step);
            }
            fs::rename(&hidden, &target).at(target.display())
        });
        if written.is_err() {
            let _ = fs::remove_dir_all(&hidden);
        }
        written.map_err(|e| e.at(format!("checkpoint at step {}", state.step)))?;
        files::sync_dir(&self.dir);
        self.link(state)?;
        self.prune(state);
        Ok(true)
    }

    fn write(
        &self,
        folder: &Path,
        trainer: &mut Trainer,
        weights: &Tensors,
        state: &RunState,
        meta: &CheckpointMeta,
    ) -> Result<()> {
        files::create_dir(folder)?;
        let meta = CheckpointMeta { step: Some(state.step), ..meta.clone() };
        let config = trainer.model.config.clone();
        weights::save(&folder.join("model.safetensors"), &config, weights, &meta)?;
        if trainer.optimizer.ema_decay().is_some() {
            let tensors = read_weights(&trainer.model, &mut *trainer.backend, Arena::Ema)?;
            weights::save(&folder.join("ema.safetensors"), &config, &tensors, &meta)?;
        }
        write_state(&folder.join("state.safetensors"), &mut *trainer.backend, state)
    }

    /// Points `last` at the newest and `best` at the best checkpoint.
    fn link(&self, state: &RunState) -> Result<()> {
        self.point("last", state.step)?;
        match state.best {
            Some(best) if self.path(best.step).exists() => self.point("best", best.step),
            _ => Ok(()),
        }
    }

    fn point(&self, name: &str, step: u64) -> Result<()> {
        let link = self.dir.join(name);
        let temporary = self.dir.join(format!(".{name}.{}.tmp", std::process::id()));
        let _ = fs::remove_file(&temporary);
        std::os::unix::fs::symlink(format!("step-{step}"), &temporary).at(temporary.display())?;
        fs::rename(&temporary, &link).at(link.display())
    }

    /// Hides a checkpoint, then removes it: a killed run leaves no half of one under its name. Best effort.
    fn remove(&self, step: u64) {
        let hidden = self.hidden(step).with_extension("old.tmp");
        let _ = fs::rename(self.path(step), &hidden).and_then(|()| fs::remove_dir_all(&hidden));
    }

    fn hidden(&self, step: u64) -> PathBuf {
        self.dir.join(format!(".step-{step}.{}.tmp", std::process::id()))
    }

    /// Removes what is neither last nor best, and leftovers of killed writers. Best effort.
    fn prune(&self, state: &RunState) {
        let best = state.best.map(|b| b.step);
        for step in self.steps() {
            if step != state.step && Some(step) != best {
                self.remove(step);
            }
        }
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().ends_with(".tmp") {
                let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
            }
        }
    }

    /// Restores the newest whole checkpoint, unless `check` objects to its state. `None`: there is none, the run starts
    /// fresh.
    pub fn resume(
        &self,
        trainer: &mut Trainer,
        check: impl FnOnce(&RunState) -> Result<()>,
    ) -> Result<Option<RunState>> {
        let Some(step) = self.steps().last().copied() else { return Ok(None) };
        let folder = self.path(step);
        let restore = |trainer: &mut Trainer| -> Result<RunState> {
            let stored = SafeTensors::open(&folder.join("state.safetensors"))?;
            let state = read_state(&stored, &folder)?;
            check(&state)?;
            load_weights(&folder.join("model.safetensors"), trainer, Arena::Params)?;
            if trainer.optimizer.ema_decay().is_some() {
                load_weights(&folder.join("ema.safetensors"), trainer, Arena::Ema)?;
            }
            read_moments(&stored, &folder, &mut *trainer.backend)?;
            Ok(state)
        };
        let state = restore(trainer).map_err(|e| match e.hint_text() {
            Some(_) => e,
            None => e.hint(format!(
                "the checkpoint is damaged or belongs to another model: remove {} to go on from an older one",
                folder.display()
            )),
        })?;
        trainer.resume_at(state.step, state.skipped, state.skipped_in_a_row);
        self.link(&state)?;
        self.prune(&state);
        Ok(Some(state))
    }
}

/// All parameters of an arena under their own names, in file order.
pub fn read_weights(model: &Vit, backend: &mut dyn Backend, arena: Arena) -> Result<Tensors> {
    let mut tensors = Tensors::default();
    for param in model.layout.parameters() {
        let mut values = vec![0.0; param.len()];
        let mat = if arena == Arena::Ema { param.ema() } else { param.mat() };
        backend.read(mat, &mut values)?;
        tensors.insert(param.name.clone(), Tensor::new(param.shape.clone(), param.to_file_order(&values)));
    }
    Ok(tensors)
}

fn load_weights(path: &Path, trainer: &mut Trainer, arena: Arena) -> Result<()> {
    let file = weights::open(path, &Default::default())?;
    let (model, backend) = (&trainer.model, &mut trainer.backend);
    weights::load_into(&file, &model.layout, |param, values| {
        backend.write(if arena == Arena::Ema { param.ema() } else { param.mat() }, values)
    })
}

fn write_state(path: &Path, backend: &mut dyn Backend, state: &RunState) -> Result<()> {
    let moments = [("moment1", Arena::Moment1), ("moment2", Arena::Moment2)];
    let mut buffers = Vec::new();
    for (name, arena) in moments {
        buffers.push((name, backend.read_arena(arena)?));
    }
    let views =
        buffers.iter().map(|(name, bytes)| View::new(*name, Dtype::U8, &[bytes.len()], bytes.as_slice()));
    let json = serde_json::to_string(state).at(path.display())?;
    safetensors::write(path, &[(STATE_KEY.to_string(), json)].into(), views.collect())
}

fn read_state(file: &SafeTensors, folder: &Path) -> Result<RunState> {
    let place = folder.join("state.safetensors");
    let json =
        file.metadata().get(STATE_KEY).ok_or_else(|| Error::new(format!("no `{STATE_KEY}` in the metadata")));
    serde_json::from_str(json.at(place.display())?).at(place.display())
}

fn read_moments(file: &SafeTensors, folder: &Path, backend: &mut dyn Backend) -> Result<()> {
    for (name, arena) in [("moment1", Arena::Moment1), ("moment2", Arena::Moment2)] {
        backend
            .write_arena(arena, file.bytes(name)?)
            .map_err(|e| e.at(format!("{}: `{name}`", folder.join("state.safetensors").display())))?;
    }
    Ok(())
}
