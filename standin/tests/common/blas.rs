//! libcublasLt.so loaded next to the driver: describes products, requests algorithms, fills matrices.

use std::ffi::{c_int, c_void};
use std::ptr;

use libloading::Library;

use super::{Gpu, Handle};

pub const F32: c_int = 0;
pub const BF16: c_int = 14;

pub const NO_EPILOGUE: u32 = 1;
pub const BIAS: u32 = 4;

/// `cublasLtReductionScheme_t`: the parts of a split sum are combined in f32.
pub const IN_F32: u32 = 2;

/// Both libraries and a handle.
pub struct Blas {
    pub gpu: Gpu,
    pub lt: Library,
    pub handle: Handle,
}

/// Like `cu!`, for cuBLASLt.
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
pub struct Found {
    pub algorithm: [u64; 8],
    pub workspace: usize,
    pub state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

#[derive(Clone, Copy)]
pub struct Product {
    pub transpose: (bool, bool),
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub input: c_int,
    pub output: c_int,
    pub epilogue: u32,
    pub alpha: f32,
    pub beta: f32,
}

pub struct Descriptors {
    pub product: Handle,
    pub a: Handle,
    pub b: Handle,
    pub d: Handle,
}

/// A leading dimension that leaves a gap after each column.
pub fn ld(rows: usize) -> usize {
    rows.div_ceil(8) * 8 + 8
}

impl Product {
    pub fn a(&self) -> (usize, usize) {
        if self.transpose.0 { (self.k, self.m) } else { (self.m, self.k) }
    }
    pub fn b(&self) -> (usize, usize) {
        if self.transpose.1 { (self.n, self.k) } else { (self.k, self.n) }
    }
}

impl Blas {
    pub fn open(options: &str) -> Self {
        let gpu = Gpu::open(vitrum_standin::libraries(), options);
        // SAFETY: our own library, which finds the libcuda.so that is already loaded.
        let lt = unsafe { Library::new(vitrum_standin::libraries().join("libcublasLt.so")).unwrap() };
        let mut blas = Self { gpu, lt, handle: ptr::null_mut() };
        blas.handle = blas.create().unwrap();
        blas
    }

    /// A handle of the library, or the code.
    pub fn create(&self) -> Result<Handle, c_int> {
        let mut handle = ptr::null_mut();
        match lt!(self, cublasLtCreate(&mut handle => *mut Handle)) {
            0 => Ok(handle),
            code => Err(code),
        }
    }

    pub fn destroy(&self, handle: Handle) -> c_int {
        lt!(self, cublasLtDestroy(handle => Handle))
    }

    pub fn set<T>(&self, product: Handle, attribute: c_int, value: T) -> c_int {
        let from = ptr::from_ref(&value).cast::<c_void>();
        lt!(self, cublasLtMatmulDescSetAttribute(
            product => Handle, attribute => c_int, from => *const c_void, size_of::<T>() => usize))
    }

    pub fn layout(&self, dtype: c_int, (rows, cols): (usize, usize), ld: usize) -> Handle {
        let mut layout = ptr::null_mut();
        let code = lt!(self, cublasLtMatrixLayoutCreate(
            &mut layout => *mut Handle, dtype => c_int, rows as u64 => u64, cols as u64 => u64, ld as i64 => i64));
        assert_eq!(code, 0);
        layout
    }

    pub fn describe(&self, p: &Product) -> Descriptors {
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

    /// The candidates of the heuristic. `reductions`: how the parts of a split sum may be combined, if
    /// specified.
    pub fn candidates(
        &self,
        x: &Descriptors,
        workspace: u64,
        reductions: Option<u32>,
    ) -> Result<Vec<Found>, c_int> {
        let mut preference = ptr::null_mut();
        assert_eq!(lt!(self, cublasLtMatmulPreferenceCreate(&mut preference => *mut Handle)), 0);
        let set = |attribute: c_int, from: *const c_void, size: usize| {
            let code = lt!(self, cublasLtMatmulPreferenceSetAttribute(
                preference => Handle, attribute => c_int, from => *const c_void, size => usize));
            assert_eq!(code, 0);
        };
        set(1, ptr::from_ref(&workspace).cast(), 8);
        if let Some(mask) = &reductions {
            set(3, ptr::from_ref(mask).cast(), 4);
        }
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

    /// Whether the library still accepts an algorithm for this product; returns the code.
    pub fn check(&self, x: &Descriptors, algorithm: &[u64; 8]) -> c_int {
        let mut result = Found::default();
        lt!(self, cublasLtMatmulAlgoCheck(
            self.handle => Handle, x.product => Handle, x.a => Handle, x.b => Handle, x.d => Handle, x.d => Handle,
            algorithm.as_ptr() => *const u64, &mut result => *mut Found))
    }

    /// An attribute of an algorithm (`cublasLtMatmulAlgoConfigAttributes_t`); the code, its value, the bytes written.
    pub fn configuration(&self, algorithm: &[u64; 8], attribute: c_int) -> (c_int, u32, usize) {
        let (mut value, mut written) = (u32::MAX, 0usize);
        let code = lt!(self, cublasLtMatmulAlgoConfigGetAttribute(
            algorithm.as_ptr() => *const u64, attribute => c_int, &mut value => *mut u32, 4 => usize,
            &mut written => *mut usize));
        (code, value, written)
    }

    pub fn multiply(
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

    /// Uploads a matrix of small random values with NaN in its padding; returns the values as the device sees
    /// them.
    pub fn matrix(&self, dtype: c_int, (rows, cols): (usize, usize), seed: u64) -> (u64, Vec<f64>) {
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

    pub fn upload(&self, dtype: c_int, raw: &[f32]) -> u64 {
        if dtype == F32 {
            self.gpu.upload(raw)
        } else {
            self.gpu.upload(&raw.iter().map(|v| (v.to_bits() >> 16) as u16).collect::<Vec<_>>())
        }
    }

    pub fn download(&self, dtype: c_int, at: u64, count: usize) -> Vec<f64> {
        if dtype == F32 {
            self.gpu.download::<f32>(at, count).into_iter().map(f64::from).collect()
        } else {
            let raw = self.gpu.download::<u16>(at, count);
            raw.into_iter().map(|bits| f64::from(f32::from_bits(u32::from(bits) << 16))).collect()
        }
    }
}
