//! Reference outputs for this room's tests: `VITRUM_REFERENCE`, default `../shared/reference`.

use std::fs::File;
use std::path::PathBuf;

/// A file of the reference folder; `None`, and a line that says so, where it is absent.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
    let path = std::env::var_os("VITRUM_REFERENCE").map_or_else(|| default.into(), PathBuf::from).join(name);
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    Some(path)
}

pub(crate) fn json(name: &str) -> Option<serde_json::Value> {
    Some(serde_json::from_slice(&std::fs::read(path(name)?).unwrap()).unwrap())
}

/// The arrays of an `.npz` file.
pub(crate) struct Arrays(zip::ZipArchive<File>);

impl Arrays {
    pub(crate) fn open(name: &str) -> Option<Self> {
        Some(Self(zip::ZipArchive::new(File::open(path(name)?).unwrap()).unwrap()))
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.file_names().map(|name| name.unwrap().trim_end_matches(".npy").to_owned()).collect()
    }

    /// Shape and values.
    pub(crate) fn get<T: npyz::Deserialize>(&mut self, name: &str) -> (Vec<usize>, Vec<T>) {
        let file = self.0.by_name(&format!("{name}.npy")).unwrap_or_else(|_| panic!("no array {name}"));
        let array = npyz::NpyFile::new(file).unwrap();
        let shape = array.shape().iter().map(|n| *n as usize).collect();
        (shape, array.into_vec().unwrap_or_else(|e| panic!("{name}: {e}")))
    }

    /// Height, width and pixels of a picture `[H, W, 3]`.
    pub(crate) fn picture(&mut self, name: &str) -> super::picture::Picture {
        let (shape, pixels) = self.get(name);
        super::picture::Picture { height: shape[0], width: shape[1], pixels }
    }
}
