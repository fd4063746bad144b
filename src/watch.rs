//! The watchdog: ends a run that hangs, and says where.
//!
//! The thread of a run notes where it stands: the stage that it entered, and when ([`enter`]). A second thread
//! looks at this. A stage that lasts longer than the limit ends the process: a disk that does not answer, a GPU
//! that does not finish, another rank that is gone. Several ranks write where they stand into a folder that all
//! of them see, so that a rank that waits for others can name those that are elsewhere or silent, and does not
//! end while another one still makes progress.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{At, Error, Result};
use crate::{files, terminal};

/// What the thread of a run does or waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stage {
    /// Anything else, between the other stages.
    Between,
    /// Waits for the data loader.
    Loader,
    /// Computes a step, or submits it to a device.
    Step,
    /// Waits for a device.
    Device,
    /// Waits for other ranks.
    Ranks,
    /// Waits for a checkpoint to be written.
    Checkpoint,
}

const STAGES: [Stage; 6] =
    [Stage::Between, Stage::Loader, Stage::Step, Stage::Device, Stage::Ranks, Stage::Checkpoint];

impl Stage {
    /// `rank 1 ...`
    fn does(self) -> &'static str {
        match self {
            Stage::Between => "works between two steps",
            Stage::Loader => "waits for the data loader",
            Stage::Step => "computes",
            Stage::Device => "waits for its GPU",
            Stage::Ranks => "waits for other ranks",
            Stage::Checkpoint => "waits for a checkpoint to be written",
        }
    }

    /// Whether what it waits for may be another rank's work.
    fn is_for_others(self) -> bool {
        matches!(self, Stage::Ranks | Stage::Checkpoint)
    }
}

/// The limit without `train.timeout`: this many times the longest computation so far, and at least so long.
const TIMES: u32 = 10;
const LEAST: Duration = Duration::from_secs(60);
/// The same before the first step is done, in which a device may compile and choose, and for checkpoints,
/// which a slow file system holds up.
const UNKNOWN: Duration = Duration::from_secs(1800);

/// Where the thread of a run stands. Other threads that work for it may report progress.
pub(crate) struct Standing {
    origin: Instant,
    stage: AtomicUsize,
    /// Milliseconds from `origin` to the last sign of progress.
    since: AtomicU64,
    step: AtomicU64,
    /// Milliseconds of the longest [`Stage::Step`] or [`Stage::Device`].
    longest: AtomicU64,
    has_stepped: AtomicBool,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Standing>>> = const { RefCell::new(None) };
}

impl Standing {
    fn new() -> Self {
        Self {
            origin: Instant::now(),
            stage: AtomicUsize::new(0),
            since: AtomicU64::new(0),
            step: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            has_stepped: AtomicBool::new(false),
        }
    }

    /// Progress in the current stage, if it is `stage`.
    pub(crate) fn progress(&self, stage: Stage) {
        if self.stage() == stage {
            self.set(stage);
        }
    }

    fn set(&self, stage: Stage) -> Stage {
        let now = self.origin.elapsed().as_millis() as u64;
        let since = self.since.swap(now, Ordering::Relaxed);
        let index = STAGES.iter().position(|s| *s == stage).unwrap_or(0);
        let before = STAGES[self.stage.swap(index, Ordering::Relaxed)];
        // How long others or a disk were waited for once says nothing about the next time.
        if matches!(before, Stage::Step | Stage::Device) {
            self.longest.fetch_max(now.saturating_sub(since), Ordering::Relaxed);
        }
        before
    }

    fn stage(&self) -> Stage {
        STAGES[self.stage.load(Ordering::Relaxed)]
    }

    /// How long there was no progress.
    fn waited(&self) -> Duration {
        let since = Duration::from_millis(self.since.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(since)
    }

    fn limit(&self, given: Option<Duration>) -> Duration {
        given.unwrap_or_else(|| {
            let longest = Duration::from_millis(self.longest.load(Ordering::Relaxed));
            let least = match self.has_stepped.load(Ordering::Relaxed) {
                true if self.stage() != Stage::Checkpoint => LEAST,
                _ => UNKNOWN,
            };
            (longest * TIMES).max(least)
        })
    }
}

/// The standing of this thread's run, for a thread that works for it.
pub(crate) fn current() -> Option<Arc<Standing>> {
    CURRENT.with_borrow(Clone::clone)
}

/// From now on this thread works for the run with this standing.
pub(crate) fn work_for(standing: Option<Arc<Standing>>) {
    CURRENT.set(standing);
}

/// Reports progress of work for which the run waits in `stage`.
pub(crate) fn progress(stage: Stage) {
    CURRENT.with_borrow(|standing| standing.iter().for_each(|standing| standing.progress(stage)));
}

/// Notes that this thread's run is in `stage` until the result is dropped. Does nothing without a [`Watch`].
pub(crate) fn enter(stage: Stage) -> Entered {
    let standing = current();
    let before = standing.as_ref().map_or(Stage::Between, |standing| standing.set(stage));
    Entered { standing, before }
}

/// Notes that this thread's run has finished a step.
pub(crate) fn finished(step: u64) {
    if let Some(standing) = current() {
        standing.step.store(step, Ordering::Relaxed);
        standing.has_stepped.store(true, Ordering::Relaxed);
        standing.progress(standing.stage());
    }
}

/// Leaves the stage when it is dropped.
pub(crate) struct Entered {
    standing: Option<Arc<Standing>>,
    before: Stage,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(standing) = &self.standing {
            standing.set(self.before);
        }
    }
}

