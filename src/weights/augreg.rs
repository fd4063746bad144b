//! The published AugReg weights (Steiner et al. 2021, arXiv:2106.10270) by name: what a file name says about
//! its run, short names for the files that the authors recommend, and the choice from the index of all files.
//!
//! Nothing is downloaded. For a missing file, the error gives the command that fetches it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::hub_cache;
use super::shards::INDEX;
use crate::error::{Error, Result};
use crate::files;

/// URL of the published files.
const BUCKET: &str = "https://storage.googleapis.com/vit_models/augreg";

/// The meaning of a short name (`augreg:B/16`, `howto-i21k-B/16`) without an index: the 300-epoch
/// ImageNet-21k checkpoints that the authors recommend, as (model, augmentation, weight decay).
const RECOMMENDED: [(&str, &str, &str); 8] = [
    ("Ti/16", "none", "0.03"),
    ("S/32", "none", "0.1"),
    ("S/16", "light1", "0.03"),
    ("B/32", "light1", "0.1"),
    ("B/16", "medium1", "0.1"),
    ("B/8", "medium2", "0.1"),
    ("L/16", "strong1", "0.1"),
    ("R50+L/32", "medium1", "0.1"),
];

/// The file that a user means by `path`: that of a short name, of a folder, of a HuggingFace hub model, or
/// `path` itself.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    match path.to_str() {
        Some(text) if !path.exists() => match ShortName::parse(text) {
            Some(name) => name.find(),
            None => in_folder(hub_cache::resolve(path)?.as_deref().unwrap_or(path)),
        },
        _ => in_folder(path),
    }
}

/// Whether `path` is a short name and no file has that name.
pub fn is_short_name(path: &Path) -> bool {
    !path.exists() && path.to_str().is_some_and(|text| ShortName::parse(text).is_some())
}

/// A folder's weights file: of a checkpoint, of a HuggingFace model, or of a run (its best checkpoint, else
/// its last).
fn in_folder(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    let weights = "model.safetensors";
    if let Some(file) = [weights, INDEX].map(|name| path.join(name)).into_iter().find(|file| file.is_file()) {
        return Ok(file);
    }
    let named = of_run(path, weights)?;
    let [pickle, pickles] = ["pytorch_model.bin", "pytorch_model.bin.index.json"].map(|name| path.join(name));
    if named.is_none() && pickle.is_file() {
        return Err(super::refuse_pickle(&pickle));
    }
    if named.is_none() && pickles.is_file() {
        let all = format!("glob.glob('{}')", path.join("pytorch_model-*.bin").display());
        return Err(super::refuse_pickles(&pickles, &all, &path.join(weights)));
    }
    named.ok_or_else(|| {
        Error::new(format!(
            "{}: no `{weights}` and no `checkpoints/best` or `checkpoints/last`",
            path.display()
        ))
        .hint("give a weights file, a checkpoint folder or a run directory")
    })
}

/// The weights of a run's best checkpoint, else of its last. A checkpoint that was chosen but is damaged is an error:
/// another one is other weights.
fn of_run(run: &Path, weights: &str) -> Result<Option<PathBuf>> {
    let checkpoints = run.join("checkpoints");
    let pointers = ["best", "last"].map(|name| checkpoints.join(name));
    let Some(pointer) = pointers.iter().find(|pointer| pointer.symlink_metadata().is_ok()) else {
        return Ok(None);
    };
    // A file system without links has a file with the folder's name.
    let target =
        std::fs::read_link(pointer).or_else(|_| std::fs::read_to_string(pointer).map(|s| s.trim().into()));
    let folder = target.map_or(pointer.clone(), |target| checkpoints.join(target));
    if folder.join(weights).is_file() {
        // A link's own name says which checkpoint was chosen.
        let named = if pointer.is_dir() { pointer } else { &folder };
        return Ok(Some(named.join(weights)));
    }
    let step = |folder: &Path| folder.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let whole = std::fs::read_dir(&checkpoints).into_iter().flatten().flatten().map(|entry| entry.path());
    let newest =
        whole.filter(|folder| folder.join(weights).is_file()).filter_map(|f| Some((step(&f)?, f))).max();
    let error = Error::new(match folder.is_dir() {
        true => format!("{}: it is `{}`, which has no `{weights}`", pointer.display(), folder.display()),
        false => format!("{}: it is `{}`, which does not exist", pointer.display(), folder.display()),
    });
    Err(match newest {
        Some((_, other)) => {
            error.hint(format!("name another checkpoint, as in `--weights {}`", other.display()))
        }
        None => error.hint("the run has no other checkpoint: give a weights file, or another run"),
    })
}

