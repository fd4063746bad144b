//! Writes checkpoints on a thread, while training goes on.
//!
//! Between two steps each rank copies its part of weights, average and moments ([`Snapshot`]). Its thread
//! writes this part into the files of a hidden folder, which the first rank made. Other ranks then leave a
//! note in the folder. The first rank waits for all notes, adds the checksums and renames the folder, so the
//! earlier checkpoints are untouched until the new one is whole. Ranks meet only when a checkpoint begins and
//! when its result is asked for.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ::safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::snapshot::Snapshot;
use super::{About, Checkpoints, FILES, MOMENTS, RunState, STATE_KEY};
use crate::backend::Arena;
use crate::dist::Collective;
use crate::error::{At, Error, Result};
use crate::train::Trainer;
use crate::train::lease::Holder;
use crate::vit::Param;
use crate::watch::{self, Stage, Standing};
use crate::weights::safetensors::Outline;
use crate::weights::{self, CheckpointMeta};
use crate::{files, seal};

/// What became of a checkpoint.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// It is whole, and `last` points at it.
    Saved,
    /// Its weights are not finite, so it was not written. The last good one remains.
    NotFinite,
    /// It could not be written. Earlier ones are untouched.
    Failed(Error),
}

/// Writes one checkpoint at a time.
pub(crate) struct Writer {
    checkpoints: Checkpoints,
    ranks: Collective,
    params: Arc<[Param]>,
    /// `None` before the first checkpoint, and while one is being written.
    idle: Option<Snapshot>,
    running: Option<Running>,
    /// Asks the thread not to wait for other ranks any more.
    abandon: Arc<AtomicBool>,
    /// The lock of the run directory, on the first rank.
    lock: Option<Holder>,
}

struct Running {
    step: u64,
    work: Work,
}

enum Work {
    Thread(JoinHandle<(Snapshot, Outcome)>),
    /// It failed before a thread was started.
    Over(Outcome),
}

/// What the first rank tells the others, so that all write the same files.
#[derive(Serialize, Deserialize)]
struct Order {
    folder: Option<PathBuf>,
    state: String,
    meta: CheckpointMeta,
}

impl Writer {
    /// A writer of the trainer's checkpoints.
    pub(crate) fn new(checkpoints: Checkpoints, trainer: &Trainer, lock: Option<Holder>) -> Self {
        Self {
            checkpoints,
            ranks: trainer.collective,
            params: trainer.model.layout.parameters().cloned().collect(),
            idle: None,
            running: None,
            abandon: Arc::default(),
            lock,
        }
    }

    /// The step of the checkpoint that is being written, or whose result was not asked for yet.
    pub(crate) fn step(&self) -> Option<u64> {
        self.running.as_ref().map(|running| running.step)
    }

    /// Whether a checkpoint waits for [`Writer::settle`], which would not wait for it.
    pub(crate) fn is_done(&self) -> bool {
        self.running.as_ref().is_some_and(|running| match &running.work {
            Work::Thread(thread) => thread.is_finished(),
            Work::Over(_) => true,
        })
    }

