//! The C functions of the CUDA driver, of cuBLASLt and of NCCL that we call: one table per library, opened at
//! run time.
//!
//! Status codes are integers on this side of the boundary. A newer library may return a code that this
//! program has no name for, and a Rust enum with a value outside its list is undefined behaviour. A table
//! exists only when its library has all its functions, so no call can meet a missing one. Types are
//! `cudarc`'s, except for NCCL's.

#![allow(non_snake_case)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use std::error::Error as _;

use libloading::Library;

use crate::error::{Error, Result};

/// What a function returns: 0 is success in all libraries.
pub(super) type Code = c_int;

/// `cublasLtMatmulHeuristicResult_t`, its status as an integer.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Candidate {
    pub(super) algo: lt::cublasLtMatmulAlgo_t,
    pub(super) workspace: usize,
    pub(super) state: Code,
    pub(super) waves: f32,
    reserved: [c_int; 4],
}
const _: () = assert!(size_of::<Candidate>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());

impl Candidate {
    pub(super) const NONE: Candidate = Candidate {
        algo: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspace: 0,
        state: 0,
        waves: 0.0,
        reserved: [0; 4],
    };
}

/// A library as a table of its functions: `fn name(arguments) -> result`, with the header's names.
macro_rules! library {
    ($(#[$doc:meta])* $table:ident { $(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty;)* }) => {
        $(#[$doc])*
        pub(super) struct $table { $($name: unsafe extern "C" fn($($type),*) -> $result,)* }

        impl $table {
            /// All functions, or the name of a missing one.
            fn load(library: &'static Library) -> std::result::Result<Self, &'static str> {
                Ok(Self { $($name: {
                    // SAFETY: the headers declare it so, in every version since the oldest that is accepted.
                    let found = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                    *found.map_err(|_| stringify!($name))?
                },)* })
            }

            $(
                /// # Safety
                /// What the library's documentation requires of the caller.
                pub(super) unsafe fn $name(&self, $($argument: $type),*) -> $result {
                    // SAFETY: the caller's promise.
                    unsafe { (self.$name)($($argument),*) }
                }
            )*
        }
    };
}

library! {
    /// libcuda
    Driver {
        fn cuCtxSetCurrent(context: cu::CUcontext) -> Code;
        fn cuDeviceGet(device: *mut cu::CUdevice, ordinal: c_int) -> Code;
        fn cuDeviceGetAttribute(value: *mut c_int, attribute: cu::CUdevice_attribute, device: cu::CUdevice) -> Code;
        fn cuDeviceGetCount(count: *mut c_int) -> Code;
        fn cuDeviceGetName(name: *mut c_char, bytes: c_int, device: cu::CUdevice) -> Code;
        fn cuDevicePrimaryCtxRelease_v2(device: cu::CUdevice) -> Code;
        fn cuDevicePrimaryCtxRetain(context: *mut cu::CUcontext, device: cu::CUdevice) -> Code;
        fn cuDeviceTotalMem_v2(bytes: *mut usize, device: cu::CUdevice) -> Code;
        fn cuDriverGetVersion(version: *mut c_int) -> Code;
        fn cuEventCreate(event: *mut cu::CUevent, flags: c_uint) -> Code;
        fn cuEventDestroy_v2(event: cu::CUevent) -> Code;
        fn cuDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: cu::CUdevice) -> Code;
        fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: cu::CUevent, end: cu::CUevent) -> Code;
        fn cuEventQuery(event: cu::CUevent) -> Code;
        fn cuEventRecord(event: cu::CUevent, stream: cu::CUstream) -> Code;
        fn cuEventSynchronize(event: cu::CUevent) -> Code;
        fn cuFuncSetAttribute(function: cu::CUfunction, attribute: cu::CUfunction_attribute, value: c_int) -> Code;
        fn cuGetErrorName(code: Code, name: *mut *const c_char) -> Code;
        fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code;
        fn cuGraphDestroy(graph: cu::CUgraph) -> Code;
        fn cuGraphExecDestroy(graph: cu::CUgraphExec) -> Code;
        fn cuGraphInstantiateWithFlags(exec: *mut cu::CUgraphExec, graph: cu::CUgraph, flags: u64) -> Code;
        fn cuGraphLaunch(graph: cu::CUgraphExec, stream: cu::CUstream) -> Code;
        fn cuInit(flags: c_uint) -> Code;
        fn cuLaunchKernel(
            function: cu::CUfunction,
            grid_x: c_uint,
            grid_y: c_uint,
            grid_z: c_uint,
            block_x: c_uint,
            block_y: c_uint,
            block_z: c_uint,
            shared: c_uint,
            stream: cu::CUstream,
            arguments: *mut *mut c_void,
            extra: *mut *mut c_void,
        ) -> Code;
        fn cuMemAlloc_v2(address: *mut cu::CUdeviceptr, bytes: usize) -> Code;
        fn cuMemFreeHost(pointer: *mut c_void) -> Code;
        fn cuMemFree_v2(address: cu::CUdeviceptr) -> Code;
        fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code;
        fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint) -> Code;
        fn cuMemcpyDtoDAsync_v2(to: cu::CUdeviceptr, from: cu::CUdeviceptr, bytes: usize, stream: cu::CUstream) -> Code;
        fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: cu::CUdeviceptr, bytes: usize, stream: cu::CUstream) -> Code;
        fn cuMemcpyHtoDAsync_v2(to: cu::CUdeviceptr, from: *const c_void, bytes: usize, stream: cu::CUstream) -> Code;
        fn cuTensorMapEncodeTiled(
            map: *mut cu::CUtensorMap,
            dtype: c_uint,
            rank: c_uint,
            at: *mut c_void,
            sizes: *const u64,
            strides: *const u64,
            part: *const c_uint,
            steps: *const c_uint,
            interleave: c_uint,
            swizzle: c_uint,
            promotion: c_uint,
            outside: c_uint,
        ) -> Code;
        fn cuMemsetD8Async(at: cu::CUdeviceptr, value: u8, bytes: usize, stream: cu::CUstream) -> Code;
        fn cuModuleGetFunction(function: *mut cu::CUfunction, module: cu::CUmodule, name: *const c_char) -> Code;
        fn cuModuleLoadData(module: *mut cu::CUmodule, image: *const c_void) -> Code;
        fn cuStreamBeginCapture_v2(stream: cu::CUstream, mode: cu::CUstreamCaptureMode) -> Code;
        fn cuStreamCreate(stream: *mut cu::CUstream, flags: c_uint) -> Code;
        fn cuStreamDestroy_v2(stream: cu::CUstream) -> Code;
        fn cuStreamEndCapture(stream: cu::CUstream, graph: *mut cu::CUgraph) -> Code;
        fn cuStreamSynchronize(stream: cu::CUstream) -> Code;
        fn cuStreamWaitEvent(stream: cu::CUstream, event: cu::CUevent, flags: c_uint) -> Code;
    }
}