/// `[FOLDER/]augreg:MODEL`, `[FOLDER/]augreg:FILE` or `howto-i21k-MODEL`.
struct ShortName<'a> {
    text: &'a str,
    /// The only folder to search, if one is given.
    folder: Option<&'a str>,
    /// `B/16`, or the stem of a file.
    name: &'a str,
    /// Whether the index may choose; `howto` names stand for one file each.
    by_index: bool,
}

impl<'a> ShortName<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        if let Some(name) = text.strip_prefix("howto-i21k-") {
            return Some(Self { text, folder: None, name, by_index: false });
        }
        let (folder, name) = text.split_once("augreg:")?;
        let folder = match folder.strip_suffix('/') {
            Some(folder) => Some(if folder.is_empty() { "/" } else { folder }),
            None if folder.is_empty() => None,
            None => return None,
        };
        Some(Self { text, folder, name: name.strip_suffix(".npz").unwrap_or(name), by_index: true })
    }

    fn find(&self) -> Result<PathBuf> {
        let cache = files::cache_dir().join("weights");
        let folders = match self.folder {
            Some(folder) => vec![PathBuf::from(folder)],
            None => vec![PathBuf::from("."), cache.clone()],
        };
        let file = format!("{}.npz", self.stem(&folders)?);
        if let Some(path) = folders.iter().map(|f| f.join(&file)).find(|p| p.is_file()) {
            return Ok(path);
        }
        let to = self.folder.map_or(cache, PathBuf::from).join(&file);
        Err(Error::new(format!("`{}` is the file `{file}`, which was not found", self.text))
            .hint(format!("download it: curl -L --create-dirs -o '{}' '{BUCKET}/{file}'", to.display())))
    }

    /// As in vit_jax: a name with a dash is a file's; a model's name means the best of the index.
    fn stem(&self, folders: &[PathBuf]) -> Result<String> {
        if self.by_index && self.name.contains('-') {
            return Ok(self.name.into());
        }
        let index = folders.iter().map(|f| f.join("index.csv")).find(|p| p.is_file());
        if let (true, Some(index)) = (self.by_index, index) {
            let text = files::read_text(&index)?;
            return best_of(&text, self.name).map_err(|e| e.at(index.display()));
        }
        let Some((model, aug, decay)) = RECOMMENDED.iter().find(|(model, ..)| *model == self.name) else {
            let known: Vec<&str> = RECOMMENDED.iter().map(|(model, ..)| *model).collect();
            return Err(Error::usage(format!("`{}` does not name an AugReg model", self.text))
                .hint(format!("there are {}", known.join(", "))));
        };
        // Of the recommended files, only the largest hybrid was trained with dropout.
        let rate = if *model == "R50+L/32" { "0.1" } else { "0.0" };
        let model = model.replace(['/', '+'], "_");
        Ok(format!("{model}-i21k-300ep-lr_0.001-aug_{aug}-wd_{decay}-do_{rate}-sd_{rate}"))
    }
}

/// From the index of all runs, the pre-training file of `model` (`B/16`, or `B_16`) with the best upstream
/// validation result (`final_val`) on ImageNet-21k. Of equal ones it takes the last, as vit_jax does.
pub fn best_of(index: &str, model: &str) -> Result<String> {
    let mut lines = index.lines();
    let columns: Vec<&str> = lines.next().unwrap_or_default().split(',').map(str::trim).collect();
    let column = |name: &str| {
        let found = columns.iter().position(|c| *c == name);
        found.ok_or_else(|| Error::new(format!("no column `{name}`: not the AugReg index")))
    };
    let (ds, value, file) = (column("ds")?, column("final_val")?, column("filename")?);
    let wanted = model.replace(['/', '+'], "_");
    let mut best: Option<(f64, &str)> = None;
    for line in lines {
        let fields: Vec<&str> = line.split(',').map(|f| f.trim().trim_matches('"')).collect();
        let (Some(ds), Some(value), Some(file)) = (fields.get(ds), fields.get(value), fields.get(file))
        else {
            continue;
        };
        let Ok(value) = value.parse::<f64>() else { continue };
        let fits = *ds == "i21k" && file.split('-').next() == Some(wanted.as_str());
        if fits && best.is_none_or(|(so_far, _)| value >= so_far) {
            best = Some((value, file));
        }
    }
    match best {
        Some((_, file)) => Ok(file.to_string()),
        None => Err(Error::new(format!("no checkpoint of `{model}` on ImageNet-21k"))
            .hint("models are named as in `B/16`, `R50+L/32`")),
    }
}

