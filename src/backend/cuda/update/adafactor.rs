//! Adafactor: tensors addressed by strides, cut into tiles of 64 × 64 (kernels/adafactor.cu).

use super::super::Cuda;
use super::super::driver::{Address, Gpu};
use super::super::launch::{
    AdafactorArgs, AdafactorBuffers, AdafactorTensor as Tensor, AdafactorTile as Tile, RuleConstants,
    UpdateBuffers, kernel,
};
use crate::backend::memory::TENSOR_ALIGN;
use crate::backend::{Rule, Segment, Update};
use crate::error::Result;

/// Rows and columns of a tile.
const TILE: usize = 64;
/// Shared memory for a tile whose lines start in different banks.
const TILE_SHARED: u32 = (TILE * (TILE + 1) * 4) as u32;
/// Shared memory in which eight warps sum one f64 each.
const SUM_SHARED: u32 = 8 * 8;

/// The tables of an update, and the scratch that its kernels share: one after the other in device memory.
pub(super) struct Tables {
    tensors: Vec<Tensor>,
    tiles: Vec<Tile>,
    /// Elements of scratch, f64 and f32.
    sums: usize,
    factors: usize,
    at: Address,
}

/// Parts of the memory, in order.
const TENSORS: usize = 0;
const TILES: usize = 1;
const SUMS: usize = 2;
const FACTORS: usize = 3;
const SQUARES: usize = 4;
const SCALES: usize = 5;
const PARTS: usize = 6;

impl Tables {
    pub(super) fn new(segments: &[Segment]) -> Self {
        let (mut tensors, mut tiles) = (Vec::new(), Vec::new());
        let (mut sums, mut factors) = (0, 0);
        for segment in segments {
            let f = segment.factor.unwrap_or_else(|| panic!("{}: Adafactor needs its axes", segment.name));
            let outers = f.outer[0] * f.outer[1];
            let (row_tiles, col_tiles) = (f.rows.div_ceil(TILE), f.cols.div_ceil(TILE));
            let first_tile = tiles.len();
            let places = (0..outers)
                .flat_map(|o| (0..row_tiles).flat_map(move |r| (0..col_tiles).map(move |c| (o, r, c))));
            for (outer, row, col) in places {
                let [tensor, outer, row, col] =
                    [tensors.len(), outer, row * TILE, col * TILE].map(|n| n as u32);
                tiles.push(Tile { tensor, outer, row, col });
            }
            let row_sums = sums;
            let col_sums = row_sums + if f.factored { col_tiles * outers * f.rows } else { 0 };
            tensors.push(Tensor {
                param: segment.param as u64,
                grad: segment.grad as u64,
                state: f.state as u64,
                row_sums: row_sums as u64,
                col_sums: col_sums as u64,
                factors: factors as u64,
                outers: outers as u32,
                outer1: f.outer[1] as u32,
                rows: f.rows as u32,
                cols: f.cols as u32,
                outer_stride0: f.outer_stride[0] as u32,
                outer_stride1: f.outer_stride[1] as u32,
                row_stride: f.row_stride as u32,
                col_stride: f.col_stride as u32,
                row_tiles: row_tiles as u32,
                col_tiles: col_tiles as u32,
                first_tile: first_tile as u32,
                tiles: (tiles.len() - first_tile) as u32,
                group: segment.group as u32,
                factored: u32::from(f.factored),
            });
            if f.factored {
                sums = col_sums + row_tiles * outers * f.cols;
                factors += outers * (f.rows + f.cols);
            }
        }
        Self { tensors, tiles, sums, factors, at: 0 }
    }

    /// Where each part begins, and the end of the last.
    fn offsets(&self) -> [usize; PARTS + 1] {
        let (tensors, tiles) = (self.tensors.len(), self.tiles.len());
        let sizes = [
            tensors * size_of::<Tensor>(),
            tiles * size_of::<Tile>(),
            8 * self.sums,
            4 * self.factors,
            8 * tiles,
            4 * tensors,
        ];
        let mut offsets = [0; PARTS + 1];
        for (i, size) in sizes.into_iter().enumerate() {
            offsets[i + 1] = (offsets[i] + size).next_multiple_of(TENSOR_ALIGN);
        }
        offsets
    }

    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> usize {
        self.offsets()[PARTS]
    }

    /// Writes the tables into [`Tables::bytes`] bytes of device memory.
    pub(super) fn place(&mut self, gpu: &Gpu, at: Address) -> Result<()> {
        self.at = at;
        gpu.upload(self.part(TENSORS), bytemuck::cast_slice(&self.tensors))?;
        gpu.upload(self.part(TILES), bytemuck::cast_slice(&self.tiles))
    }

    fn part(&self, part: usize) -> Address {
        self.at + self.offsets()[part] as u64
    }

    pub(super) fn update(
        &self,
        cuda: &Cuda,
        update: &Update,
        constants: Address,
        flat: UpdateBuffers,
        rule: RuleConstants,
    ) -> Result<()> {
        let Rule::Adafactor { clip_rms, bf16, .. } = update.rule else {
            unreachable!("the other rules walk chunks")
        };
        if self.tiles.is_empty() {
            return Ok(());
        }
        let buffers = AdafactorBuffers {
            params: flat.params,
            grads: flat.grads,
            moment1: flat.moment1,
            moment2: flat.moment2,
            ema: flat.ema,
            copy: flat.copy,
            sums: self.part(SUMS),
            factors: self.part(FACTORS),
            squares: self.part(SQUARES),
            scales: if clip_rms.is_some() { self.part(SCALES) } else { 0 },
            ema_keep: flat.ema_keep,
            ema_add: flat.ema_add,
            keep1: rule.keep1,
            add1: rule.add1,
        };
        let args = AdafactorArgs {
            update: constants,
            buffers,
            tensors: self.part(TENSORS),
            tiles: self.part(TILES),
            groups: cuda.step_params.rates(),
            clip_rms: clip_rms.unwrap_or(0.0),
        };
        let (by_tensor, by_tile) = ([self.tensors.len() as u32, 1, 1], [self.tiles.len() as u32, 1, 1]);
        cuda.launch(kernel!("adafactor_statistics"), by_tile, TILE_SHARED, &args)?;
        cuda.launch(kernel!("adafactor_factors"), by_tensor, SUM_SHARED, &args)?;
        if clip_rms.is_some() {
            cuda.launch(kernel!("adafactor_squares"), by_tile, SUM_SHARED, &args)?;
            cuda.launch(kernel!("adafactor_scales"), by_tensor, SUM_SHARED, &args)?;
        }
        let kernel = if bf16 { kernel!("adafactor_update_bf16") } else { kernel!("adafactor_update_f32") };
        cuda.launch(kernel, by_tile, 0, &args)
    }
}
