//! Lengths of time in a run: steps, epochs, examples or percent.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `500` or `"500 steps"`, `"5 epochs"`, `"100000 examples"`, `"10%"`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Duration {
    /// Updates.
    Steps(u64),
    /// Passes over the training data.
    Epochs(f64),
    /// Samples, counted over all batches.
    Examples(u64),
    /// Percent of the run.
    Percent(f64),
}

impl Duration {
    /// In updates of `batch` samples, for a run of `total` updates with `samples` pictures per epoch. At
    /// least 1, unless the duration itself is 0.
    pub fn to_steps(self, total: u64, batch: usize, samples: usize) -> u64 {
        let steps = match self {
            Self::Steps(steps) => return steps,
            Self::Epochs(epochs) => epochs * samples as f64 / batch as f64,
            Self::Examples(examples) => examples as f64 / batch as f64,
            Self::Percent(percent) => percent / 100.0 * total as f64,
        };
        if steps == 0.0 { 0 } else { (steps.round() as u64).max(1) }
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => write!(f, "{steps} steps"),
            Self::Epochs(epochs) => write!(f, "{epochs} epochs"),
            Self::Examples(examples) => write!(f, "{examples} examples"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl std::str::FromStr for Duration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a duration");
        let split = text.find(|c: char| c.is_alphabetic() || c == '%').unwrap_or(text.len());
        let (number, unit) = (text[..split].trim().replace('_', ""), text[split..].trim());
        let whole = || number.parse::<u64>().map_err(|_| wrong());
        let real = |most: f64| {
            let fits = |x: &f64| (0.0..=most).contains(x) && x.is_finite();
            number.parse::<f64>().ok().filter(fits).ok_or_else(wrong)
        };
        match unit {
            "" | "step" | "steps" => whole().map(Self::Steps),
            "epoch" | "epochs" => real(f64::MAX).map(Self::Epochs),
            "example" | "examples" => whole().map(Self::Examples),
            "%" | "percent" => real(100.0).map(Self::Percent),
            _ => Err(wrong()),
        }
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Steps(steps) => serializer.serialize_u64(*steps),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Durations;
        impl Visitor<'_> for Durations {
            type Value = Duration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration: steps as in 500, or \"5 epochs\", \"100000 examples\", \"10%\"")
            }

            fn visit_u64<E: de::Error>(self, steps: u64) -> Result<Duration, E> {
                Ok(Duration::Steps(steps))
            }

            fn visit_i64<E: de::Error>(self, steps: i64) -> Result<Duration, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(steps), &self);
                u64::try_from(steps).map(Duration::Steps).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Durations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_reads_back_as_what_it_was_written_from() {
        for (text, duration) in [
            ("500 steps", Duration::Steps(500)),
            ("2.5 epochs", Duration::Epochs(2.5)),
            ("100000 examples", Duration::Examples(100_000)),
            ("10%", Duration::Percent(10.0)),
        ] {
            assert_eq!(text.parse(), Ok(duration));
            assert_eq!(duration.to_string(), text);
        }
        assert_eq!("1_000".parse(), Ok(Duration::Steps(1000)));
        for wrong in ["", "x", "-1 epochs", "101%", "nan%", "5 weeks", "1.5 steps", "%", "1e999 epochs"] {
            assert!(wrong.parse::<Duration>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn steps_are_rounded_and_only_zero_is_zero() {
        assert_eq!(Duration::Percent(10.0).to_steps(1770, 128, 20_000), 177);
        assert_eq!(Duration::Percent(0.01).to_steps(1770, 128, 20_000), 1);
        assert_eq!(Duration::Percent(0.0).to_steps(1770, 128, 20_000), 0);
        assert_eq!(Duration::Epochs(1.0).to_steps(1770, 128, 20_000), 156);
        assert_eq!(Duration::Examples(1280).to_steps(1770, 128, 20_000), 10);
    }
}
