//! libcublasLt.so: products against plain loops in f64, epilogues, algorithms, refusals.

#[macro_use]
mod common;

use std::ffi::{c_int, c_void};
use std::ptr;

use common::{Gpu, Handle};
use libloading::Library;

const F32: c_int = 0;
const BF16: c_int = 14;

const BIAS: u32 = 4;
const GELU_AUX_BIAS: u32 = 164;
const DGELU: u32 = 192;
const DGELU_BGRAD: u32 = 208;
const BGRADA: u32 = 256;
const BGRADB: u32 = 512;

/// Both libraries and a handle.
struct Blas {
    gpu: Gpu,
    lt: Library,
    handle: Handle,
}

/// As `cu!`, for cuBLASLt.
macro_rules! lt {
    ($blas:expr, $name:ident ( $($value:expr => $type:ty),* $(,)? )) => {{
        // SAFETY: the C declaration's types, written down by the caller; pointers are valid for the call.
        unsafe {
            let function: libloading::Symbol<unsafe extern "C" fn($($type),*) -> c_int> =
                $blas.lt.get(concat!(stringify!($name), "\0").as_bytes()).expect(stringify!($name));
            function($($value),*)
        }
    }};
}

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

#[derive(Clone, Copy)]
struct Product {
    transpose: (bool, bool),
    m: usize,
    n: usize,
    k: usize,
    input: c_int,
    output: c_int,
    epilogue: u32,
    alpha: f32,
    beta: f32,
}

struct Descriptors {
    product: Handle,
    a: Handle,
    b: Handle,
    d: Handle,
}

fn ld(rows: usize) -> usize {
    rows.div_ceil(8) * 8 + 8
}

impl Product {
    fn a(&self) -> (usize, usize) {
        if self.transpose.0 { (self.k, self.m) } else { (self.m, self.k) }
    }
    fn b(&self) -> (usize, usize) {
        if self.transpose.1 { (self.n, self.k) } else { (self.k, self.n) }
    }
}

impl Blas {
    fn open(options: &str) -> Self {
        let gpu = Gpu::open(vitrum_standin::libraries(), options);
        // SAFETY: our own library, which finds the libcuda.so that is already loaded.
        let lt = unsafe { Library::new(vitrum_standin::libraries().join("libcublasLt.so")).unwrap() };
        let mut blas = Self { gpu, lt, handle: ptr::null_mut() };
        let mut handle = ptr::null_mut();
        assert_eq!(lt!(blas, cublasLtCreate(&mut handle => *mut Handle)), 0);
        blas.handle = handle;
        blas
    }

    fn set<T>(&self, product: Handle, attribute: c_int, value: T) -> c_int {
        let from = ptr::from_ref(&value).cast::<c_void>();
        lt!(self, cublasLtMatmulDescSetAttribute(
            product => Handle, attribute => c_int, from => *const c_void, size_of::<T>() => usize))
    }

    fn layout(&self, dtype: c_int, (rows, cols): (usize, usize), ld: usize) -> Handle {
        let mut layout = ptr::null_mut();
        let code = lt!(self, cublasLtMatrixLayoutCreate(
            &mut layout => *mut Handle, dtype => c_int, rows as u64 => u64, cols as u64 => u64, ld as i64 => i64));
        assert_eq!(code, 0);
        layout
    }

    fn describe(&self, p: &Product) -> Descriptors {
        let mut product = ptr::null_mut();
        let code =
            lt!(self, cublasLtMatmulDescCreate(&mut product => *mut Handle, 68 => c_int, F32 => c_int));
        assert_eq!(code, 0);
        assert_eq!(self.set(product, 3, i32::from(p.transpose.0)), 0);
        assert_eq!(self.set(product, 4, i32::from(p.transpose.1)), 0);
        assert_eq!(self.set(product, 7, p.epilogue), 0);
        assert_eq!(self.set(product, 12, ld(p.m) as i64), 0);
        Descriptors {
            product,
            a: self.layout(p.input, p.a(), ld(p.a().0)),
            b: self.layout(p.input, p.b(), ld(p.b().0)),
            d: self.layout(p.output, (p.m, p.n), ld(p.m)),
        }
    }

