//! Checks a device: every operation of [`Backend`] against a plain float64 reference.
//!
//! It uses a backend only through the trait, so one table of cases covers all of them. Each file holds the
//! cases of a group of operations, with their references as simple loops that can be compared with the
//! operation's documentation. [`harness`] places operands, poisons what an operation must write, and looks
//! for writes elsewhere.
//!
//! ```no_run
//! use vitrum::backend::{Device, DeviceOptions, select};
//! let results = vitrum::selftest::run(&|| select(Device::Cpu, &DeviceOptions::default()), Some("attention"));
//! assert!(results.iter().all(|result| result.passed));
//! ```

mod apart;
mod attention;
mod gated;
mod group;
mod harness;
mod head;
mod matmul;
mod memory;
mod norm;
mod reference;
mod stem;
#[cfg(test)]
mod tests;
mod update;

use std::borrow::Cow;
use std::time::Instant;

use serde_json::json;

use crate::backend::{Backend, Device, DeviceOptions, Precision, Residual, Storage, select};
use crate::error::{Error, Result};

use apart::or_infinite;
pub use apart::{check_apart, in_a_process, report_cases};
use harness::Case;

/// Opens a device.
pub type Make<'a> = dyn Fn() -> Result<Box<dyn Backend>> + 'a;

/// The result of one case.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CaseResult {
    /// The method of [`Backend`], with its variant where that has its own kernel: `matmul gelu`.
    pub operation: Cow<'static, str>,
    /// Sizes and settings.
    pub case: String,
    /// Of the comparison with the largest error relative to its tolerance: the relative L2 distance from
    /// float64, or a tenth of the largest deviation over the largest value, if that is more; or by how much
    /// values in bf16 are off on average.
    #[serde(deserialize_with = "or_infinite")]
    pub error: f64,
    pub tolerance: f64,
    pub passed: bool,
    /// The worst output, or what went wrong.
    pub note: String,
}

/// Runs every case whose `operation: case` contains `filter`, each on a fresh device from `make`. A case that
/// fails or panics does not keep the others from running.
pub fn run(make: &Make, filter: Option<&str>) -> Vec<CaseResult> {
    let wanted = |case: &&Case| filter.is_none_or(|filter| case.title().contains(filter));
    let storage = storage_of(make);
    cases().iter().filter(wanted).map(|case| case.run(make, storage)).collect()
}

/// How the device stores data. If it does not open, each case fails in its own attempt.
fn storage_of(make: &Make) -> Storage {
    make().map_or(Storage::CPU, |device| device.storage())
}

/// Prefixes of the operations that read or write the residual stream.
const OF_THE_STREAM: [&str; 5] = ["embed", "matmul none", "matmul residual", "layernorm", "residual"];

/// Every case. Those of a group are adjacent, because a case that breaks a device ends its group.
fn cases() -> Vec<Case> {
    let mut groups = [
        memory::cases(),
        stem::cases(),
        matmul::cases(),
        norm::cases(),
        attention::cases(),
        gated::cases(),
        head::cases(),
        update::cases(),
        group::cases(),
    ];
    // The cases of an operation are adjacent; operations are in the order of their first case.
    for (group, cases) in groups.iter_mut().enumerate() {
        let operations: Vec<_> = cases.iter().map(Case::operation).collect();
        cases.sort_by_key(|case| operations.iter().position(|operation| *operation == case.operation()));
        cases.iter_mut().for_each(|case| case.group = group);
    }
    groups.into_iter().flatten().collect()
}

/// All results on one device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// [`Backend::describe`]
    pub device: String,
    pub seconds: f64,
    pub cases: Vec<CaseResult>,
}

/// A precision of a device, with the type of its residual stream.
type Kind = (Precision, Residual);

/// All of them, or those of the requested precision.
fn kinds(device: Device, asked: Precision) -> Vec<Kind> {
    let (f32, bf16) = ((Precision::F32, Residual::Auto), (Precision::Bf16, Residual::Auto));
    let stream_in_f32 = (Precision::Bf16, Residual::F32);
    match (device, asked) {
        (Device::Cuda(_), Precision::Auto) => vec![f32, bf16, stream_in_f32],
        (Device::Cuda(_), Precision::Bf16) => vec![bf16, stream_in_f32],
        (_, asked) => vec![(asked, Residual::Auto)],
    }
}

