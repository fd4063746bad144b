//! The flat buffers of a run on the CPU, and the checked borrow of several matrices in them at once.
//!
//! An operation reads some matrices of an arena and writes others of the same arena, which a plain `&mut`
//! cannot express. [`Access`] stands for one operation: it borrows all arenas for its lifetime, records every
//! span that it lends, and refuses to lend a span for writing that overlaps another. Only this module turns
//! handles into memory.

use std::marker::PhantomData;

use super::update::{Buffers, Moment1};
use super::view::{Rows, RowsMut};
use crate::backend::Update;
use crate::backend::batch::{HostMemory, PlainMemory};
use crate::backend::memory::{Arena, Dtype, Mat, MemoryPlan};
use crate::error::Result;

/// One zeroed buffer per [`Arena`], aligned to 64 bytes.
pub(super) struct Arenas {
    buffers: [PlainMemory; Arena::COUNT],
    bytes: usize,
}

impl Arenas {
    /// Empty buffers, for the time before [`Arenas::new`] knows the plan.
    pub(super) fn empty() -> Self {
        Self { buffers: std::array::from_fn(|_| PlainMemory::empty()), bytes: 0 }
    }

    pub(super) fn new(plan: &MemoryPlan) -> Result<Self> {
        let mut arenas = Self::empty();
        // `Working` and `Workspace` are empty, unless a backend in front of this one requests them.
        for arena in Arena::ALL.into_iter().chain([Arena::Working, Arena::Workspace, Arena::Exchange]) {
            arenas.buffers[arena as usize] = PlainMemory::new(plan.bytes(arena))
                .map_err(|e| e.at(format!("{arena:?}")).hint("use a smaller `train.batch` or model"))?;
        }
        arenas.bytes = plan.total_bytes();
        Ok(arenas)
    }

    pub(super) fn total_bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn bytes(&self, arena: Arena) -> &[u8] {
        self.buffers[arena as usize].bytes()
    }

    pub(super) fn bytes_mut(&mut self, arena: Arena) -> &mut [u8] {
        self.buffers[arena as usize].bytes_mut()
    }

    /// Exchanges two arenas of the same size. No byte moves.
    pub(super) fn swap(&mut self, a: Arena, b: Arena) {
        assert_eq!(self.bytes(a).len(), self.bytes(b).len(), "{a:?} and {b:?} differ in size");
        self.buffers.swap(a as usize, b as usize);
    }

    /// The gradients, and the memory for their sums over chunks and ranks.
    pub(super) fn for_reduction(&mut self) -> (&mut [f32], &mut [f32]) {
        let [_, grads, .., exchange] = &mut self.buffers;
        (bytemuck::cast_slice_mut(grads.bytes_mut()), bytemuck::cast_slice_mut(exchange.bytes_mut()))
    }

    /// What ranks give each other after an update.
    pub(super) fn for_exchange(&mut self) -> ExchangeArenas<'_> {
        let [params, grads, _, _, ema, ..] = &mut self.buffers;
        ExchangeArenas {
            params: bytemuck::cast_slice_mut(params.bytes_mut()),
            grads: bytemuck::cast_slice_mut(grads.bytes_mut()),
            ema: bytemuck::cast_slice(ema.bytes()),
        }
    }

    /// Parameters, gradients, both moments and the EMA together: what an optimiser update works on.
    pub(super) fn for_update(&mut self) -> UpdateArenas<'_> {
        let [params, grads, moment1, moment2, ema, ..] = &mut self.buffers;
        UpdateArenas {
            params: bytemuck::cast_slice_mut(params.bytes_mut()),
            grads: bytemuck::cast_slice(grads.bytes()),
            moment1: moment1.bytes_mut(),
            moment2: bytemuck::cast_slice_mut(moment2.bytes_mut()),
            ema: bytemuck::cast_slice_mut(ema.bytes_mut()),
        }
    }
}

