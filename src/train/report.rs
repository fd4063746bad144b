//! The page of a run, `report.html`: gathers what it shows, and writes it at evaluations and at the end.
//!
//! After an evaluation, no page is written while the pages so far have taken more than a hundredth of the run's time; the
//! next one shows it. The first and the last page are always written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use toml::{Table, Value};

use crate::backend::{Backend, LossKind, Mat};
use crate::data::picture::{Picture, View};
use crate::data::{self, Dataset, sheet};
use crate::error::Result;
use crate::files;
use crate::recipe::Recipe;
use crate::report::{Bin, Confused, Details, EventFile, Hparam, Log, MetricsFile, Png, RunPage, Wrong};
use crate::vit::Vit;
use crate::vit::params::ParamKind;
use crate::weights::CheckpointMeta;

use super::header::model_lines;
use super::run_data::RunData;
use super::{Trainer, about};

/// The share of the run's time that pages may take.
const SHARE: f64 = 0.01;
/// How many pictures are shown as the most wrongly predicted ones.
const WORST: usize = 12;
/// Ranges of probability in the calibration.
const BINS: usize = 10;
/// Training samples on the sheet, and in one of its rows.
const SAMPLES: (usize, usize) = (12, 6);
/// The longer side of a picture on the page, in pixels.
const SIDE: usize = 160;
/// Kernels that are shown, and in one row.
const FILTERS: (usize, usize) = (32, 8);
/// Patches in a row of the similarity map.
const MAPS: usize = 7;

/// What an evaluation saw, picture by picture.
pub struct Seen {
    kind: LossKind,
    /// Pictures in a full batch, and in the data set.
    batch: usize,
    images: usize,
    confusion: BTreeMap<(u32, u32), u64>,
    calibration: [Bin; BINS],
    /// The worst so far, the worst first.
    worst: Vec<Mistake>,
}

/// A picture whose most probable class is not its own.
#[derive(Clone, Copy)]
struct Mistake {
    record: usize,
    truth: u32,
    of_truth: f64,
    predicted: u32,
    probability: f64,
}

impl Seen {
    /// For `images` pictures in batches of `batch`.
    pub fn new(kind: LossKind, batch: usize, images: usize) -> Self {
        Self {
            kind,
            batch,
            images,
            confusion: BTreeMap::new(),
            calibration: Default::default(),
            worst: Vec::new(),
        }
    }

    /// Adds a batch, by its number in the data: of each sample its logits and, last, its label.
    pub fn add<'a>(&mut self, batch: u64, samples: impl ExactSizeIterator<Item = &'a [f32]>) {
        let first = batch as usize * self.batch;
        // Where a picture could not be decoded, the others of its batch move up: their records are not known.
        let is_whole = samples.len() == self.batch.min(self.images.saturating_sub(first));
        for (i, sample) in samples.enumerate() {
            let Some((label, row)) = sample.split_last() else { continue };
            let truth = *label as u32;
            let Some((predicted, _)) =
                row.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best })
            else {
                continue;
            };
            let predicted = predicted as u32;
            *self.confusion.entry((truth, predicted)).or_default() += 1;
            let (probability, of_truth) = self.probabilities(row, predicted as usize, truth as usize);
            let bin = &mut self.calibration[((probability * BINS as f64) as usize).min(BINS - 1)];
            bin.images += 1;
            bin.confidence += probability;
            bin.right += u64::from(truth == predicted);
            if truth != predicted && is_whole {
                self.keep(Mistake { record: first + i, truth, of_truth, predicted, probability });
            }
        }
    }

    /// The probabilities of two classes.
    fn probabilities(&self, row: &[f32], one: usize, other: usize) -> (f64, f64) {
        let of = |class: usize| row.get(class).map_or(f64::NEG_INFINITY, |z| f64::from(*z));
        match self.kind {
            LossKind::Softmax => {
                let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let sum: f64 = row.iter().map(|z| (f64::from(*z) - top).exp()).sum();
                ((of(one) - top).exp() / sum, (of(other) - top).exp() / sum)
            }
            LossKind::Sigmoid => {
                let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
                (sigmoid(of(one)), sigmoid(of(other)))
            }
        }
    }

    fn keep(&mut self, mistake: Mistake) {
        let place = self.worst.partition_point(|other| other.of_truth <= mistake.of_truth);
        if place < WORST {
            self.worst.insert(place, mistake);
            self.worst.truncate(WORST);
        }
    }
}

/// Writes a run's page.
pub struct Reporter {
    out: PathBuf,
    recipe: Recipe,
    details: Details,
    began: Instant,
    /// Seconds that pages took so far.
    spent: f64,
    /// What the last evaluation saw, if the page does not show it yet.
    unseen: Option<Seen>,
    /// The files lack the last evaluation.
    is_behind: bool,
    /// A failure is said once.
    has_failed: bool,
}