/// The cases that match `filter` and depend on the kind: an f32 stream matters only for operations that read
/// or write the stream.
fn cases_of((_, residual): Kind, filter: Option<&str>) -> Vec<Case> {
    let asked = |case: &Case| filter.is_none_or(|filter| case.title().contains(filter));
    let concerned = |case: &Case| {
        residual == Residual::Auto || OF_THE_STREAM.iter().any(|name| case.operation().starts_with(name))
    };
    cases().into_iter().filter(|case| asked(case) && concerned(case)).collect()
}

/// Tests the device that the user asked for, in every precision it has or in the one that `options` names,
/// with the cases that [`run`] would run. For a GPU use [`check_apart`].
///
/// # Errors
/// The device cannot be opened, or the filter matches no case; for the results of the cases see [`verdict`].
pub fn check(device: Device, options: &DeviceOptions, filter: Option<&str>) -> Result<Vec<Report>> {
    let report = |kind: Kind| -> Result<Report> {
        let (precision, residual) = kind;
        let options = DeviceOptions { precision, residual, ..*options };
        let make = move || select(device, &options);
        let opened = make()?;
        let start = Instant::now();
        let cases = cases_of(kind, filter).iter().map(|case| case.run(&make, opened.storage())).collect();
        Ok(Report { device: opened.describe(), seconds: start.elapsed().as_secs_f64(), cases })
    };
    let reports =
        kinds(device, options.precision).into_iter().map(report).collect::<Result<Vec<Report>>>()?;
    some_case(reports, filter)
}

/// The reports that contain a case.
fn some_case(mut reports: Vec<Report>, filter: Option<&str>) -> Result<Vec<Report>> {
    reports.retain(|report| !report.cases.is_empty());
    if reports.is_empty() {
        return Err(Error::usage(format!("no case contains `{}`", filter.unwrap_or_default()))
            .hint("`vitrum selftest` without `--filter` names the operations"));
    }
    Ok(reports)
}

/// An error that names the operations that failed, in any report.
pub fn verdict(reports: &[Report]) -> Result<()> {
    reports.iter().try_for_each(Report::verdict)
}

/// One JSON object for all reports.
pub fn json(reports: &[Report]) -> serde_json::Value {
    let cases: usize = reports.iter().map(|r| r.cases.len()).sum();
    let failed: usize = reports.iter().map(|r| r.failed().count()).sum();
    json!({
        "device": reports.first().map(|r| &r.device),
        "runs": reports.iter().map(|r| json!({"device": r.device, "seconds": r.seconds})).collect::<Vec<_>>(),
        "cases": cases,
        "failed": failed,
        "passed": failed == 0,
        "results": reports.iter().flat_map(|r| &r.cases).collect::<Vec<_>>(),
    })
}

impl Report {
    pub fn failed(&self) -> impl Iterator<Item = &CaseResult> {
        self.cases.iter().filter(|case| !case.passed)
    }

    /// An error that names the operations that failed.
    pub fn verdict(&self) -> Result<()> {
        let failed = self.failed().count();
        if failed == 0 {
            return Ok(());
        }
        let mut operations: Vec<_> = self.failed().map(|case| format!("`{}`", case.operation)).collect();
        operations.dedup();
        Err(Error::new(format!(
            "{failed} of {} cases failed on {}: {}",
            self.cases.len(),
            self.device,
            operations.join(", ")
        ))
        .hint("compute on the CPU with `--device cpu`, and report this table"))
    }

    /// One line per operation with its worst case, then one per failure.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n\n", self.device);
        text += &format!("{:<28} {:>5}  {:>11}  {:>9}\n", "operation", "cases", "worst error", "tolerance");
        for group in self.cases.chunk_by(|a, b| a.operation == b.operation) {
            let worst = group.iter().max_by(|a, b| a.excess().total_cmp(&b.excess())).expect("not empty");
            let verdict = if group.iter().all(|case| case.passed) { "ok" } else { "FAILED" };
            text += &format!(
                "{:<28} {:>5}  {:>11.1e}  {:>9.1e}  {verdict}\n",
                worst.operation,
                group.len(),
                worst.error,
                worst.tolerance
            );
        }
        for case in self.failed() {
            text += &format!("\nFAILED {}: {}\n       {}\n", case.operation, case.case, case.note);
        }
        let passed = self.cases.len() - self.failed().count();
        text + &format!("\n{passed} of {} cases passed in {:.1} s\n", self.cases.len(), self.seconds)
    }
}

impl CaseResult {
    /// Error relative to the tolerance: above 1 is a failure. A failed case ranks above any passed one.
    fn excess(&self) -> f64 {
        let ratio = if self.tolerance > 0.0 { self.error / self.tolerance } else { self.error };
        if self.passed { ratio } else { ratio.max(1.0) + 1.0 }
    }
}