/// See [`Arenas::for_update`]. `moment1` may hold f32 or bf16.
pub(super) struct UpdateArenas<'a> {
    pub(super) params: &'a mut [f32],
    pub(super) grads: &'a [f32],
    pub(super) moment1: &'a mut [u8],
    pub(super) moment2: &'a mut [f32],
    pub(super) ema: &'a mut [f32],
}

impl<'a> UpdateArenas<'a> {
    /// The same with the types that an update says.
    pub(super) fn buffers(self, update: &Update) -> Buffers<'a> {
        Buffers {
            params: self.params,
            grads: self.grads,
            moment1: match update.rule.first_moment() {
                Dtype::Bf16 => Moment1::Bf16(bytemuck::cast_slice_mut(self.moment1)),
                Dtype::F32 => Moment1::F32(bytemuck::cast_slice_mut(self.moment1)),
            },
            moment2: self.moment2,
            ema: update.ema_decay.map(|_| self.ema),
        }
    }
}

/// See [`Arenas::for_exchange`].
pub(super) struct ExchangeArenas<'a> {
    pub(super) params: &'a mut [f32],
    pub(super) grads: &'a mut [f32],
    pub(super) ema: &'a [f32],
}

/// Operands per operation; more is a bug of the backend.
const MAX_OPERANDS: usize = 24;

/// What one operation reads and writes. Lent matrices live as long as the borrow of the arenas.
pub(super) struct Access<'a> {
    buffers: [(*mut f32, usize); Arena::COUNT],
    lent: [Span; MAX_OPERANDS],
    count: usize,
    arenas: PhantomData<&'a mut Arenas>,
}

#[derive(Clone, Copy)]
struct Span {
    arena: Arena,
    start: usize,
    end: usize,
    writes: bool,
}

impl<'a> Access<'a> {
    pub(super) fn new(arenas: &'a mut Arenas) -> Self {
        let buffers = arenas.buffers.each_mut().map(|buffer| {
            let values: &mut [f32] = bytemuck::cast_slice_mut(buffer.bytes_mut());
            (values.as_mut_ptr(), values.len())
        });
        let none = Span { arena: Arena::Params, start: 0, end: 0, writes: false };
        Self { buffers, lent: [none; MAX_OPERANDS], count: 0, arenas: PhantomData }
    }

