//! Checkpoints: `checkpoints/step-N/{model,ema,state}.safetensors` and their checksums, written atomically.
//!
//! A checkpoint is written to a hidden folder ([`writer`], from the copy that [`snapshot`] takes), with `checkpoint.json` ([`crate::seal`]) last. The folder is
//! then synced and renamed. `last` and `best` are symbolic links that a rename replaces. So a run that is
//! killed at any moment finds its newest complete checkpoint, and its result is bit-identical to an
//! uninterrupted run: `state.safetensors` holds the optimiser's moments and every counter, and the loader's
//! position is the number of finished steps. If the newest checkpoint is damaged, the run uses the one before
//! it and says so.

mod snapshot;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::backend::{Arena, Backend};
use crate::data::Digest;
use crate::error::{At, Error, Result};
use crate::seal::{SEAL, Seal};
use crate::vit::Vit;
use crate::weights::safetensors::SafeTensors;
use crate::weights::{self, CheckpointMeta, Tensor, Tensors};
use crate::{fail, files};

use super::spikes::Spikes;
use super::{Trainer, state};

pub(crate) use snapshot::ARENAS;
pub(crate) use writer::{Outcome, Writer};

/// Everything a run needs besides weights and moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Finished steps; also the loader's position in batches.
    pub step: u64,
    /// Steps whose update was skipped because the loss or the gradient norm was not finite.
    pub skipped: u64,
    /// The same, since the last update.
    pub skipped_in_a_row: u64,
    /// Best validation metric so far (larger is better), and its step.
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub stale_evals: u64,
    /// Sums over the steps since the last line of the log: a checkpoint may fall between two lines.
    pub window: Sums,
    /// The loss of the last line of the log.
    pub last_loss: Option<f64>,
    /// The run's recipe, to refuse a resume with another one.
    pub recipe: String,
    /// The recipe's name when the run began.
    #[serde(default)]
    pub recipe_name: String,
    /// The training and validation data, to refuse a resume on other data. `None` in older checkpoints.
    #[serde(default)]
    pub data: Option<RunDigest>,
    /// The number of images of an `--overfit` run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overfit: Option<usize>,
    /// The number of ranks, if there were several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// What is remembered to find steps that stand out, and the batches that were passed over for them.
    #[serde(default)]
    pub spikes: Spikes,
    /// The evaluation of this step was interrupted: a resumed run begins with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owes_evaluation: bool,
    /// The matrix product algorithms in use ([`Backend::algorithms`]).
    pub algorithms: Vec<String>,
}

/// A digest of a run's data, to notice changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunDigest {
    /// In the order of the labels.
    pub classes: Vec<String>,
    /// The training data.
    pub train: Digest,
    /// The validation data, if there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val: Option<Digest>,
}

/// The best evaluation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step of the evaluation.
    pub step: u64,
    /// Its value of `eval.metric`, made so that larger is better.
    pub metric: f64,
}

/// The sums from which a line of the log takes its means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Number of steps.
    pub steps: u64,
    /// Sum of the losses.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Sum of the top-1 shares.
    #[serde(deserialize_with = "number_or_nan")]
    pub top1: f64,
}

/// JSON has no NaN; it is stored as `null`.
fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// The key of [`RunState`] in the metadata of `state.safetensors`.
const STATE_KEY: &str = "vitrum.state";

/// The files of a checkpoint, as its `checkpoint.json` lists them.
const FILES: [&str; 3] = ["model.safetensors", "ema.safetensors", "state.safetensors"];

/// The checkpoints of one run directory.
#[derive(Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    /// How many of the newest checkpoints to keep, besides the best.
    keep: usize,
}

/// The facts that are written into a checkpoint.
pub struct About<'a> {
    /// For the weights file.
    pub meta: &'a CheckpointMeta,
    /// For `checkpoint.json`, an object.
    pub facts: Value,
}

