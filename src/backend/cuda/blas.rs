//! Matrix products by cuBLASLt: descriptors made once per shape, algorithms chosen by timing and remembered on disk.
//!
//! cuBLASLt is column-major. A row-major matrix `[rows, cols]` with leading dimension `ld` is to it a `cols × rows`
//! matrix, so that `y = x·Wᵀ` becomes `D = Wᵀ·x` with m = outputs, n = rows, and a bias runs along m.

mod algorithms;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t as DescAttribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;

use super::BLAS_WORKSPACE;
use super::driver::{Address, Gpu, Stream};
use super::probe;
use crate::backend::{Dtype, Precision};
use crate::error::{Error, Result};

use algorithms::Algorithms;

/// What cuBLASLt does to a product before it stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fused {
    Nothing,
    /// `+ bias`, along m.
    Bias,
    /// `D = gelu_tanh(product + bias)`
    BiasGeluAlone,
    /// `aux = product + bias; D = gelu_tanh(aux)`
    BiasGelu,
    /// `D = product ∘ gelu_tanh'(aux)`
    GeluGrad,
    /// Besides the product, `bias = Σ over k of B`: a bias gradient along n.
    BiasGrad,
}

/// One operand or result: column-major, `rows × cols`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) ld: usize,
    pub(super) dtype: Dtype,
}

/// `D = op(A)·op(B) [+ C]`: everything that an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) transpose_a: bool,
    pub(super) transpose_b: bool,
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    /// Of C and D alike; their addresses may differ.
    pub(super) d: Matrix,
    pub(super) add_c: bool,
    pub(super) fused: Fused,
    pub(super) aux_ld: usize,
}

impl Shape {
    fn k(&self) -> usize {
        if self.transpose_a { self.a.rows } else { self.a.cols }
    }

    /// One word per field, for the file of algorithms and for messages.
    fn key(&self) -> String {
        let t = |dtype| if dtype == Dtype::Bf16 { "bf16" } else { "f32" };
        format!(
            "{}{} m{} n{} k{} {}>{} ld {} {} {} c{} {:?} {}",
            if self.transpose_a { 't' } else { 'n' },
            if self.transpose_b { 't' } else { 'n' },
            self.d.rows,
            self.d.cols,
            self.k(),
            t(self.a.dtype),
            t(self.d.dtype),
            self.a.ld,
            self.b.ld,
            self.d.ld,
            u8::from(self.add_c),
            self.fused,
            self.aux_ld,
        )
    }
}

/// Where the matrices of a product lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) a: Address,
    pub(super) b: Address,
    /// Equal to `d` where nothing is added.
    pub(super) c: Address,
    pub(super) d: Address,
    pub(super) bias: Address,
    pub(super) aux: Address,
}

/// The library, with what is known of every shape so far.
pub(super) struct Blas {
    gpu: Gpu,
    handle: sys::cublasLtHandle_t,
    compute: sys::cublasComputeType_t,
    version: usize,
    by_rule: bool,
    /// `None`: cuBLASLt has no algorithm for this shape and epilogue.
    plans: HashMap<Shape, Option<Plan>>,
    algorithms: Algorithms,
}

