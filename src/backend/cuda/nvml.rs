//! The health of a GPU, from NVIDIA's management library (NVML), which the driver brings along.
//!
//! It is opened at run time. Where it is missing, or does not know the GPU (some containers, vGPUs), there is
//! nothing to report, and nothing else changes. Codes are integers on this side, as for CUDA.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};

use libloading::Library;

use super::device;
use crate::backend::Health;

type Code = c_int;
type Handle = *mut c_void;

const NAME: &str = "libnvidia-ml.so.1";

/// `NVML_TEMPERATURE_GPU`, `NVML_CLOCK_SM`, `NVML_CLOCK_MEM`
const TEMPERATURE_GPU: c_uint = 0;
const CLOCK_SM: c_uint = 1;
const CLOCK_MEMORY: c_uint = 2;

/// `nvmlClocksThrottleReason…`: the reasons that mean less speed than the GPU has.
const REASONS: [(u64, &str); 5] = [
    (0x04, "power cap"),
    (0x08, "hardware slowdown"),
    (0x20, "hot (software)"),
    (0x40, "hot (hardware)"),
    (0x80, "power brake"),
];

/// `nvmlMemory_t`
#[derive(Default)]
#[repr(C)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// One GPU, as the library knows it.
pub(super) struct Nvml {
    library: &'static Library,
    gpu: Handle,
}

impl Nvml {
    /// Opens the library, and finds the driver's GPU `ordinal` by its place on the bus: the library counts
    /// otherwise. A device must be open.
    pub(super) fn open(ordinal: usize) -> Option<Self> {
        // SAFETY: loading NVIDIA's libraries runs their initialisers, which is what every program for GPUs does.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(NAME) }.ok()?));
        let place = CString::new(device::pci_address(ordinal).ok()?).ok()?;
        let mut gpu: Handle = std::ptr::null_mut();
        // SAFETY: nvml.h declares both functions so; `gpu` is a valid out-pointer.
        unsafe {
            let init: unsafe extern "C" fn() -> Code = *library.get(b"nvmlInit_v2\0").ok()?;
            let find: unsafe extern "C" fn(*const c_char, *mut Handle) -> Code =
                *library.get(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?;
            if init() != 0 || find(place.as_ptr(), &mut gpu) != 0 {
                return None;
            }
        }
        Some(Self { library, gpu })
    }

    /// What the GPU says now. A value that it does not give is zero.
    pub(super) fn health(&self) -> Health {
        let mut memory = Memory::default();
        let mut reasons: c_ulonglong = 0;
        let mut milliwatts: c_uint = 0;
        // SAFETY: nvml.h declares the functions so, for a handle that the library gave; all pointers are valid
        // out-pointers of the right types.
        unsafe {
            self.call(c"nvmlDeviceGetMemoryInfo", &mut memory);
            self.call(c"nvmlDeviceGetCurrentClocksThrottleReasons", &mut reasons);
            self.call(c"nvmlDeviceGetPowerUsage", &mut milliwatts);
            Health {
                memory_used: memory.used,
                celsius: self.number(c"nvmlDeviceGetTemperature", TEMPERATURE_GPU),
                clock_mhz: self.number(c"nvmlDeviceGetClockInfo", CLOCK_SM),
                memory_clock_mhz: self.number(c"nvmlDeviceGetClockInfo", CLOCK_MEMORY),
                watts: f64::from(milliwatts) / 1000.0,
                throttled: REASONS
                    .iter()
                    .filter(|(bit, _)| reasons & bit != 0)
                    .map(|(_, name)| *name)
                    .collect(),
            }
        }
    }

    /// Calls `name(gpu, out)`, if the library has it. A call that fails leaves `out` as it is.
    ///
    /// # Safety
    /// The function takes a handle and a pointer to a `T`.
    unsafe fn call<T>(&self, name: &CStr, out: &mut T) {
        // SAFETY: the caller's promise.
        unsafe {
            let function = self.library.get::<unsafe extern "C" fn(Handle, *mut T) -> Code>(name.to_bytes());
            if let Ok(function) = function {
                function(self.gpu, out);
            }
        }
    }

    /// Calls `name(gpu, kind, out)`, if the library has it.
    ///
    /// # Safety
    /// The function takes a handle, a number and a pointer to a number.
    unsafe fn number(&self, name: &CStr, kind: c_uint) -> u32 {
        let mut out: c_uint = 0;
        // SAFETY: the caller's promise.
        unsafe {
            type Function = unsafe extern "C" fn(Handle, c_uint, *mut c_uint) -> Code;
            if let Ok(function) = self.library.get::<Function>(name.to_bytes()) {
                function(self.gpu, kind, &mut out);
            }
        }
        out
    }
}