library! {
    /// libcublasLt
    CublasLt {
        fn cublasLtCreate(handle: *mut lt::cublasLtHandle_t) -> Code;
        fn cublasLtGetVersion() -> usize;
        fn cublasLtMatmul(
            handle: lt::cublasLtHandle_t,
            desc: lt::cublasLtMatmulDesc_t,
            alpha: *const c_void,
            a: *const c_void,
            a_layout: lt::cublasLtMatrixLayout_t,
            b: *const c_void,
            b_layout: lt::cublasLtMatrixLayout_t,
            beta: *const c_void,
            c: *const c_void,
            c_layout: lt::cublasLtMatrixLayout_t,
            d: *mut c_void,
            d_layout: lt::cublasLtMatrixLayout_t,
            algo: *const lt::cublasLtMatmulAlgo_t,
            workspace: *mut c_void,
            workspace_bytes: usize,
            stream: cu::CUstream,
        ) -> Code;
        fn cublasLtMatmulAlgoCheck(
            handle: lt::cublasLtHandle_t,
            desc: lt::cublasLtMatmulDesc_t,
            a: lt::cublasLtMatrixLayout_t,
            b: lt::cublasLtMatrixLayout_t,
            c: lt::cublasLtMatrixLayout_t,
            d: lt::cublasLtMatrixLayout_t,
            algo: *const lt::cublasLtMatmulAlgo_t,
            result: *mut Candidate,
        ) -> Code;
        fn cublasLtMatmulAlgoConfigGetAttribute(
            algo: *const lt::cublasLtMatmulAlgo_t,
            attribute: lt::cublasLtMatmulAlgoConfigAttributes_t,
            value: *mut c_void,
            bytes: usize,
            written: *mut usize,
        ) -> Code;
        fn cublasLtMatmulAlgoGetHeuristic(
            handle: lt::cublasLtHandle_t,
            desc: lt::cublasLtMatmulDesc_t,
            a: lt::cublasLtMatrixLayout_t,
            b: lt::cublasLtMatrixLayout_t,
            c: lt::cublasLtMatrixLayout_t,
            d: lt::cublasLtMatrixLayout_t,
            preference: lt::cublasLtMatmulPreference_t,
            wanted: c_int,
            results: *mut Candidate,
            found: *mut c_int,
        ) -> Code;
        fn cublasLtMatmulDescCreate(
            desc: *mut lt::cublasLtMatmulDesc_t,
            compute: lt::cublasComputeType_t,
            scale: lt::cudaDataType_t,
        ) -> Code;
        fn cublasLtMatmulDescDestroy(desc: lt::cublasLtMatmulDesc_t) -> Code;
        fn cublasLtMatmulDescSetAttribute(
            desc: lt::cublasLtMatmulDesc_t,
            attribute: lt::cublasLtMatmulDescAttributes_t,
            value: *const c_void,
            bytes: usize,
        ) -> Code;
        fn cublasLtMatmulPreferenceCreate(preference: *mut lt::cublasLtMatmulPreference_t) -> Code;
        fn cublasLtMatmulPreferenceDestroy(preference: lt::cublasLtMatmulPreference_t) -> Code;
        fn cublasLtMatmulPreferenceSetAttribute(
            preference: lt::cublasLtMatmulPreference_t,
            attribute: lt::cublasLtMatmulPreferenceAttributes_t,
            value: *const c_void,
            bytes: usize,
        ) -> Code;
        fn cublasLtMatrixLayoutCreate(
            layout: *mut lt::cublasLtMatrixLayout_t,
            dtype: lt::cudaDataType,
            rows: u64,
            cols: u64,
            ld: i64,
        ) -> Code;
        fn cublasLtMatrixLayoutDestroy(layout: lt::cublasLtMatrixLayout_t) -> Code;
    }
}

