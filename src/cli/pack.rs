//! `vitrum pack`: writes pictures as a packed data set, the form that loads fastest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::numbers;
use crate::data::dataset::Manifest;
use crate::data::decode::JpegPath;
use crate::data::pack::{self, Format, PackOptions, Packed, Target};
use crate::error::{Error, Result};
use crate::recipe::OnBadRecord;
use crate::{fail, signals, terminal};

/// How long a pack may take to stop after a signal.
const GRACE: Duration = Duration::from_millis(500);

/// Packs pictures into a data set.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An image folder (`CLASS/...`, or `train/CLASS/...` and `val/CLASS/...`); a tar archive with such
    /// paths, with one archive per class or with WebDataset samples; a folder of such archives; CIFAR
    /// binaries; or a manifest (`.csv`, `.tsv`, `.jsonl`, `.txt`) of paths and labels
    pub source: PathBuf,
    /// The folder to create; with `--check` it may be left out, SOURCE is then a packed data set
    pub dest: Option<PathBuf>,
    /// `jpeg` keeps the encoded pictures, `raw` stores pixels of one size [default: raw if all pictures have
    /// the same size of at most 64 pixels, else jpeg]
    #[arg(long)]
    pub format: Option<Format>,
    /// Resize to `N` pixels on the shorter side, or to `HxW`; raw pixels are then cropped at the centre
    #[arg(long, value_name = "N|HxW")]
    pub size: Option<Target>,
    /// Re-encode every picture as JPEG with this quality
    #[arg(long, value_name = "Q", value_parser = numbers::whole::<u8>(1..=100))]
    pub quality: Option<u8>,
    /// What to do with a record that cannot be decoded
    #[arg(long, value_name = "WHAT", default_value = "skip")]
    pub on_bad_record: OnBadRecord,
    /// Rotate pictures as their EXIF orientation says; rotated pictures are re-encoded
    #[arg(long)]
    pub exif: bool,
    /// Hold out this share of the training records (0.01 = 1 %), chosen by a hash of their names; the part is
    /// called `val`, or `minival` if the source has a validation part
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = numbers::real(0.0..=0.9))]
    pub minival: f64,
    /// Verify the packed data set: checksums and every picture
    #[arg(long)]
    pub check: bool,
}

/// Packs a data set, checks one, or both.
pub fn run(args: Args) -> Result<()> {
    let packed_before =
        |dir: &Path| [dir.to_owned(), dir.join("train"), dir.join("val")].iter().any(|d| Manifest::is_in(d));
    let Some(dest) = &args.dest else {
        if args.check {
            return check(&args.source);
        }
        return Err(Error::usage("`vitrum pack` needs a folder to pack into").hint("vitrum pack SOURCE DEST"));
    };
    if !(args.check && packed_before(dest)) {
        let options = PackOptions {
            format: args.format,
            size: args.size,
            quality: args.quality,
            on_bad_record: args.on_bad_record,
            exif: args.exif,
            minival: args.minival,
        };
        let stop = signals::flag()?;
        signals::end_after(GRACE);
        report(&pack::pack(&args.source, dest, options, &stop)?, dest);
    }
    if args.check { check(dest) } else { Ok(()) }
}

fn report(packed: &Packed, dest: &Path) {
    let parts: Vec<String> = packed
        .parts
        .iter()
        .map(|(part, records, _)| match part {
            Some(part) => format!("{records} {part} records"),
            None => format!("{records} records"),
        })
        .collect();
    let skipped: usize = packed.parts.iter().map(|(_, _, skipped)| skipped).sum();
    let form = match packed.image {
        Some((height, width)) => format!("raw {width}x{height} pixels"),
        None => "encoded pictures".into(),
    };
    terminal::say(&format!(
        "packed {} of {} classes as {form} into {}, {skipped} skipped (JPEG decoder: {})",
        parts.join(" and "),
        packed.classes,
        dest.display(),
        JpegPath::chosen().describe()
    ));
}

fn check(dir: &Path) -> Result<()> {
    let checked = pack::check(dir)?;
    for fault in &checked.faults {
        terminal::say(&format!("damaged: {fault}"));
    }
    match checked.faults.len() {
        0 => {
            terminal::say(&format!(
                "checked {} records in {} shards: all good",
                checked.records, checked.shards
            ));
            Ok(())
        }
        1 => fail!("{}: the data set has a fault", dir.display()),
        faults => fail!("{}: the data set has {faults} faults", dir.display()),
    }
}
