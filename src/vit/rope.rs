//! Rotary positions: the angles by which q and k of every patch are turned.
//!
//! A head of size Dh has n = Dh/4 frequencies `f_j = θ^(-j/n)` for each of a patch's two coordinates, so Dh/2 angles. Class
//! token and registers are not turned. Su et al. 2021 (arXiv:2104.09864); the two forms are those of EVA-02
//! (arXiv:2303.11331) and DINOv3 (arXiv:2508.10104).

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use crate::backend::RopePairs;

/// How coordinates become angles, and which elements turn together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeKind {
    /// No rotary positions.
    #[default]
    None,
    /// The grid spans [-1, 1] at every size; an angle is `2π·c·f`. Elements j and j + Dh/2 are a pair.
    Dinov3,
    /// The coordinates are those of the patches, scaled to a reference grid; an angle is `c·f`. Neighbours are a pair.
    Eva,
}

/// Which coordinate the first half of the angles belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeIndexing {
    /// The row.
    #[default]
    Ij,
    /// The column (Perception Encoder).
    Xy,
}

impl RopeKind {
    /// Which elements of a head are a pair.
    pub fn pairs(self) -> RopePairs {
        if self == RopeKind::Eva { RopePairs::Neighbours } else { RopePairs::Half }
    }
}

/// The table of [`crate::backend::Rope`], `[N, Dh]`: angles in f64, cosines and sines rounded once to f32.
pub fn table(config: &ModelConfig) -> Vec<f32> {
    let grid = config.patch_grid().grid();
    let n = config.head_size() / 4;
    let theta = f64::from(config.rope_theta());
    let frequencies: Vec<f64> = (0..n).map(|j| theta.powf(-(j as f64) / n as f64)).collect();
    let coordinate = |i: usize, side: usize, reference: Option<usize>| match config.rope {
        RopeKind::Eva => {
            let scale = reference.map_or(1.0, |reference| reference as f64 / side as f64);
            (i as f64 + f64::from(config.rope_offset)) * scale
        }
        _ => 2.0 * std::f64::consts::PI * (2.0 * (i as f64 + 0.5) / side as f64 - 1.0),
    };
    let mut out = Vec::with_capacity(grid.0 * grid.1 * config.head_size());
    for row in 0..grid.0 {
        for column in 0..grid.1 {
            let y = coordinate(row, grid.0, config.rope_ref.map(|r| r.0));
            let x = coordinate(column, grid.1, config.rope_ref.map(|r| r.1));
            let both = if config.rope_indexing == RopeIndexing::Xy { [x, y] } else { [y, x] };
            let angles = || both.iter().flat_map(|c| frequencies.iter().map(move |f| c * f));
            out.extend(angles().map(|a| a.cos() as f32));
            out.extend(angles().map(|a| a.sin() as f32));
        }
    }
    out
}
