//! Vitrum pre-trains and fine-tunes Vision Transformers as fast as the hardware allows.
//!
//! `ARCHITECTURE.md` is the map. Imports point one way: cli → (bench, check) → train → infer → (vit, optim, data,
//! weights, dist, report) → backend.
//!
//! # From Rust
//!
//! Load a weights file and classify a picture:
//!
//! ```
//! # let dir = tempfile::tempdir().unwrap();
//! # let small = ["model.width=24", "model.heads=3", "train.batch=16", "train.steps=2", "train.eval_every=2"];
//! # let recipe = vitrum::Recipe::load(Some("demo"), &small.map(String::from))?;
//! # let mut options = vitrum::RunOptions::new("demo", dir.path().join("run"));
//! # options.device = vitrum::backend::Device::Cpu;
//! # let run = vitrum::train(recipe, &options)?;
//! # let (weights, picture) = (run.out, &run.samples[0]);
//! use vitrum::LoadedModel;
//! use vitrum::backend::Device;
//!
//! let mut model = LoadedModel::load(weights, Device::Auto)?;
//! for class in model.classify(picture)?.iter().take(3) {
//!     println!("{:>5.1} %  {}", 100.0 * class.probability, class.name);
//! }
//! # Ok::<(), vitrum::Error>(())
//! ```
//!
//! Train a recipe:
//!
//! ```no_run
//! use vitrum::{Recipe, RunOptions, train};
//!
//! let recipe = Recipe::load(Some("mini/cifar10"), &["data.train=cifar-10-batches-bin".into()])?;
//! let run = train(recipe, &RunOptions::new("mini/cifar10", "runs/first"))?;
//! println!("{:?}", run.best);
//! # Ok::<(), vitrum::Error>(())
//! ```
//!
//! The library prints nothing of its own accord: [`show_messages`] turns notes, warnings and progress on.
//!
//! Do one training step by hand:
//!
//! ```
//! use vitrum::Recipe;
//! use vitrum::backend::Device;
//! use vitrum::dist::Collective;
//! use vitrum::train::{DataShape, Setup, Trainer};
//!
//! let set = ["model.variant=mu/16", "model.image=32", "model.classes=10", "train.batch=8", "train.steps=1"];
//! let recipe = Recipe::default().with(&set.map(String::from))?;
//! let setup = Setup::open(&recipe, Device::Cpu, DataShape::labels(8))?;
//! let layout = setup.parts.slot;
//! let mut trainer = Trainer::new(setup, Collective::ALONE, None)?;
//!
//! let mut batch = trainer.backend.new_slot(layout)?;
//! batch.images_u8_mut().fill(128); // [8, 32, 32, 3]
//! batch.labels_mut().fill(3);
//! let (_, report) = trainer.step(batch)?;
//! assert!(report.loss > 0.0 && report.grad_norm > 0.0);
//! # Ok::<(), vitrum::Error>(())
//! ```

// The documentation is for maintainers, too: `cargo doc --document-private-items`.
#![allow(rustdoc::private_intra_doc_links)]
// Only `terminal` prints. `println!` elsewhere would panic if stdout is closed.
#![warn(missing_docs)]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod backend;
pub mod data;
pub mod dist;
pub mod error;
pub mod infer;
pub mod optim;
pub mod recipe;
pub mod rng;
pub mod train;
pub mod vit;
pub mod weights;

// The command line and what only it uses. Public for the program, the benches and the tests.
#[doc(hidden)]
pub mod bench;
#[doc(hidden)]
pub mod check;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod files;
#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod selftest;
#[doc(hidden)]
pub mod signals;
#[doc(hidden)]
pub mod terminal;

mod seal;
mod watch;

pub use data::Dataset;
pub use error::{Error, Result};
pub use infer::LoadedModel;
pub use recipe::Recipe;
pub use terminal::show_messages;
pub use train::{RunOptions, RunSummary, train};
