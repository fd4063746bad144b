//! A rank's part of weights, moving average and moments, copied between two steps, and how it becomes its part
//! of a checkpoint's files.
//!
//! The files of a checkpoint are the same for any number of ranks, so each rank writes the bytes of the files
//! that its part of an arena becomes. Files hold tensors without the padding of their rows, and a patch
//! kernel in another order of its axes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::backend::{Arena, HostMemory};
use crate::error::Result;
use crate::train::Trainer;
use crate::train::state::{ALIGN, Run};
use crate::vit::Param;
use crate::weights::safetensors::Outline;

/// The arenas that a checkpoint holds.
pub(crate) const ARENAS: [Arena; 4] = [Arena::Params, Arena::Ema, Arena::Moment1, Arena::Moment2];

/// One buffer for all parts, made once.
pub(crate) struct Snapshot {
    memory: Box<dyn HostMemory>,
    /// For each of [`ARENAS`]: the bytes of the rank's arena, and where in `memory` they begin.
    parts: [(Range<usize>, usize); ARENAS.len()],
    /// For each of [`ARENAS`]: where runs of the part lie in the whole arena.
    runs: [Vec<Run>; ARENAS.len()],
}

impl Snapshot {
    /// Allocates memory that the device copies to fast.
    pub(crate) fn new(trainer: &Trainer) -> Result<Self> {
        let runs = ARENAS.map(|arena| trainer.runs(arena));
        let mut end = 0;
        let parts = runs.each_ref().map(|runs| {
            let part = match (runs.first(), runs.last()) {
                (Some(first), Some(last)) => first.held..last.held + last.len,
                _ => 0..0,
            };
            let start = end;
            end = (start + part.len()).next_multiple_of(ALIGN);
            (part, start)
        });
        Ok(Self { memory: trainer.backend.host_memory(end)?, parts, runs })
    }

    /// Copies the trainer's arenas as they are now.
    pub(crate) fn take(&mut self, trainer: &mut Trainer) -> Result<()> {
        for (arena, (part, start)) in ARENAS.iter().zip(&self.parts) {
            let to = &mut self.memory.bytes_mut()[*start..*start + part.len()];
            trainer.backend.copy_arena(*arena, part.start, to)?;
        }
        Ok(())
    }

    /// The runs of this rank's part of an arena: the place of their first byte in the whole arena, and their
    /// bytes.
    fn runs(&self, arena: Arena) -> impl Iterator<Item = (usize, &[u8])> {
        let index = ARENAS.iter().position(|a| *a == arena).expect("a checkpoint has this arena");
        let (part, start) = &self.parts[index];
        let bytes = &self.memory.bytes()[*start..*start + part.len()];
        self.runs[index].iter().map(move |run| (run.whole, &bytes[run.held - part.start..][..run.len]))
    }

    /// Whether this part of the weights has only finite values.
    pub(crate) fn is_finite(&self) -> bool {
        let mut runs = self.runs(Arena::Params);
        runs.all(|(_, bytes)| bytemuck::cast_slice::<u8, f32>(bytes).iter().all(|value| value.is_finite()))
    }

    /// Writes this part of an arena with the weights' layout into a weights file. A tensor that is not trained
    /// is its own average.
    pub(crate) fn write_weights(
        &self,
        arena: Arena,
        params: &[Param],
        outline: &Outline,
        file: &File,
    ) -> io::Result<()> {
        for param in params {
            let place = outline.places[&param.name].start;
            let arena = if param.grad_offset.is_none() { Arena::Params } else { arena };
            for (start, bytes) in self.runs(arena) {
                let own = start / 4..(start + bytes.len()) / 4;
                write_param(param, &own, bytemuck::cast_slice(bytes), &mut |at, values| {
                    file.write_all_at(bytemuck::cast_slice(values), (place + 4 * at) as u64)
                })?;
            }
        }
        Ok(())
    }

