//! How the CPU backend computes: with which instruction set and which threads.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{At, Error, Result};

/// Instruction sets for which the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// AVX2 with FMA: vectors of 8.
    Avx2,
    /// AVX-512 F, BW, DQ, VL: vectors of 16.
    Avx512,
}

impl Isa {
    /// The best that this machine has.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let wide = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                if fma && wide {
                    return Isa::Avx512;
                }
                if fma {
                    return Isa::Avx2;
                }
            }
            Isa::Scalar
        })
    }

    /// The best, or the one that `VITRUM_ISA` names.
    pub fn from_env() -> Result<Isa> {
        let Some(wanted) = std::env::var("VITRUM_ISA").ok().filter(|w| !w.is_empty()) else {
            return Ok(Isa::best());
        };
        let isa = match wanted.as_str() {
            "scalar" => Isa::Scalar,
            "avx2" => Isa::Avx2,
            "avx512" => Isa::Avx512,
            _ => {
                return Err(Error::usage(format!("`VITRUM_ISA={wanted}` is not an instruction set"))
                    .hint("use `scalar`, `avx2` or `avx512`, or unset it"));
            }
        };
        if isa > Isa::best() {
            return Err(Error::new(format!(
                "`VITRUM_ISA={wanted}`, but this processor has {} at most",
                Isa::best().name()
            ))
            .hint("unset `VITRUM_ISA`"));
        }
        Ok(isa)
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Every instruction set that this machine can run, best last. For tests.
    pub fn available() -> Vec<Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512].into_iter().filter(|i| *i <= Isa::best()).collect()
    }
}

/// An instruction set and a thread pool. Kernels take `&Compute` and split their rows over the pool; the
/// split never changes a bit of the result.
pub struct Compute {
    pub isa: Isa,
    pool: rayon::ThreadPool,
    /// Idle scratch buffers. They only grow: once each operation has run, a step allocates nothing.
    idle: Mutex<Vec<Vec<Line>>>,
    scratch_bytes: AtomicUsize,
}

impl Compute {
    /// `threads = 0` takes one per core.
    pub fn new(isa: Isa, threads: usize) -> Result<Self> {
        let threads =
            if threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { threads };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .at("cannot start the compute threads")?;
        Ok(Self { isa, pool, idle: Mutex::new(Vec::new()), scratch_bytes: AtomicUsize::new(0) })
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `job(i)` for every `i` in `0..n`, in any order, on the pool.
    pub fn for_each(&self, n: usize, job: impl Fn(usize) + Sync + Send) {
        use rayon::prelude::*;
        if n <= 1 || self.threads() == 1 {
            (0..n).for_each(job);
        } else {
            self.pool.install(|| (0..n).into_par_iter().with_max_len(1).for_each(job));
        }
    }

    /// Consumes `items` on the pool, in any order.
    pub fn for_each_item<T: Send>(&self, items: Vec<T>, job: impl Fn(T) + Sync + Send) {
        use rayon::prelude::*;
        if items.len() <= 1 || self.threads() == 1 {
            items.into_iter().for_each(job);
        } else {
            self.pool.install(|| items.into_par_iter().with_max_len(1).for_each(job));
        }
    }

    /// A buffer of at least `len` values with unspecified contents, aligned to 64 bytes. It is returned when
    /// dropped.
    pub fn scratch(&self, len: usize) -> ThreadScratch<'_> {
        let lines = len.div_ceil(LINE);
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, else the largest, which then grows.
        let best = (0..idle.len()).min_by_key(|&i| {
            let held = idle[i].len();
            if held >= lines { (0, held) } else { (1, usize::MAX - held) }
        });
        let mut buffer = best.map(|i| idle.swap_remove(i)).unwrap_or_default();
        drop(idle);
        if buffer.len() < lines {
            self.scratch_bytes.fetch_add((lines - buffer.len()) * size_of::<Line>(), Ordering::Relaxed);
            // A new allocation: growing in place would copy contents that nobody needs.
            buffer = vec![Line([0.0; LINE]); lines];
        }
        ThreadScratch { owner: self, buffer, len }
    }

    /// Bytes of all scratch buffers, idle or in use.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes.load(Ordering::Relaxed)
    }
}

/// Values per cache line.
const LINE: usize = 16;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// A buffer borrowed from [`Compute::scratch`].
pub struct ThreadScratch<'a> {
    owner: &'a Compute,
    buffer: Vec<Line>,
    len: usize,
}

impl Deref for ThreadScratch<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.buffer)[..self.len]
    }
}

impl DerefMut for ThreadScratch<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.buffer)[..self.len]
    }
}

impl Drop for ThreadScratch<'_> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        self.owner.idle.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}