    fn candidates(&self, x: &Descriptors, workspace: u64) -> Result<Vec<Found>, c_int> {
        let mut preference = ptr::null_mut();
        assert_eq!(lt!(self, cublasLtMatmulPreferenceCreate(&mut preference => *mut Handle)), 0);
        let set = |attribute: c_int, from: *const c_void, size: usize| {
            let code = lt!(self, cublasLtMatmulPreferenceSetAttribute(
                preference => Handle, attribute => c_int, from => *const c_void, size => usize));
            assert_eq!(code, 0);
        };
        set(1, ptr::from_ref(&workspace).cast(), 8);
        for attribute in 5..9 {
            set(attribute, ptr::from_ref(&16u32).cast(), 4);
        }
        let mut found = [Found::default(); 16];
        let mut count = 0;
        let code = lt!(self, cublasLtMatmulAlgoGetHeuristic(
            self.handle => Handle, x.product => Handle, x.a => Handle, x.b => Handle, x.d => Handle, x.d => Handle,
            preference => Handle, 16 => c_int, found.as_mut_ptr() => *mut Found, &mut count => *mut c_int));
        if code == 0 { Ok(found[..count as usize].to_vec()) } else { Err(code) }
    }

    fn multiply(
        &self,
        x: &Descriptors,
        p: &Product,
        at: [u64; 4],
        algorithm: Option<&Found>,
        scratch: u64,
    ) -> c_int {
        let [a, b, c, d] = at;
        let algo = algorithm.map_or(ptr::null(), |found| found.algorithm.as_ptr());
        lt!(self, cublasLtMatmul(
            self.handle => Handle, x.product => Handle, &p.alpha => *const f32, a => u64, x.a => Handle,
            b => u64, x.b => Handle, &p.beta => *const f32, c => u64, x.d => Handle, d => u64, x.d => Handle,
            algo => *const u64, scratch => u64, 4 << 20 => usize, ptr::null_mut() => Handle))
    }

    /// Uploads a matrix of small random values with NaN in its padding; the values as the card sees them.
    fn matrix(&self, dtype: c_int, (rows, cols): (usize, usize), seed: u64) -> (u64, Vec<f64>) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut values = Vec::with_capacity(rows * cols);
        let mut raw = vec![f32::NAN; ld(rows) * cols];
        for j in 0..cols {
            for i in 0..rows {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let v = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
                let v = if dtype == BF16 { f32::from_bits(v.to_bits() & 0xffff_0000) } else { v };
                values.push(f64::from(v));
                raw[i + j * ld(rows)] = v;
            }
        }
        (self.upload(dtype, &raw), values)
    }

    fn upload(&self, dtype: c_int, raw: &[f32]) -> u64 {
        if dtype == F32 {
            self.gpu.upload(raw)
        } else {
            self.gpu.upload(&raw.iter().map(|v| (v.to_bits() >> 16) as u16).collect::<Vec<_>>())
        }
    }

    fn download(&self, dtype: c_int, at: u64, count: usize) -> Vec<f64> {
        if dtype == F32 {
            self.gpu.download::<f32>(at, count).into_iter().map(f64::from).collect()
        } else {
            let raw = self.gpu.download::<u16>(at, count);
            raw.into_iter().map(|bits| f64::from(f32::from_bits(u32::from(bits) << 16))).collect()
        }
    }
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn gelu_slope(x: f64) -> f64 {
    (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5
}

/// `sum over k of op(A)[i, k] · op(B)[k, j]` and the plain sums of both over k.
fn product(p: &Product, a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let a_at = |i: usize, k: usize| if p.transpose.0 { a[k + i * p.k] } else { a[i + k * p.m] };
    let b_at = |k: usize, j: usize| if p.transpose.1 { b[j + k * p.n] } else { b[k + j * p.k] };
    let mut d = vec![0.0; p.m * p.n];
    for j in 0..p.n {
        for i in 0..p.m {
            d[i + j * p.m] = (0..p.k).map(|k| a_at(i, k) * b_at(k, j)).sum();
        }
    }
    let over_a = (0..p.m).map(|i| (0..p.k).map(|k| a_at(i, k)).sum()).collect();
    let over_b = (0..p.n).map(|j| (0..p.k).map(|k| b_at(k, j)).sum()).collect();
    (d, over_a, over_b)
}

fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * (1.0 + e.abs()), "{what}[{i}]: {f}, not {e}");
    }
}