impl Reporter {
    /// For the run in `out`. `meta`: what its checkpoints say about it.
    pub fn new(recipe: &Recipe, out: &Path, meta: &CheckpointMeta, trainer: &Trainer) -> Self {
        Self {
            out: out.into(),
            recipe: recipe.clone(),
            details: Details { facts: facts(recipe, meta, trainer), ..Details::default() },
            began: Instant::now(),
            spent: 0.0,
            unseen: None,
            is_behind: false,
            has_failed: false,
        }
    }

    /// After an evaluation, of which `metrics` have the line: `seen` are the validation pictures. A failure never ends
    /// a run.
    pub fn evaluated(
        &mut self,
        trainer: &mut Trainer,
        data: &RunData,
        seen: Option<Seen>,
        metrics: &mut MetricsFile,
        log: &Log,
    ) {
        let began = Instant::now();
        self.details.step = trainer.step;
        self.details.classes = data.train.classes().to_vec();
        self.unseen = seen;
        self.is_behind = true;
        if self.spent <= SHARE * self.began.elapsed().as_secs_f64() {
            let written = self.pictures(trainer, data, metrics).and_then(|()| self.write(data));
            self.say(written, log);
        }
        self.spent += began.elapsed().as_secs_f64();
    }

    /// Draws what the model sees, once, and its weights.
    fn pictures(&mut self, trainer: &mut Trainer, data: &RunData, metrics: &mut MetricsFile) -> Result<()> {
        let Details { sheet, filters, positions, .. } = &mut self.details;
        let is_first = sheet.is_none();
        if is_first {
            let (picture, _) = sheet::of_run(data.train.clone(), &self.recipe, SAMPLES.0, 0, SAMPLES.1)?;
            let file = data::encode_png(picture.view())?;
            *sheet = Some(Png::new(picture.width, picture.height, file));
        }
        *filters = kernels(&mut *trainer.backend, &trainer.model)?;
        *positions = similarities(&mut *trainer.backend, &trainer.model)?;
        if let Some(events) = &mut metrics.events {
            let new = sheet.as_ref().filter(|_| is_first).map(|png| ("inputs", png));
            let all =
                [new, filters.as_ref().map(|p| ("filters", p)), positions.as_ref().map(|p| ("positions", p))];
            all.into_iter().flatten().try_for_each(|(tag, png)| events.image(trainer.step, tag, png))?;
        }
        Ok(())
    }

    /// Writes what is not written yet.
    pub fn finish(&mut self, data: &RunData, log: &Log) {
        if self.is_behind {
            let written = self.write(data);
            self.say(written, log);
        }
    }

    fn say(&mut self, written: Result<()>, log: &Log) {
        if let Err(why) = written
            && !self.has_failed
        {
            self.has_failed = true;
            log.warn(&format!("the run's page could not be written: {}", why.message()));
        }
    }

    fn write(&mut self, data: &RunData) -> Result<()> {
        if let (Some(seen), Some(val)) = (self.unseen.take(), &data.val) {
            self.take(seen, val);
        }
        let text = serde_json::to_vec(&self.details).expect("numbers and text can be written");
        files::write_atomic(&self.out.join("report.json"), |out| out.write_all(&text))?;
        RunPage::write(&self.out)?;
        self.is_behind = false;
        Ok(())
    }

    fn take(&mut self, seen: Seen, val: &Dataset) {
        let cells = seen.confusion.iter().map(|((truth, predicted), n)| Confused(*truth, *predicted, *n));
        self.details.confusion = cells.collect();
        self.details.calibration = seen.calibration.to_vec();
        self.details.worst = seen.worst.iter().filter_map(|mistake| self.wrong(mistake, val)).collect();
    }

    /// A mistake with its picture; `None` if it cannot be read again.
    fn wrong(&self, mistake: &Mistake, val: &Dataset) -> Option<Wrong> {
        let image = (self.recipe.model.image.height, self.recipe.model.image.width);
        let how = (self.recipe.eval.resize, self.recipe.eval.crop_ratio);
        let record = val.record(mistake.record).ok()?;
        let pixels = data::prepare(&record, image, how, self.recipe.data.exif).ok()?;
        Some(Wrong {
            name: val.record_name(mistake.record),
            truth: mistake.truth,
            of_truth: mistake.of_truth,
            predicted: mistake.predicted,
            probability: mistake.probability,
            picture: png(View::new(&pixels, image.0, image.1)).ok()?,
        })
    }
}

