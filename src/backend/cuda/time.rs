//! What benchmarks need to know about a GPU and runs do not: which kernels were launched, how long work took
//! by the GPU's clock, how fast the GPU copies.

use super::Cuda;
use super::driver::{Buffer, Launched, Stream, memory_of_current_gpu};
use super::libraries::STAND_IN;
use crate::backend::{Arena, Body};
use crate::error::Result;

impl Cuda {
    /// The stand-in GPU computes on the host: its times mean nothing.
    pub fn is_stand_in(&self) -> bool {
        self.gpu.properties().name.starts_with(STAND_IN)
    }

    /// Bytes in use, by any program, on the GPU that this thread last computed on.
    pub fn used_memory() -> Result<usize> {
        let (free, total) = memory_of_current_gpu()?;
        Ok(total - free)
    }

    /// Runs `work` and returns the kernels that it started, in order. Products of cuBLASLt are not among
    /// them.
    pub fn launches(&mut self, work: Body) -> Result<Vec<Launched>> {
        let gpu = self.gpu.clone();
        let launches = gpu.watch_launches(|| work(self))?;
        gpu.synchronize(Stream::Compute)?;
        Ok(launches)
    }

    /// Records `work`, which has run before, and returns the seconds of one replay: one value per round of
    /// `replays`, timed with two events of the GPU. The host makes no call between two kernels.
    pub fn time_replayed(&mut self, work: Body, rounds: usize, replays: usize) -> Result<Vec<f64>> {
        let gpu = self.gpu.clone();
        let graph = gpu.capture(|| work(self))?;
        self.time_rounds(rounds, replays, |_| gpu.replay(&graph))
    }

    /// Like [`Cuda::time_replayed`], but launch by launch: for an update, which sends its rates each time.
    pub fn time_launched(&mut self, work: Body, rounds: usize, repeats: usize) -> Result<Vec<f64>> {
        self.time_rounds(rounds, repeats, |cuda| work(cuda))
    }

    fn time_rounds(
        &mut self,
        rounds: usize,
        repeats: usize,
        mut run: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let (start, end) = (self.gpu.new_timer()?, self.gpu.new_timer()?);
        // The first run of a graph uploads it.
        run(self)?;
        let mut seconds = Vec::new();
        for _ in 0..rounds {
            self.gpu.record_event(&start, Stream::Compute)?;
            for _ in 0..repeats {
                run(self)?;
            }
            self.gpu.record_event(&end, Stream::Compute)?;
            end.synchronize()?;
            seconds.push(f64::from(end.since(&start)?) * 1e-3 / repeats as f64);
        }
        Ok(seconds)
    }

    /// Seconds to copy `bytes` bytes within the GPU's memory, as in [`Cuda::time_replayed`].
    pub fn time_copy(&mut self, bytes: usize, rounds: usize, repeats: usize) -> Result<Vec<f64>> {
        self.gpu.make_current()?;
        let (from, to): (Buffer, Buffer) = (self.gpu.allocate(bytes)?, self.gpu.allocate(bytes)?);
        self.time_rounds(rounds, repeats, |cuda| cuda.gpu.copy(to.address, from.address, bytes))
    }

    /// Fills an arena with repetitions of `pattern`. Weights are also copied to bf16, where there is such a
    /// copy.
    pub fn fill(&mut self, arena: Arena, pattern: &[u8]) -> Result<()> {
        let Buffer { address, bytes, .. } = *self.arena(arena);
        let mut filled = pattern.len().min(bytes);
        self.gpu.upload(address, &pattern[..filled])?;
        while filled < bytes {
            let more = filled.min(bytes - filled);
            self.gpu.copy(address + filled as u64, address, more)?;
            filled += more;
        }
        if arena == Arena::Params {
            self.refresh_working_copy()?;
        }
        self.gpu.synchronize(Stream::Compute)
    }
}
