//! Runs the self-test of a GPU in child processes.
//!
//! An error inside a kernel breaks the context of its process: from then on, every call to the GPU fails. So
//! the cases of a precision run in a child, which reports them one by one. A case that breaks the GPU, ends
//! the process or never ends costs the rest of its group of operations; another child continues with the next
//! group. If nothing breaks, a precision takes one process and one context. The parent never opens the GPU:
//! some are configured to serve one process at a time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize};

use super::{Case, CaseResult, Report, cases_of, kinds, some_case};
use crate::backend::{Device, DeviceOptions, select};
use crate::error::{Error, Result};

/// How long a child may be silent. A case takes a second at most, somewhat more on the stand-in GPU of a busy
/// machine.
const SILENCE: Duration = Duration::from_secs(300);

/// A line from a child.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// The device cannot be opened.
    Refused {
        message: String,
        hint: Option<String>,
    },
    /// [`crate::backend::Backend::describe`]
    Device(String),
    Case(CaseResult),
    /// The device no longer works.
    Lost(String),
}

/// Like [`super::check`], with each precision in its own process, and a new process after each case that
/// breaks the GPU.
///
/// # Errors
/// Those of [`super::check`], and failure to start a process.
pub fn check_apart(device: Device, options: &DeviceOptions, filter: Option<&str>) -> Result<Vec<Report>> {
    let reports = kinds(device, options.precision).into_iter().map(|kind| {
        let (precision, residual) = kind;
        report_of(device, &DeviceOptions { precision, residual, ..*options }, filter)
    });
    some_case(reports.collect::<Result<_>>()?, filter)
}

/// All cases of a precision, in as many processes as needed.
fn report_of(device: Device, options: &DeviceOptions, filter: Option<&str>) -> Result<Report> {
    let cases = cases_of((options.precision, options.residual), filter);
    let start = Instant::now();
    let mut report = Report { device: device.to_string(), seconds: 0.0, cases: Vec::new() };
    while report.cases.len() < cases.len() {
        let from = report.cases.len();
        let trouble = match run_child(device, options, filter, &cases, &mut report)? {
            Ended::Whole if report.cases.len() == cases.len() => break,
            // The case that broke the GPU has reported itself.
            Ended::Lost(why) if report.cases.len() > from => why,
            Ended::Refused(e) if from == 0 => return Err(e),
            Ended::Refused(e) => e.message().to_string(),
            Ended::Lost(why) | Ended::Died(why) => {
                let culprit = &cases[report.cases.len()];
                report.cases.push(culprit.failed(why.clone()));
                why
            }
            Ended::Whole => {
                return Err(Error::new("the self-test's own process ended before its last case"));
            }
        };
        // Never retry the same group.
        let group = cases[report.cases.len().saturating_sub(1).max(from)].group;
        while let Some(case) = cases.get(report.cases.len()).filter(|case| case.group == group) {
            report
                .cases
                .push(case.failed(format!("not run: an earlier case has ended its group ({trouble})")));
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// How a child ended.
enum Ended {
    Whole,
    Refused(Error),
    Lost(String),
    Died(String),
}

/// Runs the cases that have no result yet in one process, as far as it gets.
fn run_child(
    device: Device,
    options: &DeviceOptions,
    filter: Option<&str>,
    cases: &[Case],
    report: &mut Report,
) -> Result<Ended> {
    let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    let from = report.cases.len().to_string();
    let (precision, residual) = (word(&options.precision), word(&options.residual));
    let kernels = word(&options.kernels);
    let mut args = vec!["--precision", &precision, "--residual", &residual, "--kernels", &kernels];
    args.extend(["--report-from", &from]);
    if let Some(filter) = filter {
        args.extend(["--filter", filter]);
    }
    if options.deterministic {
        args.push("--deterministic");
    }
    let mut ended = None;
    let status = in_a_process(device, &args, &mut |line| match serde_json::from_str(line) {
        Ok(Line::Device(name)) => report.device = name,
        Ok(Line::Case(result)) if report.cases.len() < cases.len() => report.cases.push(result),
        Ok(Line::Lost(why)) => ended = Some(Ended::Lost(why)),
        Ok(Line::Refused { message, hint }) => {
            let error = Error::new(message);
            ended = Some(Ended::Refused(match hint {
                Some(hint) => error.hint(hint),
                None => error,
            }));
        }
        Ok(Line::Case(_)) | Err(_) => {}
    })?;
    Ok(match (ended, status) {
        (Some(ended), _) => ended,
        (None, Some(status)) if status.success() => Ended::Whole,
        (None, Some(status)) => Ended::Died(format!("its process ended: {status}")),
        (None, None) => Ended::Died(format!("no output for {} s", SILENCE.as_secs())),
    })
}

/// Runs `vitrum selftest --device DEVICE ARGS` and passes its lines to `hear`. Returns how it ended, or
/// `None` if it was silent for too long and was killed.
///
/// # Errors
/// The process cannot be started.
pub fn in_a_process(device: Device, args: &[&str], hear: &mut dyn FnMut(&str)) -> Result<Option<ExitStatus>> {
    let cannot = |e: std::io::Error| Error::new(format!("cannot start a process of the self-test: {e}"));
    let program = std::env::current_exe().map_err(cannot)?;
    let mut child = Command::new(program)
        .args(["selftest", "--device", &device.to_string()])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let lines = BufReader::new(child.stdout.take().expect("piped above")).lines();
    let (send, receive) = channel();
    let reader = std::thread::spawn(move || {
        for line in lines.map_while(std::io::Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    let silent = loop {
        match receive.recv_timeout(SILENCE) {
            Ok(line) => hear(&line),
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    if silent {
        let _ = child.kill();
    }
    let status = child.wait().map_err(cannot)?;
    let _ = reader.join();
    Ok((!silent).then_some(status))
}

/// The child's part: runs the cases from `from` on and reports each, until the device is lost.
///
/// # Errors
/// The output cannot be written.
pub fn report_cases(
    device: Device,
    options: &DeviceOptions,
    filter: Option<&str>,
    from: usize,
) -> Result<()> {
    let make = || select(device, options);
    let opened = match make() {
        Ok(opened) => opened,
        Err(e) => {
            let hint = e.hint_text().map(Into::into);
            return tell(&Line::Refused { message: e.message().into(), hint });
        }
    };
    tell(&Line::Device(opened.describe()))?;
    for case in &cases_of((options.precision, options.residual), filter)[from..] {
        let result = case.run(&make, opened.storage());
        let passed = result.passed;
        tell(&Line::Case(result))?;
        // Did only this case fail, or does nothing work any more?
        if !passed && let Err(e) = make().and_then(|mut device| device.synchronize()) {
            return tell(&Line::Lost(e.message().into()));
        }
    }
    Ok(())
}

fn tell(line: &Line) -> Result<()> {
    let text = serde_json::to_string(line).expect("plain data is JSON");
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|e| Error::new(format!("stdout: {e}")))
}

/// JSON has no infinity: it is sent as null.
///
/// # Errors
/// Neither a number nor null.
pub(super) fn or_infinite<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::INFINITY))
}
