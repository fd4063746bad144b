//! cuBLASLt's descriptions of a product, as values that free themselves.

use std::ptr;

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t as DescAttribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;

use super::{Fused, Matrix, Shape};
use crate::backend::Dtype;
use crate::backend::cuda::BLAS_WORKSPACE;
use crate::backend::cuda::api::{self, Code};
use crate::error::{Error, Result};

/// How the parts of a split sum may be combined: not at all (no split), or in f32 in the workspace. The
/// library's default would allow them to pass through D's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reduction {
    Unsplit,
    InF32,
}

/// `cublasLtMatmulDesc_t`
pub(super) struct Desc(pub(super) sys::cublasLtMatmulDesc_t);

impl Desc {
    pub(super) fn new(compute: sys::cublasComputeType_t, shape: &Shape) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        let status = unsafe {
            api::cublaslt().cublasLtMatmulDescCreate(&mut raw, compute, sys::cudaDataType_t::CUDA_R_32F)
        };
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
        if shape.fused.reads_or_writes_aux() {
            let ld = shape.aux_ld as i64;
            desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld)?;
        }
        Ok(desc)
    }

    pub(super) fn set<T>(&mut self, attribute: DescAttribute, value: &T) -> Result<()> {
        // SAFETY: a live descriptor; the value has the attribute's type.
        let status = unsafe {
            api::cublaslt().cublasLtMatmulDescSetAttribute(
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
        unsafe { api::cublaslt().cublasLtMatmulDescDestroy(self.0) };
    }
}

/// `cublasLtMatrixLayout_t`
pub(super) struct Layout(pub(super) sys::cublasLtMatrixLayout_t);

impl Layout {
    pub(super) fn new(matrix: Matrix) -> Result<Self> {
        let mut raw = ptr::null_mut();
        let dtype = match matrix.dtype {
            Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        // SAFETY: a valid out-pointer.
        let status = unsafe {
            api::cublaslt().cublasLtMatrixLayoutCreate(
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
        unsafe { api::cublaslt().cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// `cublasLtMatmulPreference_t`
pub(super) struct Preference(pub(super) sys::cublasLtMatmulPreference_t);

impl Preference {
    /// Any algorithm that fits into the workspace and works with operands aligned to 16 bytes.
    pub(super) fn new(reduction: Reduction) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        let status = unsafe { api::cublaslt().cublasLtMatmulPreferenceCreate(&mut raw) };
        check(status, "describe a preference")?;
        let preference = Self(raw);
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &BLAS_WORKSPACE)?;
        use sys::cublasLtReductionScheme_t as Scheme;
        let scheme = match reduction {
            Reduction::Unsplit => Scheme::CUBLASLT_REDUCTION_SCHEME_NONE,
            Reduction::InF32 => Scheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
        };
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &(scheme as u32))?;
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

    pub(super) fn set<T>(&self, attribute: PreferenceAttribute, value: &T) -> Result<()> {
        // SAFETY: a live preference; the value has the attribute's type.
        let status = unsafe {
            api::cublaslt().cublasLtMatmulPreferenceSetAttribute(
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
        unsafe { api::cublaslt().cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// Turns a status into an error that names the failed action.
pub(super) fn check(status: Code, doing: impl std::fmt::Display) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let name = match status {
        1 => "NOT_INITIALIZED",
        3 => "ALLOC_FAILED",
        7 => "INVALID_VALUE",
        8 => "ARCH_MISMATCH",
        11 => "MAPPING_ERROR",
        13 => "EXECUTION_FAILED",
        14 => "INTERNAL_ERROR",
        15 => "NOT_SUPPORTED",
        _ => "an unknown status",
    };
    Err(Error::new(format!("cannot {doing}: cuBLASLt says {name} ({status})")))
}