/// What a rank writes for the others and for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    rank: usize,
    host: String,
    process: u32,
    /// Finished steps.
    step: u64,
    stage: Stage,
    /// Seconds without progress.
    seconds: f64,
    /// Counts up, so that a note of a process that has gone can be told from a new one.
    number: u64,
}

/// What a [`Watch`] needs to know.
pub(crate) struct Settings {
    /// The run directory.
    pub(crate) out: PathBuf,
    /// This process.
    pub(crate) rank: usize,
    /// Number of processes.
    pub(crate) ranks: usize,
    /// `train.timeout`.
    pub(crate) timeout: Option<Duration>,
    /// This machine.
    pub(crate) host: String,
}

/// Watches the run of the thread that started it, until it is dropped.
pub(crate) struct Watch {
    /// The note of this rank.
    note: PathBuf,
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to watch this thread.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub(crate) fn start(settings: Settings) -> Result<Self> {
        let standing = Arc::new(Standing::new());
        CURRENT.set(Some(standing.clone()));
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let watched = stop.clone();
        let note = note_at(&settings.out, settings.rank);
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || {
                Watcher { settings, standing, number: 0, asked: None, told: false }.watch(&watched)
            })
            .at("the watchdog's thread")?;
        Ok(Self { note, stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        CURRENT.set(None);
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        // It may be in the middle of a write to a file system that hangs. The run is over, and does not wait for
        // that.
        let Some(thread) = self.thread.take() else { return };
        let patience = Instant::now() + Duration::from_millis(200);
        while !thread.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
            let _ = fs::remove_file(&self.note);
            let _ = self.note.parent().map(fs::remove_dir);
        }
    }
}

struct Watcher {
    settings: Settings,
    standing: Arc<Standing>,
    number: u64,
    /// When this rank began to ask where the others are, and their notes of that moment.
    asked: Option<(Instant, Vec<Option<Note>>)>,
    /// Whether the note for people is written.
    told: bool,
}

impl Watcher {
    fn watch(mut self, stop: &(Mutex<bool>, Condvar)) {
        loop {
            let limit = self.standing.limit(self.settings.timeout);
            let pause = (limit / 16).clamp(Duration::from_millis(20), Duration::from_secs(5));
            let stopped = stop.0.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = stop.1.wait_timeout_while(stopped, pause, |stopped| !*stopped);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
            if let Some(error) = self.look(limit) {
                end(&error, &self.settings);
            }
        }
    }

    /// Writes and reads notes as the time demands. Returns why the run must end, if it must.
    fn look(&mut self, limit: Duration) -> Option<Error> {
        let (stage, waited) = (self.standing.stage(), self.standing.waited());
        if self.settings.ranks > 1 || waited > limit / 2 {
            self.write_note(stage, waited);
            self.told = true;
        } else if std::mem::take(&mut self.told) {
            let _ = fs::remove_file(self.place(self.settings.rank));
        }
        if waited <= limit / 2 {
            self.asked = None;
            return None;
        }
        if !(stage.is_for_others() && self.settings.ranks > 1) {
            return (waited > limit).then(|| self.own_fault(stage, waited));
        }
        let (since, before) = self.asked.get_or_insert_with(|| {
            let notes = (0..self.settings.ranks).map(|rank| read_note(&self.settings.out, rank));
            (Instant::now(), notes.collect())
        });
        if waited <= limit || since.elapsed() < limit / 2 {
            return None;
        }
        let now: Vec<_> = (0..self.settings.ranks).map(|rank| read_note(&self.settings.out, rank)).collect();
        let fresh: Vec<Option<Note>> = now
            .into_iter()
            .zip(before.iter())
            .map(|(now, before)| now.filter(|now| before.as_ref() != Some(now)))
            .collect();
        // A rank that makes progress will come, or will itself be found to hang. One that writes a checkpoint may take
        // as long as it would be given itself.
        let own = self.settings.rank;
        let patience = |note: &Note| match note.stage {
            Stage::Checkpoint if self.settings.timeout.is_none() => limit.max(UNKNOWN),
            _ => limit,
        };
        let moves = |note: &Note| note.rank != own && note.seconds < patience(note).as_secs_f64() / 2.0;
        if fresh.iter().flatten().any(moves) {
            self.asked = None;
            return None;
        }
        Some(self.others_fault(stage, waited, &fresh))
    }