/// Device, model, data and versions of a run.
fn facts(recipe: &Recipe, meta: &CheckpointMeta, trainer: &Trainer) -> Vec<(String, String)> {
    let mut facts = vec![("device".into(), trainer.backend.describe())];
    // `model    ViT width 64 ...`
    let model = model_lines(&trainer.model, recipe.finetune.is_none());
    facts.extend(model.first().map(|line| ("model".into(), line.trim_start_matches("model").trim().into())));
    let of_meta = about::facts(meta);
    for (key, name) in [
        ("recipe", "recipe"),
        ("data", "data"),
        ("made_by", "made by"),
        ("command", "command"),
        ("host", "machine"),
        ("written", "begun"),
    ] {
        facts.extend(of_meta[key].as_str().map(|value| (name.into(), value.into())));
    }
    facts.push(("seed".into(), recipe.train.seed.to_string()));
    facts
}

/// The events of a run for TensorBoard, with its settings, if the recipe asks for them.
pub(super) fn event_file(out: &Path, recipe: &Recipe, resumed: Option<u64>) -> Result<Option<EventFile>> {
    if !recipe.train.tensorboard {
        return Ok(None);
    }
    let mut events = EventFile::create(out, resumed.map_or(0, |step| step + 1))?;
    events.settings(&settings(recipe))?;
    Ok(Some(events))
}

/// Every setting of a resolved recipe that has a value.
fn settings(recipe: &Recipe) -> Vec<(String, Hparam)> {
    let sections = Table::try_from(recipe).expect("a recipe is a table");
    let mut found = Vec::new();
    for (section, keys) in &sections {
        for (key, value) in keys.as_table().into_iter().flatten() {
            let value = match value {
                Value::Integer(number) => Hparam::Number(*number as f64),
                Value::Float(number) => Hparam::Number(*number),
                Value::Boolean(truth) => Hparam::Truth(*truth),
                Value::String(text) => Hparam::Text(text.clone()),
                other => Hparam::Text(other.to_string()),
            };
            found.push((format!("{section}.{key}"), value));
        }
    }
    found
}

/// A picture for the page, not larger than it is shown.
fn png(view: View) -> Result<Png> {
    let (height, width) = view.size();
    let divisor = height.max(width).div_ceil(SIDE);
    let (small_h, small_w) = ((height / divisor).max(1), (width / divisor).max(1));
    let mut pixels = vec![0; small_h * small_w * 3];
    for (i, value) in pixels.iter_mut().enumerate() {
        let (y, x, channel) = (i / 3 / small_w * divisor, i / 3 % small_w * divisor, i % 3);
        let rows = (y..(y + divisor).min(height)).map(|y| view.row(y));
        let of =
            rows.flat_map(|row| (x..(x + divisor).min(width)).map(move |x| u32::from(row[x * 3 + channel])));
        let (sum, count) = of.fold((0, 0), |(sum, count), value| (sum + value, count + 1));
        *value = (sum / u32::max(count, 1)) as u8;
    }
    let file = data::encode_png(View::new(&pixels, small_h, small_w))?;
    Ok(Png::new(small_w, small_h, file))
}

/// The kernels of the patch embedding with the largest norm, each scaled to its own range, in rows.
fn kernels(b: &mut dyn Backend, model: &Vit) -> Result<Option<Png>> {
    let Some(kernel) = model.layout.params.iter().find(|p| p.kind == ParamKind::PatchKernel) else {
        return Ok(None);
    };
    let values = read(b, kernel.mat())?;
    let (height, width) = model.config.patch;
    let mut rows: Vec<&[f32]> = values.chunks_exact(kernel.cols).collect();
    let norm = |kernel: &[f32]| kernel.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    rows.sort_by(|a, b| norm(b).total_cmp(&norm(a)));
    rows.truncate(FILTERS.0);
    let tiles = rows.iter().map(|kernel| {
        let most = kernel.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
        kernel.iter().map(|v| (127.5 + 127.5 * v / most) as u8).collect::<Vec<u8>>()
    });
    tiled(&tiles.collect::<Vec<_>>(), (height, width), FILTERS.1).map(Some)
}

/// For patches of a regular grid, the cosine similarity of their position embedding to that of every patch.
fn similarities(b: &mut dyn Backend, model: &Vit) -> Result<Option<Png>> {
    let Some(table) = model.layout.params.iter().find(|p| p.kind == ParamKind::PosEmbed) else {
        return Ok(None);
    };
    let values = read(b, table.mat())?;
    let grid = (model.config.image.0 / model.config.patch.0, model.config.image.1 / model.config.patch.1);
    // The extra tokens come first.
    let rows: Vec<&[f32]> = values.chunks_exact(table.cols).collect();
    let rows = &rows[rows.len() - grid.0 * grid.1..];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms: Vec<f64> = rows.iter().map(|row| dot(row, row).sqrt().max(1e-12)).collect();
    let shown = (grid.0.min(MAPS), grid.1.min(MAPS));
    let pick = |i: usize, of: usize, n: usize| if n > 1 { i * (of - 1) / (n - 1) } else { 0 };
    let tile = |i: usize| {
        let patch = pick(i / shown.1, grid.0, shown.0) * grid.1 + pick(i % shown.1, grid.1, shown.1);
        let like = |other: usize| dot(rows[patch], rows[other]) / (norms[patch] * norms[other]);
        (0..rows.len()).flat_map(|other| colour(like(other))).collect::<Vec<u8>>()
    };
    let tiles: Vec<Vec<u8>> = (0..shown.0 * shown.1).map(tile).collect();
    tiled(&tiles, grid, shown.1).map(Some)
}