    /// Writes this part of an arena into a file that holds the arena as it is, under `name`.
    pub(crate) fn write_bytes(
        &self,
        arena: Arena,
        name: &str,
        outline: &Outline,
        file: &File,
    ) -> io::Result<()> {
        let place = outline.places[name].start;
        let mut runs = self.runs(arena);
        runs.try_for_each(|(start, bytes)| file.write_all_at(bytes, (place + start) as u64))
    }
}

/// Gives the values of a tensor that lie in the elements `own` of the weights' arena to `write`, in runs: the
/// index of a run's first value in the file's order, and its values. `values` are those of `own`.
fn write_param(
    param: &Param,
    own: &Range<usize>,
    values: &[f32],
    write: &mut dyn FnMut(usize, &[f32]) -> io::Result<()>,
) -> io::Result<()> {
    let (rows, cols, ld) = (param.rows, param.cols, param.ld);
    // The index among the values without padding of the first value at or after an element of the arena.
    let dense = |element: usize| {
        let inside = element.saturating_sub(param.offset).min(rows * ld);
        inside / ld * cols + (inside % ld).min(cols)
    };
    let (from, to) = (dense(own.start), dense(own.end));
    if from >= to {
        return Ok(());
    }
    let element = |i: usize| param.offset + i / cols * ld + i % cols - own.start;
    let mut part = Vec::with_capacity(to - from);
    let mut next = from;
    while next < to {
        let end = (next / cols * cols + cols).min(to);
        part.extend_from_slice(&values[element(next)..element(next) + end - next]);
        next = end;
    }
    if param.keeps_order() {
        return write(from, &part);
    }
    // The other values are another rank's. A second tensor of marks goes the same way, and says which are ours.
    let mut whole = vec![0.0; param.len()];
    let mut marks = vec![0.0; param.len()];
    whole[from..to].copy_from_slice(&part);
    marks[from..to].fill(1.0);
    let (whole, marks) = (param.to_file_order(&whole), param.to_file_order(&marks));
    let mut at = 0;
    for run in marks.chunk_by(|a, b| a == b) {
        if run[0] == 1.0 {
            write(at, &whole[at..at + run.len()])?;
        }
        at += run.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;
    use crate::vit::ParamLayout;

    #[test]
    fn any_cut_of_the_weights_gives_the_same_file() {
        let sets = ["model.image=8", "model.patch=4", "model.width=24", "model.depth=1", "model.heads=2"];
        let sets: Vec<String> = sets.map(String::from).to_vec();
        let config = Recipe::read(None, &sets).unwrap().recipe.model_config(7).unwrap();
        let layout = ParamLayout::new(&config, |_| false);
        let length = layout.parameters().map(|p| p.offset + p.padded_len()).max().unwrap();
        // Padding holds NaN here, which must not reach a file.
        let mut arena = vec![f32::NAN; length];
        let mut want = Vec::new();
        for (i, param) in layout.parameters().enumerate() {
            let values: Vec<f32> = (0..param.len()).map(|v| (i * 100_000 + v) as f32).collect();
            for (row, values) in values.chunks(param.cols).enumerate() {
                arena[param.offset + row * param.ld..][..param.cols].copy_from_slice(values);
            }
            want.push(param.to_file_order(&values));
        }
        for cuts in [vec![], vec![1000], vec![7, 100, 101, 3000], (1..200).map(|i| i * 37).collect()] {
            let edges: Vec<usize> = [&[0][..], &cuts, &[length]].concat();
            let mut files: Vec<_> = want.iter().map(|values| vec![f32::NAN; values.len()]).collect();
            for own in edges.windows(2).map(|two| two[0].min(length)..two[1].min(length)) {
                for (param, file) in layout.parameters().zip(&mut files) {
                    let mut write = |at: usize, values: &[f32]| {
                        assert!(file[at..at + values.len()].iter().all(|v| v.is_nan()), "written twice");
                        file[at..at + values.len()].copy_from_slice(values);
                        Ok(())
                    };
                    write_param(param, &own, &arena[own.clone()], &mut write).unwrap();
                }
            }
            assert!(files == want, "{} cuts", cuts.len());
        }
    }
}