/// The contents of a file name.
#[derive(Clone, Debug, PartialEq)]
pub struct Name {
    /// Such as `B/16`.
    pub model: String,
    /// `i21k` or `i1k`.
    pub data: String,
    /// Epochs of the pre-training.
    pub epochs: u32,
    /// Peak learning rate of the pre-training.
    pub lr: f64,
    /// `none`, `light0`, ... `strong2`.
    pub augment: String,
    /// Weight decay.
    pub weight_decay: f64,
    /// Dropout rate.
    pub dropout: f64,
    /// Stochastic depth rate.
    pub drop_path: f64,
    /// The fine-tuning after it, if there was one.
    pub finetuned: Option<Finetuned>,
}

/// The second half of a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Finetuned {
    /// The data set of the fine-tuning, such as `imagenet2012`.
    pub data: String,
    /// Number of updates.
    pub steps: u32,
    /// Peak learning rate of the fine-tuning.
    pub lr: f64,
    /// Side of the pictures in pixels.
    pub image: u32,
}

impl Name {
    /// `None` if it is another kind of name.
    pub fn of_file(path: &Path) -> Option<Self> {
        Self::parse(path.file_name()?.to_str()?.strip_suffix(".npz")?)
    }

    /// `B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0`, and `--DATA-steps_20k-lr_0.03-res_384`.
    pub fn parse(stem: &str) -> Option<Self> {
        let (pretrained, finetuned) = match stem.split_once("--") {
            Some((pretrained, finetuned)) => (pretrained, Some(Finetuned::parse(finetuned)?)),
            None => (stem, None),
        };
        let &[model, data, epochs, lr, augment, decay, dropout, path] =
            pretrained.split('-').collect::<Vec<_>>().as_slice()
        else {
            return None;
        };
        let number = |text: &str, key: &str| text.strip_prefix(key)?.parse::<f64>().ok();
        Some(Self {
            model: model_name(model)?,
            data: data.to_string(),
            epochs: epochs.strip_suffix("ep")?.parse().ok()?,
            lr: number(lr, "lr_")?,
            augment: augment.strip_prefix("aug_")?.to_string(),
            weight_decay: number(decay, "wd_")?,
            dropout: number(dropout, "do_")?,
            drop_path: number(path, "sd_")?,
            finetuned,
        })
    }

    /// All of it as an object, with the meaning of `augment`.
    pub fn describe(&self) -> Value {
        json!({
            "model": self.model,
            "data": self.data,
            "epochs": self.epochs,
            "lr": self.lr,
            "augment": self.augment,
            "augment_means": augment_means(&self.augment),
            "weight_decay": self.weight_decay,
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "finetuned": self.finetuned.as_ref().map(|f| json!({
                "data": f.data, "steps": f.steps, "lr": f.lr, "image": f.image,
            })),
        })
    }
}

impl Finetuned {
    fn parse(text: &str) -> Option<Self> {
        let &[data, steps, lr, image] = text.split('-').collect::<Vec<_>>().as_slice() else { return None };
        // Thousands, rounded down: there are runs of 500 and of 2,500 steps.
        let steps = match steps.strip_prefix("steps_")?.strip_suffix('k')? {
            "0" => 500,
            "2" => 2500,
            thousands => thousands.parse::<u32>().ok()?.checked_mul(1000)?,
        };
        let (lr, image) = (lr.strip_prefix("lr_")?.parse().ok()?, image.strip_prefix("res_")?.parse().ok()?);
        Some(Self { data: data.to_string(), steps, lr, image })
    }
}

/// `R26_S_32` → `R26+S/32`.
fn model_name(text: &str) -> Option<String> {
    let (rest, patch) = text.rsplit_once('_')?;
    patch.parse::<u32>().ok()?;
    Some(format!("{}/{patch}", rest.replace('_', "+")))
}

