//! The speed of one GPU by itself: predicted, or measured before.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;

/// Where the time of a step on one GPU comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Predicted from the operations' costs (`chip.rs`).
    Predicted,
    /// Images per second of one GPU, measured with a batch of so many samples, or with the plan's own.
    Measured {
        /// Images per second.
        img_per_s: f64,
        /// Samples of a step.
        batch: Option<usize>,
        /// Where the figure comes from, for people.
        from: String,
    },
}

impl Source {
    /// A measured rate with the plan's own batch.
    ///
    /// # Errors
    /// It is not a positive number.
    pub fn given(img_per_s: f64) -> Result<Self> {
        if !(img_per_s > 0.0 && img_per_s.is_finite()) {
            return Err(Error::usage(format!("`--img-per-s {img_per_s}` is no speed"))
                .hint("give the images per second of one GPU, as in `--img-per-s 5000`"));
        }
        Ok(Self::Measured { img_per_s, batch: None, from: "`--img-per-s`".into() })
    }

    /// A measurement that `vitrum bench --what train --json` printed, or the one of a single rank among the
    /// `runs` that `benches/scaling.py` stored.
    ///
    /// # Errors
    /// The file is no such measurement, or one of another model or another kind of device.
    pub fn read(path: &Path, model: Option<&str>, on_cpu: bool) -> Result<Self> {
        let from = path.display().to_string();
        let wrong = |why: &str| {
            Error::new(format!("{from}: {why}"))
                .hint("`vitrum bench --what train --json` prints such a measurement; `--img-per-s N` gives its figure")
        };
        let file: Value =
            serde_json::from_str(&files::read_text(path)?).map_err(|e| wrong(&format!("not JSON: {e}")))?;
        let is_alone = |run: &Value| run["ranks"].as_u64().unwrap_or(1) == 1;
        let run = match file["runs"].as_array() {
            Some(runs) => runs.iter().find(|run| is_alone(run)),
            None => Some(&file).filter(|run| is_alone(run)),
        };
        let run = run.ok_or_else(|| wrong("it has no measurement of one rank alone"))?;
        let (Some(rate), Some(batch)) = (run["img_per_s"].as_f64(), run["batch"].as_u64()) else {
            return Err(wrong("it has no `img_per_s` and `batch`"));
        };
        if run["card"]["stand_in"] == true {
            return Err(wrong("it was measured on the stand-in GPU, which says nothing about a real one"));
        }
        if let Some(device) = run["device"].as_str()
            && device.starts_with("cpu") != on_cpu
        {
            return Err(wrong(&format!("it was measured on another kind of device, {device}")));
        }
        if let (Some(then), Some(now)) = (run["model"].as_str(), model)
            && then != now
        {
            return Err(wrong(&format!("it is a measurement of {then}, and the recipe's model is {now}")));
        }
        if !(rate > 0.0 && rate.is_finite() && batch > 0) {
            return Err(wrong("its speed or its batch is 0"));
        }
        Ok(Self::Measured { img_per_s: rate, batch: Some(batch as usize), from })
    }
}
