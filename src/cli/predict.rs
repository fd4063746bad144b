//! `vitrum predict`: the most probable classes of single pictures.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{On, Settings, not_built, numbers, print, print_json};
use crate::backend::DeviceOptions;
use crate::data::{Split, encode_png, pictures, sheet};
use crate::error::{At, Error, Result};
use crate::files;
use crate::infer::loaded::{LoadedModel, Prediction};
use crate::infer::protocol::Protocol;
use crate::report::format;
use crate::terminal::{self, one_line};
use crate::vit::Mode;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Pictures, folders of pictures, packed data sets, archives, tables, patterns such as 'photos/*.jpg', or `-` to
    /// read a list of files from stdin
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    /// How many classes to show [default: 5, or all above --threshold]
    #[arg(long, value_name = "K", value_parser = numbers::whole::<u16>(1..=u16::MAX.into()))]
    pub top: Option<u16>,
    /// Show only classes with at least this probability, such as 0.5
    #[arg(long, value_name = "P", value_parser = numbers::real(0.0..=1.0))]
    pub threshold: Option<f64>,
    /// For data sets, the part to use: train, val or test [default: every picture]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "PART")]
    pub split: Option<Split>,
    /// How pictures are prepared: a system's name [default: what the weights file says]
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    /// Write each picture, as the model sees it, with its predictions below: one PNG file per picture
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// Print one line of comma-separated values per picture and class
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    /// Write attention maps as PNG files (not built yet)
    #[arg(long, value_name = "DIR")]
    pub attention: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How many classes are shown by default.
const TOP: usize = 5;

pub fn run(args: Args) -> Result<()> {
    if args.attention.is_some() {
        return Err(not_built("vitrum predict --attention").hint("leave it out to get the classes"));
    }
    let images = pictures::named(&args.images, args.split, list)?;
    let overrides = args.settings.model_overrides()?;
    let mut run = LoadedModel::open(
        &args.weights,
        &overrides,
        (args.on.device, &DeviceOptions::default()),
        1,
        Mode::Infer,
        None,
    )?;
    super::say_notes(&run.notes);
    let protocol = match args.protocol.as_deref() {
        Some(name) => Protocol::named(name)?,
        None => run.protocol()?,
    };
    let least = args.threshold.unwrap_or(0.0) as f32;
    // With a threshold, show all classes above it unless the user says how many.
    let most = args.top.map_or(if args.threshold.is_some() { usize::MAX } else { TOP }, usize::from);
    let (mut all, mut errors) = (Vec::new(), Vec::new());
    if let Some(folder) = &args.save {
        files::create_dir(folder)?;
    }
    if args.csv {
        print("image,rank,class,name,probability")?;
    }
    for (number, picture) in images.iter().enumerate() {
        let name = picture.name();
        let seen =
            run.prepared(picture, protocol).and_then(|pixels| Ok((run.predict_pixels(&pixels)?, pixels)));
        // One bad file among many does not stop the others.
        let (mut top, pixels) = match seen {
            Ok(seen) => seen,
            Err(error) if images.len() == 1 => return Err(error),
            Err(error) => {
                terminal::say(&format!("error: {}", error.message()));
                errors.push(json!({ "image": name, "error": error.message() }));
                continue;
            }
        };
        top.retain(|class| class.probability >= least);
        top.truncate(most);
        if args.csv {
            top.iter().enumerate().try_for_each(|(rank, of)| print(&row(&name, rank + 1, of)))?;
        } else if !args.json {
            print(&text(&name, &top))?;
        }
        if let Some(folder) = &args.save {
            let file = folder.join(format!("{number:04}-{}.png", file_name(&name)));
            save(&file, &pixels, run.model.config.image, &top)?;
        }
        let entry = |p: &Prediction| json!({"class": p.class, "name": p.name, "probability": p.probability});
        all.push(json!({
            "image": name,
            "top": top.iter().map(entry).collect::<Vec<_>>(),
        }));
    }
    let bad = errors.len();
    if args.json {
        let mut out = json!({ "predictions": all });
        if bad > 0 {
            out["errors"] = json!(errors);
        }
        print_json(&out)?;
    }
    match bad {
        0 => Ok(()),
        _ => Err(Error::new(format!("{bad} of {} pictures could not be read", images.len()))),
    }
}

/// The lines of stdin.
fn list() -> Result<String> {
    std::io::read_to_string(std::io::stdin()).at("stdin")
}

/// A line of comma-separated values (RFC 4180).
fn row(image: &str, rank: usize, of: &Prediction) -> String {
    let quoted = |text: &str| match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", one_line(text).replace('"', "\"\"")),
        false => one_line(text).into_owned(),
    };
    format!("{},{rank},{},{},{}", quoted(image), of.class, quoted(&of.name), of.probability)
}

/// Writes a picture with its predictions.
fn save(file: &Path, pixels: &[u8], size: (usize, usize), top: &[Prediction]) -> Result<()> {
    let line = |of: &Prediction| format!("{} {}", format::percent(of.probability.into()), of.name);
    let picture = sheet::captioned(pixels, size, &top.iter().map(line).collect::<Vec<_>>());
    let png = encode_png(picture.view())?;
    files::write_atomic(file, |out| out.write_all(&png))
}

/// The last part of a picture's name, without its ending and what a file name cannot have.
fn file_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or(name);
    let stem = last.rsplit_once('.').map_or(last, |(stem, _)| stem);
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    stem.chars().take(64).map(plain).collect()
}

/// The picture's name, then one line with a bar per class.
fn text(name: &str, top: &[Prediction]) -> String {
    let width = top.iter().map(|p| one_line(&p.name).chars().count()).max().unwrap_or(0);
    let row = |p: &Prediction| {
        let bar = "#".repeat((p.probability * 40.0).round() as usize);
        format!("  {:<width$}  {:>7}  {bar}\n", one_line(&p.name), format::percent(p.probability.into()))
    };
    format!("{}\n{}", one_line(name), top.iter().map(row).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_in_a_row_and_plain_in_a_file_name() {
        let of = Prediction { class: 3, name: "great white, \"shark\"".into(), probability: 0.5 };
        assert_eq!(row("a.png", 1, &of), "a.png,1,3,\"great white, \"\"shark\"\"\",0.5");
        assert_eq!(file_name("x.tar: a/../b c.tar.png"), "b_c_tar");
    }
}
