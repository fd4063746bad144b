//! `vitrum selftest`: compares every operation of this machine's device with float64. Then compares whole
//! training steps with the CPU's, and with a second run of themselves.

use super::{On, print, print_json};
use serde_json::{Value, json};

use crate::backend::cuda::device::usable;
use crate::backend::{Device, DeviceOptions, Kernels, Precision, Residual, select};
use crate::check::steps::{STEPS, StepCheck, check_steps};
use crate::error::{Error, Result};
use crate::selftest::{self, in_a_process};

/// The name of the whole training steps for `--filter`.
const TRAINING: &str = "training";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub on: On,
    /// The precision to check: f32, tf32 or bf16 [default: every precision that the device is used with]
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Precision::Auto)]
    pub precision: Precision,
    /// Only cases whose line (`attention_backward: ...`) contains this text; `training` selects the training
    /// steps
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Compute matrix products as `train.deterministic` does: use the first algorithm that works, without
    /// timing
    #[arg(long)]
    pub deterministic: bool,
    /// The kernels to check, as `train.kernels`: portable or hopper [default: portable]
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Kernels::Auto)]
    pub kernels: Kernels,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Internal: the type of the residual stream in a child process of the self-test
    #[arg(long, value_enum, hide = true, default_value_t = Residual::Auto)]
    pub residual: Residual,
    /// Internal: a child process reports the cases from this one on, one line each, or the training steps
    #[arg(long, hide = true)]
    pub report_from: Option<usize>,
}

pub fn run(args: Args) -> Result<()> {
    let Args { precision, residual, deterministic, kernels, .. } = args;
    let options = DeviceOptions { precision, residual, deterministic, kernels, ..DeviceOptions::default() };
    let filter = args.filter.as_deref();
    if let Some(from) = args.report_from {
        return match filter {
            Some(TRAINING) => print(&json!(check_steps(args.on.device, args.precision)?).to_string()),
            filter => selftest::report_cases(args.on.device, &options, filter, from),
        };
    }
    let device = settle(args.on.device, &options)?;
    let reports = match (filter, device) {
        (Some(TRAINING), _) => Vec::new(),
        (filter, Device::Cuda(_)) => selftest::check_apart(device, &options, filter)?,
        (filter, _) => selftest::check(device, &options, filter)?,
    };
    if !args.json {
        reports.iter().try_for_each(|report| print(&report.table()))?;
    }
    let checks = match (filter, device) {
        (Some(filter), _) if filter != TRAINING => Vec::new(),
        (_, Device::Cuda(_)) => check_steps_apart(device, args.precision)?,
        _ => check_steps(device, args.precision)?,
    };
    if args.json {
        let mut all = selftest::json(&reports);
        if let (Value::Null, Some(first)) = (&all["device"], checks.first()) {
            all["device"] = json!(first.device);
        }
        all["passed"] = json!(all["passed"] == true && checks.iter().all(StepCheck::passed));
        all["training"] = json!(checks);
        print_json(&all)?;
    } else if !checks.is_empty() {
        print(&training_table(&checks))?;
    }
    selftest::verdict(&reports)?;
    match checks.iter().find(|proof| !proof.passed()) {
        None => Ok(()),
        Some(failed) => Err(Error::new(format!("training steps give wrong results on {}", failed.device))
            .hint("compute on the CPU with `--device cpu`, and report this table")),
    }
}

/// Resolves `auto` without opening a GPU, because a GPU's cases run in child processes.
fn settle(device: Device, options: &DeviceOptions) -> Result<Device> {
    match device {
        Device::Auto if device.gpu().is_some_and(|gpu| usable(gpu).is_ok()) => Ok(Device::Cuda(0)),
        // `select` prints why no GPU is used.
        Device::Auto => select(device, options).map(|_| Device::Cpu),
        other => Ok(other),
    }
}

/// [`check_steps`] in a process of its own.
fn check_steps_apart(device: Device, precision: Precision) -> Result<Vec<StepCheck>> {
    let precision = format!("{precision:?}").to_lowercase();
    let mut checks = None;
    let args = ["--precision", &precision, "--filter", TRAINING, "--report-from", "0"];
    let status = in_a_process(device, &args, &mut |line| checks = serde_json::from_str(line).ok())?;
    checks.ok_or_else(|| {
        let how = status.map_or("it did not end".into(), |status| format!("its process ended: {status}"));
        Error::new(format!("the training steps on {device} gave no result: {how}"))
            .hint("`vitrum selftest --filter training` runs them alone")
    })
}

fn training_table(checks: &[StepCheck]) -> String {
    let title = format!("training, {STEPS} steps of a small model");
    let head = format!("{title:<42}  {:>9}  {:>9}\n", "distance", "tolerance");
    let seconds: f64 = checks.iter().map(|proof| proof.seconds).sum();
    let lines: String = checks.iter().map(StepCheck::text).collect();
    format!("{head}{lines}\nin {seconds:.1} s\n")
}
