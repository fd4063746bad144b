//! From pictures on disk to batches in slots.
//!
//! A data set is packed once ([`pack`]) into a folder of memory-mapped safetensors shards ([`shard`], [`dataset`]);
//! image folders, tar archives and CIFAR binaries ([`source`]) train unpacked as well, and [`demo`] draws a data set
//! of its own. The [`loader`] decodes ([`decode`]) and augments ([`augment`]) with a few workers and writes the
//! finished pixels once, straight into the batch slots that the device reads.

pub mod augment;
pub mod dataset;
pub mod decode;
pub mod demo;
pub mod loader;
pub mod pack;
pub mod picture;
pub mod shard;
pub mod source;

pub use dataset::{Dataset, Split, pair};
pub use loader::{Loader, LoaderSpec, Mode};
