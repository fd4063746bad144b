//! How ranks on GPUs find each other: rank 0 tells the others the id of their communicator through files in the run's
//! directory, which all of them see. There is no port and no server.
//!
//! Every rank but the first leaves a file with a number that it drew. Rank 0 publishes the id together with the numbers
//! that it read, and again whenever one changes, until all ranks are connected. A rank takes an id only with its own
//! number, so files of an earlier start harm nothing: they have other numbers, and they are written over. Each start
//! has a folder of its own if its launcher gives starts different names ([`Launch::job`]).

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::launch::Launch;
use crate::backend::cuda::nccl::Id;
use crate::error::{At, Error, Kind, Result};
use crate::terminal;

/// The folder in a run's directory.
pub const FOLDER: &str = ".join";

/// How long ranks wait for each other, if `VITRUM_JOIN_TIMEOUT` does not say otherwise.
const LIMIT: Duration = Duration::from_secs(300);
/// After this time, rank 0 says once for whom it waits.
const PATIENCE: Duration = Duration::from_secs(15);
/// How much longer the other ranks wait.
const GRACE: Duration = Duration::from_secs(2);
/// How often files are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How often a rank writes its file again: network file systems remember for a while that a file is absent, and a file
/// in its folder that changes ends that.
const REPEAT: Duration = Duration::from_secs(1);
/// How often a file is made again at once that was taken away while it was made.
const TRIES: usize = 100;

/// Where a rank computes: two ranks cannot share a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) host: String,
    /// The GPU's PCI address.
    pub(super) gpu: String,
}

/// The file of a rank.
#[derive(Serialize, Deserialize)]
struct Member {
    number: u64,
    place: Place,
    /// It has read the id and connects.
    connects: bool,
}

/// The file of rank 0.
#[derive(PartialEq, Serialize, Deserialize)]
struct Published {
    id: Vec<u8>,
    /// Those of ranks 1, 2, ...
    numbers: Vec<u64>,
    /// Why this start cannot go on.
    refused: Option<Refusal>,
}

/// An error of rank 0 for the others to end with.
#[derive(PartialEq, Serialize, Deserialize)]
struct Refusal {
    message: String,
    hint: Option<String>,
    usage: bool,
}

/// A rank on its way to the others.
pub(super) struct Rendezvous<'a> {
    launch: &'a Launch,
    /// The run's directory, as the user named it.
    out: &'a Path,
    folder: PathBuf,
    place: Place,
    number: u64,
    limit: Duration,
    start: Instant,
    written: Option<Instant>,
    looked: Option<Instant>,
    id: Option<Id>,
    /// Of rank 0: what it published last.
    published: Option<Published>,
    told: bool,
    _lock: Option<File>,
}

