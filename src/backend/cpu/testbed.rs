//! Shared by the tests of the operations: a testbed for operands, reference files, and error measures.

use super::CpuBackend;
use super::compute::{Compute, Isa};
use crate::backend::{Backend, Mat, MemoryPlan, Micro, StepKeys, Storage, Write};
use crate::rng::{Domain, Stream};

/// The operands of one operation, and their layout.
pub(super) struct Testbed {
    plan: MemoryPlan,
    operands: Vec<(Mat, Vec<f32>)>,
    pub(super) keys: StepKeys,
    pub(super) micro: Micro,
}

impl Testbed {
    pub(super) fn new(samples: usize) -> Self {
        Self {
            plan: MemoryPlan::new(Storage::CPU),
            operands: Vec::new(),
            keys: StepKeys { seed: 3, step: 17 },
            micro: Micro {
                first: 0,
                samples,
                global_first: 40,
                gradients: Write::Assign,
                mean_over: samples,
            },
        }
    }

    /// A matrix with these values.
    pub(super) fn put(&mut self, rows: usize, cols: usize, values: &[f32]) -> Mat {
        assert_eq!(values.len(), rows * cols);
        let mat = self.plan.activation("operand", rows, cols);
        self.operands.push((mat, values.to_vec()));
        mat
    }

    /// A matrix for results, initialised with NaN.
    pub(super) fn room(&mut self, rows: usize, cols: usize) -> Mat {
        self.put(rows, cols, &vec![f32::NAN; rows * cols])
    }

    /// Runs an operation for every instruction set with 1, 2 and 3 threads, requires the same bits of all
    /// three, and passes the results of each instruction set to `check`.
    pub(super) fn everywhere(
        &self,
        results: &[Mat],
        run: impl Fn(&mut CpuBackend),
        check: impl Fn(&[Vec<f32>]),
    ) {
        for isa in Isa::available() {
            let of = |threads| -> Vec<Vec<f32>> {
                let mut backend = self.backend(isa, threads);
                run(&mut backend);
                results.iter().map(|mat| take(&mut backend, *mat)).collect()
            };
            let one = of(1);
            for threads in [2, 3] {
                let same = bits(&one) == bits(&of(threads));
                assert!(same, "{} with {threads} threads gives other bits than with one", isa.name());
            }
            check(&one);
        }
    }

    /// A backend that holds the operands.
    pub(super) fn backend(&self, isa: Isa, threads: usize) -> CpuBackend {
        let mut backend = CpuBackend::with(Compute::new(isa, threads).unwrap());
        backend.allocate(&self.plan).unwrap();
        for (mat, values) in &self.operands {
            backend.write(*mat, values).unwrap();
        }
        backend.begin_step(self.keys).unwrap();
        backend.begin_micro(self.micro).unwrap();
        backend
    }
}

/// The values of a matrix.
pub(super) fn take(backend: &mut CpuBackend, mat: Mat) -> Vec<f32> {
    let mut values = vec![0.0; mat.rows * mat.cols];
    backend.read(mat, &mut values).unwrap();
    values
}

fn bits(results: &[Vec<f32>]) -> Vec<Vec<u32>> {
    results.iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect()
}

/// `n` standard normal values times `scale`; `tag` distinguishes tensors.
pub(super) fn normal(tag: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut stream = Stream::new(11, Domain::Init, tag, n as u64);
    (0..n).map(|_| scale * stream.normal() as f32).collect()
}

pub(super) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// `|got - expected|₂ / |expected|₂`
pub(super) fn rel_l2(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let of = |terms: &mut dyn Iterator<Item = f64>| terms.map(|t| t * t).sum::<f64>().sqrt();
    let error = of(&mut got.iter().zip(expected).map(|(g, e)| f64::from(*g) - e));
    error / of(&mut expected.iter().copied()).max(f64::MIN_POSITIVE)
}

#[track_caller]
pub(super) fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    let error = rel_l2(got, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, allowed {tolerance:.0e}");
}

/// Compares a gradient with central differences of an f64 function, at elements spread over the input.
#[track_caller]
pub(super) fn assert_gradient(what: &str, at: &[f32], gradient: &[f32], f: impl Fn(&[f64]) -> f64) {
    assert_eq!(at.len(), gradient.len(), "{what}");
    let largest = gradient.iter().fold(0.0f32, |m, g| m.max(g.abs()));
    let mut point = wide(at);
    let checks = at.len().min(9);
    for i in 0..checks {
        let element = (i * at.len() / checks + 7 * i) % at.len();
        let (x, h) = (point[element], 1e-4);
        point[element] = x + h;
        let above = f(&point);
        point[element] = x - h;
        let below = f(&point);
        point[element] = x;
        let expected = (above - below) / (2.0 * h);
        let error = (f64::from(gradient[element]) - expected).abs();
        let allowed = 2e-5 * f64::from(largest) + 1e-7;
        assert!(error <= allowed, "{what}[{element}]: {} instead of {expected}", gradient[element]);
    }
}

/// A file of reference values, or `None` after a printed line if the folder is absent.
pub(super) struct Reference(Vec<u8>);

impl Reference {
    pub(super) fn open(path: &str) -> Option<Self> {
        let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
        let folder = std::env::var("VITRUM_REFERENCE").unwrap_or_else(|_| default.into());
        let file = std::path::Path::new(&folder).join(path);
        match std::fs::read(&file) {
            Ok(bytes) => Some(Self(bytes)),
            Err(e) => {
                println!("skipped: {}: {e}", file.display());
                None
            }
        }
    }

    fn tensors(&self) -> safetensors::SafeTensors<'_> {
        safetensors::SafeTensors::deserialize(&self.0).unwrap()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    pub(super) fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap().shape().to_vec()
    }

    pub(super) fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
        bytemuck::pod_collect_to_vec(tensor.data())
    }

    pub(super) fn i32(&self, name: &str) -> Vec<i32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), safetensors::Dtype::I32, "{name}");
        bytemuck::pod_collect_to_vec(tensor.data())
    }

    pub(super) fn f64(&self, name: &str) -> Vec<f64> {
        wide(&self.f32(name))
    }
}
