//! A GPU as the process opens it: the primary context, the kernels, and their properties.
//!
//! A process opens a GPU once and keeps it open until it exits. Everything that lives in the context
//! (streams, events, graphs, page-locked memory, matrix product plans) can therefore be dropped in any order,
//! on any thread: the context still exists. A second [`Device::open`] returns the same device and costs
//! nothing, so `selftest` can open it for each case.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;
use sys::CUdevice_attribute as Attribute;
use sys::CUfunction_attribute as FunctionAttribute;

use super::api::{self, Code};
use super::images;
use super::libraries::{self, dotted};
use crate::error::{Error, Result};

/// The oldest compute capability that the kernels are compiled for.
const OLDEST_GPU: (i32, i32) = (8, 0);

/// The build has no machine code for newer GPUs: the driver translates the kernels for them. Its translator,
/// like the compiler since CUDA 12.8, can leave stale registers behind at nested branches on these GPUs
/// (release notes of CUDA 13.2 Update 2, 6111901). The first driver that certainly has the fix knows this
/// CUDA version.
const FIRST_TRANSLATED: i32 = 10;
const MENDED_TRANSLATOR: i32 = 13_030;

/// Shared memory that a kernel may use without asking.
const DEFAULT_SHARED: u32 = 48 << 10;
/// Kernels with at least this much also set the split between shared memory and L1 cache: room for two blocks,
/// plus what the system reserves for each.
const LARGE_SHARED: u32 = 16 << 10;
const SYSTEM_SHARED: u32 = 1 << 10;

/// The GPU's properties.
#[derive(Clone, Debug)]
pub struct DeviceProperties {
    /// Its number among the visible ones.
    pub ordinal: usize,
    /// As the driver says it: `NVIDIA H200`.
    pub name: String,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Largest dynamic shared memory of a block, in bytes.
    pub shared_memory: u32,
    /// Shared memory of a multiprocessor, in bytes, when the L1 cache gets its minimum.
    pub multiprocessor_shared: u32,
    /// Bytes of the L2 cache.
    pub cache: usize,
    /// Bytes of device memory.
    pub total_memory: usize,
    /// The newest CUDA that the driver supports: 13000 is 13.0.
    pub driver_version: i32,
}

/// An opened GPU.
pub(super) struct Device {
    pub(super) properties: DeviceProperties,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    /// Kernels used so far.
    kernels: Mutex<HashMap<&'static str, Kernel>>,
}

#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    /// Bytes of dynamic shared memory that a block may use.
    allowed: u32,
    /// Bytes requested as shared memory in the split with the L1 cache.
    room: u32,
}

// SAFETY: the driver's handles belong to a context, not to a thread; the driver allows calls from any thread
// on which the context is current, and every entry point of `Gpu` makes it current.
unsafe impl Send for Device {}
// SAFETY: as above; the only field that changes is behind a lock.
unsafe impl Sync for Device {}

/// The GPUs that this process has opened.
static OPEN: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());

/// The visible GPUs. Opens none.
///
/// # Errors
/// No driver, too old a driver, no GPU.
pub fn gpus() -> Result<Vec<DeviceProperties>> {
    let found = libraries::driver()?;
    let mut count = 0;
    // SAFETY: a valid out-pointer.
    unsafe { check(found.api.cuDeviceGetCount(&mut count), "count the GPUs")? };
    if count == 0 {
        return Err(libraries::no_gpu());
    }
    (0..count as usize).map(|ordinal| Ok(describe(ordinal, found.version)?.1)).collect()
}

/// Checks whether GPU `ordinal` could be opened, as far as is possible without opening it.
///
/// # Errors
/// Those of opening it, except failures of the GPU itself.
pub fn usable(ordinal: usize) -> Result<DeviceProperties> {
    let gpus = gpus()?;
    let count = gpus.len();
    let properties = gpus.into_iter().nth(ordinal).ok_or_else(|| no_such_gpu(ordinal, count))?;
    accept(&properties)?;
    libraries::cublaslt()?;
    if images_for(&properties).is_empty() {
        return Err(no_images());
    }
    Ok(properties)
}

