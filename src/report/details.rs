//! What a run's page shows besides its curves: the last evaluation picture by picture, and pictures of what the model
//! sees and has learned. Kept in `report.json`, so that a page can be made again from the run's directory.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{At, Result};
use crate::files;

/// The contents of `report.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// Updates that were done when it was written.
    pub step: u64,
    /// Device, model, data, seed, versions: a name and a value each.
    pub facts: Vec<(String, String)>,
    /// Names of the classes, in the order of the labels.
    pub classes: Vec<String>,
    /// Validation pictures by true and predicted class. Pairs that do not occur are left out.
    pub confusion: Vec<Confused>,
    /// How often the model is right when it is this sure.
    pub calibration: Vec<Bin>,
    /// The pictures whose true class got the least probability.
    pub worst: Vec<Wrong>,
    /// Augmented training samples, as the model sees them.
    pub sheet: Option<Png>,
    /// Kernels of the patch embedding.
    pub filters: Option<Png>,
    /// For each patch, how similar the position embeddings of all patches are to its own.
    pub positions: Option<Png>,
}

/// A cell of the confusion matrix: true class, predicted class, pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confused(pub u32, pub u32, pub u64);

/// The pictures whose most probable class has a probability within one range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// How many pictures.
    pub images: u64,
    /// Sum of the probabilities.
    pub confidence: f64,
    /// How many are right.
    pub right: u64,
}

/// A picture that the model gets wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wrong {
    /// Its name in the data set.
    pub name: String,
    /// Its class.
    pub truth: u32,
    /// The probability of that class.
    pub of_truth: f64,
    /// The most probable class.
    pub predicted: u32,
    /// The probability of that.
    pub probability: f64,
    /// As the model saw it.
    pub picture: Png,
}

/// A picture for the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Png {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// The file, in base64.
    pub base64: String,
    /// The file itself, where this process made it.
    #[serde(skip)]
    pub file: Vec<u8>,
}

impl Png {
    /// From the bytes of a PNG file.
    pub fn new(width: usize, height: usize, file: Vec<u8>) -> Self {
        Self { width, height, base64: base64(&file), file }
    }
}

impl Details {
    /// Reads `report.json`; `None` if the directory has none.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let found: Self = serde_json::from_slice(&files::read(path)?).at(path.display())?;
        Ok(Some(found))
    }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let is_padding = digit > group.len();
            let value = bits >> (18 - 6 * digit) & 63;
            text.push(if is_padding { '=' } else { char::from(DIGITS[value as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }
}
