//! Shared by the kernels' tests: matrices with guarded padding, numbers, and the reference files.

use std::path::PathBuf;

use super::compute::{Compute, Isa};
use super::view::{Rows, RowsMut};

/// Uniform values in [-1, 1), a function of the seed.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u32 << 23) as f32 - 1.0
    }
    pub(crate) fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// A matrix with gaps of `gap` values between its rows. The gaps hold NaN, so reading them shows;
/// [`Matrix::values`] checks that nothing was written there.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) data: Vec<f32>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    ld: usize,
}

impl Matrix {
    pub(crate) fn from_values(values: &[f32], rows: usize, cols: usize, gap: usize) -> Self {
        let ld = cols + gap;
        let mut data = vec![f32::NAN; rows * ld];
        for r in 0..rows {
            data[r * ld..r * ld + cols].copy_from_slice(&values[r * cols..(r + 1) * cols]);
        }
        Self { data, rows, cols, ld }
    }
    pub(crate) fn random(numbers: &mut Numbers, rows: usize, cols: usize, gap: usize) -> Self {
        Self::from_values(&numbers.vec(rows * cols), rows, cols, gap)
    }
    pub(crate) fn rows(&self) -> Rows<'_> {
        Rows::new(&self.data, self.rows, self.cols, self.ld)
    }
    pub(crate) fn rows_mut(&mut self) -> RowsMut<'_> {
        RowsMut::new(&mut self.data, self.rows, self.cols, self.ld)
    }
    pub(crate) fn at(&self, r: usize, c: usize) -> f64 {
        assert!(c < self.cols);
        self.data[r * self.ld + c] as f64
    }
    /// The values without the gaps, which must be unchanged.
    pub(crate) fn values(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.rows * self.cols);
        for row in self.data.chunks(self.ld) {
            out.extend_from_slice(&row[..self.cols]);
            assert!(row[self.cols..].iter().all(|x| x.is_nan()), "something was written between two rows");
        }
        out
    }
}

/// Runs `work` with every instruction set on 1, 2 and 3 threads; all results of an instruction set must be
/// bit-identical to the first. Calls `check` with one result per instruction set.
pub(crate) fn on_every_isa(work: impl Fn(&Compute) -> Vec<f32>, check: impl Fn(Isa, &[f32])) {
    for isa in Isa::available() {
        let results = [1, 2, 3].map(|threads| work(&Compute::new(isa, threads).unwrap()));
        for (i, result) in results.iter().enumerate() {
            let same = results[0].iter().zip(result).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && results[0].len() == result.len(), "{isa:?}: {} threads change bits", i + 1);
        }
        check(isa, &results[0]);
    }
}

/// `|got - want|₂ / |want|₂`
pub(crate) fn rel_l2(got: &[f32], want: impl IntoIterator<Item = f64>) -> f64 {
    let (mut error, mut norm, mut n) = (0.0, 0.0, 0);
    for (want, got) in want.into_iter().zip(got) {
        error += (*got as f64 - want).powi(2);
        norm += want.powi(2);
        n += 1;
    }
    assert_eq!(n, got.len(), "lengths differ");
    (error / f64::max(norm, f64::MIN_POSITIVE)).sqrt()
}

/// A folder of the reference data; prints a line and returns `None` if it is absent.
pub(crate) fn reference(folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("VITRUM_REFERENCE")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference")));
    let path = root.join(folder);
    if !path.is_dir() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

/// A safetensors file of f32 tensors.
pub(crate) struct Tensors(Vec<u8>);

impl Tensors {
    pub(crate) fn open(path: &std::path::Path) -> Self {
        Self(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }
    pub(crate) fn names(&self) -> Vec<String> {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        file.names().into_iter().map(|n| n.to_string()).collect()
    }
    /// Shape and values.
    pub(crate) fn get(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("`{name}`: {e}"));
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "`{name}`");
        let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        (tensor.shape().to_vec(), values.collect())
    }
}
