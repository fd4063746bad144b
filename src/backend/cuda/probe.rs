//! Looks for the CUDA driver and cuBLASLt before anything calls them.
//!
//! The bindings resolve each symbol at its first call and panic where it is missing, so that an old driver, a stub
//! library or none at all must be recognised here: each becomes one sentence that says what to do.

use std::ffi::{c_int, c_uint};

use libloading::Library;

use super::images;
use crate::error::{Error, Result};

/// Name prefix of the stand-in GPU that tests run on.
pub(super) const STAND_IN: &str = "Vitrum stand-in";

/// The oldest driver with every function that is called, as `cuDriverGetVersion` says it.
const OLDEST_CALLS: i32 = 12_080;

/// The oldest driver that runs this build: one of the embedded kernels' major version, at least CUDA 12.8.
pub fn oldest_driver() -> i32 {
    images::NVCC.map_or(OLDEST_CALLS, |(major, _)| OLDEST_CALLS.max(major as i32 * 1000))
}

/// The oldest cuBLASLt with every epilogue that is used, as `cublasLtGetVersion` says it.
pub const OLDEST_CUBLASLT: usize = 120_000;

/// Every driver function that this backend calls.
const DRIVER_SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Every cuBLASLt function that this backend calls.
const CUBLASLT_SYMBOLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// A library that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<V> {
    pub version: V,
}

/// The driver, if it is there, whole, and new enough.
pub fn driver() -> Result<Found<i32>> {
    let library = open("the CUDA driver", &["libcuda.so", "libcuda.so.1"])
        .map_err(|e| e.hint("install NVIDIA's driver; in a container, start it with `--gpus all`"))?;
    require(library, "the CUDA driver", DRIVER_SYMBOLS)
        .map_err(|e| e.hint("update NVIDIA's driver; a `stubs` folder must not be on LD_LIBRARY_PATH"))?;
    let mut version: c_int = 0;
    // SAFETY: the two functions have these signatures in every driver since CUDA 2.2, and `require` has found them.
    let code = unsafe {
        let init = library
            .get::<unsafe extern "C" fn(c_uint) -> c_int>(b"cuInit")
            .map_err(|e| Error::new(e.to_string()))?;
        let get = library
            .get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion")
            .map_err(|e| Error::new(e.to_string()))?;
        match init(0) {
            0 => get(&mut version),
            code => code,
        }
    };
    // CUDA_ERROR_NO_DEVICE, and the codes of a driver that does not match its kernel module.
    match code {
        0 => {}
        100 => {
            return Err(Error::new("the CUDA driver sees no card")
                .hint("`nvidia-smi` lists the cards; an empty `CUDA_VISIBLE_DEVICES` hides them all"));
        }
        803 | 804 => {
            return Err(Error::new(format!(
                "the CUDA driver does not match its kernel module (code {code})"
            ))
            .hint("restart the machine, or install the driver again"));
        }
        code => return Err(Error::new(format!("the CUDA driver does not start (code {code})"))),
    }
    if version < oldest_driver() {
        return Err(Error::new(format!(
            "the CUDA driver is too old: it knows CUDA {}, {} is needed",
            dotted(version),
            dotted(oldest_driver())
        ))
        .hint("update NVIDIA's driver"));
    }
    Ok(Found { version })
}

/// cuBLASLt, if it is there, whole, and new enough.
pub fn cublaslt() -> Result<Found<usize>> {
    let names = ["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"];
    let library = open("cuBLASLt", &names).map_err(|e| {
        e.hint(
            "install CUDA's libraries (`pip install nvidia-cublas`) and put their folder on LD_LIBRARY_PATH",
        )
    })?;
    require(library, "cuBLASLt", CUBLASLT_SYMBOLS).map_err(|e| e.hint("install CUDA 12 or newer"))?;
    // SAFETY: the function has this signature, and `require` has found it.
    let version = unsafe {
        library
            .get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion")
            .map(|get| get())
            .map_err(|e| Error::new(e.to_string()))?
    };
    if version < OLDEST_CUBLASLT {
        return Err(Error::new(format!(
            "cuBLASLt is too old: version {version}, {OLDEST_CUBLASLT} is needed"
        ))
        .hint("install CUDA 12 or newer"));
    }
    Ok(Found { version })
}

/// `12.4` from 12040.
pub fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Opens the first library of `names` that is there. It stays open: unloading a driver is not safe.
fn open(what: &str, names: &[&str]) -> Result<&'static Library> {
    let mut last = String::new();
    for name in names {
        // SAFETY: loading NVIDIA's libraries runs their initialisers, which is what every CUDA program does.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(Box::leak(Box::new(library))),
            Err(error) => last = error.to_string(),
        }
    }
    Err(Error::new(format!("{what} was not found ({last})")))
}

fn require(library: &Library, what: &str, symbols: &[&str]) -> Result<()> {
    // SAFETY: only whether the symbol exists is asked; nothing is called.
    let missing = |name: &&&str| unsafe { library.get::<*const ()>(name.as_bytes()).is_err() };
    match symbols.iter().find(missing) {
        None => Ok(()),
        Some(name) => Err(Error::new(format!("{what} has no function `{name}`: it is too old, or a stub"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The functions named `sys::PREFIX...(` in a source file.
    fn called<'a>(source: &'a str, prefix: &str) -> Vec<&'a str> {
        let names =
            source.split("sys::").skip(1).filter_map(|rest| rest.split_once('(')).map(|(name, _)| name);
        let is_function = |name: &&str| {
            let next = name.strip_prefix(prefix).and_then(|rest| rest.chars().next());
            next.is_some_and(char::is_uppercase) && name.chars().all(|c| c.is_alphanumeric() || c == '_')
        };
        names.filter(is_function).collect()
    }

    #[test]
    fn every_function_that_is_called_is_looked_for_first() {
        let driver = called(include_str!("driver.rs"), "cu");
        let blas = called(include_str!("blas.rs"), "cublasLt");
        assert!(driver.len() > 30 && blas.len() > 10, "{} and {} calls found", driver.len(), blas.len());
        for (calls, symbols) in [(driver, DRIVER_SYMBOLS), (blas, CUBLASLT_SYMBOLS)] {
            let missing: Vec<_> = calls.iter().filter(|name| !symbols.contains(name)).collect();
            assert!(missing.is_empty(), "not looked for: {missing:?}");
        }
    }
}