    /// Copies the trainer's arenas and begins to write them. The writer must be idle. All ranks call it after
    /// the same step.
    ///
    /// # Errors
    /// The device or another rank failed; there is no memory for the copy. A checkpoint that cannot be written
    /// is no error here, but the result of [`Writer::settle`].
    pub(crate) fn begin(&mut self, trainer: &mut Trainer, state: &RunState, about: &About<'_>) -> Result<()> {
        assert!(self.running.is_none(), "a checkpoint is being written");
        let step = state.step;
        let mut order = Order {
            folder: None,
            state: serde_json::to_string(state).at("the run's state")?,
            meta: about.meta.clone(),
        };
        let mut refused = None;
        if self.ranks.size > 1 {
            if self.ranks.is_first() {
                let folder = self.checkpoints.hidden(step);
                match Plan::of(trainer, &order).and_then(|plan| plan.prepare(&folder, self.ranks.size)) {
                    Ok(()) => order.folder = Some(folder),
                    Err(error) => refused = Some(error),
                }
            }
            let mut bytes = serde_json::to_vec(&order).at("the order to write a checkpoint")?;
            self.ranks.broadcast(&mut bytes)?;
            order = serde_json::from_slice(&bytes).at("rank 0's order to write a checkpoint")?;
            if order.folder.is_none() {
                let error =
                    refused.unwrap_or_else(|| Error::new("rank 0 cannot make the checkpoint's folder"));
                self.running = Some(Running { step, work: Work::Over(Outcome::Failed(error)) });
                return Ok(());
            }
        }
        let mut snapshot = match self.idle.take() {
            Some(snapshot) => snapshot,
            None => Snapshot::new(trainer)?,
        };
        snapshot.take(trainer)?;
        let job = Job {
            plan: Plan::of(trainer, &order)?,
            folder: order.folder.unwrap_or_else(|| self.checkpoints.hidden(step)),
            checkpoints: self.checkpoints.clone(),
            params: self.params.clone(),
            state: state.clone(),
            facts: about.facts.clone(),
            rank: self.ranks.rank,
            ranks: self.ranks.size,
            abandon: self.abandon.clone(),
            lock: self.lock.clone(),
            standing: watch::current(),
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            let outcome = job.run(&snapshot);
            (snapshot, outcome)
        });
        let work = match thread {
            Ok(thread) => Work::Thread(thread),
            Err(e) => Work::Over(Outcome::Failed(Error::new(format!("no thread can be started: {e}")))),
        };
        self.running = Some(Running { step, work });
        Ok(())
    }

    /// Waits until the checkpoint is written, or could not be. All ranks call it after the same step, and get
    /// the same step and outcome. `None`: no checkpoint was begun since the last call.
    ///
    /// # Errors
    /// Another rank failed.
    pub(crate) fn settle(&mut self) -> Result<Option<(u64, Outcome)>> {
        let Some(Running { step, work }) = self.running.take() else { return Ok(None) };
        let here = watch::enter(Stage::Checkpoint);
        let mut outcome = match work {
            Work::Over(outcome) => outcome,
            Work::Thread(thread) => match thread.join() {
                Ok((snapshot, outcome)) => {
                    self.idle = Some(snapshot);
                    outcome
                }
                Err(_) => Outcome::Failed(Error::new("the thread that writes checkpoints died")),
            },
        };
        drop(here);
        if self.ranks.size > 1 {
            let mut note = if self.ranks.is_first() { outcome.note().into_bytes() } else { Vec::new() };
            self.ranks.broadcast(&mut note)?;
            if !self.ranks.is_first() {
                outcome = Outcome::read(&String::from_utf8_lossy(&note)).expect("rank 0 sends an outcome");
            }
        }
        if let Outcome::Failed(error) = outcome {
            outcome = Outcome::Failed(error.at(format!("checkpoint at step {step}")));
        }
        Ok(Some((step, outcome)))
    }
}

impl Drop for Writer {
    /// A process alone finishes a checkpoint that was begun, whatever ends the run. Of several ranks, the first one does
    /// so only if the others have written: it does not wait for them.
    fn drop(&mut self) {
        self.abandon.store(true, Ordering::Relaxed);
        if let Some(Running { work: Work::Thread(thread), .. }) = self.running.take() {
            let _ = thread.join();
        }
    }
}

impl Outcome {
    /// One line, for other ranks.
    fn note(&self) -> String {
        match self {
            Outcome::Saved => "saved\n".into(),
            Outcome::NotFinite => "not finite\n".into(),
            Outcome::Failed(error) => format!("failed {}\n", error.message().replace('\n', " ")),
        }
    }