    fn place(&self, rank: usize) -> PathBuf {
        note_at(&self.settings.out, rank)
    }

    /// Best effort: a disk that is full must not end the run here.
    fn write_note(&mut self, stage: Stage, waited: Duration) {
        self.number += 1;
        let note = Note {
            rank: self.settings.rank,
            host: self.settings.host.clone(),
            process: std::process::id(),
            step: self.standing.step.load(Ordering::Relaxed),
            stage,
            seconds: waited.as_secs_f64(),
            number: self.number,
        };
        let place = self.place(self.settings.rank);
        let text = serde_json::to_string(&note).unwrap_or_default() + "\n";
        let _ = place.parent().map(fs::create_dir_all);
        let _ = fs::write(place, text);
    }

    fn own_fault(&self, stage: Stage, waited: Duration) -> Error {
        let who = match self.settings.ranks {
            1 => "the run".into(),
            _ => format!("rank {} on {}", self.settings.rank, self.settings.host),
        };
        self.error(format!("{who} {} for {}", stage.does(), seconds(waited.as_secs_f64())), stage)
    }

    fn others_fault(&self, stage: Stage, waited: Duration, fresh: &[Option<Note>]) -> Error {
        let step = self.standing.step.load(Ordering::Relaxed);
        let mut silent = Vec::new();
        let mut elsewhere = Vec::new();
        for (rank, note) in fresh.iter().enumerate().filter(|(rank, _)| *rank != self.settings.rank) {
            match note {
                None => silent.push(rank.to_string()),
                Some(note) if note.stage == stage && note.step == step => {}
                Some(note) => elsewhere.push(format!(
                    "rank {rank} on {} {} for {}, after step {}",
                    note.host,
                    note.stage.does(),
                    seconds(note.seconds),
                    note.step
                )),
            }
        }
        let mut named = elsewhere;
        if !silent.is_empty() {
            let which = if silent.len() == 1 { "rank" } else { "ranks" };
            named.insert(0, format!("{which} {} said nothing: gone, or stopped", silent.join(", ")));
        }
        if named.is_empty() {
            named.push("all ranks wait in the same place: the network does not deliver".into());
        }
        let waited = seconds(waited.as_secs_f64());
        let text = format!("rank {} {} for {waited}; {}", self.settings.rank, stage.does(), named.join("; "));
        self.error(text, stage)
    }

    fn error(&self, what: String, stage: Stage) -> Error {
        let step = self.standing.step.load(Ordering::Relaxed);
        let check = match stage {
            Stage::Loader => "check the disk of the data; ",
            Stage::Checkpoint => "check the disk of the run; ",
            Stage::Device => "check the GPU with `nvidia-smi`; ",
            _ => "",
        };
        let all = if self.settings.ranks > 1 { "all ranks end" } else { "the run ends" };
        Error::new(format!("after step {step}, {what}: {all}")).hint(format!(
            "{check}`vitrum train --resume {}` continues from the last checkpoint; `--set train.timeout=SECONDS` waits \
             longer",
            self.settings.out.display()
        ))
    }
}

