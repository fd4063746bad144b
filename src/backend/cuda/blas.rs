//! Matrix products by cuBLASLt. Descriptors are made once per shape; algorithms are chosen by timing and
//! stored on disk.
//!
//! cuBLASLt is column-major. It sees a row-major matrix `[rows, cols]` with leading dimension `ld` as a
//! `cols × rows` matrix, so `y = x·Wᵀ` becomes `D = Wᵀ·x` with m = outputs and n = rows, and a bias runs
//! along m.

mod algorithms;
mod config;
mod descriptors;
mod proof;
#[cfg(test)]
mod real;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t as DescAttribute;

use super::BLAS_WORKSPACE;
use super::api::{self, Candidate, Code};
use super::driver::{Address, Gpu, Stream};
use super::libraries;
use super::race::race;
use crate::backend::{Dtype, Precision};
use crate::error::Result;
use crate::terminal;

use algorithms::Algorithms;
pub(super) use algorithms::Chosen;
use config::{Config, Library};
use descriptors::{Desc, Layout, Preference, Reduction, check};
pub(super) use proof::SetAside;

/// What cuBLASLt applies to a product before it stores it.
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

impl Fused {
    fn reads_or_writes_bias(self) -> bool {
        matches!(self, Fused::Bias | Fused::BiasGeluAlone | Fused::BiasGelu | Fused::BiasGrad)
    }

    fn reads_or_writes_aux(self) -> bool {
        matches!(self, Fused::BiasGelu | Fused::GeluGrad)
    }
}

/// One operand or result: column-major, `rows × cols`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) ld: usize,
    pub(super) dtype: Dtype,
}

impl Matrix {
    /// Bytes from the first element to the last.
    pub(super) fn span(&self) -> usize {
        ((self.cols - 1) * self.ld + self.rows) * self.dtype.bytes()
    }
}

/// `D = op(A)·op(B) [+ C]`: everything that an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) transpose_a: bool,
    pub(super) transpose_b: bool,
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    /// Shared by C and D; their addresses may differ.
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
    pub(super) fn key(&self) -> String {
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

/// The library, and the plans of every shape so far.
pub(super) struct Blas {
    gpu: Gpu,
    handle: sys::cublasLtHandle_t,
    compute: sys::cublasComputeType_t,
    library: Library,
    by_rule: bool,
    /// `None`: cuBLASLt has no algorithm for this shape and epilogue.
    plans: HashMap<Shape, Option<Plan>>,
    algorithms: Algorithms,
    /// Ways of doing the work are being timed: their algorithms are not yet part of the run.
    rehearsal: bool,
}

/// The descriptors of one shape and the chosen algorithm.
struct Plan {
    desc: Desc,
    a: Layout,
    b: Layout,
    d: Layout,
    algo: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
    /// The run uses it, so its checkpoints name it.
    in_use: bool,
}

/// Candidates that are timed per shape.
const CANDIDATES: usize = 32;
/// Candidates that are requested when the first that works is used.
const CANDIDATES_BY_RULE: usize = 8;

/// The library's handle for each GPU. It is made once and kept, like the GPU's context.
static HANDLES: Mutex<Vec<(usize, Handle)>> = Mutex::new(Vec::new());

#[derive(Clone, Copy)]
struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library documents that a handle may be used from several threads.
unsafe impl Send for Handle {}

/// The handle for the GPU whose context is current.
fn handle_of(ordinal: usize) -> Result<sys::cublasLtHandle_t> {
    let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, handle)) = handles.iter().find(|(of, _)| *of == ordinal) {
        return Ok(handle.0);
    }
    let mut handle = ptr::null_mut();
    // SAFETY: the context is current; a valid out-pointer.
    check(unsafe { api::cublaslt().cublasLtCreate(&mut handle) }, "start cuBLASLt")?;
    handles.push((ordinal, Handle(handle)));
    Ok(handle)
}

