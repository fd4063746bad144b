//! Finds the CUDA driver, cuBLASLt and NCCL before anything calls them. A missing library, a stub or an old driver
//! becomes a one-sentence error that says what to do.

use super::api::{self, Code, CublasLt, Driver, Nccl};
use super::images;
use crate::error::{Error, Result};

/// Name prefix of the stand-in GPU that tests run on.
pub(super) const STAND_IN: &str = "Vitrum stand-in";

/// The oldest driver that has every function we call, in the form of `cuDriverGetVersion`.
const OLDEST_CALLS: i32 = 12_080;

/// The oldest driver that runs this build: the major version of the embedded kernels, and at least CUDA 12.8.
pub fn oldest_driver() -> i32 {
    images::NVCC.map_or(OLDEST_CALLS, |(major, _)| OLDEST_CALLS.max(major as i32 * 1000))
}

/// The oldest cuBLASLt that has every epilogue we use, in the form of `cublasLtGetVersion`.
pub const OLDEST_CUBLASLT: usize = 120_000;

/// The oldest NCCL that has every function we call, in the form of `ncclGetVersion`.
pub const OLDEST_NCCL: i32 = 21_800;

/// A usable library.
#[derive(Clone, Copy)]
pub(super) struct Found<T: 'static, V> {
    pub(super) api: &'static T,
    pub(super) version: V,
}

/// CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE, and the two codes of a driver that does not match its
/// kernel module.
const STUB: Code = 34;
const NO_DEVICE: Code = 100;
const MISMATCH: [Code; 2] = [803, 804];

/// The driver, if it is present, complete, started and new enough.
pub(super) fn driver() -> Result<Found<Driver, i32>> {
    let api = api::find_driver()?;
    let mut version = 0;
    // SAFETY: a valid out-pointer.
    let code = unsafe {
        match api.cuInit(0) {
            0 => api.cuDriverGetVersion(&mut version),
            code => code,
        }
    };
    match code {
        0 => {}
        STUB => {
            return Err(Error::new(
                "the CUDA driver that was found is a stub library, made only for linking (code 34)",
            )
            .hint(
                "remove the `stubs` folder from LD_LIBRARY_PATH, so that the driver's own libcuda.so.1 is found",
            ));
        }
        NO_DEVICE => return Err(no_gpu()),
        code if MISMATCH.contains(&code) => {
            return Err(Error::new(format!(
                "the CUDA driver does not match its kernel module (code {code})"
            ))
            .hint("restart the machine, or install the driver again"));
        }
        code => return Err(Error::new(format!("the CUDA driver does not start (code {code})"))),
    }
    if version < oldest_driver() {
        return Err(Error::new(format!(
            "the CUDA driver is too old: it supports CUDA {}, {} is needed",
            dotted(version),
            dotted(oldest_driver())
        ))
        .hint("update NVIDIA's driver"));
    }
    Ok(Found { api, version })
}

/// The error where the driver works and lists no GPU.
pub(super) fn no_gpu() -> Error {
    Error::new("the CUDA driver finds no GPU")
        .hint("`nvidia-smi` lists the GPUs; an empty `CUDA_VISIBLE_DEVICES` hides them all")
}

/// cuBLASLt, if it is present, complete and new enough.
pub(super) fn cublaslt() -> Result<Found<CublasLt, usize>> {
    let api = api::find_cublaslt()?;
    // SAFETY: this function may be called at any time.
    let version = unsafe { api.cublasLtGetVersion() };
    if version < OLDEST_CUBLASLT {
        return Err(Error::new(format!(
            "cuBLASLt is too old: version {version}, {OLDEST_CUBLASLT} is needed"
        ))
        .hint("install CUDA 12 or newer"));
    }
    Ok(Found { api, version })
}

/// NCCL, if it is present, complete and new enough.
pub(super) fn nccl() -> Result<Found<Nccl, i32>> {
    let api = api::find_nccl()?;
    let mut version = 0;
    // SAFETY: a valid out-pointer; this function may be called at any time.
    let code = unsafe { api.ncclGetVersion(&mut version) };
    if code != 0 {
        return Err(Error::new(format!("NCCL does not tell its version (code {code})")));
    }
    if version < OLDEST_NCCL {
        return Err(Error::new(format!(
            "NCCL is too old: version {}, {} is needed",
            dotted_nccl(version),
            dotted_nccl(OLDEST_NCCL)
        ))
        .hint("`pip install -U nvidia-nccl-cu12` (or `-cu13`) and put its folder first in LD_LIBRARY_PATH"));
    }
    Ok(Found { api, version })
}

/// The version of the NCCL that ranks on GPUs would use, as `2.27.3`.
///
/// # Errors
/// There is none, or it is too old.
pub fn nccl_version() -> Result<String> {
    Ok(dotted_nccl(nccl()?.version))
}

/// `2.27.3` from 22703; versions before 2.9 counted otherwise.
fn dotted_nccl(version: i32) -> String {
    match version {
        ..10_000 => format!("{}.{}.{}", version / 1000, version / 100 % 10, version % 100),
        _ => format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
    }
}

/// `12.4` from 12040.
pub fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