    /// The inverse; `None` while the line is not complete.
    fn read(note: &str) -> Option<Self> {
        match note.split_once('\n')?.0 {
            "saved" => Some(Outcome::Saved),
            "not finite" => Some(Outcome::NotFinite),
            other => Some(Outcome::Failed(Error::new(other.strip_prefix("failed ")?))),
        }
    }

    /// The outcome of two ranks' parts.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Outcome::Saved, other) => other,
            (Outcome::NotFinite, Outcome::Failed(error)) => Outcome::Failed(error),
            (own, _) => own,
        }
    }
}

/// The files of one checkpoint, before their values.
struct Plan {
    /// Name, arena and outline of each weights file.
    weights: Vec<(&'static str, Arena, Outline)>,
    /// The table in each of them that no arena holds.
    table: Option<(String, Vec<f32>)>,
    state: Outline,
}

impl Plan {
    fn of(trainer: &Trainer, order: &Order) -> Result<Self> {
        let [model, ema, _] = FILES;
        let with_ema = trainer.optimizer.ema_decay().map(|_| (ema, Arena::Ema));
        let (mut weights, mut table) = (Vec::new(), None);
        for (name, arena) in [(model, Arena::Params)].into_iter().chain(with_ema) {
            let (outline, fixed) = weights::outline(&trainer.model.config, &order.meta)?;
            weights.push((name, arena, outline));
            table = fixed;
        }
        let lengths = MOMENTS.map(|(_, arena)| [trainer.whole_bytes(arena)]);
        let moments: Vec<_> =
            MOMENTS.iter().zip(&lengths).map(|((name, _), length)| (*name, Dtype::U8, &length[..])).collect();
        let state = Outline::new(&[(STATE_KEY.to_string(), order.state.clone())].into(), &moments);
        Ok(Self { weights, table, state })
    }

    /// Name and outline of every file, in the order of `checkpoint.json`.
    fn files(&self) -> impl Iterator<Item = (&'static str, &Outline)> {
        let [.., state] = FILES;
        self.weights.iter().map(|(name, _, outline)| (*name, outline)).chain([(state, &self.state)])
    }

    /// Makes the folder with its files in full length, and room for the notes of `ranks` ranks.
    fn prepare(&self, folder: &Path, ranks: usize) -> Result<()> {
        let _ = fs::remove_dir_all(folder);
        files::create_dir(folder)?;
        let made = self.files().try_for_each(|(name, outline)| {
            let path = folder.join(name);
            let made = File::create(&path).and_then(|file| {
                file.set_len(outline.bytes as u64)?;
                file.write_all_at(&outline.header, 0)
            });
            made.map_err(|e| files::cannot_write(&path, &e))
        });
        // A note must have room on a disk that is full by then.
        let made = made.and_then(|()| {
            (1..ranks).try_for_each(|rank| {
                let path = note_of(folder, rank);
                fs::write(&path, [b' '; NOTE]).map_err(|e| files::cannot_write(&path, &e))
            })
        });
        if made.is_err() {
            let _ = fs::remove_dir_all(folder);
        }
        made
    }
}

/// Bytes of a note.
const NOTE: usize = 512;

/// How often the first rank looks for notes.
const LOOK: Duration = Duration::from_millis(10);

/// Where a rank leaves its note.
fn note_of(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank}"))
}

/// The work of the thread.
struct Job {
    plan: Plan,
    folder: PathBuf,
    checkpoints: Checkpoints,
    params: Arc<[Param]>,
    state: RunState,
    facts: Value,
    rank: usize,
    ranks: usize,
    abandon: Arc<AtomicBool>,
    lock: Option<Holder>,
    /// Where the run stands, which may be waiting for this thread.
    standing: Option<Arc<Standing>>,
}

