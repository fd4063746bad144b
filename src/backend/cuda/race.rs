//! Times several ways of doing the same work against each other, by the GPU's clock.
//!
//! An idle GPU runs at a fraction of its clock, its cache favours whichever way runs second, and launching a
//! kernel costs the host more time than a short kernel takes. So the GPU is warmed up first, and the ways
//! take turns. Every turn begins with clearing the cache, which also gives the host time to submit a whole
//! round before the GPU begins with it. The fastest turn of each way counts.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::driver::{Address, Event, Gpu, Stream};
use crate::error::Result;

/// Turns of each way that stays in the race.
const ROUNDS: usize = 5;
/// A way that was this much slower than the fastest in the first round drops out.
const HOPELESS: f32 = 1.5;
/// How long a GPU is kept busy before timing, and how soon it clocks down again.
const WARM_UP: Duration = Duration::from_millis(50);
const COOLS_AFTER: Duration = Duration::from_secs(2);

/// When a race last kept a GPU busy.
static BUSY_UNTIL: Mutex<Option<Instant>> = Mutex::new(None);

/// Microseconds of each of `ways`, infinite for one that does not work. `run` does one of them, or returns
/// false where it cannot; each is run several times. `cleared` is unused memory as large as the GPU's cache.
pub(super) fn race(
    gpu: &Gpu,
    cleared: (Address, usize),
    ways: usize,
    run: &mut dyn FnMut(usize) -> Result<bool>,
) -> Result<Vec<f32>> {
    // The first run of a way loads its kernels.
    let mut able = Vec::new();
    for way in 0..ways {
        if run(way)? {
            able.push(way);
        }
    }
    let mut fastest = vec![f32::INFINITY; ways];
    if able.len() < 2 {
        // Nothing to compare, so nothing is timed.
        able.iter().for_each(|way| fastest[*way] = 0.0);
        return Ok(fastest);
    }
    gpu.synchronize(Stream::Compute)?;
    warm_up(gpu, &able, run)?;

    let timer = |_| Ok((gpu.new_timer()?, gpu.new_timer()?));
    let timers: Vec<(Event, Event)> = able.iter().map(timer).collect::<Result<_>>()?;
    for round in 0..ROUNDS {
        for (way, (start, end)) in able.iter().zip(&timers) {
            gpu.fill(cleared.0, 0, cleared.1)?;
            gpu.record_event(start, Stream::Compute)?;
            run(*way)?;
            gpu.record_event(end, Stream::Compute)?;
        }
        gpu.synchronize(Stream::Compute)?;
        for (way, (start, end)) in able.iter().zip(&timers) {
            fastest[*way] = fastest[*way].min(1e3 * end.since(start)?);
        }
        if round == 0 {
            let limit = HOPELESS * fastest.iter().copied().fold(f32::INFINITY, f32::min);
            able.retain(|way| fastest[*way] <= limit);
        }
        if able.len() == 1 {
            break;
        }
    }
    *BUSY_UNTIL.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
    Ok(fastest)
}

fn warm_up(gpu: &Gpu, able: &[usize], run: &mut dyn FnMut(usize) -> Result<bool>) -> Result<()> {
    let busy_until = *BUSY_UNTIL.lock().unwrap_or_else(|e| e.into_inner());
    if busy_until.is_some_and(|at| at.elapsed() < COOLS_AFTER) {
        return Ok(());
    }
    let start = Instant::now();
    for way in able.iter().cycle() {
        if start.elapsed() >= WARM_UP {
            break;
        }
        run(*way)?;
        gpu.synchronize(Stream::Compute)?;
    }
    Ok(())
}