/// The state of a resumed run.
pub struct Resumed {
    /// What the checkpoint says about the run.
    pub state: RunState,
    /// Lines for the header: which damaged checkpoints were skipped, and why.
    pub notes: Vec<String>,
}

impl Checkpoints {
    /// For `run/checkpoints`. Creates nothing yet. Keeps the `keep` newest checkpoints and the best.
    pub fn new(run: &Path, keep: usize) -> Self {
        Self { dir: run.join("checkpoints"), keep: keep.max(1) }
    }

    /// The folder of the checkpoint of `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    /// Steps of all checkpoints, ascending. Includes damaged ones: a folder is renamed into place only when
    /// it is complete, so one that lacks a file is damaged.
    pub fn steps(&self) -> Vec<u64> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut steps: Vec<u64> = entries
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .filter(|step| self.path(*step).is_dir())
            .collect();
        steps.sort_unstable();
        steps
    }

    /// Puts a complete hidden folder into its place, points `last` (and `best`) at it, and removes old
    /// checkpoints.
    fn put_in_place(&self, hidden: &Path, state: &RunState) -> Result<()> {
        files::replace_dir(hidden, &self.path(state.step))?;
        files::sync_dir(&self.dir);
        self.link(state)?;
        self.prune(state);
        Ok(())
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

    /// Renames a checkpoint to a hidden name, then removes it. So a killed run leaves no partial checkpoint
    /// under its name. Best effort.
    fn remove(&self, step: u64) {
        let hidden = self.dir.join(format!(".step-{step}-old.{}.tmp", std::process::id()));
        let _ = fs::rename(self.path(step), &hidden).and_then(|()| fs::remove_dir_all(&hidden));
    }

    fn hidden(&self, step: u64) -> PathBuf {
        self.dir.join(format!(".step-{step}.{}.tmp", std::process::id()))
    }

    /// Removes checkpoints that are neither among the newest nor the one that `best` names, and leftovers of killed
    /// writers. The best step may have no checkpoint: `best` then still names the one before.
    /// Checkpoints of later steps are damaged ones that the run skipped when it resumed; they are removed
    /// too. Best effort.
    fn prune(&self, state: &RunState) {
        let best = fs::read_link(self.dir.join("best")).ok();
        let best = best.and_then(|to| to.to_str()?.strip_prefix("step-")?.parse().ok());
        let (past, beyond): (Vec<u64>, Vec<u64>) =
            self.steps().into_iter().partition(|step| *step <= state.step);
        let old = past.iter().rev().skip(self.keep);
        old.chain(&beyond).filter(|step| Some(**step) != best).for_each(|step| self.remove(*step));
        files::sweep(&self.dir);
    }

    /// The state of the newest checkpoint whose `state.safetensors` is not damaged.
    pub fn newest_state(&self) -> Option<(u64, RunState)> {
        let newest = self.steps().into_iter().rev();
        newest.filter_map(|step| Some((step, open_state(&self.path(step), step).ok()?.1))).next()
    }

    /// Restores the newest undamaged checkpoint, if `check` accepts its state. `None`: there is no
    /// checkpoint, and the run starts from the beginning.
    ///
    /// Errors: those of `check`; all checkpoints are damaged.
    pub fn resume(
        &self,
        trainer: &mut Trainer,
        check: impl Fn(&RunState) -> Result<()>,
    ) -> Result<Option<Resumed>> {
        files::sweep(&self.dir);
        let mut notes = Vec::new();
        let mut first = None;
        for step in self.steps().into_iter().rev() {
            let folder = self.path(step);
            let opened = match open_state(&folder, step) {
                Ok((stored, state)) => {
                    check(&state)?;
                    restore(&folder, &stored, trainer).map(|()| state)
                }
                Err(e) => Err(e),
            };
            match opened {
                Ok(state) => {
                    trainer.resume_at(state.step, state.skipped, state.skipped_in_a_row);
                    notes.extend(weights::unsealed(&folder));
                    self.link(&state)?;
                    return Ok(Some(Resumed { state, notes }));
                }
                Err(e) => {
                    notes.push(format!("checkpoints/step-{step} is passed over: {}", e.message()));
                    first.get_or_insert((folder, e));
                }
            }
        }
        let Some((folder, error)) = first else { return Ok(None) };
        let what = if notes.len() > 1 {
            "every checkpoint of the run is damaged"
        } else {
            "the only checkpoint is damaged"
        };
        Err(Error::new(format!("{what}: {}", error.message())).hint(format!(
            "replace {} with an undamaged copy, or start a new run with another `--out`",
            folder.display()
        )))
    }
}

