//! Where a run computes: what the user may ask for, and the backend that it selects.

use std::fmt;
use std::str::FromStr;

use super::{Backend, DeviceOptions, Precision, Residual, Storage, cpu, cuda, rounded};
use crate::error::{Error, Result};
use crate::terminal;

/// Where a run computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if it works, else the CPU after one line that says why.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU, by its number among the visible ones.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    /// `auto`, `cpu`, `cuda` or `cuda:N`; `gpu`, `gpu:N` and `N` mean the same as the last two.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let number = lower.strip_prefix("cuda:").or(lower.strip_prefix("gpu:")).unwrap_or(&lower);
        match (lower.as_str(), number.parse()) {
            ("auto", _) => Ok(Device::Auto),
            ("cpu", _) => Ok(Device::Cpu),
            ("cuda" | "gpu", _) => Ok(Device::Cuda(0)),
            (_, Ok(gpu)) if number.bytes().all(|b| b.is_ascii_digit()) => Ok(Device::Cuda(gpu)),
            _ => Err("a device is `auto`, `cpu`, `cuda` or `cuda:N`, N being the GPU's number".into()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(gpu) => write!(f, "cuda:{gpu}"),
        }
    }
}

impl Device {
    /// The number of the GPU that it is, or may be.
    pub fn gpu(self) -> Option<usize> {
        match self {
            Device::Auto => Some(FIRST_GPU),
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(gpu),
        }
    }
}

/// The GPU that `Auto` uses if it can.
const FIRST_GPU: usize = 0;

/// The precision that the device computes in and how it stores data. A device that the user names is not
/// opened, so a plan for a GPU can be made on any machine.
pub fn planned(device: Device, precision: Precision, residual: Residual) -> (Precision, Storage) {
    let options = DeviceOptions { precision, residual, ..DeviceOptions::default() };
    let on_gpu = match device {
        Device::Cpu => false,
        Device::Auto => cuda::Cuda::open(FIRST_GPU, &options).is_ok(),
        Device::Cuda(_) => true,
    };
    let precision = match precision {
        Precision::Auto if on_gpu => Precision::Bf16,
        Precision::Auto => Precision::F32,
        given => given,
    };
    (precision, if on_gpu { cuda::Cuda::storage_of(precision, residual) } else { Storage::CPU })
}

/// Which device `Auto` is, for callers that open it repeatedly: [`select`] prints its line once.
///
/// # Errors
/// Those of [`select`].
pub fn decide(device: Device, options: &DeviceOptions) -> Result<Device> {
    match device {
        Device::Auto if cuda::Cuda::open(FIRST_GPU, options).is_ok() => Ok(Device::Cuda(FIRST_GPU)),
        Device::Auto => select(device, options).map(|_| Device::Cpu),
        other => Ok(other),
    }
}

/// Opens the device that the user asked for. `Auto` falls back to the CPU after one line on stderr that says
/// why.
///
/// # Errors
/// The device cannot be used, or does not compute in the requested precision.
pub fn select(device: Device, options: &DeviceOptions) -> Result<Box<dyn Backend>> {
    let cpu = || -> Result<Box<dyn Backend>> {
        if !matches!(options.precision, Precision::Auto | Precision::F32) {
            return Err(Error::usage("the CPU computes in f32").hint("use `--set train.precision=f32`"));
        }
        let cpu = cpu::CpuBackend::new(options.threads)?;
        Ok(match rounded::Rounds::from_env()? {
            Some(rounds) => Box::new(rounded::Rounded::new(cpu, rounds)),
            None => Box::new(cpu),
        })
    };
    match device {
        Device::Cpu => cpu(),
        Device::Cuda(gpu) => {
            Ok(Box::new(cuda::Cuda::open(gpu, options).map_err(|e| e.at("cannot compute on a GPU"))?))
        }
        Device::Auto => match cuda::Cuda::open(FIRST_GPU, options) {
            Ok(cuda) => Ok(Box::new(cuda)),
            Err(why) => {
                terminal::note(&format!("computing on the CPU: {}", why.message()));
                cpu()
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_each_of_its_names() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("CPU", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("gpu", Device::Cuda(0)),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
            ("gpu:11", Device::Cuda(11)),
            ("2", Device::Cuda(2)),
        ] {
            assert_eq!(text.parse(), Ok(device), "{text}");
            assert_eq!(device.to_string().parse(), Ok(device), "{device}");
        }
        for text in [
            "",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:1.0",
            "cuda 1",
            "gpu1",
            "tpu",
            "-1",
            "99999999999999999999",
        ] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
