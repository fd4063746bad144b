//! Signals. The first asks the work to stop at a point from which it can be resumed. A second Ctrl-C or
//! SIGTERM ends the process at once.
//!
//! SIGHUP (the terminal is gone) and SIGUSR1 (a batch system says that time is nearly up) count as SIGTERM. A
//! signal that the process ignored at its start, as under `nohup` or in the background of a script, stays
//! ignored.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;

use crate::error::{At, Result};
use crate::terminal;

/// The signal that arrived; 0 if none.
static PENDING: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on signals are recorded instead of ending the process. Later calls do nothing.
///
/// # Errors
/// The system does not let the process handle signals.
pub fn install() -> Result<()> {
    let mut fresh = false;
    let pending = PENDING.get_or_init(|| {
        fresh = true;
        Arc::default()
    });
    if !fresh {
        return Ok(());
    }
    let ignored = ignored();
    let seen = Arc::new(AtomicBool::new(false));
    for (signal, asks_as) in [(SIGINT, SIGINT), (SIGTERM, SIGTERM), (SIGHUP, SIGTERM), (SIGUSR1, SIGTERM)] {
        if ignored >> (signal - 1) & 1 == 1 {
            continue;
        }
        if signal == asks_as {
            // The order matters: the first signal finds `seen` unset, so it does not shut down, and then sets
            // `seen` for the second. A SIGHUP that a closing session sends with SIGTERM does not count as a
            // second signal.
            flag::register_conditional_shutdown(signal, 128 + signal, seen.clone())
                .at("cannot listen to signals")?;
            flag::register(signal, seen.clone()).at("cannot listen to signals")?;
        }
        flag::register_usize(signal, pending.clone(), asks_as as usize).at("cannot listen to signals")?;
    }
    // A file that grows past a limit is then an error of the write, and not the end of the process.
    flag::register(SIGXFSZ, Arc::default()).at("cannot listen to signals")?;
    Ok(())
}

/// The signal that asks this process to stop, if one came.
pub fn pending() -> Option<i32> {
    let signal = PENDING.get()?.load(Ordering::Relaxed);
    (signal != 0).then_some(signal as i32)
}

/// The number of the signal that arrived, or 0, for work that polls it.
///
/// # Errors
/// Those of [`install`].
pub fn flag() -> Result<Arc<AtomicUsize>> {
    install()?;
    Ok(PENDING.get().expect("installed above").clone())
}

/// Ends the process if it is still running `grace` after a signal. A read from a disk that hangs, or from a
/// pipe that nobody fills, cannot be asked to stop.
pub fn end_after(grace: Duration) {
    const LOOK: Duration = Duration::from_millis(50);
    let watch = move || {
        loop {
            std::thread::sleep(LOOK);
            if let Some(signal) = pending() {
                std::thread::sleep(grace);
                terminal::say("stopped while waiting for a read");
                std::process::exit(128 + signal);
            }
        }
    };
    // If the thread cannot be started, a second signal still ends the process.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(watch);
}

/// The signals that this process ignored at its start, one bit each. Read from `/proc`; none on other
/// systems.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