impl Device {
    /// Opens GPU `ordinal` of those that `CUDA_VISIBLE_DEVICES` leaves visible, or returns it if it is open,
    /// and makes its context current on this thread.
    ///
    /// # Errors
    /// No driver, too old a driver, no such GPU, a GPU that the kernels do not run on, no kernels in this
    /// build.
    pub(super) fn open(ordinal: usize) -> Result<&'static Self> {
        // A panic while a GPU is being opened leaves no half-open entry.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match open.iter().find(|device| device.properties.ordinal == ordinal) {
            Some(device) => *device,
            None => {
                let device: &'static Self = Box::leak(Box::new(Self::new(ordinal)?));
                open.push(device);
                device
            }
        };
        device.make_current()?;
        Ok(device)
    }

    fn new(ordinal: usize) -> Result<Self> {
        let properties = usable(ordinal)?;
        let device = describe(ordinal, properties.driver_version)?.0;
        let mut context = ptr::null_mut();
        // SAFETY: a valid out-pointer and a device of this driver.
        unsafe {
            check(api::driver().cuDevicePrimaryCtxRetain(&mut context, device), "create a context")?;
            check(api::driver().cuCtxSetCurrent(context), "use the context")?;
        }
        match load_modules(&properties) {
            Ok(modules) => Ok(Self { properties, context, modules, kernels: Mutex::default() }),
            Err(e) => {
                // SAFETY: retained above, and nothing in it is in use any more.
                unsafe { api::driver().cuDevicePrimaryCtxRelease_v2(device) };
                Err(e)
            }
        }
    }

    /// Makes the context current on the calling thread.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: a context that is never released.
        unsafe { check(api::driver().cuCtxSetCurrent(self.context), "use the context") }
    }

    /// Looks up a kernel once, and allows it the shared memory that it needs.
    pub(super) fn kernel(&self, name: &'static str, shared: u32) -> Result<sys::CUfunction> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match kernels.get(name) {
            Some(kernel) => *kernel,
            None => Kernel { function: self.find_kernel(name)?, allowed: DEFAULT_SHARED, room: LARGE_SHARED },
        };
        let set = |attribute, value: u32| {
            // SAFETY: a function of a loaded module.
            let code = unsafe { api::driver().cuFuncSetAttribute(kernel.function, attribute, value as i32) };
            check(code, format_args!("give kernel `{name}` {shared} bytes of shared memory"))
        };
        if shared > kernel.allowed {
            set(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)?;
        }
        if shared > kernel.room {
            let percent =
                (200 * (shared + SYSTEM_SHARED)).div_ceil(self.properties.multiprocessor_shared.max(1));
            set(FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent.min(100))?;
        }
        let (allowed, room) = (kernel.allowed.max(shared), kernel.room.max(shared));
        kernels.insert(name, Kernel { allowed, room, ..kernel });
        Ok(kernel.function)
    }

    fn find_kernel(&self, name: &'static str) -> Result<sys::CUfunction> {
        /// CUDA_ERROR_NOT_FOUND
        const NOT_FOUND: Code = 500;
        let c_name = CString::new(name).expect("a kernel's name has no NUL");
        for module in &self.modules {
            let mut function = ptr::null_mut();
            // SAFETY: a loaded module, a NUL-terminated name, a valid out-pointer.
            let code = unsafe { api::driver().cuModuleGetFunction(&mut function, *module, c_name.as_ptr()) };
            match code {
                0 => return Ok(function),
                NOT_FOUND => {}
                other => check(other, format_args!("find kernel `{name}`"))?,
            }
        }
        Err(Error::new(format!("kernel `{name}` is in none of the embedded images"))
            .hint("this build is broken: build it again from a clean checkout"))
    }
}

/// The PCI address of GPU `ordinal`, which tells GPUs of one machine apart whatever numbers a process sees.
///
/// # Errors
/// No driver, no such GPU.
pub fn pci_address(ordinal: usize) -> Result<String> {
    libraries::driver()?;
    let (mut device, mut text) = (0, [0; 32]);
    // SAFETY: valid out-pointers; the driver writes at most `len` bytes and a NUL.
    unsafe {
        check(api::driver().cuDeviceGet(&mut device, ordinal as i32), format_args!("find GPU {ordinal}"))?;
        let code = api::driver().cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, device);
        check(code, "read the PCI address of the GPU")?;
        Ok(CStr::from_ptr(text.as_ptr()).to_string_lossy().to_ascii_lowercase())
    }
}