impl Job {
    fn run(&self, snapshot: &Snapshot) -> Outcome {
        let own = if snapshot.is_finite() {
            self.write(snapshot).map_or_else(Outcome::Failed, |()| Outcome::Saved)
        } else {
            Outcome::NotFinite
        };
        if self.rank > 0 {
            self.leave_note(&own);
            return own;
        }
        let outcome = match self.wait_for_notes(own) {
            Outcome::Saved => self.complete().map_or_else(Outcome::Failed, |()| Outcome::Saved),
            other => other,
        };
        if !matches!(outcome, Outcome::Saved) {
            let _ = fs::remove_dir_all(&self.folder);
        }
        outcome
    }

    /// Writes and syncs this rank's part of every file.
    fn write(&self, snapshot: &Snapshot) -> Result<()> {
        if self.ranks == 1 {
            self.plan.prepare(&self.folder, 1)?;
        }
        let [.., state] = FILES;
        for (name, arena, outline) in &self.plan.weights {
            self.write_file(name, |file| {
                if let Some((table, values)) = self.plan.table.as_ref().filter(|_| self.rank == 0) {
                    let at = outline.places[table].start;
                    file.write_all_at(bytemuck::cast_slice(values), at as u64)?;
                }
                snapshot.write_weights(*arena, &self.params, outline, file)
            })?;
        }
        self.write_file(state, |file| {
            MOMENTS
                .iter()
                .try_for_each(|(name, arena)| snapshot.write_bytes(*arena, name, &self.plan.state, file))
        })
    }

    fn write_file(&self, name: &str, write: impl FnOnce(&File) -> std::io::Result<()>) -> Result<()> {
        let path = self.folder.join(name);
        let file = OpenOptions::new().write(true).open(&path);
        let written = file.and_then(|file| {
            write(&file)?;
            file.sync_all()
        });
        self.standing.iter().for_each(|standing| standing.progress(Stage::Checkpoint));
        written.map_err(|e| files::cannot_write(&path, &e))
    }

    fn leave_note(&self, own: &Outcome) {
        let mut text = own.note();
        if text.len() > NOTE {
            let end = (0..NOTE).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(end);
            text.push('\n');
        }
        // Without the note, the first rank waits until the watchdog ends the run.
        let note = OpenOptions::new().write(true).open(note_of(&self.folder, self.rank));
        let _ = note.and_then(|file| {
            file.write_all_at(text.as_bytes(), 0)?;
            file.sync_all()
        });
    }

    /// Waits for the notes of all other ranks. They write into the folder, which is removed only after that.
    fn wait_for_notes(&self, own: Outcome) -> Outcome {
        let mut outcome = own;
        for rank in 1..self.ranks {
            let note = loop {
                // A file that is opened anew shows what another machine wrote.
                let text = fs::read_to_string(note_of(&self.folder, rank)).unwrap_or_default();
                if let Some(note) = Outcome::read(&text) {
                    break note;
                }
                if self.abandon.load(Ordering::Relaxed) {
                    return Outcome::Failed(Error::new("the run ended before all ranks had written"));
                }
                std::thread::sleep(LOOK);
            };
            let note = match note {
                Outcome::Failed(error) => Outcome::Failed(error.at(format!("rank {rank}"))),
                other => other,
            };
            outcome = outcome.and(note);
            self.standing.iter().for_each(|standing| standing.progress(Stage::Checkpoint));
        }
        outcome
    }

    /// Adds the checksums, puts the folder into its place, and removes old checkpoints.
    fn complete(&self) -> Result<()> {
        for rank in 1..self.ranks {
            let note = note_of(&self.folder, rank);
            fs::remove_file(&note).at(note.display())?;
        }
        let names: Vec<&str> = self.plan.files().map(|(name, _)| name).collect();
        seal::write(&self.folder, &names, self.facts.clone())?;
        if self.lock.as_ref().is_some_and(|lock| !lock.is_held()) {
            return Err(Error::new("another process has taken the run directory"));
        }
        self.checkpoints.put_in_place(&self.folder, &self.state)
    }
}