/// From dark blue at -1 over green to yellow at 1.
fn colour(similarity: f64) -> [u8; 3] {
    const STOPS: [[f64; 3]; 4] =
        [[45.0, 20.0, 90.0], [40.0, 100.0, 150.0], [60.0, 175.0, 120.0], [250.0, 230.0, 60.0]];
    let at = (similarity.clamp(-1.0, 1.0) + 1.0) / 2.0 * 3.0;
    let (stop, share) = ((at as usize).min(2), at - (at as usize).min(2) as f64);
    std::array::from_fn(|c| (STOPS[stop][c] + share * (STOPS[stop + 1][c] - STOPS[stop][c])) as u8)
}

/// Tiles of one size in rows of `columns`, a pixel apart.
fn tiled(tiles: &[Vec<u8>], (height, width): (usize, usize), columns: usize) -> Result<Png> {
    let rows = tiles.len().div_ceil(columns);
    let (total_h, total_w) = (rows * (height + 1) + 1, columns.min(tiles.len()) * (width + 1) + 1);
    let mut sheet = Picture { height: total_h, width: total_w, pixels: vec![128; total_h * total_w * 3] };
    for (i, tile) in tiles.iter().enumerate() {
        let (top, left) = (1 + i / columns * (height + 1), 1 + i % columns * (width + 1));
        for (y, row) in tile.chunks_exact(width * 3).enumerate() {
            sheet.pixels[((top + y) * total_w + left) * 3..][..row.len()].copy_from_slice(row);
        }
    }
    let file = data::encode_png(sheet.view())?;
    Ok(Png::new(total_w, total_h, file))
}

fn read(b: &mut dyn Backend, mat: Mat) -> Result<Vec<f32>> {
    let mut values = vec![0.0; mat.rows * mat.cols];
    b.read(mat, &mut values)?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_counted_by_pair_and_the_worst_come_first() {
        let mut seen = Seen::new(LossKind::Softmax, 2, 4);
        seen.add(0, [&[3.0, 0.0, 0.0, 0.0][..], &[9.0, 0.0, 0.0, 1.0]].into_iter());
        seen.add(1, [&[0.0, 1.0, 0.0, 2.0][..], &[0.0, 2.0, 0.0, 1.0]].into_iter());
        assert_eq!(seen.confusion, BTreeMap::from([((0, 0), 1), ((1, 0), 1), ((1, 1), 1), ((2, 1), 1)]));
        let worst: Vec<_> = seen.worst.iter().map(|m| (m.record, m.truth, m.predicted)).collect();
        assert_eq!(worst, [(1, 1, 0), (2, 2, 1)]);
        let e = std::f64::consts::E;
        assert!((seen.worst[1].of_truth - 1.0 / (2.0 + e)).abs() < 1e-12);
        assert!((seen.worst[1].probability - e / (2.0 + e)).abs() < 1e-12);
        assert_eq!(seen.calibration.iter().map(|bin| bin.images).sum::<u64>(), 4);
        assert_eq!(seen.calibration.iter().map(|bin| bin.right).sum::<u64>(), 2);
    }

    #[test]
    fn only_the_worst_are_kept() {
        let mut seen = Seen::new(LossKind::Softmax, 1, 40);
        for i in 0..40 {
            seen.add(i, [&[0.0, 1.0 + (i * 7 % 40) as f32 / 10.0, 0.0][..]].into_iter());
        }
        assert_eq!(seen.worst.len(), WORST);
        assert!(seen.worst.windows(2).all(|pair| pair[0].of_truth <= pair[1].of_truth));
        assert_eq!(seen.worst[0].record * 7 % 40, 39);
    }

    #[test]
    fn a_large_picture_becomes_smaller_by_means() {
        let pixels: Vec<u8> = (0..400 * 200 * 3).map(|i| if i / 3 % 200 < 100 { 10 } else { 90 }).collect();
        let small = png(View::new(&pixels, 400, 200)).unwrap();
        assert_eq!((small.height, small.width), (133, 66));
    }
}
