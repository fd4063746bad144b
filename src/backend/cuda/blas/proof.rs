//! Compares an algorithm that splits its sum with one that does not.
//!
//! This runs once for each split algorithm that wins, because a library has silently given wrong sums for
//! some splits. The operands of the step cannot be used: at the first step the gradients of a model whose
//! head starts at zero are all zero, and any sum of zeros is right. So A and B are saved to main memory,
//! filled with random numbers, and restored.

use half::bf16;

use super::{Matrix, Operands, Shape};
use crate::backend::Dtype;
use crate::backend::cuda::driver::{Address, Gpu};
use crate::error::Result;
use crate::rng::{Domain, Stream};

/// Length of the pattern of random numbers that fills an operand: a prime, so that no two rows are alike.
const PATTERN: usize = 65_521;

/// The contents of these places, to be restored.
pub(in crate::backend::cuda) struct SetAside<'a> {
    gpu: &'a Gpu,
    kept: Vec<(Address, Vec<u8>)>,
}

impl<'a> SetAside<'a> {
    pub(in crate::backend::cuda) fn new(gpu: &'a Gpu, places: &[(Address, usize)]) -> Result<Self> {
        let keep = |(at, bytes): &(Address, usize)| {
            let mut copy = vec![0; *bytes];
            gpu.download(*at, &mut copy)?;
            Ok((*at, copy))
        };
        Ok(Self { gpu, kept: places.iter().map(keep).collect::<Result<_>>()? })
    }

    pub(in crate::backend::cuda) fn put_back(self) -> Result<()> {
        self.kept.iter().try_for_each(|(at, copy)| self.gpu.upload(*at, copy))
    }
}

/// Whether two ways of computing a product give the same D, up to rounding. `multiply` computes it the first
/// or the second way, or returns false where it cannot: then nothing is shown.
pub(super) fn agree(
    gpu: &Gpu,
    shape: &Shape,
    operands: &Operands,
    multiply: &mut dyn FnMut(usize) -> Result<bool>,
) -> Result<bool> {
    let d = (operands.d, shape.d.span());
    let mut places = vec![(operands.a, shape.a.span()), (operands.b, shape.b.span())];
    if shape.add_c {
        places.push(d);
    }
    let aside = SetAside::new(gpu, &places)?;
    fill(gpu, operands.a, shape.a, 0)?;
    fill(gpu, operands.b, shape.b, 1)?;
    let mut results = Vec::new();
    for way in 0..2 {
        if shape.add_c {
            fill(gpu, operands.d, shape.d, 2)?;
        }
        if !multiply(way)? {
            break;
        }
        let mut bytes = vec![0; d.1];
        gpu.download(d.0, &mut bytes)?;
        results.push(bytes);
    }
    aside.put_back()?;
    let [first, second] = &results[..] else { return Ok(false) };
    Ok(differ_by_rounding(shape.d, first, second))
}

fn fill(gpu: &Gpu, at: Address, matrix: Matrix, which: u64) -> Result<()> {
    let mut stream = Stream::new(0, Domain::Init, which, 0);
    let pattern: Vec<f32> = (0..PATTERN).map(|_| stream.range(-1.0, 1.0)).collect();
    let bytes: Vec<u8> = match matrix.dtype {
        Dtype::F32 => bytemuck::cast_slice(&pattern).to_vec(),
        Dtype::Bf16 => pattern.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    };
    // In larger pieces: each copy has a fixed cost.
    let piece = bytes.repeat(32);
    let span = matrix.span();
    (0..span)
        .step_by(piece.len())
        .try_for_each(|from| gpu.upload(at + from as u64, &piece[..piece.len().min(span - from)]))
}

/// No element may differ by more than a rounding of D's type at four times the matrix's root mean square.
fn differ_by_rounding(matrix: Matrix, a: &[u8], b: &[u8]) -> bool {
    let value = |bytes: &[u8], at: usize| match matrix.dtype {
        Dtype::F32 => f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")),
        Dtype::Bf16 => bf16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes")).to_f32(),
    };
    let size = matrix.dtype.bytes();
    let columns = (0..matrix.cols).map(|col| col * matrix.ld * size);
    let places = columns.flat_map(|start| (0..matrix.rows).map(move |row| start + row * size));
    let (mut largest, mut squares) = (0.0f64, 0.0f64);
    for at in places {
        let (x, y) = (f64::from(value(a, at)), f64::from(value(b, at)));
        if x.is_nan() != y.is_nan() {
            return false;
        }
        if x.is_nan() || x == y {
            squares += if x.is_finite() { x * x } else { 0.0 };
            continue;
        }
        largest = largest.max((x - y).abs());
        squares += x * x;
    }
    let rms = (squares / (matrix.rows * matrix.cols) as f64).sqrt();
    // Two steps of bf16 at four times the root mean square; sums in f32 differ by at most a thousandth of
    // that.
    let tolerance = if matrix.dtype == Dtype::Bf16 { 4.0 * 2.0 / 128.0 } else { 1e-3 };
    largest <= tolerance * rms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn one_wrong_element_is_seen_and_rounding_is_not() {
        let matrix = Matrix { rows: 3, cols: 2, ld: 4, dtype: Dtype::F32 };
        let right = [1.0, -2.0, 3.0, 99.0, -1.0, 0.5, 2.0];
        let agrees = |other: [f32; 7]| differ_by_rounding(matrix, &f32s(&right), &f32s(&other));
        assert!(agrees(right));
        // Gaps between columns are ignored.
        assert!(agrees([1.0, -2.0, 3.0, 0.0, -1.0, 0.5, 2.0]));
        assert!(agrees([1.0, -2.0, 3.0 + 1e-5, 99.0, -1.0, 0.5, 2.0]));
        assert!(!agrees([1.0, -2.0, 3.0, 99.0, -1.0, 0.5, 2.1]));
        assert!(!agrees([1.0, -2.0, 0.0, 99.0, -1.0, 0.5, 2.0]));
        assert!(!agrees([1.0, -2.0, f32::NAN, 99.0, -1.0, 0.5, 2.0]));
        assert!(!agrees([1.0, -2.0, f32::INFINITY, 99.0, -1.0, 0.5, 2.0]));
    }
}
