//! `report.html`: a run on one page, or several runs side by side. One file that needs nothing else and no network.
//!
//! A page is made from what a run's directory holds: `metrics.jsonl`, `recipe.toml` and `report.json`. So the page of a
//! working run and the one that `vitrum report` makes later are the same.

mod chart;
mod html;
mod last;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::details::Details;
use super::format;
use super::history::History;
use crate::error::{At, Error, Result};
use crate::files;
use chart::{Series, Unit, figure, lines};
use html::{escape, fold, number, table};

const STYLE: &str = include_str!("style.css");

/// The key by which runs are compared, what it is called, and whether larger is better.
const METRICS: [(&str, &str, &str, bool); 3] = [
    ("top1", "val.top1", "validation top-1", true),
    ("map", "val.mAP", "validation mAP", true),
    ("loss", "val.loss", "validation loss", false),
];

/// A run, read from its directory.
#[derive(Clone, Debug)]
pub struct RunPage {
    /// Its directory.
    pub dir: PathBuf,
    /// The directory's name.
    pub name: String,
    history: History,
    details: Details,
    recipe: String,
}

impl RunPage {
    /// Reads a run's directory.
    ///
    /// # Errors
    /// It is no run, or a file in it cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let metrics = dir.join("metrics.jsonl");
        if !metrics.is_file() {
            return Err(Error::new(format!("{}: not a run, it has no metrics.jsonl", dir.display()))
                .hint("give the directory of a run, such as `runs/NAME`, or the folder of a sweep"));
        }
        let recipe = dir.join("recipe.toml");
        let name =
            dir.canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
        Ok(Self {
            dir: dir.into(),
            name: name.unwrap_or_else(|| dir.display().to_string()),
            history: History::read(&metrics)?,
            details: Details::read(&dir.join("report.json"))?.unwrap_or_default(),
            recipe: if recipe.is_file() { files::read_text(&recipe)? } else { String::new() },
        })
    }

    /// Writes `report.html` and `results.csv` into the run's directory; returns the page's path.
    pub fn write(dir: &Path) -> Result<PathBuf> {
        let run = Self::read(dir)?;
        let path = dir.join("report.html");
        files::write_atomic(&path, |out| out.write_all(run.html().as_bytes()))?;
        files::write_atomic(&dir.join("results.csv"), |out| out.write_all(run.history.csv().as_bytes()))?;
        Ok(path)
    }

    /// The page of this run.
    pub fn html(&self) -> String {
        let details = &self.details;
        let mut body = format!("<h1>{}</h1>\n", escape(&self.name));
        writeln!(body, "<p class=\"soft\">After {} updates.</p>", format::thousands(self.history.steps()))
            .unwrap();
        let classes = last::sections(details);
        let mut parts = vec![("curves", "Curves")];
        if !classes.is_empty() {
            parts.push(("classes", "Classes"));
        }
        if !details.worst.is_empty() {
            parts.push(("worst", "Most wrong"));
        }
        let sees = self.pictures();
        if !sees.is_empty() {
            parts.push(("model", "Inputs and weights"));
        }
        parts.push(("settings", "Settings"));
        body += &contents(&parts);
        body += &self.cards();
        body += "<h2 id=\"curves\">Curves</h2>\n<div class=\"grid\">\n";
        body += &self.curves();
        body += "</div>\n";
        body += &classes;
        body += &sees;
        body += "<h2 id=\"settings\">Settings</h2>\n";
        body += &facts(&details.facts);
        if !self.recipe.is_empty() {
            body += &fold(
                "Recipe, with every default",
                &format!("<pre tabindex=\"0\">{}</pre>", preformatted(&self.recipe)),
            );
        }
        document(&self.name, &body)
    }

    /// The metric that selects the best checkpoint, as in [`METRICS`].
    fn metric(&self) -> (&'static str, &'static str, bool) {
        let recipe = self.recipe.parse::<Table>().ok();
        let chosen = recipe.as_ref().and_then(|table| table.get("eval")?.get("metric")?.as_str());
        let (_, key, name, larger) =
            *METRICS.iter().find(|(word, ..)| Some(*word) == chosen).unwrap_or(&METRICS[0]);
        // Data with several labels is measured by mAP where top-1 is asked for.
        match self.history.last("val.mAP") {
            Some(_) if key == "val.top1" => (METRICS[1].1, METRICS[1].2, METRICS[1].3),
            _ => (key, name, larger),
        }
    }

    /// Step and value of the best evaluation.
    fn best(&self) -> Option<(f64, f64)> {
        let (key, _, larger) = self.metric();
        let better = |a: &(f64, f64), b: &(f64, f64)| if larger { b.1 > a.1 } else { b.1 < a.1 };
        self.history
            .curve(key)
            .into_iter()
            .reduce(|best, next| if better(&best, &next) { next } else { best })
    }

    fn cards(&self) -> String {
        let (key, name, _) = self.metric();
        let mut cards = Vec::new();
        if let Some((step, value)) = self.best() {
            cards.push((
                format!("best {name}, step {}", format::thousands(step as u64)),
                unit(key).text(value),
            ));
        }
        for (key, name) in [
            ("val.top1", "last validation top-1"),
            ("loss", "last training loss"),
            ("img_per_s", "images per second"),
        ] {
            if let Some(value) = self.history.last(key) {
                cards.push((name.to_string(), unit(key).text(value)));
            }
        }
        if let Some(seconds) = self.history.last("seconds") {
            cards.push(("time of the last session".into(), format::seconds(seconds)));
        }
        let card =
            |(name, value): &(String, String)| format!("<li><b>{}</b>{}</li>", escape(value), escape(name));
        format!("<ul class=\"cards\">{}</ul>\n", cards.iter().map(card).collect::<String>())
    }

    fn curves(&self) -> String {
        let curve = |key: &str| self.history.curve(key);
        let one = |title: &str, key: &str| lines(title, unit(key), &[Series::new(title, curve(key), 0)]);
        let three = |title: &str, key: &str| {
            let series = [
                Series::new("training", curve(key), 0),
                Series::new("validation", curve(&format!("val.{key}")), 1),
                Series::new("validation, EMA", curve(&format!("ema.{key}")), 2).dashed(),
            ];
            lines(title, unit(key), &series)
        };
        let mut text = three("Loss", "loss") + &three("Top-1", "top1");
        text += &lines(
            "Top-5",
            Unit::Percent,
            &[
                Series::new("validation", curve("val.top5"), 1),
                Series::new("validation, EMA", curve("ema.top5"), 2).dashed(),
            ],
        );
        text += &lines(
            "Mean average precision",
            Unit::Percent,
            &[
                Series::new("validation", curve("val.mAP"), 1),
                Series::new("validation, EMA", curve("ema.mAP"), 2).dashed(),
            ],
        );
        text += &one("Learning rate", "lr");
        text += &one("Gradient norm", "grad_norm");
        text += &one("Images per second", "img_per_s");
        text += &one("Waiting for data", "data_wait");
        text += &one("Share of the device's peak (MFU)", "mfu");
        if self.history.last("skipped").is_some_and(|skipped| skipped > 0.0) {
            text += &one("Skipped updates", "skipped");
        }
        // Whatever else a line of training has, such as what a GPU says about itself.
        let named = ["val.", "ema.", "spike.", "rewind."];
        let is_other = |key: &&str| !named.iter().any(|of| key.starts_with(of)) && !KNOWN.contains(key);
        let others = self.history.keys().filter(is_other);
        for key in others {
            text += &one(&key.replace(['_', '.'], " "), key);
        }
        text
    }

    /// What the model sees, and what it has learned.
    fn pictures(&self) -> String {
        let details = &self.details;
        let mut text = String::new();
        if let Some(png) = &details.sheet {
            let picture = last::image(png, "A sheet of augmented training pictures with their labels", "");
            text += &figure("Training samples, augmented as the model sees them", &picture);
        }
        if let Some(png) = &details.filters {
            let picture =
                last::image(png, "Kernels of the patch embedding as small colour pictures", "sharp");
            text += &figure("Patch embedding: the kernels with the largest norm", &picture);
        }
        if let Some(png) = &details.positions {
            let says = "A map for each patch: the brighter, the more similar the position embedding there";
            text += &figure(
                "Position embedding: similarity of each patch's to all others",
                &last::image(png, says, "sharp"),
            );
        }
        match text.is_empty() {
            true => text,
            false => format!("<h2 id=\"model\">Inputs and weights</h2>\n<div class=\"grid\">{text}</div>\n"),
        }
    }

    /// Every setting by its key, as text.
    fn settings(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        if let Ok(table) = self.recipe.parse::<Table>() {
            flatten("", &Value::Table(table), &mut found);
        }
        found
    }
}