/// `ncclUniqueId`
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct NcclId(pub(super) [u8; 128]);

/// `ncclComm_t`
pub(super) type NcclComm = *mut c_void;

/// `ncclConfig_t` of NCCL 2.17. Later versions append fields and read no more than `size` bytes.
#[repr(C)]
pub(super) struct NcclConfig {
    pub(super) size: usize,
    pub(super) magic: c_uint,
    pub(super) version: c_uint,
    pub(super) blocking: c_int,
    pub(super) cga_cluster: c_int,
    pub(super) min_ctas: c_int,
    pub(super) max_ctas: c_int,
    pub(super) network: *const c_char,
}

library! {
    /// libnccl
    Nccl {
        fn ncclAllGather(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            dtype: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
        fn ncclAllReduce(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            dtype: c_int,
            op: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
        fn ncclBroadcast(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            dtype: c_int,
            root: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
        fn ncclCommCount(comm: NcclComm, ranks: *mut c_int) -> Code;
        fn ncclCommDestroy(comm: NcclComm) -> Code;
        fn ncclCommFinalize(comm: NcclComm) -> Code;
        fn ncclCommGetAsyncError(comm: NcclComm, error: *mut Code) -> Code;
        fn ncclCommInitRankConfig(
            comm: *mut NcclComm,
            ranks: c_int,
            id: NcclId,
            rank: c_int,
            config: *mut NcclConfig,
        ) -> Code;
        fn ncclCommUserRank(comm: NcclComm, rank: *mut c_int) -> Code;
        fn ncclGetErrorString(code: Code) -> *const c_char;
        fn ncclGetLastError(comm: NcclComm) -> *const c_char;
        fn ncclGetUniqueId(id: *mut NcclId) -> Code;
        fn ncclGetVersion(version: *mut c_int) -> Code;
        fn ncclGroupEnd() -> Code;
        fn ncclGroupStart() -> Code;
        fn ncclRecv(
            to: *mut c_void,
            count: usize,
            dtype: c_int,
            from: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
        fn ncclReduceScatter(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            dtype: c_int,
            op: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
        fn ncclSend(
            from: *const c_void,
            count: usize,
            dtype: c_int,
            to: c_int,
            comm: NcclComm,
            stream: cu::CUstream,
        ) -> Code;
    }
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static CUBLASLT: OnceLock<CublasLt> = OnceLock::new();
static NCCL: OnceLock<Nccl> = OnceLock::new();

/// How to find a library, and what to do if that fails.
struct Search {
    what: &'static str,
    /// Tried in this order.
    names: &'static [&'static str],
    /// Its folder in NVIDIA's Python packages, tried last.
    package: Option<&'static str>,
    absent: &'static str,
    incomplete: &'static str,
}

const FOR_DRIVER: Search = Search {
    what: "the CUDA driver",
    // The versioned name is the driver's own; the bare one comes with development packages and may be a stub.
    names: &["libcuda.so.1", "libcuda.so"],
    package: None,
    absent: "install NVIDIA's driver; in a container, start it with `--gpus all`",
    incomplete: "update NVIDIA's driver; a `stubs` folder must not be on LD_LIBRARY_PATH",
};

const FOR_CUBLASLT: Search = Search {
    what: "cuBLASLt",
    names: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    package: None,
    absent: "install CUDA's libraries (`pip install nvidia-cublas`) and put their folder on LD_LIBRARY_PATH",
    incomplete: "install CUDA 12 or newer",
};

const FOR_NCCL: Search = Search {
    what: "NCCL",
    names: &["libnccl.so.2"],
    package: Some("nvidia/nccl/lib"),
    absent: "`pip install nvidia-nccl-cu12` (or `-cu13`) and put its folder `nvidia/nccl/lib` on LD_LIBRARY_PATH",
    incomplete: "install NCCL 2.18 or newer",
};

/// The driver's functions, looked up by the first call that finds them.
///
/// # Errors
/// No such library, or one that lacks a function.
pub(super) fn find_driver() -> Result<&'static Driver> {
    FOR_DRIVER.find(&DRIVER, Driver::load)
}

/// cuBLASLt's functions, likewise.
pub(super) fn find_cublaslt() -> Result<&'static CublasLt> {
    FOR_CUBLASLT.find(&CUBLASLT, CublasLt::load)
}

/// NCCL's functions, likewise.
pub(super) fn find_nccl() -> Result<&'static Nccl> {
    FOR_NCCL.find(&NCCL, Nccl::load)
}

/// The driver's functions. A device must be open.
pub(super) fn driver() -> &'static Driver {
    DRIVER.get().expect("a device is open, so its driver was found")
}

/// cuBLASLt's functions. A device must be open.
pub(super) fn cublaslt() -> &'static CublasLt {
    CUBLASLT.get().expect("a device is open, so cuBLASLt was found")
}