impl<'a> Rendezvous<'a> {
    /// Prepares the folder.
    ///
    /// # Errors
    /// It cannot be written; another start with the same name is under way there; `VITRUM_JOIN_TIMEOUT` is no number.
    pub(super) fn new(launch: &'a Launch, out: &'a Path, place: Place) -> Result<Self> {
        let folder = out.join(FOLDER).join(launch.job());
        fs::create_dir_all(&folder).at(folder.display()).map_err(|e| {
            e.hint(
                "ranks on GPUs meet in the run's directory: choose one that all can write with `--out DIR`",
            )
        })?;
        let lock = if launch.rank == 0 { take(&folder, out)? } else { None };
        if launch.rank == 0 {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_name() != LOCK {
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let drawn = format!("{}-{}-{now:?}-{place:?}", launch.rank, std::process::id());
        Ok(Self {
            launch,
            out,
            folder,
            place,
            number: xxhash_rust::xxh3::xxh3_64(drawn.as_bytes()),
            limit: limit()?,
            start: Instant::now(),
            written: None,
            looked: None,
            id: None,
            published: None,
            told: false,
            _lock: lock,
        })
    }

    /// The id that all ranks will have: rank 0 passes its own.
    ///
    /// # Errors
    /// Rank 0 does not answer; it refuses this start.
    pub(super) fn id(&mut self, own: impl FnOnce() -> Result<Id>) -> Result<Id> {
        if self.launch.rank == 0 {
            let id = own()?;
            self.id = Some(id);
            return Ok(id);
        }
        loop {
            self.look()?;
            if let Some(id) = self.id {
                return Ok(id);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What a rank does again and again until all are connected.
    ///
    /// # Errors
    /// Ranks are missing at the end of the time; two ranks have one GPU.
    pub(super) fn look(&mut self) -> Result<()> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        if self.launch.rank == 0 { self.publish() } else { self.answer() }
    }

    /// Tells the other ranks that are here that this one ends, and why. Only rank 0 speaks.
    pub(super) fn give_up(&self, error: &Error) {
        if self.launch.rank > 0 {
            return;
        }
        let number = |rank| self.read::<Member>(&member(rank)).map_or(0, |member| member.number);
        let refused = Refusal {
            message: error.message().into(),
            hint: error.hint_text().map(Into::into),
            usage: matches!(error.kind(), Kind::Usage),
        };
        let numbers = (1..self.launch.size).map(number).collect();
        // The others end without it, too, but later.
        let _ = self.write("id", &Published { id: Vec::new(), numbers, refused: Some(refused) });
    }

    /// Removes the files. Every rank may still look for them; none needs them.
    pub(super) fn done(self) {
        if self.launch.rank == 0 {
            let _ = fs::remove_dir_all(&self.folder);
            // Stays if another start meets in it.
            let _ = fs::remove_dir(self.out.join(FOLDER));
        }
    }

    /// Of rank 0.
    fn publish(&mut self) -> Result<()> {
        let members: Vec<Option<Member>> =
            (1..self.launch.size).map(|rank| self.read(&member(rank))).collect();
        let missing = |of: &dyn Fn(&Member) -> bool| -> Vec<usize> {
            let ranks = members.iter().enumerate();
            ranks.filter(|(_, member)| !member.as_ref().is_some_and(of)).map(|(i, _)| i + 1).collect()
        };
        let absent = missing(&|_| true);
        let id = self.id.expect("rank 0 has made the id").0.to_vec();
        if absent.is_empty() {
            let members = || members.iter().flatten();
            let numbers = members().map(|member| member.number).collect();
            let places: Vec<_> = std::iter::once(&self.place).chain(members().map(|m| &m.place)).collect();
            if let Some(error) = same_gpu(&places) {
                return Err(error);
            }
            let published = Published { id, numbers, refused: None };
            if self.published.as_ref() != Some(&published) {
                self.write("id", &published)?;
                self.published = Some(published);
            }
        }
        if self.start.elapsed() > PATIENCE && !self.told {
            self.told = true;
            let waits = if absent.is_empty() { missing(&|member| member.connects) } else { absent.clone() };
            if !waits.is_empty() {
                terminal::note(&format!("waiting for {}", names(&waits)));
            }
        }
        if self.start.elapsed() < self.limit {
            return Ok(());
        }
        let (seconds, out) = (self.limit.as_secs(), self.out.display());
        let silent = if absent.is_empty() { missing(&|member| member.connects) } else { absent };
        Err(if silent.is_empty() {
            Error::new(format!("all {} ranks came, but NCCL did not connect them within {seconds} s", self.launch.size))
                .hint("`NCCL_DEBUG=INFO` makes NCCL say why; `NCCL_SOCKET_IFNAME` names the network between machines")
        } else {
            let error = Error::new(format!("{} did not come to {out} within {seconds} s", names(&silent)));
            error.hint("all ranks need the same `--out DIR`, on a file system that all of them see; look for an error of those ranks")
        })
    }

    /// Of the other ranks.
    fn answer(&mut self) -> Result<()> {
        let own = member(self.launch.rank);
        let there = self.read::<Member>(&own);
        let is_ours = there.is_some_and(|there| there.number == self.number);
        if self.id.is_none() && !(is_ours && self.written.is_some_and(|at| at.elapsed() < REPEAT)) {
            self.leave_word(false)?;
        }
        if let Some(published) = self.read::<Published>("id")
            && published.numbers.get(self.launch.rank - 1) == Some(&self.number)
        {
            if let Some(refused) = published.refused {
                return Err(refused.into());
            }
            if self.id.is_none()
                && let Ok(id) = <[u8; 128]>::try_from(published.id)
            {
                self.leave_word(true)?;
                self.id = Some(Id(id));
            }
        }
        // Rank 0 knows more: its error comes first.
        if self.start.elapsed() < self.limit + GRACE {
            return Ok(());
        }
        let (seconds, out) = (self.limit.as_secs(), self.out.display());
        Err(match self.id {
            None => Error::new(format!("rank 0 did not answer in {out} within {seconds} s"))
                .hint("rank 0 waits for all ranks, and says which are missing; all need the same `--out DIR`, on a file system that all of them see"),
            Some(_) => Error::new(format!("NCCL did not connect the ranks within {seconds} s"))
                .hint("rank 0 says which ranks are missing; `NCCL_DEBUG=INFO` makes NCCL say more"),
        })
    }

    fn leave_word(&mut self, connects: bool) -> Result<()> {
        self.written = Some(Instant::now());
        let word = Member { number: self.number, place: self.place.clone(), connects };
        self.write(&member(self.launch.rank), &word)
    }

    /// Writes a file that is complete or not there. Rank 0 removes files of earlier starts when it comes, and the folder
    /// when all is done: what it takes away is made again.
    fn write(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let path = self.folder.join(name);
        let part = self.folder.join(format!("{name}.{}", std::process::id()));
        let json = serde_json::to_vec(value).expect("plain values");
        let write = || {
            fs::create_dir_all(&self.folder)?;
            fs::write(&part, &json)?;
            fs::rename(&part, &path)
        };
        let mut again = 0..TRIES;
        loop {
            match write() {
                // A folder that goes while it is made "exists".
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists)
                        && again.next().is_some() => {}
                done => return done.at(path.display()),
            }
        }
    }

    /// The content of a file. `None` if it is absent, or not of this kind: a file of another version.
    fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.folder.join(name)).ok()?).ok()
    }
}

