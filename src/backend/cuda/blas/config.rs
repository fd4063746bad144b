//! What an algorithm of cuBLASLt does, by its own description, and which ones we exclude.

use std::ptr;

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;

use crate::backend::cuda::api;

/// The relevant part of an algorithm's configuration. `None`: the library does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) id: Option<u32>,
    /// Parts into which the sum over k is split.
    pub(super) splits: Option<u32>,
    /// `cublasLtMatmulStages_t`
    pub(super) stages: Option<u32>,
}

impl Config {
    pub(super) fn of(algo: &sys::cublasLtMatmulAlgo_t) -> Self {
        let read = |attribute: Attribute| {
            let (mut value, mut written) = (0u32, 0usize);
            // SAFETY: a valid algorithm; room for one word, which each of these attributes is.
            let status = unsafe {
                api::cublaslt().cublasLtMatmulAlgoConfigGetAttribute(
                    algo,
                    attribute,
                    ptr::from_mut(&mut value).cast(),
                    size_of::<u32>(),
                    &mut written,
                )
            };
            (status == 0 && written == size_of::<u32>()).then_some(value)
        };
        Self {
            id: read(Attribute::CUBLASLT_ALGO_CONFIG_ID),
            splits: read(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
            stages: read(Attribute::CUBLASLT_ALGO_CONFIG_STAGES_ID),
        }
    }

    /// Whether the whole sum is computed in one place. False if the library does not say.
    pub(super) fn is_unsplit(&self) -> bool {
        self.splits == Some(1)
    }
}

/// Library and GPU, as far as known bugs depend on them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Library {
    /// `cublasLtGetVersion`
    pub(super) version: usize,
    pub(super) capability: (i32, i32),
}

impl Library {
    /// cuBLAS 12.6.3 to before 13.8.0 on compute capability 9.0: algorithm 66 gives wrong results where the
    /// number of splits does not divide k and k / splits, rounded down, is a multiple of the stage's depth
    /// (release notes of CUDA 13.4 Update 1, 6580689). If the library does not tell the algorithm or the
    /// stage, the worst is assumed.
    pub(super) fn computes_wrongly(&self, config: &Config, k: usize) -> bool {
        const WRONG_ALGORITHM: u32 = 66;
        if self.capability != (9, 0) || !(120_603..130_800).contains(&self.version) {
            return false;
        }
        let Some(splits @ 2..) = config.splits.map(|splits| splits as usize) else { return false };
        let may_be_the_one = config.id.is_none_or(|id| id == WRONG_ALGORITHM);
        let deep = |depth: Option<usize>| depth.is_none_or(|depth| (k / splits).is_multiple_of(depth));
        may_be_the_one && !k.is_multiple_of(splits) && deep(config.stages.and_then(stage_depth))
    }
}

/// Elements of k in a stage: `64` of `STAGES_64x3` and of `STAGES_64xAUTO`. Indexed by number, from 1: six
/// numbers of stages for each of four depths, then those that were added later.
#[rustfmt::skip]
const STAGE_DEPTHS: [usize; 36] = [
    16, 16, 16, 16, 16, 16,
    32, 32, 32, 32, 32, 32,
    64, 64, 64, 64, 64, 64,
    128, 128, 128, 128, 128, 128,
    32, 8, 16, 8, 16, 64, 8,
    8, 16, 32, 64, 128,
];