/// Reads a GPU's properties.
fn describe(ordinal: usize, driver_version: i32) -> Result<(sys::CUdevice, DeviceProperties)> {
    let mut device = 0;
    // SAFETY: a valid out-pointer.
    unsafe {
        check(api::driver().cuDeviceGet(&mut device, ordinal as i32), format_args!("open GPU {ordinal}"))?
    };
    let attribute = |which: Attribute| {
        let mut value = 0;
        // SAFETY: a valid out-pointer and device.
        unsafe {
            check(
                api::driver().cuDeviceGetAttribute(&mut value, which, device),
                "read a property of the GPU",
            )?
        };
        Ok::<i32, Error>(value)
    };
    let mut name = [0; 128];
    let mut total_memory = 0;
    // SAFETY: the driver writes at most `len` bytes and a NUL.
    unsafe {
        let code = api::driver().cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device);
        check(code, "read the name of the GPU")?;
        check(
            api::driver().cuDeviceTotalMem_v2(&mut total_memory, device),
            "read the memory size of the GPU",
        )?;
    }
    // SAFETY: NUL-terminated by the driver.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let properties = DeviceProperties {
        ordinal,
        name,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        multiprocessor_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            as u32,
        cache: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.max(0) as usize,
        total_memory,
        driver_version,
    };
    Ok((device, properties))
}

fn no_such_gpu(ordinal: usize, count: usize) -> Error {
    let there = match count {
        1 => "the driver finds one, `cuda:0`".to_string(),
        n => format!("the driver finds {n}, `cuda:0` to `cuda:{}`", n - 1),
    };
    Error::new(format!("there is no GPU {ordinal}: {there}"))
        .hint("`vitrum doctor` lists the GPUs; `CUDA_VISIBLE_DEVICES` hides some and renumbers the others")
}

/// Refuses a GPU on which the kernels do not run, or do not run correctly.
fn accept(properties: &DeviceProperties) -> Result<()> {
    let DeviceProperties { name, capability: (major, minor), driver_version, .. } = properties;
    if properties.capability < OLDEST_GPU {
        return Err(Error::new(format!(
            "{name} has compute capability {major}.{minor}; the kernels need {}.{} (Ampere) or newer",
            OLDEST_GPU.0, OLDEST_GPU.1
        )));
    }
    if *major >= FIRST_TRANSLATED && *driver_version < MENDED_TRANSLATOR {
        return Err(Error::new(format!(
            "{name} (sm_{major}{minor}) is not supported with this driver: it translates the kernels for such GPUs itself, \
             and drivers for CUDA 12.8 to 13.2, this one for {}, can do so incorrectly",
            dotted(*driver_version)
        ))
        .hint(format!("update NVIDIA's driver to one for CUDA {} or newer", dotted(MENDED_TRANSLATOR))));
    }
    Ok(())
}

/// The kernels to load on a GPU. The stand-in GPU has its own where the program was built without any.
fn images_for(properties: &DeviceProperties) -> &'static [(&'static str, &'static [u8])] {
    const STAND_IN: &[(&str, &[u8])] = &[("stand-in", &[])];
    let needs_none = properties.name.starts_with(libraries::STAND_IN);
    if images::IMAGES.is_empty() && needs_none { STAND_IN } else { images::IMAGES }
}

fn no_images() -> Error {
    Error::new(format!(
        "this build has no CUDA kernels inside ({})",
        images::WHY_NONE.unwrap_or("built without nvcc")
    ))
    .hint("`scripts/install-nvcc` fetches nvcc; then build again")
}

fn load_modules(properties: &DeviceProperties) -> Result<Vec<sys::CUmodule>> {
    let load = |(file, image): &(&str, &[u8])| {
        let mut module = ptr::null_mut();
        let start = if image.is_empty() { ptr::null() } else { image.as_ptr().cast() };
        // SAFETY: a fat binary made by nvcc; the stand-in takes none as well.
        let code = unsafe { api::driver().cuModuleLoadData(&mut module, start) };
        check(code, format_args!("load the kernels of `{file}` for {}", properties.name))?;
        Ok(module)
    };
    images_for(properties).iter().map(load).collect()
}

/// Turns a return code into an error that names the failed action.
pub(super) fn check(code: Code, doing: impl std::fmt::Display) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: the driver gives static NUL-terminated strings, or leaves the pointers null where it does not know the code.
    let words = unsafe {
        api::driver().cuGetErrorName(code, &mut name);
        api::driver().cuGetErrorString(code, &mut text);
        [name, text].map(|p| (!p.is_null()).then(|| CStr::from_ptr(p).to_string_lossy().into_owned()))
    };
    let what = match words {
        [Some(name), Some(text)] => format!("{name}, {text}"),
        [Some(name), None] => name,
        _ => format!("the driver's code {code}"),
    };
    Err(Error::new(format!("cannot {doing}: {what}")))
}