/// Descriptors of one shape and the algorithm that was chosen.
struct Plan {
    desc: Desc,
    a: Layout,
    b: Layout,
    d: Layout,
    algo: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

/// Candidates that are timed for a shape.
const CANDIDATES: usize = 32;
/// Runs of a candidate: the first warms it up, the fastest of the others counts.
const TRIALS: usize = 4;

impl Blas {
    /// `by_rule` takes the heuristic's first algorithm instead of timing.
    pub(super) fn new(gpu: &Gpu, precision: Precision, by_rule: bool) -> Result<Self> {
        let version = probe::cublaslt()?.version;
        let mut handle = ptr::null_mut();
        // SAFETY: `probe` found the library and its functions; the context is current; a valid out-pointer.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "start cuBLASLt")?;
        let compute = match precision {
            Precision::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let algorithms = Algorithms::open(&gpu.card().name, version, precision);
        Ok(Self { gpu: gpu.clone(), handle, compute, version, by_rule, plans: HashMap::new(), algorithms })
    }

    /// `cublasLtGetVersion`
    pub(super) fn version(&self) -> usize {
        self.version
    }

    /// Runs the product, or returns false where cuBLASLt cannot do it with this epilogue.
    pub(super) fn run(&mut self, shape: &Shape, operands: &Operands, workspace: Address) -> Result<bool> {
        if !self.plans.contains_key(shape) {
            let plan = self.plan(shape, operands, workspace)?;
            self.plans.insert(*shape, plan);
        }
        let Some(plan) = &mut self.plans.get_mut(shape).expect("inserted above") else { return Ok(false) };
        plan.point_at(shape, operands)?;
        let status = plan.launch(&self.gpu, self.handle, shape, operands, workspace);
        check(status, format_args!("multiply matrices ({})", shape.key()))?;
        Ok(true)
    }

    fn plan(&mut self, shape: &Shape, operands: &Operands, workspace: Address) -> Result<Option<Plan>> {
        let desc = Desc::new(self.compute, shape)?;
        let (a, b, d) = (Layout::new(shape.a)?, Layout::new(shape.b)?, Layout::new(shape.d)?);
        let none = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        let mut plan = Plan { desc, a, b, d, algo: none, workspace: 0 };
        plan.point_at(shape, operands)?;

        let key = shape.key();
        if !self.by_rule
            && let Some(algo) = self.algorithms.get(&key)
        {
            if let Some(size) = self.accepts(&plan, &algo) {
                (plan.algo, plan.workspace) = (algo, size);
                self.algorithms.take(key, algo);
                return Ok(Some(plan));
            }
            if self.algorithms.is_preferred(&key) {
                eprintln!(
                    "warning: cuBLASLt refuses the checkpoint's algorithm for {key}: it is chosen anew"
                );
            }
        }
        let wanted = if self.by_rule { 1 } else { CANDIDATES };
        let candidates = self.candidates(&plan, wanted)?;
        let Some(first) = candidates.first() else { return Ok(None) };
        (plan.algo, plan.workspace) = (first.algo, first.workspaceSize);
        if candidates.len() > 1 {
            self.choose_fastest(&mut plan, shape, operands, workspace, &candidates)?;
        }
        if !self.by_rule {
            self.algorithms.put(key, plan.algo);
        }
        Ok(Some(plan))
    }

    /// The workspace of an algorithm that was remembered, if the library still takes it and the workspace is there. What the
    /// file says is not trusted: it only names a candidate.
    fn accepts(&self, plan: &Plan, algo: &sys::cublasLtMatmulAlgo_t) -> Option<usize> {
        // SAFETY: an all-zero result is a valid value of this plain struct.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: live descriptors of this plan.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.desc.0,
                plan.a.0,
                plan.b.0,
                plan.d.0,
                plan.d.0,
                algo,
                &mut result,
            )
        };
        let success = sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let fits = result.workspaceSize <= BLAS_WORKSPACE;
        (status == success && result.state == success && fits).then_some(result.workspaceSize)
    }

    fn candidates(&self, plan: &Plan, wanted: usize) -> Result<Vec<sys::cublasLtMatmulHeuristicResult_t>> {
        let preference = Preference::new()?;
        // SAFETY: an all-zero result is a valid value of this plain struct.
        let mut results = vec![unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() }; wanted];
        let mut found = 0;
        // SAFETY: live descriptors; room for `wanted` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.desc.0,
                plan.a.0,
                plan.b.0,
                plan.d.0,
                plan.d.0,
                preference.0,
                wanted as i32,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        // Not supported is an answer: the caller takes another way.
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(status, "ask for matrix product algorithms")?;
        results.truncate(found as usize);
        results.retain(|r| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(results)
    }