/// Keys of training lines that have a chart of their own, or none.
const KNOWN: [&str; 10] =
    ["epoch", "loss", "top1", "lr", "grad_norm", "img_per_s", "data_wait", "mfu", "skipped", "seconds"];

fn unit(key: &str) -> Unit {
    let name = key.rsplit('.').next().unwrap_or(key);
    match name {
        "top1" | "top5" | "mAP" | "data_wait" | "mfu" => Unit::Percent,
        _ => Unit::Plain,
    }
}

/// Several runs on one page: their curves over each other, and the settings in which they differ.
pub fn comparison(runs: &[RunPage]) -> String {
    let (key, metric, larger) = runs.first().map_or(("val.top1", METRICS[0].2, true), RunPage::metric);
    let settings: Vec<BTreeMap<String, String>> = runs.iter().map(RunPage::settings).collect();
    let mut keys: Vec<&String> = settings.iter().flat_map(BTreeMap::keys).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| settings.iter().any(|of| of.get(*key) != settings[0].get(*key)));
    let best: Vec<Option<(f64, f64)>> = runs
        .iter()
        .map(|run| {
            let better = |a: f64, b: f64| if larger { b > a } else { b < a };
            run.history.curve(key).into_iter().reduce(|x, y| if better(x.1, y.1) { y } else { x })
        })
        .collect();
    let values = || best.iter().flatten().map(|(_, value)| *value);
    let winner = if larger { values().reduce(f64::max) } else { values().reduce(f64::min) };
    let mut body = format!("<h1>{} runs</h1>\n", runs.len());
    body += &contents(&[("runs", "Runs"), ("curves", "Curves")]);
    body += "<h2 id=\"runs\">Runs</h2>\n<p class=\"soft\">The best value is marked. Settings that are the same in all runs are left out.</p>\n";
    body += "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Runs\"><table><thead><tr><th scope=\"col\">run</th>";
    for name in [metric, "at step", "last training loss", "updates", "images/s"] {
        write!(body, "<th scope=\"col\">{}</th>", escape(name)).unwrap();
    }
    keys.iter().for_each(|key| write!(body, "<th scope=\"col\">{}</th>", escape(key)).unwrap());
    body += "</tr></thead><tbody>\n";
    for ((run, best), of) in runs.iter().zip(&best).zip(&settings) {
        let is_best = best.is_some_and(|(_, value)| Some(value) == winner);
        let (class, mark) = if is_best { (" class=\"best\"", " ★ best") } else { ("", "") };
        let value = best.map_or("-".into(), |(_, value)| unit(key).text(value));
        write!(
            body,
            "<tr><th scope=\"row\">{}</th><td{class}>{}{mark}</td>",
            escape(&run.name),
            escape(&value)
        )
        .unwrap();
        let last = |key: &str| run.history.last(key).map_or("-".into(), number);
        let step = best.map_or("-".into(), |(step, _)| format::thousands(step as u64));
        for value in [step, last("loss"), format::thousands(run.history.steps()), last("img_per_s")] {
            write!(body, "<td>{}</td>", escape(&value)).unwrap();
        }
        for key in &keys {
            write!(body, "<td>{}</td>", escape(of.get(*key).map_or("-", String::as_str))).unwrap();
        }
        body += "</tr>\n";
    }
    body += "</tbody></table></div>\n<h2 id=\"curves\">Curves</h2>\n<div class=\"grid\">\n";
    for (title, key) in [
        ("Validation top-1", "val.top1"),
        ("Validation mAP", "val.mAP"),
        ("Validation loss", "val.loss"),
        ("Validation top-1, EMA", "ema.top1"),
        ("Training loss", "loss"),
        ("Learning rate", "lr"),
        ("Gradient norm", "grad_norm"),
        ("Images per second", "img_per_s"),
    ] {
        let series: Vec<Series> = runs
            .iter()
            .enumerate()
            .map(|(i, run)| Series::new(&run.name, run.history.curve(key), i))
            .collect();
        body += &lines(title, unit(key), &series);
    }
    body += "</div>\n";
    document(&format!("{} runs", runs.len()), &body)
}

