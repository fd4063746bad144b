//! What a text means that is no number here: `1e3` for a whole number, `10,000`, `10k`, `0,1`, `10%`.

/// The numbers that a text may mean, as they are written here; empty if it means none. A whole number is at least 0.
pub(crate) fn meant(text: &str, whole: bool) -> Vec<String> {
    let text = text.trim();
    let scaled = |end: &[char], factor: f64| {
        let number: f64 = text.strip_suffix(end)?.trim().parse().ok()?;
        plain((number * factor * 1e9).round() / 1e9, whole)
    };
    // `1,000` and `1.000` are a thousand or one, by the country.
    let joined = joined(text);
    let number = text.parse().ok().filter(|_| !(whole && joined.is_some())).and_then(|n| plain(n, whole));
    let decimal = || text.replace(',', ".").parse().ok().and_then(|number| plain(number, whole));
    let found = [
        number,
        joined,
        decimal().filter(|_| !whole && text.matches(',').count() == 1),
        scaled(&['k', 'K'], 1e3),
        scaled(&['M'], 1e6),
        scaled(&['%'], 0.01).filter(|_| !whole),
    ];
    found.into_iter().flatten().collect()
}

fn plain(number: f64, whole: bool) -> Option<String> {
    let fits = number.is_finite() && (!whole || (number.fract() == 0.0 && (0.0..1e15).contains(&number)));
    fits.then(|| number.to_string())
}

/// A number whose thousands are separated.
fn joined(text: &str) -> Option<String> {
    ['.', ',', '\'', '’', ' ', '\u{a0}', '\u{202f}'].into_iter().find_map(|mark| {
        let groups: Vec<&str> = text.split(mark).collect();
        let are_digits = groups.iter().all(|group| group.bytes().all(|b| b.is_ascii_digit()));
        let are_threes = groups.len() > 1 && groups[1..].iter().all(|group| group.len() == 3);
        let first = are_digits && (1..4).contains(&groups[0].len()) && !groups[0].starts_with('0');
        (are_threes && first).then(|| groups.concat())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_known_in_other_spellings() {
        let whole = |text: &str| meant(text, true).join(" or ");
        for (text, number) in [
            ("1e3", "1000"),
            ("1000.0", "1000"),
            ("10,000", "10000"),
            ("1'000'000", "1000000"),
            ("1.000", "1000"),
            ("1.000.000", "1000000"),
            ("10 000", "10000"),
            ("10k", "10000"),
            ("1.5k", "1500"),
            ("2M", "2000000"),
            ("1.5", ""),
            ("-1e3", ""),
            ("1,00", ""),
            ("0,001", ""),
            ("1e300", ""),
            ("nan", ""),
            ("many", ""),
            ("", ""),
            (",", ""),
        ] {
            assert_eq!(whole(text), number, "{text}");
        }
        let real = |text: &str| meant(text, false).join(" or ");
        for (text, number) in [
            ("0,001", "0.001"),
            ("1,5", "1.5"),
            ("1,000", "1000 or 1"),
            ("10%", "0.1"),
            ("10 %", "0.1"),
            ("1e-3", "0.001"),
            ("1e", ""),
            ("3e-4x", ""),
        ] {
            assert_eq!(real(text), number, "{text}");
        }
    }
}
