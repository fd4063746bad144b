//! The lock of a run directory: one process works in it, on any machine that sees the folder.
//!
//! The file `.lock` names its holder. On one machine, and on file systems that have locks, the system's lock
//! decides; it ends with the process. Locks of many network file systems do not reach other machines. So the
//! holder also rewrites the file all the time, and a process of another machine waits until the file is
//! [`LEASE`] old before it takes it. Ages are differences of times that the file system itself gave, so clocks
//! need not agree.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{At, Error, Result};
use crate::terminal;

use super::directory::host;

/// The file. It stays; the lock ends with the process, however it ends.
pub(super) const LOCK: &str = ".lock";

/// How long a holder on another machine may be silent before it counts as dead. It renews its lease three times
/// as often.
const LEASE: Duration = Duration::from_secs(30);

/// How long a process on a network file system waits for one that took the lock at the same moment.
const RIVALS: Duration = Duration::from_secs(2);

/// Magic numbers (statfs(2)) of file systems that several machines share: 9p, BeeGFS, Ceph, CIFS, FUSE, GPFS,
/// Lustre, NFS, SMB2.
const SHARED: [u32; 9] = [
    0x0102_1997,
    0x1983_0326,
    0x00c3_6400,
    0xff53_4d42,
    0x6573_5546,
    0x4750_4653,
    0x0bd0_0bd0,
    0x6969,
    0xfe53_4d42,
];

/// The lock, held by this process until it is dropped.
pub(super) struct Lease {
    file: File,
    holder: Holder,
    stop: Arc<(Mutex<bool>, Condvar)>,
}

/// The text by which a process recognises its own lock.
#[derive(Clone)]
pub(crate) struct Holder {
    place: PathBuf,
    /// `process 7 on node`, the machine's boot, and a number of this process.
    text: String,
}

impl Holder {
    fn new(place: PathBuf) -> Self {
        let nonce = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let text = format!("process {} on {}\n{}\n{nonce:x}\n", std::process::id(), host(), boot());
        Self { place, text }
    }

    /// Whether this process still holds the lock: it may have been stopped so long that another one took it.
    pub(crate) fn is_held(&self) -> bool {
        // A file that cannot be read now says nothing.
        fs::read_to_string(&self.place).map_or(true, |text| text.starts_with(&self.text))
    }
}

impl Lease {
    /// Takes the lock of a folder.
    ///
    /// # Errors
    /// Another process holds it; the folder cannot be written.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        Self::take_within(dir, LEASE)
    }

    fn take_within(dir: &Path, lease: Duration) -> Result<Self> {
        let place = dir.join(LOCK);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&place).map_err(
                |e| {
                    Error::new(format!("{}: {e}", place.display()))
                        .hint("choose another folder with `--out DIR`")
                },
            )?;
        let is_locked = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => return Err(held(dir, &read(&place))),
            // Some file systems have no locks.
            Err(TryLockError::Error(_)) => false,
        };
        wait_for_the_dead(dir, &place, is_locked, lease)?;
        let holder = Holder::new(place);
        renew(&file, &holder, 0).at(holder.place.display())?;
        if is_shared(dir) || !is_locked {
            std::thread::sleep(RIVALS.min(lease));
            if !holder.is_held() {
                return Err(held(dir, &read(&holder.place)));
            }
        }
        let lease = Self { stop: Arc::new((Mutex::new(false), Condvar::new())), file, holder };
        lease.keep(dir, LEASE / 3)?;
        Ok(lease)
    }

    pub(super) fn holder(&self) -> Holder {
        self.holder.clone()
    }

    /// Starts the thread that renews the lease, and ends the process if another one has taken it.
    fn keep(&self, dir: &Path, every: Duration) -> Result<()> {
        let (stop, holder, dir) = (self.stop.clone(), self.holder.clone(), dir.to_path_buf());
        let file = self.file.try_clone().at(holder.place.display())?;
        let work = move || {
            for number in 1u64.. {
                let stopped = stop.0.lock().unwrap_or_else(PoisonError::into_inner);
                let waited = stop.1.wait_timeout_while(stopped, every, |stopped| !*stopped);
                let stopped = waited.unwrap_or_else(PoisonError::into_inner).0;
                if *stopped {
                    return;
                }
                if !holder.is_held() {
                    let error = lost(&dir, &read(&holder.place));
                    terminal::say(&format!("error: {error}"));
                    signal_hook::low_level::exit(1);
                }
                // A disk that is full or away now may be there the next time.
                let _ = renew(&file, &holder, number);
            }
        };
        std::thread::Builder::new().name("lease".into()).spawn(work).map(drop).at("the lock's thread")
    }
}

impl Drop for Lease {
    /// Leaves an empty file: nobody has to wait for this process.
    fn drop(&mut self) {
        let mut stopped = self.stop.0.lock().unwrap_or_else(PoisonError::into_inner);
        *stopped = true;
        self.stop.1.notify_all();
        if self.holder.is_held() {
            let _ = self.file.set_len(0);
        }
        // The thread has a handle of the same file, which it may close later.
        let _ = self.file.unlock();
    }
}