/// `optim.groups[0].lr_mult` and its value for each value of a recipe.
fn flatten(key: &str, value: &Value, found: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                let inside = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                flatten(&inside, value, found);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_table) => {
            items.iter().enumerate().for_each(|(i, item)| flatten(&format!("{key}[{i}]"), item, found));
        }
        value => drop(found.insert(key.into(), value.to_string())),
    }
}

fn contents(parts: &[(&str, &str)]) -> String {
    let item = |(id, name): &(&str, &str)| format!("<li><a href=\"#{id}\">{name}</a></li>");
    format!("<nav aria-label=\"Contents\"><ul>{}</ul></nav>\n", parts.iter().map(item).collect::<String>())
}

fn facts(facts: &[(String, String)]) -> String {
    if facts.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<String>> =
        facts.iter().map(|(name, value)| vec![name.clone(), value.clone()]).collect();
    format!("<div class=\"facts\">{}</div>", table("The run and its machine", &["", ""], &rows))
}

/// A file's text, line by line.
fn preformatted(text: &str) -> String {
    text.lines().map(|line| escape(line) + "\n").collect()
}

fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n\
         <title>{} - Vitrum</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         <footer><p class=\"soft\">Made by vitrum {}.</p></footer>\n</body>\n</html>\n",
        escape(title),
        env!("CARGO_PKG_VERSION")
    )
}

/// The runs below each directory: the directory itself, or the runs of a sweep.
///
/// # Errors
/// There is no run.
pub fn runs_in(dirs: &[PathBuf]) -> Result<Vec<RunPage>> {
    let mut runs = Vec::new();
    for dir in dirs {
        let inside = if dir.join("metrics.jsonl").is_file() { Vec::new() } else { below(dir)? };
        match inside.is_empty() {
            true => runs.push(RunPage::read(dir)?),
            false => inside.iter().try_for_each(|dir| RunPage::read(dir).map(|run| runs.push(run)))?,
        }
    }
    Ok(runs)
}

/// Folders with runs, by name.
fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).at(dir.display())?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("metrics.jsonl").is_file())
        .collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