impl Blas {
    /// `by_rule` uses the first algorithm of the heuristic that works, instead of timing.
    pub(super) fn new(gpu: &Gpu, precision: Precision, by_rule: bool) -> Result<Self> {
        let version = libraries::cublaslt()?.version;
        let properties = gpu.properties();
        let compute = match precision {
            Precision::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        Ok(Self {
            gpu: gpu.clone(),
            handle: handle_of(properties.ordinal)?,
            compute,
            library: Library { version, capability: properties.capability },
            by_rule,
            plans: HashMap::new(),
            algorithms: Algorithms::open(&properties.name, version, precision),
            rehearsal: false,
        })
    }

    /// `cublasLtGetVersion`
    pub(super) fn version(&self) -> usize {
        self.library.version
    }

    /// Whether algorithms are chosen by rule instead of timing.
    pub(super) fn by_rule(&self) -> bool {
        self.by_rule
    }

    /// Runs the product, or returns false where cuBLASLt cannot do it with this epilogue.
    ///
    /// # Panics
    /// An operand is not inside a live buffer.
    pub(super) fn run(&mut self, shape: &Shape, operands: &Operands, workspace: Address) -> Result<bool> {
        let added = shape.add_c.then_some((operands.c, shape.d));
        let given = [(operands.a, shape.a), (operands.b, shape.b), (operands.d, shape.d)];
        for (at, matrix) in given.into_iter().chain(added) {
            self.gpu.check_range(at, matrix.span());
        }
        if !self.plans.contains_key(shape) {
            let plan = self.plan(shape, operands, workspace)?;
            self.plans.insert(*shape, plan);
        }
        let Some(plan) = &mut self.plans.get_mut(shape).expect("inserted above") else { return Ok(false) };
        plan.point_at(shape, operands)?;
        let status = plan.launch(&self.gpu, self.handle, shape, operands, workspace);
        check(status, format_args!("multiply matrices ({})", shape.key()))?;
        if !self.rehearsal && !plan.in_use {
            plan.in_use = true;
            self.algorithms.take(shape.key(), plan.algo);
        }
        Ok(true)
    }

    /// While on, products that run are trials and do not count as the run's choices.
    pub(super) fn rehearse(&mut self, on: bool) {
        self.rehearsal = on;
    }

    fn plan(&mut self, shape: &Shape, operands: &Operands, workspace: Address) -> Result<Option<Plan>> {
        let desc = Desc::new(self.compute, shape)?;
        let (a, b, d) = (Layout::new(shape.a)?, Layout::new(shape.b)?, Layout::new(shape.d)?);
        let mut plan = Plan { desc, a, b, d, algo: Candidate::NONE.algo, workspace: 0, in_use: false };
        plan.point_at(shape, operands)?;
        let trial = Trial { blas: self, shape, operands, workspace };
        // Where the product adds to D, the old values of D affect the result.
        let added_to = shape.add_c && operands.c == operands.d;
        let places = if added_to { vec![(operands.d, shape.d.span())] } else { Vec::new() };
        let aside = SetAside::new(&self.gpu, &places)?;

        let key = shape.key();
        let remembered = self.algorithms.get(&key).filter(|_| !self.by_rule);
        let mut chosen_anew = false;
        let found = match remembered.and_then(|algo| self.accepts(&plan, shape, &algo)) {
            Some(candidate) if trial.launches(&mut plan, &candidate) => Some(candidate),
            _ => {
                if self.algorithms.is_preferred(&key) && !self.by_rule {
                    terminal::warn(&format!(
                        "the checkpoint's algorithm for {key} cannot be used; choosing another one"
                    ));
                }
                chosen_anew = !self.by_rule;
                trial.choose(&mut plan)?
            }
        };
        aside.put_back()?;
        let Some(found) = found else { return Ok(None) };
        plan.take(&found);
        if chosen_anew {
            self.algorithms.put(key, plan.algo);
        }
        Ok(Some(plan))
    }

    /// A remembered algorithm, if the library still accepts it, its workspace fits and it is not known to be
    /// wrong. The file is not trusted: it only names a candidate.
    fn accepts(&self, plan: &Plan, shape: &Shape, algo: &sys::cublasLtMatmulAlgo_t) -> Option<Candidate> {
        let mut result = Candidate::NONE;
        // SAFETY: live descriptors of this plan.
        let status = unsafe {
            api::cublaslt().cublasLtMatmulAlgoCheck(
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
        result.algo = *algo;
        let fits = result.workspace <= BLAS_WORKSPACE;
        let right = !self.library.computes_wrongly(&Config::of(algo), shape.k());
        (status == 0 && result.state == 0 && fits && right).then_some(result)
    }

    /// The library's candidates for a product, the likely fastest first. Empty on any failure: the caller has
    /// a fallback.
    fn candidates(
        &self,
        plan: &Plan,
        shape: &Shape,
        reduction: Reduction,
        wanted: usize,
    ) -> Result<Vec<Candidate>> {
        let preference = Preference::new(reduction)?;
        let mut results = vec![Candidate::NONE; wanted];
        let mut found = 0;
        // SAFETY: live descriptors; room for `wanted` results.
        let status = unsafe {
            api::cublaslt().cublasLtMatmulAlgoGetHeuristic(
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
        // NOT_SUPPORTED is documented; matrices of one row or column get INVALID_VALUE.
        if status != 0 {
            return Ok(Vec::new());
        }
        results.truncate(usize::try_from(found).unwrap_or(0));
        results.retain(|r| {
            r.state == 0
                && r.workspace <= BLAS_WORKSPACE
                && !self.library.computes_wrongly(&Config::of(&r.algo), shape.k())
        });
        Ok(results)
    }

    /// The choices that this run made by timing, for its checkpoint.
    pub(super) fn algorithms(&self) -> Vec<String> {
        if self.by_rule { Vec::new() } else { self.algorithms.in_words() }
    }

    /// Prefers the choices of a checkpoint for shapes that have not occurred yet, or says why not.
    pub(super) fn prefer(&mut self, algorithms: &[String]) -> Result<(), String> {
        if self.by_rule {
            return Ok(());
        }
        self.algorithms.prefer(algorithms).map_err(|why| format!("matrix products are timed again: {why}"))
    }

    /// How to do the product with this key and the work around it, if that is already known.
    pub(super) fn way(&self, key: &str) -> Option<&Chosen> {
        self.algorithms.way(key)
    }

    pub(super) fn put_way(&mut self, key: &str, chosen: &Chosen) {
        self.algorithms.put_way(key, chosen);
    }

    pub(super) fn take_way(&mut self, key: String, chosen: Chosen) {
        self.algorithms.take_way(key, chosen);
    }

    /// The ways of this run.
    pub(super) fn ways(&self) -> impl Iterator<Item = (&String, &Chosen)> {
        self.algorithms.ways()
    }

    /// Writes new choices to the cache folder.
    pub(super) fn save(&mut self) {
        self.algorithms.save();
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.save();
    }
}

/// A product whose algorithm is being chosen, on the operands of a step.
struct Trial<'a> {
    blas: &'a Blas,
    shape: &'a Shape,
    operands: &'a Operands,
    workspace: Address,
}

impl Trial<'_> {
    /// Whether the library can run the product with this candidate.
    fn launches(&self, plan: &mut Plan, candidate: &Candidate) -> bool {
        plan.take(candidate);
        plan.launch(&self.blas.gpu, self.blas.handle, self.shape, self.operands, self.workspace) == 0
    }

    /// The fastest candidate that agrees with one without a split; by rule, the first that works.
    fn choose(&self, plan: &mut Plan) -> Result<Option<Candidate>> {
        let wanted = if self.blas.by_rule { CANDIDATES_BY_RULE } else { CANDIDATES };
        let candidates = self.blas.candidates(plan, self.shape, Reduction::InF32, wanted)?;
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        if self.blas.by_rule {
            // If one cannot be launched, another may.
            order.retain(|at| self.launches(plan, &candidates[*at]));
        } else {
            let gpu = &self.blas.gpu;
            let cleared = (self.workspace, gpu.properties().cache.min(BLAS_WORKSPACE));
            let times =
                race(gpu, cleared, candidates.len(), &mut |at| Ok(self.launches(plan, &candidates[at])))?;
            order.retain(|at| times[*at].is_finite());
            order.sort_by(|a, b| times[*a].total_cmp(&times[*b]));
        }
        for at in order {
            let candidate = candidates[at];
            if Config::of(&candidate.algo).is_unsplit() || self.agrees(plan, &candidate, &candidates)? {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// Whether a split candidate agrees with one without a split. True if there is none to compare with.
    fn agrees(&self, plan: &mut Plan, split: &Candidate, candidates: &[Candidate]) -> Result<bool> {
        let is_unsplit = |candidate: &&Candidate| Config::of(&candidate.algo).is_unsplit();
        let asked = match candidates.iter().find(is_unsplit) {
            Some(_) => Vec::new(),
            None => self.blas.candidates(plan, self.shape, Reduction::Unsplit, CANDIDATES_BY_RULE)?,
        };
        let unsplit = candidates.iter().chain(&asked).filter(is_unsplit);
        let Some(unsplit) = unsplit.copied().find(|candidate| self.launches(plan, candidate)) else {
            return Ok(true);
        };
        let ways = [unsplit, *split];
        let mut multiply = |way: usize| Ok(self.launches(plan, &ways[way]));
        let agrees = proof::agree(&self.blas.gpu, self.shape, self.operands, &mut multiply)?;
        if !agrees {
            terminal::warn(&format!(
                "cuBLASLt {} offers an algorithm that computes wrongly for {}; another one is used",
                self.blas.version(),
                self.shape.key()
            ));
        }
        Ok(agrees)
    }
}

impl Plan {
    fn take(&mut self, candidate: &Candidate) {
        (self.algo, self.workspace) = (candidate.algo, candidate.workspace);
    }

    /// Sets the addresses that are stored in the descriptor.
    fn point_at(&mut self, shape: &Shape, operands: &Operands) -> Result<()> {
        if shape.fused.reads_or_writes_bias() {
            self.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        if shape.fused.reads_or_writes_aux() {
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
    ) -> Code {
        let (alpha, beta) = (1.0f32, if shape.add_c { 1.0f32 } else { 0.0 });
        // SAFETY: live descriptors that describe the operands, which lie in live buffers (`run`); alpha and beta
        // are read before the call returns; the workspace belongs to the compute stream alone.
        unsafe {
            api::cublaslt().cublasLtMatmul(
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
                gpu.stream(Stream::Compute),
            )
        }
    }
}