/// Writes the lock's text. It has the same length each time, so it needs no room on a full disk.
fn renew(file: &File, holder: &Holder, number: u64) -> std::io::Result<()> {
    let text = format!("{}{number:016x}\n", holder.text);
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// Returns when nobody else holds the lock. The system's lock is ours, or there is none.
fn wait_for_the_dead(dir: &Path, place: &Path, is_locked: bool, lease: Duration) -> Result<()> {
    let first = read(place);
    let Some((process, machine)) = holder_of(&first) else { return Ok(()) };
    // On this machine the system's lock would still be held, and a process can be looked for.
    let is_here = machine == boot();
    if is_here && (is_locked || !Path::new(&format!("/proc/{process}")).exists()) {
        return Ok(());
    }
    let mut told = false;
    loop {
        let now = read(place);
        if holder_of(&now).is_none() {
            // The holder ended in order.
            return Ok(());
        }
        if now != first {
            return Err(held(dir, &now));
        }
        if age(dir, place)? >= lease {
            return Ok(());
        }
        if !std::mem::replace(&mut told, true) {
            let (first, seconds) = (line(&first), lease.as_secs());
            terminal::note(&format!(
                "{}: waiting up to {seconds} s to see whether {first} still works there",
                dir.display()
            ));
        }
        std::thread::sleep((lease / 20).min(Duration::from_secs(1)));
    }
}

/// How long ago a file was written, by the clock of its file system.
fn age(dir: &Path, place: &Path) -> Result<Duration> {
    let probe = dir.join(format!("{LOCK}.{}.tmp", std::process::id()));
    let now = fs::write(&probe, "now").and_then(|()| fs::metadata(&probe)?.modified());
    let _ = fs::remove_file(&probe);
    let written = fs::metadata(place).and_then(|file| file.modified()).at(place.display())?;
    Ok(now.at(probe.display())?.duration_since(written).unwrap_or_default())
}

/// Number of the process, and boot of its machine. `None`: the lock is free.
fn holder_of(text: &str) -> Option<(u32, &str)> {
    let mut lines = text.lines();
    let process = lines.next()?.strip_prefix("process ")?.split(' ').next()?.parse().ok()?;
    Some((process, lines.next().unwrap_or_default()))
}

fn held(dir: &Path, text: &str) -> Error {
    Error::new(format!("{}: a run is already working there ({})", dir.display(), line(text)))
        .hint("wait for it, or stop it: it saves a checkpoint and ends")
}

fn lost(dir: &Path, text: &str) -> Error {
    Error::new(format!(
        "{}: this process did not answer for {} s, and {} took the run over",
        dir.display(),
        LEASE.as_secs(),
        line(text)
    ))
    .hint("nothing is lost: the other process continues from the last checkpoint")
}

fn line(text: &str) -> &str {
    text.lines().next().filter(|line| !line.is_empty()).unwrap_or("another process")
}

fn read(place: &Path) -> String {
    fs::read_to_string(place).unwrap_or_default()
}

/// A text that differs between machines, and between two starts of one.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or(host(), |id| id.trim().into())
}

fn is_shared(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|disk| SHARED.contains(&(disk.f_type as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(400);

    fn message(result: Result<Lease>) -> String {
        result.err().expect("it is refused").message().into()
    }

    #[test]
    fn the_dead_of_another_machine_lose_the_lock_and_the_living_keep_it() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join(LOCK);
        let elsewhere = |number: u32| format!("process 7 on node9\nanother boot\n1234\n{number:016x}\n");
        fs::write(&place, elsewhere(0)).unwrap();
        let start = std::time::Instant::now();
        let lease = Lease::take_within(dir.path(), SHORT).unwrap();
        assert!(start.elapsed() >= SHORT / 2, "it was taken at once");
        drop(lease);
        assert_eq!(read(&place), "", "it is free");

        fs::write(&place, elsewhere(0)).unwrap();
        let old = SystemTime::now() - 2 * LEASE;
        File::options().write(true).open(&place).unwrap().set_modified(old).unwrap();
        let start = std::time::Instant::now();
        drop(Lease::take(dir.path()).unwrap());
        assert!(start.elapsed() < LEASE / 3, "it was dead long ago");

        fs::write(&place, elsewhere(0)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..8 {
                    std::thread::sleep(SHORT / 4);
                    // In place, as the holder renews it: the file is never empty.
                    let file = File::options().write(true).open(&place).unwrap();
                    file.write_all_at(elsewhere(number).as_bytes(), 0).unwrap();
                }
            });
            let said = message(Lease::take_within(dir.path(), SHORT));
            assert!(said.ends_with("a run is already working there (process 7 on node9)"), "{said}");
        });
    }

    #[test]
    fn the_dead_of_this_machine_lose_the_lock_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("process 4194305 on {}\n{}\n1234\n0\n", host(), boot());
        fs::write(dir.path().join(LOCK), text).unwrap();
        let start = std::time::Instant::now();
        let lease = Lease::take(dir.path()).unwrap();
        assert!(start.elapsed() < LEASE / 3);
        assert!(lease.holder().is_held());
        // Another process believed this one dead.
        fs::write(dir.path().join(LOCK), "process 9 on node9\nanother boot\n5\n0\n").unwrap();
        assert!(!lease.holder().is_held());
        drop(lease);
        assert!(read(&dir.path().join(LOCK)).starts_with("process 9"), "it is left to its holder");
    }
}
