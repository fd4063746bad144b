//! Text in a page.

use crate::report::format;
use crate::terminal::one_line;

/// Text as HTML: names from files cannot become tags, attributes or scripts, nor turn the direction of writing.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in one_line(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A table with a caption. Cells are text, not HTML. Numbers stand to the right in one line, words to the left.
pub(super) fn table(caption: &str, names: &[&str], rows: &[Vec<String>]) -> String {
    let is_number =
        |text: &str| text.is_empty() || text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let is_word = |column: usize| rows.iter().any(|row| row.get(column).is_some_and(|text| !is_number(text)));
    let class = |column: usize| if is_word(column) { " class=\"word\"" } else { " class=\"n\"" };
    let head =
        |(column, name): (usize, &&str)| format!("<th scope=\"col\"{}>{}</th>", class(column), escape(name));
    let heads: String = names.iter().enumerate().map(head).collect();
    let row = |cells: &Vec<String>| {
        let cell = |(i, text): (usize, &String)| match i {
            0 => format!("<th scope=\"row\">{}</th>", escape(text)),
            _ => format!("<td{}>{}</td>", class(i), escape(text)),
        };
        format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
    };
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"{0}\"><table><caption>{0}</caption>\
         <thead><tr>{heads}</tr></thead><tbody>\n{1}</tbody></table></div>\n",
        escape(caption),
        rows.iter().map(row).collect::<String>()
    )
}

/// Something that opens on request.
pub(super) fn fold(summary: &str, inside: &str) -> String {
    format!("<details><summary>{}</summary>{inside}</details>\n", escape(summary))
}

/// Three to four significant digits.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".into(),
        0.0 => "0".into(),
        v if !(1e-3..1e6).contains(&v) => format!("{value:.2e}"),
        v if v >= 1000.0 => {
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}{}", format::thousands(v.round() as u64))
        }
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_text() {
        assert_eq!(
            escape("<img src=x onerror='a'>&\"\n\u{202e}"),
            "&lt;img src=x onerror=&#39;a&#39;&gt;&amp;&quot;\\n\\u{202e}"
        );
        let table = table("a<b", &["<i>"], &[vec!["<b>".into(), "\u{1b}".into()]]);
        assert!(!table.contains("<i>") && !table.contains("<b>") && table.contains("\\u{1b}"), "{table}");
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.5, 12.345, 123.45, -12_345.6, 1.5e-4, f64::NAN].map(number);
        assert_eq!(shown, ["0", "0.5000", "12.35", "123.5", "-12,346", "1.50e-4", "-"]);
    }
}