fn stage_depth(stages: u32) -> Option<usize> {
    STAGE_DEPTHS.get((stages as usize).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use sys::cublasLtMatmulStages_t as Stages;

    use super::*;

    const HOPPER: Library = Library { version: 130_101, capability: (9, 0) };
    const STAGES_64X3: u32 = Stages::CUBLASLT_MATMUL_STAGES_64x3 as u32;

    fn config(id: u32, splits: u32, stages: u32) -> Config {
        Config { id: Some(id), splits: Some(splits), stages: Some(stages) }
    }

    /// The weight gradients of 384-pixel fine-tuning sum over k = batch × 577 rows.
    #[test]
    fn splits_that_the_library_gets_wrong_are_known() {
        let wrong = |k, splits| HOPPER.computes_wrongly(&config(66, splits, STAGES_64X3), k);
        // 577 · 8 = 4616 = 72 · 64 + 8. In 3 parts: 1538 rounded down, not a multiple of 64. In 9 parts: 512,
        // a multiple.
        assert!(!wrong(4616, 3));
        assert!(wrong(4616, 9));
        // A split that divides k is right, and so is no split.
        assert!(!wrong(4616, 8));
        assert!(!wrong(4616, 1));
        // 197 tokens: none of 2 to 32 splits is affected at the batch sizes in use.
        for batch in [128, 256, 512, 1024] {
            assert!((2..=32).all(|splits| !wrong(197 * batch, splits)), "batch {batch}");
        }
    }

    #[test]
    fn other_libraries_cards_and_algorithms_are_right() {
        let case = config(66, 9, STAGES_64X3);
        for (version, capability, wrong) in [
            (120_602, (9, 0), false),
            (120_603, (9, 0), true),
            (130_799, (9, 0), true),
            (130_800, (9, 0), false),
            (130_101, (8, 0), false),
            (130_101, (10, 0), false),
        ] {
            let library = Library { version, capability };
            assert_eq!(library.computes_wrongly(&case, 4616), wrong, "{library:?}");
        }
        assert!(!HOPPER.computes_wrongly(&config(65, 9, STAGES_64X3), 4616));
    }

    #[test]
    fn what_is_not_told_is_taken_for_the_worst() {
        let of = |id, stages| Config { id, splits: Some(9), stages };
        assert!(HOPPER.computes_wrongly(&of(None, Some(STAGES_64X3)), 4616));
        assert!(HOPPER.computes_wrongly(&of(Some(66), None), 4618));
        assert!(HOPPER.computes_wrongly(&of(Some(66), Some(1000)), 4618));
        assert!(!Config { splits: None, ..config(1, 1, 1) }.is_unsplit());
    }

    /// The header's names carry the depth.
    #[test]
    fn stage_depths_are_those_of_the_names() {
        use Stages::*;
        let named = [
            CUBLASLT_MATMUL_STAGES_16x1,
            CUBLASLT_MATMUL_STAGES_16x6,
            CUBLASLT_MATMUL_STAGES_32x1,
            CUBLASLT_MATMUL_STAGES_32x6,
            CUBLASLT_MATMUL_STAGES_64x1,
            CUBLASLT_MATMUL_STAGES_64x6,
            CUBLASLT_MATMUL_STAGES_128x1,
            CUBLASLT_MATMUL_STAGES_128x6,
            CUBLASLT_MATMUL_STAGES_32x10,
            CUBLASLT_MATMUL_STAGES_8x4,
            CUBLASLT_MATMUL_STAGES_16x10,
            CUBLASLT_MATMUL_STAGES_8x5,
            CUBLASLT_MATMUL_STAGES_8x3,
            CUBLASLT_MATMUL_STAGES_8xAUTO,
            CUBLASLT_MATMUL_STAGES_16xAUTO,
            CUBLASLT_MATMUL_STAGES_32xAUTO,
            CUBLASLT_MATMUL_STAGES_64xAUTO,
            CUBLASLT_MATMUL_STAGES_128xAUTO,
        ];
        for stages in named {
            let name = format!("{stages:?}");
            let size = name.rsplit('_').next().and_then(|size| size.split('x').next()).unwrap();
            assert_eq!(stage_depth(stages as u32), size.parse().ok(), "{name}");
        }
        assert_eq!(stage_depth(CUBLASLT_MATMUL_STAGES_UNDEFINED as u32), None);
        assert_eq!(stage_depth(CUBLASLT_MATMUL_STAGES_END as u32), None);
    }
}