fn seconds(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

fn note_at(out: &Path, rank: usize) -> PathBuf {
    out.join("ranks").join(rank.to_string())
}

fn read_note(out: &Path, rank: usize) -> Option<Note> {
    serde_json::from_slice(&fs::read(note_at(out, rank)).ok()?).ok()
}

/// Removes the notes of an earlier process. Best effort.
pub(crate) fn forget(out: &Path) {
    let _ = fs::remove_dir_all(out.join("ranks"));
}

/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Says why, and ends the process at once: neither destructors nor the other ranks can hold it up. The launcher
/// ends the others.
fn end(error: &Error, settings: &Settings) -> ! {
    let mut text = format!("error: {error}");
    if settings.rank > 0 {
        text = format!("rank {}: {text}", settings.rank);
    }
    let (done, said) = channel();
    let log = settings.out.join("log.txt");
    let shown = text.clone();
    let speak = std::thread::Builder::new().spawn(move || {
        terminal::show_messages();
        terminal::say(&shown);
        let _ = files::append(&log, &format!("{}\n", terminal::visible(&shown)));
        let _ = done.send(());
    });
    if speak.is_ok() {
        let _ = said.recv_timeout(LAST_WORDS);
    }
    signal_hook::low_level::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watcher(out: &Path, rank: usize, ranks: usize) -> Watcher {
        let settings = Settings { out: out.into(), rank, ranks, timeout: None, host: format!("node{rank}") };
        Watcher { settings, standing: Arc::new(Standing::new()), number: 0, asked: None, told: false }
    }

    const LIMIT: Duration = Duration::from_millis(200);

    /// Looks until a watcher ends its run.
    fn verdict(watcher: &mut Watcher, mut meanwhile: impl FnMut()) -> String {
        let start = Instant::now();
        loop {
            meanwhile();
            if let Some(error) = watcher.look(LIMIT) {
                return error.message().into();
            }
            assert!(start.elapsed() < 50 * LIMIT, "it never ends");
            std::thread::sleep(LIMIT / 20);
        }
    }

    #[test]
    fn a_rank_names_itself_or_those_it_waits_for() {
        let (dir, start) = (tempfile::tempdir().unwrap(), Instant::now());
        let mut first = watcher(dir.path(), 0, 3);
        let mut second = watcher(dir.path(), 1, 3);
        first.standing.step.store(7, Ordering::Relaxed);
        second.standing.step.store(7, Ordering::Relaxed);
        first.standing.set(Stage::Ranks);
        second.standing.set(Stage::Loader);
        // The second one writes notes and does not end here; the third one is gone.
        let said = verdict(&mut first, || drop(second.look(LIMIT)));
        assert!(start.elapsed() > LIMIT, "too early");
        assert!(said.starts_with("after step 7, rank 0 waits for other ranks for 0."), "{said}");
        assert!(said.contains("rank 2 said nothing: gone, or stopped"), "{said}");
        assert!(said.contains("rank 1 on node1 waits for the data loader for 0."), "{said}");
        let said = verdict(&mut second, || ());
        assert!(said.contains("rank 1 on node1 waits for the data loader for 0."), "{said}");
    }

    #[test]
    fn a_rank_waits_as_long_as_another_one_makes_progress() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = watcher(dir.path(), 0, 2);
        let mut second = watcher(dir.path(), 1, 2);
        first.standing.set(Stage::Ranks);
        let start = Instant::now();
        while start.elapsed() < 4 * LIMIT {
            // An evaluation, say: many batches.
            second.standing.progress(Stage::Between);
            assert!(second.look(LIMIT).is_none() && first.look(LIMIT).is_none());
            std::thread::sleep(LIMIT / 20);
        }
        assert!(verdict(&mut first, || ()).contains("rank 1 said nothing"));
    }

    #[test]
    fn a_rank_waits_for_another_ones_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = watcher(dir.path(), 0, 2);
        let mut second = watcher(dir.path(), 1, 2);
        first.standing.set(Stage::Ranks);
        // It writes one large file: there is no progress to tell.
        second.standing.set(Stage::Checkpoint);
        let start = Instant::now();
        while start.elapsed() < 4 * LIMIT {
            assert!(second.look(UNKNOWN).is_none() && first.look(LIMIT).is_none());
            std::thread::sleep(LIMIT / 20);
        }
        second.settings.timeout = Some(LIMIT);
        first.settings.timeout = Some(LIMIT);
        let said = verdict(&mut first, || drop(second.look(UNKNOWN)));
        assert!(said.contains("rank 1 on node1 waits for a checkpoint"), "{said}");
    }

    #[test]
    fn the_limit_follows_the_slowest_step() {
        let standing = Standing::new();
        assert_eq!(standing.limit(None), UNKNOWN);
        assert_eq!(standing.limit(Some(LIMIT)), LIMIT);
        standing.has_stepped.store(true, Ordering::Relaxed);
        assert_eq!(standing.limit(None), LEAST);
        standing.longest.store(20_000, Ordering::Relaxed);
        assert_eq!(standing.limit(None), Duration::from_secs(200));
    }

    #[test]
    fn stages_nest() {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            Settings { out: dir.path().into(), rank: 0, ranks: 1, timeout: None, host: "node".into() };
        let watch = Watch::start(settings).unwrap();
        let standing = current().unwrap();
        {
            let _step = enter(Stage::Step);
            {
                let _ranks = enter(Stage::Ranks);
                assert_eq!(standing.stage(), Stage::Ranks);
            }
            assert_eq!(standing.stage(), Stage::Step);
        }
        assert_eq!(standing.stage(), Stage::Between);
        drop(watch);
        assert!(current().is_none());
        let _nothing = enter(Stage::Step);
    }
}