/// Operations and magnitude of RandAugment, probability parameter of mixup.
fn augment_means(level: &str) -> Option<&'static str> {
    Some(match level {
        "none" => "crop and flip only",
        "light0" => "RandAugment 2 operations of magnitude 0, no mixup",
        "light1" => "RandAugment 2 operations of magnitude 10, mixup 0.2",
        "medium1" => "RandAugment 2 operations of magnitude 15, mixup 0.2",
        "medium2" => "RandAugment 2 operations of magnitude 15, mixup 0.5",
        "strong1" => "RandAugment 2 operations of magnitude 20, mixup 0.5",
        "strong2" => "RandAugment 2 operations of magnitude 20, mixup 0.8",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_published_files_parse() {
        let name = Name::parse(
            "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
        );
        let name = name.unwrap();
        assert_eq!((name.model.as_str(), name.data.as_str(), name.epochs), ("R26+S/32", "i21k", 300));
        assert_eq!((name.augment.as_str(), name.weight_decay, name.dropout), ("light1", 0.1, 0.0));
        let finetuned = name.finetuned.unwrap();
        assert_eq!(
            (finetuned.data.as_str(), finetuned.steps, finetuned.image),
            ("imagenet2012", 20_000, 384)
        );
        for (text, steps) in [("0k", 500), ("2k", 2500), ("10k", 10_000)] {
            let stem = format!(
                "Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.1-sd_0.1--cifar100-steps_{text}-lr_0.01-res_224"
            );
            assert_eq!(Name::parse(&stem).unwrap().finetuned.unwrap().steps, steps);
        }
        for other in
            ["model", "B_16-i21k-300ep", "B_16-i21k-300ep-lr_x-aug_none-wd_0.03-do_0.1-sd_0.1", "ViT-B_16"]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_index_gives_the_best_checkpoint_of_a_model_on_imagenet_21k() {
        let index = "name,ds,epochs,final_val,filename,adapt_filename\n\
                     B/16,i21k,300,0.47,B_16-i21k-a,x\n\
                     B/16,i21k,300,0.49,B_16-i21k-b,x\n\
                     B/16,i21k,300,0.49,B_16-i21k-c,x\n\
                     B/16,i1k,300,0.80,B_16-i1k-d,x\n\
                     B/16,i21k_30,30,0.60,B_16-i21k_30-e,x\n\
                     L/16,i21k,300,0.50,L_16-i21k-f,x\n\
                     B/16,i21k,300,nan?,B_16-i21k-g,x\n";
        assert_eq!(best_of(index, "B/16").unwrap(), "B_16-i21k-c");
        assert_eq!(best_of(index, "L_16").unwrap(), "L_16-i21k-f");
        assert!(best_of(index, "S/16").unwrap_err().message().contains("`S/16`"));
        assert!(best_of("a,b\n", "S/16").unwrap_err().message().contains("no column `ds`"));
    }

    #[test]
    fn short_names_find_their_file_or_say_how_to_get_it() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().display();
        let file = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0";
        let error = resolve(Path::new(&format!("{place}/augreg:B/16"))).unwrap_err();
        assert!(error.message().contains(file), "{error}");
        let url = format!("'{BUCKET}/{file}.npz'");
        assert!(error.hint_text().unwrap().contains(&url), "{error}");
        std::fs::write(dir.path().join(format!("{file}.npz")), b"PK").unwrap();
        let found = resolve(Path::new(&format!("{place}/augreg:B/16"))).unwrap();
        assert_eq!(found, dir.path().join(format!("{file}.npz")));
        std::fs::write(dir.path().join("index.csv"), "ds,final_val,filename\ni21k,0.5,B_16-i21k-best\n")
            .unwrap();
        let error = resolve(Path::new(&format!("{place}/augreg:B/16"))).unwrap_err();
        assert!(error.message().contains("B_16-i21k-best.npz"), "{error}");
        let error = resolve(Path::new(&format!("{place}/augreg:{file}x.npz"))).unwrap_err();
        assert!(error.message().contains(&format!("{file}x.npz")), "{error}");
        assert_eq!(resolve(Path::new("howto-i21k-X/16")).unwrap_err().exit_code(), 2);
        assert!(resolve(Path::new("howto-i21k-S/16")).unwrap_err().message().contains("aug_light1-wd_0.03"));
    }
}
