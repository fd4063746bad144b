//! The report of a step and of an evaluation, defined once for all readers.

use serde::Serialize;

use super::format;

/// Training between two reports. Serialises to a line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct StepLine {
    /// Updates finished.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// Mean over the steps since the last line.
    pub loss: f64,
    /// The head's learning rate in this update.
    pub lr: f64,
    /// The gradient norm before clipping.
    pub grad_norm: f64,
    /// Share of training samples whose largest target was predicted, since the last line.
    pub top1: f64,
    pub img_per_s: f64,
    /// Share of the time that steps waited for the loader.
    pub data_wait: f64,
    /// Model FLOP/s over the device's peak, if the peak is known.
    pub mfu: Option<f64>,
    /// Updates skipped so far because something was not finite.
    pub skipped: u64,
    /// Seconds since this process began to train.
    pub seconds: f64,
    /// The first rank's GPU, if it can be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuLine>,
}

/// What a GPU says about itself. Serialises to the `gpu` object of a line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct GpuLine {
    /// Bytes that any process uses.
    pub memory: u64,
    pub celsius: u32,
    /// Clocks of multiprocessors and memory.
    pub mhz: u32,
    pub memory_mhz: u32,
    pub watts: f64,
    /// Why it runs slower than it could.
    pub throttled: Vec<&'static str>,
}

impl StepLine {
    /// `step   420/1770   loss 0.9123   top-1  71.2 %   lr 1.4e-3   1,420 img/s`
    pub fn text(&self, total: u64) -> String {
        let width = total.to_string().len();
        let mut text = format!(
            "step {:>width$}/{total}   loss {:.4}   top-1 {:>7}   lr {:.1e}   {:>12}",
            self.step,
            self.loss,
            format::percent(self.top1),
            self.lr,
            format::rate(self.img_per_s),
        );
        // Shown only if something is wrong.
        if self.data_wait >= 0.05 {
            text += &format!("   data wait {}", format::percent(self.data_wait));
        }
        if self.skipped > 0 {
            text += &format!("   skipped {}", self.skipped);
        }
        text
    }
}

/// A step whose loss or gradient norm stands out. Serialises to the `spike` object of a line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SpikeLine {
    #[serde(skip)]
    pub step: u64,
    /// Of this step alone.
    pub loss: f64,
    /// Standard deviations above the mean of the steps before; `norm_score` likewise.
    pub loss_score: f64,
    pub grad_norm: f64,
    pub norm_score: f64,
    /// Whether its update was left out.
    pub skipped: bool,
}

/// A return to a checkpoint. Serialises to the `rewind` object of a line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RewindLine {
    /// The first step that is done again.
    #[serde(skip)]
    pub step: u64,
    /// The last step before the return.
    pub from: u64,
    /// The batches that are passed over.
    pub first_batch: u64,
    pub batches: u64,
}

/// A model's scores on a data set; shares are in `[0, 1]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    pub loss: f64,
    pub top1: f64,
    pub top5: f64,
    /// Mean average precision, for multi-label data.
    #[serde(rename = "mAP", skip_serializing_if = "Option::is_none")]
    pub map: Option<f64>,
    pub images: u64,
}

/// One evaluation during training. Serialises to the `eval` object of a line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct EvalLine {
    #[serde(skip)]
    pub step: u64,
    pub epoch: f64,
    #[serde(flatten)]
    pub scores: Scores,
    /// Number of the model's classes. With five or fewer, top-5 is always 100 % and is not shown.
    #[serde(skip)]
    pub classes: usize,
    /// Training top-1 minus validation top-1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// Scores of the weights' moving average, if the recipe keeps one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<Scores>,
    /// Whether this is the best evaluation so far.
    pub best: bool,
    pub img_per_s: f64,
    pub seconds: f64,
}

impl EvalLine {
    /// `eval   295/1770   loss 0.5012   top-1  83.1 %   top-5  98.9 %   train − val -2.1 %   best so far`
    pub fn text(&self, total: u64) -> String {
        let width = total.to_string().len();
        let scores = |s: &Scores| {
            let top5 = match self.classes {
                0..=5 => String::new(),
                _ => format!("   top-5 {:>7}", format::percent(s.top5)),
            };
            match s.map {
                Some(map) => format!("loss {:.4}   mAP {:>7}", s.loss, format::percent(map)),
                None => format!("loss {:.4}   top-1 {:>7}{top5}", s.loss, format::percent(s.top1)),
            }
        };
        let mut text = format!("eval {:>width$}/{total}   {}", self.step, scores(&self.scores));
        if let Some(ema) = &self.ema {
            text += &format!("   ema {}", scores(ema));
        }
        if let Some(gap) = self.gap {
            text += &format!("   train − val {}", format::percent(gap));
        }
        if self.best {
            text += "   best so far";
        }
        text
    }
}