/// Runs one product and compares everything that it wrote.
fn check(blas: &Blas, p: &Product) {
    let x = blas.describe(p);
    let (a, a_values) = blas.matrix(p.input, p.a(), 1);
    let (b, b_values) = blas.matrix(p.input, p.b(), 2);
    let (c, c_values) = blas.matrix(p.output, (p.m, p.n), 3);
    let sums = if p.epilogue == BGRADB { p.n } else { p.m };
    let (bias, bias_values) = blas.matrix(p.output, (sums, 1), 4);
    let (aux, aux_values) = blas.matrix(p.output, (p.m, p.n), 5);
    let (d, _) = blas.matrix(p.output, (p.m, p.n), 6);
    assert_eq!(blas.set(x.product, 8, bias), 0);
    assert_eq!(blas.set(x.product, 11, aux), 0);
    assert_eq!(blas.multiply(&x, p, [a, b, c, d], None, 0), 0, "{}", blas.gpu.report());

    let tolerance = if p.output == BF16 { 1.0 / 256.0 } else { 1e-5 };
    let (plain, over_a, over_b) = product(p, &a_values, &b_values);
    let mut expected: Vec<f64> = plain
        .iter()
        .zip(&c_values)
        .map(|(v, c)| f64::from(p.alpha) * v + if p.beta == 0.0 { 0.0 } else { f64::from(p.beta) * c })
        .collect();
    if matches!(p.epilogue, BIAS | GELU_AUX_BIAS) {
        for (at, v) in expected.iter_mut().enumerate() {
            *v += bias_values[at % p.m];
        }
    }
    let unpadded = |at: u64| -> Vec<f64> {
        let all = blas.download(p.output, at, ld(p.m) * p.n);
        let (used, padding): (Vec<_>, Vec<_>) = all.iter().enumerate().partition(|(i, _)| i % ld(p.m) < p.m);
        assert!(padding.iter().all(|(_, v)| v.is_nan()), "padding was written");
        used.into_iter().map(|(_, v)| *v).collect()
    };
    if p.epilogue == GELU_AUX_BIAS {
        close("aux", &unpadded(aux), &expected, tolerance);
        expected.iter_mut().for_each(|v| *v = gelu(*v));
    }
    if matches!(p.epilogue, DGELU | DGELU_BGRAD) {
        expected.iter_mut().zip(&aux_values).for_each(|(v, x)| *v *= gelu_slope(*x));
    }
    close("d", &unpadded(d), &expected, tolerance);
    let sums_expected: Option<Vec<f64>> = match p.epilogue {
        BGRADA => Some(over_a),
        BGRADB => Some(over_b),
        DGELU_BGRAD => Some((0..p.m).map(|i| (0..p.n).map(|j| expected[i + j * p.m]).sum()).collect()),
        _ => None,
    };
    if let Some(sums) = sums_expected {
        close("bias gradient", &blas.download(p.output, bias, sums.len()), &sums, tolerance);
    }
}

const PLAIN: Product = Product {
    transpose: (true, false),
    m: 40,
    n: 19,
    k: 33,
    input: BF16,
    output: BF16,
    epilogue: 1,
    alpha: 1.0,
    beta: 0.0,
};

#[test]
fn products_equal_plain_loops_in_every_transpose_and_type() {
    let blas = Blas::open("checks=on");
    for transpose in [(false, false), (true, false), (false, true), (true, true)] {
        for (input, output) in [(BF16, BF16), (BF16, F32), (F32, F32)] {
            for (m, n, k) in [(40, 19, 33), (1, 1, 1), (16, 4, 8), (7, 130, 65)] {
                check(&blas, &Product { transpose, m, n, k, input, output, ..PLAIN });
                check(&blas, &Product { transpose, m, n, k, input, output, alpha: 0.5, beta: 1.0, ..PLAIN });
            }
        }
    }
}

#[test]
fn epilogues_equal_their_formulas() {
    let blas = Blas::open("checks=on");
    for epilogue in [BIAS, GELU_AUX_BIAS, DGELU, DGELU_BGRAD, BGRADA, BGRADB] {
        for (input, output) in [(BF16, BF16), (BF16, F32), (F32, F32)] {
            check(&blas, &Product { epilogue, input, output, ..PLAIN });
            check(&blas, &Product { epilogue, input, output, beta: 1.0, transpose: (false, true), ..PLAIN });
        }
    }
}

