//! Ctrl-C and SIGTERM: the first asks the run to stop at its next step, the second ends the process at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{At, Result};

/// The signal that arrived; 0: none.
static PENDING: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on signals are noted instead of ending the process. Later calls change nothing.
pub fn install() -> Result<()> {
    let mut fresh = false;
    let pending = PENDING.get_or_init(|| {
        fresh = true;
        Arc::default()
    });
    if !fresh {
        return Ok(());
    }
    let seen = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: a first signal finds `seen` unset, passes the shutdown, and sets it for the second.
        flag::register_conditional_shutdown(signal, 128 + signal, seen.clone())
            .at("cannot listen to signals")?;
        flag::register(signal, seen.clone()).at("cannot listen to signals")?;
        flag::register_usize(signal, pending.clone(), signal as usize).at("cannot listen to signals")?;
    }
    Ok(())
}

/// The signal that asks this process to stop, if one came.
pub fn pending() -> Option<i32> {
    let signal = PENDING.get()?.load(Ordering::Relaxed);
    (signal != 0).then_some(signal as i32)
}
