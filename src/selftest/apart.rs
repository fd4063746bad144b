//! The self-test of a GPU in processes of its own.
//!
//! An error inside a kernel breaks the context of its process: whatever the process asks of the card from then on fails, too.
//! So the cases of a precision run in a child, which reports them one by one; a case that breaks the card, ends the process
//! or never ends costs the rest of its group of operations, and another child goes on with the next group. Where nothing
//! breaks, a precision is one process and one context. The parent itself never opens the card: some are set to serve one
//! process at a time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize};

use super::{Case, CaseResult, Report, cases_of, kinds, some_case};
use crate::backend::{Device, DeviceOptions, select};
use crate::error::{Error, Result};

/// How long a child may be silent. A case takes a second at most, on the stand-in GPU of a busy machine some more.
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
    /// The device does nothing any more.
    Lost(String),
}

/// As [`super::check`], each precision in a process of its own, and a new one behind each case that breaks the card.
///
/// # Errors
/// Those of [`super::check`], and of starting a process.
pub fn check_apart(device: Device, options: &DeviceOptions, filter: Option<&str>) -> Result<Vec<Report>> {
    let reports = kinds(device, options.precision).into_iter().map(|kind| {
        let (precision, residual) = kind;
        report_of(device, &DeviceOptions { precision, residual, ..*options }, filter)
    });
    some_case(reports.collect::<Result<_>>()?, filter)
}

/// All cases of a precision, by as many processes as it takes.
fn report_of(device: Device, options: &DeviceOptions, filter: Option<&str>) -> Result<Report> {
    let cases = cases_of((options.precision, options.residual), filter);
    let start = Instant::now();
    let mut report = Report { device: device.to_string(), seconds: 0.0, cases: Vec::new() };
    while report.cases.len() < cases.len() {
        let from = report.cases.len();
        let trouble = match run_child(device, options, filter, &cases, &mut report)? {
            Ended::Whole if report.cases.len() == cases.len() => break,
            // The case that broke the card has told of itself.
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
        // Never the same group again.
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

/// Runs the cases that have no result yet in one process, as far as it comes.
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
    let mut args = vec!["--precision", &precision, "--residual", &residual, "--report-from", &from];
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
        (None, None) => Ended::Died(format!("nothing came of it in {} s", SILENCE.as_secs())),
    })
}

/// Runs `vitrum selftest --device DEVICE ARGS` and hears its lines; gives back how it ended, or `None` where it was silent for so
/// long that it was killed.
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

/// What a child does: runs the cases from `from` on and reports each, until the device is lost.
///
/// # Errors
/// Nobody hears the lines any more.
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
        // Is it this case's own fault, or does nothing work any more?
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

/// JSON has no infinity: it travels as null.
///
/// # Errors
/// Neither a number nor null.
pub(super) fn or_infinite<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::INFINITY))
}