/// All parameters under their own names, in file order.
pub fn read_weights(model: &Vit, backend: &mut dyn Backend) -> Result<Tensors> {
    let mut tensors = Tensors::default();
    for param in model.layout.parameters() {
        let mut values = vec![0.0; param.len()];
        backend.read(param.mat(), &mut values)?;
        tensors.insert(param.name.clone(), Tensor::new(param.shape.clone(), param.to_file_order(&values)));
    }
    Ok(tensors)
}

/// Reads the state of a checkpoint folder and checks its checksum and its step.
fn open_state(folder: &Path, step: u64) -> Result<(SafeTensors, RunState)> {
    let path = folder.join("state.safetensors");
    if let Some(seal) = Seal::read(folder)? {
        if let Some(missing) = seal.files().find(|name| !folder.join(name).is_file()) {
            fail!("{}: {SEAL} lists this file, but it does not exist", folder.join(missing).display());
        }
        seal.check(&path, &files::map(&path)?)?;
    }
    let stored = SafeTensors::open(&path)?;
    let state = read_state(&stored, folder)?;
    if state.step != step {
        fail!("{}: holds the state of step {}", path.display(), state.step);
    }
    Ok((stored, state))
}

fn restore(folder: &Path, stored: &SafeTensors, trainer: &mut Trainer) -> Result<()> {
    let open = |name: &str| weights::open(&folder.join(name), &Default::default());
    let (layout, backend) = (&trainer.model.layout, &mut trainer.backend);
    weights::load_into(&open("model.safetensors")?, layout, |param, values| {
        backend.write(param.mat(), values)
    })?;
    if trainer.optimizer.ema_decay().is_some() {
        // What is no parameter is its own average.
        let mut average = backend.read_arena(Arena::Params)?;
        weights::load_into(&open("ema.safetensors")?, layout, |param, values| {
            state::set_values(&mut average, param.ema(), values);
            Ok(())
        })?;
        trainer.restore(Arena::Ema, average)?;
    }
    read_moments(stored, folder, trainer)
}

const MOMENTS: [(&str, Arena); 2] = [("moment1", Arena::Moment1), ("moment2", Arena::Moment2)];

fn read_state(file: &SafeTensors, folder: &Path) -> Result<RunState> {
    let place = folder.join("state.safetensors");
    let json =
        file.metadata().get(STATE_KEY).ok_or_else(|| Error::new(format!("no `{STATE_KEY}` in the metadata")));
    serde_json::from_str(json.at(place.display())?).at(place.display())
}

/// Restores the moments. Their lengths in the file must be those that the trainer's model and optimiser need.
fn read_moments(file: &SafeTensors, folder: &Path, trainer: &mut Trainer) -> Result<()> {
    let place = |name: &str| format!("{}: `{name}`", folder.join("state.safetensors").display());
    for (name, arena) in MOMENTS {
        let (bytes, wanted) = (file.bytes(name)?, trainer.whole_bytes(arena));
        if bytes.len() != wanted {
            fail!("{} has {} bytes, but the optimiser needs {wanted}", place(name), bytes.len());
        }
        trainer.restore(arena, bytes.to_vec()).map_err(|e| e.at(place(name)))?;
    }
    Ok(())
}