    /// Times the candidates on the real operands. A result that is added to waits in main memory and is put back: the card
    /// may be full.
    fn choose_fastest(
        &self,
        plan: &mut Plan,
        shape: &Shape,
        operands: &Operands,
        workspace: Address,
        candidates: &[sys::cublasLtMatmulHeuristicResult_t],
    ) -> Result<()> {
        let bytes = ((shape.d.cols - 1) * shape.d.ld + shape.d.rows) * shape.d.dtype.bytes();
        let saved = if shape.add_c && operands.c == operands.d {
            let mut copy = vec![0; bytes];
            self.gpu.download(operands.d, &mut copy)?;
            Some(copy)
        } else {
            None
        };
        let (start, end) = (self.gpu.new_event()?, self.gpu.new_event()?);
        let mut best = f32::INFINITY;
        for candidate in candidates {
            let (algo, size) = (plan.algo, plan.workspace);
            (plan.algo, plan.workspace) = (candidate.algo, candidate.workspaceSize);
            let mut fastest = f32::INFINITY;
            for trial in 0..TRIALS {
                self.gpu.record_event(&start, Stream::Compute)?;
                let status = plan.launch(&self.gpu, self.handle, shape, operands, workspace);
                if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                    break;
                }
                self.gpu.record_event(&end, Stream::Compute)?;
                end.synchronize()?;
                if trial > 0 {
                    fastest = fastest.min(end.since(&start)?);
                }
            }
            if fastest < best {
                best = fastest;
            } else {
                (plan.algo, plan.workspace) = (algo, size);
            }
        }
        if let Some(copy) = &saved {
            self.gpu.upload(operands.d, copy)?;
        }
        Ok(())
    }

    /// What was chosen by timing in this run, for its checkpoint.
    pub(super) fn algorithms(&self) -> Vec<String> {
        if self.by_rule { Vec::new() } else { self.algorithms.in_words() }
    }

    /// Prefers the choices of a checkpoint for shapes that are yet to be met, or says why not.
    pub(super) fn prefer(&mut self, algorithms: &[String]) -> Result<(), String> {
        if self.by_rule {
            return Ok(());
        }
        self.algorithms.prefer(algorithms).map_err(|why| format!("matrix products are timed anew: {why}"))
    }

    /// Writes what was learnt to the cache folder.
    pub(super) fn save(&mut self) {
        self.algorithms.save();
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.save();
        self.plans.clear();
        // SAFETY: created by `new`, destroyed once, after everything that uses it.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

impl Plan {
    /// Sets the addresses that live in the descriptor.
    fn point_at(&mut self, shape: &Shape, operands: &Operands) -> Result<()> {
        if matches!(shape.fused, Fused::Bias | Fused::BiasGeluAlone | Fused::BiasGelu | Fused::BiasGrad) {
            self.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        if matches!(shape.fused, Fused::BiasGelu | Fused::GeluGrad) {
            self.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &operands.aux)?;
        }
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        operands: &Operands,
        workspace: Address,
    ) -> sys::cublasStatus_t {
        let (alpha, beta) = (1.0f32, if shape.add_c { 1.0f32 } else { 0.0 });
        // SAFETY: live descriptors that describe the operands, which lie in this card's memory; alpha and beta are read
        // before the call returns; the workspace belongs to the compute stream alone.
        unsafe {
            sys::cublasLtMatmul(
                handle,
                self.desc.0,
                ptr::from_ref(&alpha).cast(),
                operands.a as *const c_void,
                self.a.0,
                operands.b as *const c_void,
                self.b.0,
                ptr::from_ref(&beta).cast(),
                operands.c as *const c_void,
                self.d.0,
                operands.d as *mut c_void,
                self.d.0,
                &self.algo,
                workspace as *mut c_void,
                self.workspace,
                gpu.stream(Stream::Compute).cast(),
            )
        }
    }
}

// Descriptors -----------------------------------------------------------------------------------------------------

struct Desc(sys::cublasLtMatmulDesc_t);

impl Desc {
    fn new(compute: sys::cublasComputeType_t, shape: &Shape) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&mut raw, compute, sys::cudaDataType_t::CUDA_R_32F) };
        check(status, "describe a matrix product")?;
        let mut desc = Self(raw);
        let transposed = |t: bool| if t { 1i32 } else { 0 };
        desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed(shape.transpose_a))?;
        desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, &transposed(shape.transpose_b))?;
        use sys::cublasLtEpilogue_t as Epilogue;
        let epilogue = match shape.fused {
            Fused::Nothing => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            Fused::Bias => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            Fused::BiasGeluAlone => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
            Fused::BiasGelu => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Fused::GeluGrad => Epilogue::CUBLASLT_EPILOGUE_DGELU,
            Fused::BiasGrad => Epilogue::CUBLASLT_EPILOGUE_BGRADB,
        };
        desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if matches!(shape.fused, Fused::BiasGelu | Fused::GeluGrad) {
            let ld = shape.aux_ld as i64;
            desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld)?;
        }
        Ok(desc)
    }

    fn set<T>(&mut self, attribute: DescAttribute, value: &T) -> Result<()> {
        // SAFETY: a live descriptor; the value has the attribute's type.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check(status, format_args!("set {attribute:?}"))
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(matrix: Matrix) -> Result<Self> {
        let mut raw = ptr::null_mut();
        let dtype = match matrix.dtype {
            Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        // SAFETY: a valid out-pointer.
        let status = unsafe {
            sys::cublasLtMatrixLayoutCreate(
                &mut raw,
                dtype,
                matrix.rows as u64,
                matrix.cols as u64,
                matrix.ld as i64,
            )
        };
        check(status, "describe a matrix")?;
        Ok(Self(raw))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// Any algorithm that gets by with the workspace and with operands aligned to 16 bytes.
    fn new() -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut raw) }, "describe a preference")?;
        let preference = Self(raw);
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &BLAS_WORKSPACE)?;
        for attribute in [
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, &16u32)?;
        }
        Ok(preference)
    }

    fn set<T>(&self, attribute: PreferenceAttribute, value: &T) -> Result<()> {
        // SAFETY: a live preference; the value has the attribute's type.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check(status, format_args!("set {attribute:?}"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn check(status: sys::cublasStatus_t, doing: impl std::fmt::Display) -> Result<()> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(Error::new(format!("cannot {doing}: cuBLASLt says {status:?}"))),
    }
}
