//! From pictures on disk to batches in slots.
//!
//! A data set is packed once ([`pack`]) into a folder of memory-mapped safetensors shards ([`shard`],
//! [`dataset`]). Image folders, tar archives, CIFAR binaries and manifests ([`source`]) train unpacked as
//! well, and [`demo`] draws a data set of its own. [`order`] says which record a sample is. The [`loader`]
//! decodes ([`decode`], [`jpeg`]) and augments ([`augment`]) with a few workers, and writes the finished
//! pixels once, directly into the batch slots that the device reads. [`sheet`] shows them to people.

pub mod augment;
pub mod classes;
pub mod dataset;
pub mod decode;
// Hidden modules serve this room, the command line and the benches.
#[doc(hidden)]
pub mod demo;
mod describe;
mod header;
pub mod imagenet;
#[doc(hidden)]
pub mod jpeg;
pub mod loader;
#[doc(hidden)]
pub mod order;
pub mod pack;
pub mod picture;
#[doc(hidden)]
pub mod pictures;
mod place;
pub mod shard;
#[doc(hidden)]
pub mod sheet;
pub mod source;
mod split;
mod tags;
mod tiff;
mod turn;

pub use dataset::integrity::Digest;
pub use dataset::{Dataset, Split, measured, pair};
pub use describe::describe;
pub use loader::{Delivery, Loader, LoaderSpec, Mode, pixels};
pub use pack::encode_png;
pub use place::notes;
pub(crate) use place::say;

use std::path::Path;

use crate::error::Result;
use crate::files;
use crate::recipe::EvalResize;
use shard::Record;

/// Reads one picture file and prepares it as an evaluation does: `[H, W, 3]` for an `image` of (H, W).
/// `exif`: whether to turn it by its EXIF orientation.
pub fn read_image(path: &Path, image: (usize, usize), how: (EvalResize, f32), exif: bool) -> Result<Vec<u8>> {
    let record = Record::Encoded(files::read(path)?.into());
    prepare(&record, image, how, exif).map_err(|e| e.at(path.display()))
}

/// The same for a record of a data set.
pub fn prepare(
    record: &Record,
    image: (usize, usize),
    (resize, crop_ratio): (EvalResize, f32),
    exif: bool,
) -> Result<Vec<u8>> {
    let mut decoder = decode::Decoder::upright(exif);
    let picture = pixels(record, &mut decoder, picture::Wanted::whole)?.view;
    let mut out = vec![0; image.0 * image.1 * 3];
    let target = augment::Target::U8(&mut out);
    augment::evaluate(resize, crop_ratio, picture, image, &mut augment::Buffers::default(), target);
    Ok(out)
}

#[cfg(test)]
mod reference;