const LOCK: &str = "lock";

fn member(rank: usize) -> String {
    format!("rank-{rank}")
}

/// Locks the folder for this start.
fn take(folder: &Path, out: &Path) -> Result<Option<File>> {
    let path = folder.join(LOCK);
    let file = File::create(&path).at(path.display())?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            Err(Error::new(format!("{}: another start of ranks is under way there", out.display()))
                .hint("wait for it, or choose another folder with `--out DIR`"))
        }
        // Some network file systems have no locks.
        Err(TryLockError::Error(e)) if e.kind() != ErrorKind::WouldBlock => Ok(None),
        Err(TryLockError::Error(e)) => Err(Error::new(format!("{}: {e}", path.display()))),
    }
}

/// The limit that the user set, or the usual one.
fn limit() -> Result<Duration> {
    const KEY: &str = "VITRUM_JOIN_TIMEOUT";
    match std::env::var(KEY) {
        Err(_) => Ok(LIMIT),
        Ok(text) => text.parse().map(Duration::from_secs).map_err(|_| {
            Error::usage(format!("`{KEY}={text}` is not a number of seconds"))
                .hint(format!("use `{KEY}=600`"))
        }),
    }
}

/// The error of two ranks that have one GPU, if there are any.
fn same_gpu(places: &[&Place]) -> Option<Error> {
    places.iter().enumerate().find_map(|(rank, place)| {
        let first = places[..rank].iter().position(|other| other == place)?;
        let Place { host, gpu } = place;
        Some(Error::usage(format!("ranks {first} and {rank} both have the GPU {gpu} of {host}")).hint(
            "start one rank per GPU: `--device cuda` gives each rank the GPU of its number on its machine",
        ))
    })
}

