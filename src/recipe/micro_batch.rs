//! `train.micro_batch`: a number, or `"auto"`.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Samples per forward and backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatch {
    /// The largest divisor of the batch whose plan fits into the device's free memory when the run starts.
    /// The recipe in the run directory has the number.
    Auto,
    /// This number; 0: the whole batch.
    Samples(usize),
}

impl Serialize for MicroBatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MicroBatch::Auto => serializer.serialize_str("auto"),
            MicroBatch::Samples(n) => serializer.serialize_u64(*n as u64),
        }
    }
}

impl<'de> Deserialize<'de> for MicroBatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Samples;
        impl Visitor<'_> for Samples {
            type Value = MicroBatch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of samples, or \"auto\"")
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<MicroBatch, E> {
                Ok(MicroBatch::Samples(n as usize))
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<MicroBatch, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(n), &self);
                usize::try_from(n).map(MicroBatch::Samples).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<MicroBatch, E> {
                match text {
                    "auto" => Ok(MicroBatch::Auto),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(Samples)
    }
}
