//! The numbers of flags: what a flag accepts, and the answer to another value.

use std::error::Error as _;
use std::ops::RangeInclusive;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::Error;
use crate::recipe;

/// The message of a parser, with a line for each value that may have been meant.
fn with_typed(expected: String, typed: impl Iterator<Item = String>) -> String {
    typed.fold(expected, |text, typed| text + "\n" + &typed)
}

/// The parser of a flag whose value is a whole number in this range.
pub(super) fn whole<T: TryFrom<u64>>(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let read = |text: &str| text.trim().parse().ok().filter(|number| range.contains(number));
        read(text).and_then(|number| T::try_from(number).ok()).ok_or_else(|| {
            let expected = match *range.end() {
                u64::MAX => format!("expected a whole number from {} up", range.start()),
                most => format!("expected a whole number from {} to {most}", range.start()),
            };
            with_typed(expected, recipe::meant(text, true).into_iter().filter(|typed| read(typed).is_some()))
        })
    }
}

/// The parser of a flag whose value is a finite number in this range.
pub(super) fn real(range: RangeInclusive<f64>) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| {
        let read = |text: &str| {
            text.trim().parse().ok().filter(|number: &f64| number.is_finite() && range.contains(number))
        };
        read(text).ok_or_else(|| {
            let expected = match *range.end() {
                f64::MAX => format!("expected a number from {} up", range.start()),
                most => format!("expected a number from {} to {most}", range.start()),
            };
            with_typed(expected, recipe::meant(text, false).into_iter().filter(|typed| read(typed).is_some()))
        })
    }
}

/// The error for a value that its flag does not take. `None` if something else is wrong with the command line.
pub(super) fn wrong_value(error: &clap::Error) -> Option<Error> {
    if error.kind() != ErrorKind::ValueValidation {
        return None;
    }
    let context = |kind| match error.get(kind)? {
        ContextValue::String(text) => Some(text.as_str()),
        _ => None,
    };
    let (arg, value) = (context(ContextKind::InvalidArg)?, context(ContextKind::InvalidValue)?);
    let (flag, why) = (arg.split(' ').next()?, error.source()?.to_string());
    let mut lines = why.lines();
    let said = Error::usage(format!("`{flag} {value}`: {}", lines.next()?));
    let typed: Vec<&str> = lines.collect();
    Some(match typed.is_empty() {
        true => said,
        false => said.hint(format!("write `{flag} {}`", typed.join(&format!("` or `{flag} ")))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_the_range_are_told_the_range() {
        let batch = whole::<u16>(1..=u16::MAX.into());
        assert_eq!(batch("64"), Ok(64));
        assert_eq!(batch("1e3").unwrap_err(), "expected a whole number from 1 to 65535\n1000");
        for wrong in ["0", "-3", "65536", "1e9", "99999999999999999999", ""] {
            assert_eq!(batch(wrong).unwrap_err(), "expected a whole number from 1 to 65535", "{wrong}");
        }
        assert_eq!(whole::<u64>(1..=u64::MAX)("x").unwrap_err(), "expected a whole number from 1 up");
        let share = real(0.0..=1.0);
        assert_eq!(share("0.5"), Ok(0.5));
        for wrong in ["-0.1", "2", "nan", "inf", "half"] {
            assert_eq!(share(wrong).unwrap_err(), "expected a number from 0 to 1", "{wrong}");
        }
        assert_eq!(real(0.0..=f64::MAX)("-1").unwrap_err(), "expected a number from 0 up");
    }
}