impl From<Refusal> for Error {
    fn from(refused: Refusal) -> Self {
        let error = if refused.usage { Error::usage(refused.message) } else { Error::new(refused.message) };
        match refused.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// `rank 3`, or `ranks 1, 2 and 5`.
fn names(ranks: &[usize]) -> String {
    let text = |ranks: &[usize]| ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match ranks {
        [one] => format!("rank {one}"),
        [most @ .., last] => format!("ranks {} and {last}", text(most)),
        [] => "no rank".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::Launcher;

    fn launch(rank: usize, size: usize) -> Launch {
        Launch { rank, size, local_rank: Some(rank), launcher: Launcher::Torchrun }
    }

    fn place(gpu: usize) -> Place {
        Place { host: "here".into(), gpu: format!("0000:{gpu:02x}:00.0") }
    }

    const ID: Id = Id([7; 128]);

    #[test]
    fn what_another_rank_takes_away_is_made_again() {
        let out = tempfile::tempdir().unwrap();
        let launch = launch(1, 2);
        let mut way = Rendezvous::new(&launch, out.path(), place(1)).unwrap();
        let (folder, ends) = (way.folder.clone(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::remove_dir_all(&folder);
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let left: Vec<Result<()>> = (0..300).map(|_| way.leave_word(false)).collect();
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            left.into_iter().for_each(|left| left.unwrap());
        });
    }

    /// Rank `rank` of `size`; `gpu` is its GPU's number. Returns the id, or the error's message.
    fn meet(out: &Path, rank: usize, size: usize, gpu: usize) -> Result<Id, String> {
        meet_as(out, launch(rank, size), gpu, ID)
    }

    fn meet_as(out: &Path, launch: Launch, gpu: usize, own: Id) -> Result<Id, String> {
        let Launch { rank, size, .. } = launch;
        let mut way = Rendezvous::new(&launch, out, place(gpu)).map_err(|e| e.message().to_string())?;
        way.limit = Duration::from_millis(1500);
        let go = |way: &mut Rendezvous| -> Result<Id> {
            let id = way.id(|| Ok(own))?;
            // Connected once rank 0 has heard that of all, as with NCCL.
            let all = |way: &Rendezvous| {
                (1..size).all(|r| way.read::<Member>(&member(r)).is_some_and(|member| member.connects))
            };
            while rank == 0 && !all(way) {
                way.look()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(id)
        };
        let id = go(&mut way).inspect_err(|e| way.give_up(e)).map_err(|e| e.message().to_string());
        if id.is_ok() {
            way.done();
        }
        id
    }

    fn all(out: &Path, gpus: &[usize]) -> Vec<Result<Id, String>> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..gpus.len())
                .map(|rank| scope.spawn(move || meet(out, rank, gpus.len(), gpus[rank])))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_meet_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        for size in [2, 4] {
            let gpus: Vec<usize> = (0..size).collect();
            assert!(all(dir.path(), &gpus).into_iter().all(|id| id == Ok(ID)));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn files_of_an_earlier_start_are_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(FOLDER).join(launch(0, 2).job());
        fs::create_dir_all(&folder).unwrap();
        let old = Published { id: vec![1; 128], numbers: vec![41], refused: None };
        let word = Member { number: 41, place: place(0), connects: true };
        fs::write(folder.join("id"), serde_json::to_vec(&old).unwrap()).unwrap();
        fs::write(folder.join("rank-1"), serde_json::to_vec(&word).unwrap()).unwrap();
        assert!(all(dir.path(), &[0, 1]).into_iter().all(|id| id == Ok(ID)));
        // Files of other kinds, as of another version.
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("id"), "x").unwrap();
        fs::write(folder.join("rank-1"), [0; 8]).unwrap();
        assert!(all(dir.path(), &[0, 1]).into_iter().all(|id| id == Ok(ID)));
    }

    #[test]
    fn missing_ranks_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        let [zero, two] = std::thread::scope(|scope| {
            let came = [0, 2].map(|rank| scope.spawn(move || meet(out, rank, 4, rank)));
            came.map(|rank| rank.join().unwrap())
        });
        for told in [zero, two] {
            assert!(told.unwrap_err().starts_with("ranks 1 and 3 did not come to "));
        }
        let other = tempfile::tempdir().unwrap();
        assert!(meet(other.path(), 1, 2, 1).unwrap_err().starts_with("rank 0 did not answer in "));
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused_on_all() {
        let dir = tempfile::tempdir().unwrap();
        for told in all(dir.path(), &[0, 3, 3]) {
            assert_eq!(told.unwrap_err(), "ranks 1 and 2 both have the GPU 0000:03:00.0 of here");
        }
    }

    #[test]
    fn two_starts_in_one_directory_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        // The directory's lock then lets only one of them work there.
        std::thread::scope(|scope| {
            let ranks: Vec<_> = [(Launcher::Torchrun, 1u8), (Launcher::Slurm, 2)]
                .into_iter()
                .flat_map(|(launcher, start)| (0..3).map(move |rank| (launcher, start, rank)))
                .map(|(launcher, start, rank)| {
                    let launch = Launch { launcher, ..launch(rank, 3) };
                    (start, scope.spawn(move || meet_as(out, launch, rank, Id([start; 128]))))
                })
                .collect();
            for (start, rank) in ranks {
                assert_eq!(rank.join().unwrap(), Ok(Id([start; 128])));
            }
        });
    }

    #[test]
    fn two_starts_of_one_name_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let first = launch(0, 2);
        let _under_way = Rendezvous::new(&first, dir.path(), place(0)).unwrap();
        let refused = Rendezvous::new(&first, dir.path(), place(0)).err().unwrap();
        assert!(refused.message().ends_with("another start of ranks is under way there"));
    }
}
