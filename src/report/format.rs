//! Formats numbers for people.

/// `1,234,567`
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1.50 GiB`
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    format!("{} {}", three_digits(bytes as f64 / (1u64 << (10 * unit)) as f64), UNITS[unit as usize])
}

/// `18.0 TFLOP`; with `unit` `"FLOP/s"`, `212 GFLOP/s`.
pub fn si(value: f64, unit: &str) -> String {
    const PREFIXES: [&str; 9] = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
    if !(value.is_finite() && value >= 1.0) {
        return format!("{} {unit}", three_digits(value));
    }
    let power = ((value.log10() / 3.0) as usize).min(8);
    format!("{} {}{unit}", three_digits(value / 1000f64.powi(power as i32)), PREFIXES[power])
}

/// `42 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {:02} h", s / 86_400, s / 3600 % 24),
    }
}

/// A share as `93.4 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Images per second: `1,420 img/s`; below 10, with one decimal.
pub fn rate(per_second: f64) -> String {
    match per_second {
        r if !r.is_finite() || r < 0.0 => "- img/s".into(),
        r if r < 10.0 => format!("{r:.1} img/s"),
        r => format!("{} img/s", thousands(r.round() as u64)),
    }
}

/// Three significant digits: `1.23`, `12.3`, `123`.
fn three_digits(value: f64) -> String {
    match value.abs() {
        v if v < 9.995 => format!("{value:.2}"),
        v if v < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well_at_every_size() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1023, 1024, 1 << 30].map(bytes), ["0 bytes", "1023 bytes", "1.00 KiB", "1.00 GiB"]);
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
        assert_eq!(si(18e12, "FLOP"), "18.0 TFLOP");
        assert_eq!(si(1.3e20, "FLOP"), "130 EFLOP");
        assert_eq!(
            [0.0, 59.4, 60.0, 3600.0, 200_000.0].map(seconds),
            ["0.0 s", "59 s", "1 min 00 s", "1 h 00 min", "2 d 07 h"]
        );
        assert_eq!(seconds(f64::NAN), "unknown");
        assert_eq!([0.34, 9.96, 1420.2].map(rate), ["0.3 img/s", "10.0 img/s", "1,420 img/s"]);
    }
}
