//! How the CPU backend computes: which instruction set, and which threads.

use std::sync::OnceLock;

use crate::error::{At, Error, Result};

/// Instruction sets that the kernels are written for.
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

    /// The best, or what `VITRUM_ISA` asks for. An error if the machine cannot do that.
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

    /// Every instruction set that this machine can run, best last: what tests walk.
    pub fn available() -> Vec<Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512].into_iter().filter(|i| *i <= Isa::best()).collect()
    }
}

/// An instruction set and a pool of threads. Kernels take `&Compute` and split their rows over the pool; how they
/// split never changes a bit of the result.
pub struct Compute {
    pub isa: Isa,
    pool: rayon::ThreadPool,
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
        Ok(Self { isa, pool })
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
}
