//! Adafactor: tensors by strides, cut into tiles of 64 × 64 (kernels/adafactor.cu).

use super::super::Cuda;
use super::super::driver::{Address, Buffer, Gpu};
use super::super::launch::{Argument, launch};
use super::{RuleConstants, UpdateBuffers, upload_table};
use crate::backend::{Rule, Segment, Update};
use crate::error::Result;

/// Rows and columns of a tile.
const TILE: usize = 64;
/// Threads of a block of tiles, and its shared memory for a tile whose lines start in different banks.
const THREADS: u32 = 256;
const TILE_SHARED: u32 = (TILE * (TILE + 1) * 4) as u32;
/// Shared memory in which eight warps add up one f64 each.
const SUM_SHARED: u32 = 8 * 8;

/// `AdafactorTensor` of `kernels/adafactor.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Tensor {
    param: u64,
    grad: u64,
    state: u64,
    row_sums: u64,
    col_sums: u64,
    factors: u64,
    outers: u32,
    outer1: u32,
    rows: u32,
    cols: u32,
    outer_stride: [u32; 2],
    row_stride: u32,
    col_stride: u32,
    row_tiles: u32,
    col_tiles: u32,
    first_tile: u32,
    tiles: u32,
    group: u32,
    factored: u32,
}

/// `AdafactorTile` of `kernels/adafactor.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Tile {
    tensor: u32,
    outer: u32,
    row: u32,
    col: u32,
}

/// `AdafactorBuffers` of `kernels/adafactor.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdafactorBuffers {
    params: Address,
    grads: Address,
    moment1: Address,
    moment2: Address,
    ema: Address,
    copy: Address,
    sums: Address,
    factors: Address,
    squares: Address,
    scales: Address,
    ema_keep: f32,
    ema_add: f32,
    keep1: f32,
    add1: f32,
}

// SAFETY: ten addresses and four words.
unsafe impl Argument for AdafactorBuffers {}
const _: () = assert!(size_of::<AdafactorBuffers>() == 96);
const _: () = assert!(size_of::<Tensor>() == 104 && size_of::<Tile>() == 16);

/// The tables of an update, and the scratch that its kernels hand to each other.
pub(super) struct Tables {
    tensors: Buffer,
    tensor_count: u32,
    tiles: Buffer,
    tile_count: u32,
    sums: Buffer,
    factors: Buffer,
    squares: Buffer,
    scales: Buffer,
}

impl Tables {
    pub(super) fn new(gpu: &Gpu, segments: &[Segment]) -> Result<Self> {
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
                outer_stride: f.outer_stride.map(|stride| stride as u32),
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
        Ok(Self {
            tensors: upload_table(gpu, &tensors)?,
            tensor_count: tensors.len() as u32,
            tiles: upload_table(gpu, &tiles)?,
            tile_count: tiles.len() as u32,
            sums: gpu.allocate(8 * sums)?,
            factors: gpu.allocate(4 * factors)?,
            squares: gpu.allocate(8 * tiles.len())?,
            scales: gpu.allocate(4 * tensors.len())?,
        })
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
        if self.tile_count == 0 {
            return Ok(());
        }
        let buffers = AdafactorBuffers {
            params: flat.params,
            grads: flat.grads,
            moment1: flat.moment1,
            moment2: flat.moment2,
            ema: flat.ema,
            copy: flat.copy,
            sums: self.sums.address,
            factors: self.factors.address,
            squares: self.squares.address,
            scales: if clip_rms.is_some() { self.scales.address } else { 0 },
            ema_keep: flat.ema_keep,
            ema_add: flat.ema_add,
            keep1: rule.keep1,
            add1: rule.add1,
        };
        let (tensors, tiles) = (self.tensors.address, self.tiles.address);
        let (by_tensor, by_tile) = ([self.tensor_count, 1, 1], [self.tile_count, 1, 1]);
        launch!(
            cuda,
            "adafactor_statistics",
            by_tile,
            THREADS,
            TILE_SHARED,
            constants,
            buffers,
            tensors,
            tiles
        )?;
        launch!(cuda, "adafactor_factors", by_tensor, THREADS, SUM_SHARED, constants, buffers, tensors)?;
        if let Some(limit) = clip_rms {
            launch!(
                cuda,
                "adafactor_squares",
                by_tile,
                THREADS,
                SUM_SHARED,
                constants,
                buffers,
                tensors,
                tiles
            )?;
            launch!(
                cuda,
                "adafactor_scales",
                by_tensor,
                THREADS,
                SUM_SHARED,
                constants,
                buffers,
                tensors,
                limit
            )?;
        }
        let kernel = if bf16 { "adafactor_update_bf16" } else { "adafactor_update_f32" };
        let rates = cuda.cells.rates();
        launch!(cuda, kernel, by_tile, THREADS, 0, constants, buffers, tensors, tiles, rates)
    }
}