    /// Borrows a matrix for reading. Panics if the operation writes any of it.
    pub(super) fn read(&mut self, mat: Mat) -> Rows<'a> {
        let (values, len) = self.lend(mat, false);
        // SAFETY: `lend` found the span inside its buffer, which `'a` keeps borrowed, and recorded it:
        // nothing that overlaps it was lent for writing, nor will be. Every bit pattern is an f32.
        let data = unsafe { std::slice::from_raw_parts(values, len) };
        Rows::new(data, mat.rows, mat.cols, mat.ld)
    }

    /// Borrows a matrix for writing. Panics if it overlaps anything that was borrowed before.
    pub(super) fn write(&mut self, mat: Mat) -> RowsMut<'a> {
        let (values, len) = self.lend(mat, true);
        // SAFETY: as in `read`; in addition, nothing that overlaps the span was or will be lent at all.
        let data = unsafe { std::slice::from_raw_parts_mut(values, len) };
        RowsMut::new(data, mat.rows, mat.cols, mat.ld)
    }

    /// The values of a vector, or of a matrix without gaps between its rows.
    pub(super) fn read_flat(&mut self, mat: Mat) -> &'a [f32] {
        assert!(mat.rows <= 1 || mat.ld == mat.cols, "{mat} has gaps between its rows");
        self.read(mat).data
    }

    /// [`Access::read_flat`] for writing.
    pub(super) fn write_flat(&mut self, mat: Mat) -> &'a mut [f32] {
        assert!(mat.rows <= 1 || mat.ld == mat.cols, "{mat} has gaps between its rows");
        self.write(mat).data
    }

    /// The start of a matrix and the number of values it spans, after all checks.
    fn lend(&mut self, mat: Mat, writes: bool) -> (*mut f32, usize) {
        assert_eq!(mat.dtype, Dtype::F32, "{mat}: the CPU computes in f32");
        assert_eq!(mat.offset % 4, 0, "{mat}: not aligned to an f32");
        assert!(mat.cols <= mat.ld || mat.rows <= 1, "{mat}: rows overlap");
        let (base, buffer_len) = self.buffers[mat.arena as usize];
        let len = if mat.cols == 0 { 0 } else { mat.span_bytes() / 4 };
        let start = mat.offset / 4;
        assert!(start + len <= buffer_len, "{mat}: outside its arena of {buffer_len} values");

        let span = Span { arena: mat.arena, start, end: start + len, writes };
        for other in &self.lent[..self.count] {
            let overlap = other.arena == span.arena && other.start < span.end && span.start < other.end;
            assert!(!(overlap && (writes || other.writes)), "{mat}: overlaps another operand");
        }
        assert!(self.count < MAX_OPERANDS, "an operation with more than {MAX_OPERANDS} operands");
        self.lent[self.count] = span;
        self.count += 1;
        // SAFETY: `start` is at most the buffer's length, asserted above.
        (unsafe { base.add(start) }, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Storage;

    fn arenas() -> (Arenas, Mat, Mat) {
        let mut plan = MemoryPlan::new(Storage::CPU);
        let a = plan.activation("a", 3, 5);
        let b = plan.activation("b", 2, 4);
        plan.set_bytes(Arena::Params, 256);
        plan.set_bytes(Arena::Ema, 256);
        (Arenas::new(&plan).unwrap(), a, b)
    }

    #[test]
    fn matrices_of_one_arena_are_read_and_written_together() {
        let (mut arenas, a, b) = arenas();
        let mut access = Access::new(&mut arenas);
        let (x, mut y) = (access.read(a), access.write(b));
        y.row(1)[3] = 1.0 + x.row(2)[4];
        let y = Access::new(&mut arenas).read(b);
        assert_eq!(y.row(1), [0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn sizes_are_those_of_the_plan_and_weights_swap_with_their_average() {
        let (mut arenas, ..) = arenas();
        assert_eq!(arenas.total_bytes(), 256 + 256 + 256 + 256);
        arenas.bytes_mut(Arena::Params).fill(1);
        arenas.swap(Arena::Params, Arena::Ema);
        assert_eq!((arenas.bytes(Arena::Params)[0], arenas.bytes(Arena::Ema)[0]), (0, 1));
    }

    #[test]
    #[should_panic(expected = "overlaps another operand")]
    fn a_write_over_a_read_is_refused() {
        let (mut arenas, a, _) = arenas();
        let mut access = Access::new(&mut arenas);
        access.read(a.first_rows(2));
        access.write(Mat { offset: a.offset + 9 * 4, rows: 1, ..a });
    }

    #[test]
    #[should_panic(expected = "overlaps another operand")]
    fn a_read_of_what_is_written_is_refused() {
        let (mut arenas, a, _) = arenas();
        let mut access = Access::new(&mut arenas);
        access.write(a);
        access.read(a);
    }

    #[test]
    #[should_panic(expected = "outside its arena")]
    fn a_matrix_outside_its_arena_is_refused() {
        let (mut arenas, a, _) = arenas();
        Access::new(&mut arenas).read(Mat { rows: 100, ..a });
    }

    #[test]
    fn neighbours_and_shared_reads_are_allowed() {
        let (mut arenas, a, _) = arenas();
        let mut access = Access::new(&mut arenas);
        access.write(a.first_rows(1));
        access.read(Mat { offset: a.offset + 5 * 4, rows: 2, ..a });
        access.read(Mat { offset: a.offset + 10 * 4, rows: 1, ..a });
    }
}
