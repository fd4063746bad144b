//! Reference outputs for this room's tests: `VITRUM_REFERENCE`, default `../shared/reference`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A file of the reference folder. If it is absent, `None`, and a line says so.
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
        Some(Self::read(&path(name)?))
    }

    pub(crate) fn read(path: &Path) -> Self {
        Self(zip::ZipArchive::new(File::open(path).unwrap()).unwrap())
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.file_names().map(|name| name.unwrap().trim_end_matches(".npy").to_owned()).collect()
    }

    /// Shape and values of an array of u8 or f32, in C order.
    pub(crate) fn get<T: bytemuck::Pod>(&mut self, name: &str) -> (Vec<usize>, Vec<T>) {
        let mut bytes = Vec::new();
        let mut file = self.0.by_name(&format!("{name}.npy")).unwrap_or_else(|_| panic!("no array {name}"));
        file.read_to_end(&mut bytes).unwrap();
        // Magic, version 1, length of the header, a Python dictionary, values.
        let end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let header = std::str::from_utf8(&bytes[10..end]).unwrap();
        let descr = if size_of::<T>() == 1 { "'|u1'" } else { "'<f4'" };
        assert!(header.contains(descr) && header.contains("'fortran_order': False"), "{name}: {header}");
        let shape = header.split_once("'shape': (").unwrap().1.split_once(')').unwrap().0;
        let shape = shape.split(',').filter_map(|n| n.trim().parse().ok()).collect();
        (shape, bytemuck::pod_collect_to_vec::<u8, T>(&bytes[end..]))
    }

    /// Height, width and pixels of a picture `[H, W, 3]`.
    pub(crate) fn picture(&mut self, name: &str) -> super::picture::Picture {
        let (shape, pixels) = self.get(name);
        super::picture::Picture { height: shape[0], width: shape[1], pixels }
    }
}

/// Name and bytes of all files below these folders of `VITRUM_TEST_DATA` that are suitable for a decoder's
/// test. None if the data is absent; a line says so.
pub(crate) fn pictures(folders: &[&str]) -> Vec<(String, Vec<u8>)> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");
    let root = std::env::var_os("VITRUM_TEST_DATA").map_or_else(|| default.into(), PathBuf::from);
    let mut dirs: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            println!("skipped: no {}", dir.display());
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()) {
            // Files that take seconds by design have tests of their own.
            let slow = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("bomb"));
            if path.is_dir() {
                dirs.push(path);
            } else if !slow && path.extension().is_some_and(|e| e != "py") {
                found.push((path.display().to_string(), std::fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Random numbers for tests.
pub(crate) fn seeded(seed: u64) -> crate::rng::Stream {
    crate::rng::Stream::new(seed, crate::rng::Domain::Demo, u64::MAX, 0)
}
