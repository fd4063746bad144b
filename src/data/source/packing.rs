//! Names packings that other programs read and Vitrum does not, and says what to do.

use std::path::Path;

use crate::error::{Error, Result};

const UNPACK: &str = "unpack it, and name the folder or the .tar files";

/// Endings of names, what such a file is, and the way out.
const PACKINGS: &[(&[&str], &str, &str)] = &[
    (
        &[".tar.gz", ".tgz", ".gz"],
        "compressed by gzip",
        "`gzip -d` gives the plain .tar, which is read as it is",
    ),
    (
        &[".tar.bz2", ".tbz2", ".bz2"],
        "compressed by bzip2",
        "`bzip2 -d` gives the plain .tar, which is read as it is",
    ),
    (&[".tar.xz", ".txz", ".xz"], "compressed by xz", "`xz -d` gives the plain .tar, which is read as it is"),
    (
        &[".tar.zst", ".zst"],
        "compressed by Zstandard",
        "`zstd -d` gives the plain .tar, which is read as it is",
    ),
    (&[".zip"], "a ZIP archive", UNPACK),
    (&[".7z", ".rar"], "a packed archive", UNPACK),
    (
        &[".tfrecord"],
        "a file of TensorFlow records",
        "write its pictures into class folders, or .tar shards as WebDataset has them",
    ),
    (
        &[".beton"],
        "a file of FFCV",
        "name the pictures that it was made from: `vitrum pack` makes as fast a form of them",
    ),
    (&["data.mdb", ".lmdb"], "an LMDB database", "write its pictures into class folders"),
    #[cfg(not(feature = "parquet"))]
    (
        &[".parquet"],
        "a Parquet file, without the feature `parquet`,",
        "build with `cargo build --release --features parquet`",
    ),
    (&[".h5", ".hdf5"], "an HDF5 file", "write its pictures into class folders"),
];

/// An error that names the packing, if the file's name has such an ending.
pub(super) fn refuse(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    // TensorFlow puts the shard number after the ending: `train.tfrecord-00000-of-00010`.
    let is = |end: &&&str| name.ends_with(**end) || (**end == ".tfrecord" && name.contains(".tfrecord-"));
    match PACKINGS.iter().find(|(ends, ..)| ends.iter().any(|end| is(&end))) {
        Some((_, what, way)) => Err(Error::new(format!("{}: {what} is not read", path.display())).hint(*way)),
        None => Ok(()),
    }
}