#[test]
fn each_algorithm_gives_the_product_and_remembers_its_shape() {
    let blas = Blas::open("checks=on");
    let p = Product { input: F32, output: F32, ..PLAIN };
    let x = blas.describe(&p);
    let (a, a_values) = blas.matrix(F32, p.a(), 1);
    let (b, b_values) = blas.matrix(F32, p.b(), 2);
    let (d, _) = blas.matrix(F32, (p.m, p.n), 3);
    let scratch = blas.gpu.allocate(4 << 20).unwrap();
    let found = blas.candidates(&x, 4 << 20).unwrap();
    assert!(found.len() >= 4);
    assert_eq!(blas.candidates(&x, 0).unwrap().len(), 1, "only one works without a workspace");
    let (expected, _, _) = product(&p, &a_values, &b_values);
    for one in &found {
        assert_eq!(blas.multiply(&x, &p, [a, b, d, d], Some(one), scratch), 0);
        let all = blas.download(F32, d, ld(p.m) * p.n);
        let used: Vec<f64> =
            all.iter().enumerate().filter(|(i, _)| i % ld(p.m) < p.m).map(|(_, v)| *v).collect();
        close("d", &used, &expected, 1e-5);
    }
    // The same bytes for another product, and bytes that no library ever gave.
    let check = |x: &Descriptors, algorithm: &[u64; 8]| {
        let mut result = Found::default();
        lt!(blas, cublasLtMatmulAlgoCheck(
            blas.handle => Handle, x.product => Handle, x.a => Handle, x.b => Handle, x.d => Handle, x.d => Handle,
            algorithm.as_ptr() => *const u64, &mut result => *mut Found))
    };
    assert_eq!(check(&x, &found[1].algorithm), 0);
    let other = blas.describe(&Product { n: 20, ..p });
    assert_eq!(check(&other, &found[1].algorithm), 15);
    assert_eq!(check(&x, &[0x77; 8]), 7);
    blas.gpu.configure("refuse_algorithm=1");
    assert_eq!(check(&x, &found[1].algorithm), 15);
    blas.gpu.configure("refuse_matmul=1");
    assert_eq!(blas.candidates(&x, 0).err(), Some(15));
}

#[test]
fn what_the_library_refuses_is_refused() {
    let blas = Blas::open("checks=on");
    let (a, _) = blas.matrix(BF16, (64, 64), 1);
    let (d, _) = blas.matrix(F32, (64, 64), 2);
    let run = |p: &Product, at: [u64; 4], change: &dyn Fn(&Descriptors)| {
        let x = blas.describe(p);
        change(&x);
        blas.multiply(&x, p, at, None, 0)
    };
    let nothing = |_: &Descriptors| {};
    // Types.
    assert_eq!(run(&Product { input: F32, output: BF16, ..PLAIN }, [a, a, d, d], &nothing), 15);
    assert_eq!(run(&Product { input: 2, ..PLAIN }, [a, a, d, d], &nothing), 15);
    // Pointers.
    assert_eq!(run(&PLAIN, [a + 8, a, d, d], &nothing), 7);
    assert!(blas.gpu.report().contains("A at"), "{}", blas.gpu.report());
    assert_eq!(run(&PLAIN, [a, a, d, 0], &nothing), 7);
    // Epilogues without what they need.
    assert_eq!(run(&Product { epilogue: BIAS, ..PLAIN }, [a, a, d, d], &nothing), 7);
    let bias = |x: &Descriptors| assert_eq!(blas.set(x.product, 8, d), 0);
    assert_eq!(run(&Product { epilogue: GELU_AUX_BIAS, ..PLAIN }, [a, a, d, d], &bias), 7);
    let short = |x: &Descriptors| assert_eq!(blas.set(x.product, 12, 8i64), 0);
    assert_eq!(run(&Product { epilogue: DGELU, ..PLAIN }, [a, a, d, d], &short), 7);
    assert_eq!(run(&Product { epilogue: 3, ..PLAIN }, [a, a, d, d], &nothing), 15);
    // Leading dimensions: too short, and not a multiple of 16 bytes.
    for (ld, code) in [(32usize, 7), (44, 15)] {
        let x = blas.describe(&PLAIN);
        let wrong = Descriptors { d: blas.layout(BF16, (PLAIN.m, PLAIN.n), ld), ..x };
        assert_eq!(blas.multiply(&wrong, &PLAIN, [a, a, d, d], None, 0), code);
    }
}

#[test]
fn a_product_reads_and_writes_under_the_same_checks_as_a_kernel() {
    let blas = Blas::open("checks=on");
    let p = PLAIN;
    let x = blas.describe(&p);
    let (a, _) = blas.matrix(BF16, p.a(), 1);
    let (b, _) = blas.matrix(BF16, p.b(), 2);
    let short = blas.gpu.allocate(64).unwrap();
    assert_eq!(blas.multiply(&x, &p, [a, b, short, short], None, 0), 13);
    assert!(blas.gpu.report().contains("out of bounds: a matmul's D"), "{}", blas.gpu.report());
    assert_eq!(cu!(blas.gpu, standin_reset()), 0);
    let fresh = blas.gpu.allocate(2 * ld(p.k) * p.n).unwrap();
    let d = blas.gpu.allocate(2 * ld(p.m) * p.n).unwrap();
    assert_eq!(blas.multiply(&x, &p, [a, fresh, d, d], None, 0), 13);
    assert!(blas.gpu.report().contains("uninitialised: a matmul's B"), "{}", blas.gpu.report());
}