impl Search {
    fn find<T>(
        &self,
        place: &'static OnceLock<T>,
        load: impl FnOnce(&'static Library) -> std::result::Result<T, &'static str>,
    ) -> Result<&'static T> {
        if let Some(found) = place.get() {
            return Ok(found);
        }
        let table = load(self.open()?).map_err(|name| {
            Error::new(format!("{} has no function `{name}`: it is too old, or a stub", self.what))
                .hint(self.incomplete)
        })?;
        Ok(place.get_or_init(|| table))
    }

    /// Opens the first library found. It stays open: unloading a driver is not safe.
    fn open(&self) -> Result<&'static Library> {
        let mut trouble = None;
        let packaged = self.package.into_iter().flat_map(packages).flat_map(|folder| {
            self.names.iter().map(move |name| folder.join(name)).filter(|path| path.exists())
        });
        for name in self.names.iter().map(PathBuf::from).chain(packaged) {
            // SAFETY: loading NVIDIA's libraries runs their initialisers, which is what every CUDA program does.
            match unsafe { Library::new(&name) } {
                Ok(library) => return Ok(Box::leak(Box::new(library))),
                // A library that exists and does not load is more informative than a missing one.
                Err(error) => {
                    let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                    trouble = trouble.or((!why.contains("No such file")).then_some(why));
                }
            }
        }
        Err(match trouble {
            Some(why) => Error::new(format!("{} does not load: {why}", self.what)),
            None => Error::new(format!("{} was not found", self.what)),
        }
        .hint(format!("{} (looked for {})", self.absent, self.names.join(", "))))
    }
}

/// Where NVIDIA's Python packages may have put `folder`: beside packages that are on LD_LIBRARY_PATH, and in the
/// Python environments of this process.
fn packages(folder: &str) -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).unwrap_or_default();
    let on_path = variable("LD_LIBRARY_PATH");
    // `site-packages/nvidia/cublas/lib`
    let beside =
        std::env::split_paths(&on_path).filter_map(|path| Some(path.ancestors().nth(3)?.to_path_buf()));
    let local = Path::new(&variable("HOME")).join(".local");
    let roots = [variable("VIRTUAL_ENV").into(), variable("CONDA_PREFIX").into(), local, "/usr/local".into()];
    let environments = roots.into_iter().filter(|root: &PathBuf| root.is_absolute()).flat_map(|root| {
        let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
        let is_python = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
        };
        versions
            .map(|version| version.path())
            .filter(is_python)
            .flat_map(|version| ["site-packages", "dist-packages"].map(|packages| version.join(packages)))
    });
    beside.chain(environments).map(|site| site.join(folder)).filter(|path| path.is_dir()).collect()
}
